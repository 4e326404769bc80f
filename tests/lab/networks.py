"""What tests of the network share: a tap with the host's end of it, data that tells what is missing, servers on the host."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

from linux_guest import DEADLINE, Guest

HOST, GUEST = "10.77.0.1", "10.77.0.2"
MEBIBYTE = 1 << 20
AMOUNT = 48
PATTERN = hashlib.sha512(b"a block that no other resembles").digest() * (MEBIBYTE // 64)

# In the guest, a program of the host: busybox reads and writes 1 KiB at a time, and each piece is two switches of context in
# an emulated processor. With -N the end of the input is the end of the stream.
NETCAT = "nc.openbsd"
NC = f"{NETCAT} -N"
CONFIGURE = f"ip link set eth0 up && ip addr add {GUEST}/24 dev eth0\n"


def make_data(amount: int) -> str:
    """The guest makes so many MiB from a seed block, numbered: a block lost, doubled or moved changes the checksum."""
    return f"i=0; while [ $i -lt {amount} ]; do printf '%016d' $i; head -c {MEBIBYTE - 16} /tmp/seed; i=$((i + 1)); done"


MAKE_DATA = f"\n({make_data(AMOUNT)}) >/tmp/data\n"


def data(amount: int = AMOUNT) -> Iterator[bytes]:
    """So many MiB."""
    for number in range(amount):
        yield b"%016d" % number + PATTERN[: MEBIBYTE - 16]


def checksum(amount: int = AMOUNT) -> str:
    digest = hashlib.md5()
    for block in data(amount):
        digest.update(block)
    return digest.hexdigest()


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=DEADLINE)


def network(tap: str, *more: str, keys: str = "", netdev_keys: str = "") -> tuple[str, ...]:
    device = f"virtio-net-device,id=eth0,netdev=net0,mac=52:54:00:ab:cd:ef{keys}"
    return (*more, "-netdev", f"tap,id=net0,ifname={tap}{netdev_keys}", "-device", device)


class Server:
    """Listens on the host; `serve(connection)` runs for one connection on a thread of its own."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self._listener = socket.create_server((HOST, 0))
        self._listener.settimeout(5 * DEADLINE)  # the guest may have a lot to do before
        self.port = self._listener.getsockname()[1]
        self._serve = serve
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with self._listener, self._listener.accept()[0] as connection:
                connection.settimeout(DEADLINE)
                self._serve(connection)
        except BaseException as error:  # noqa: BLE001 - reported by finish()
            self._failure = error

    def finish(self) -> None:
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()
        if self._failure is not None:
            raise self._failure


def complaints(guest: Guest) -> list[str]:
    """What the VMM warned of."""
    return [line for line in guest.errors.splitlines() if "WARN" in line or "ERROR" in line]


def receive_all(digest: hashlib._Hash) -> Callable[[socket.socket], None]:
    def serve(connection: socket.socket) -> None:
        while piece := connection.recv(1 << 18):
            digest.update(piece)

    return serve


def send_all(connection: socket.socket, amount: int = AMOUNT) -> None:
    for block in data(amount):
        connection.sendall(block)
    connection.shutdown(socket.SHUT_WR)
    while connection.recv(1 << 16):
        pass


def open_tap(name: str, flags: int = 0) -> int:
    """A descriptor of a queue of the tap, as whoever starts a machine opens it."""
    fd = os.open("/dev/net/tun", os.O_RDWR)
    # TUNSETIFF with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR
    fcntl.ioctl(fd, 0x400454CA, struct.pack("=16sH22x", name.encode(), 0x0002 | 0x1000 | 0x4000 | flags))
    return fd


def send_seed(connection: socket.socket) -> None:
    connection.sendall(PATTERN)
    connection.shutdown(socket.SHUT_WR)
    while connection.recv(1 << 16):
        pass


class Iperf:
    """`iperf3 -s` on the host, for one test of a guest; `finish` is what it measured."""

    def __init__(self, port: int = 5201) -> None:
        self._process = subprocess.Popen(["iperf3", "-s", "-1", "-J", "-B", HOST, "-p", str(port)], stdout=subprocess.PIPE)

    def finish(self) -> dict[str, Any]:
        try:
            output = self._process.communicate(timeout=DEADLINE)[0]
        finally:
            self._process.kill()
        return dict(json.loads(output)["end"])
