"""virtio consoles and named ports with Linux: a shell on hvc0, and data through ports both ways, none of it lost."""

from __future__ import annotations

import hashlib
import os
import random
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from linux_guest import DEADLINE, Guest

MEBIBYTE = 1 << 20
# `port NAME` is the device of a port, `line` reads one from descriptor 3. A port reads as ended while it has no client, and
# what has arrived is lost when it is closed: so it is opened once, and waited for.
FIND = (
    'port() { for n in /sys/class/virtio-ports/*/name; do [ "$(cat $n)" != $1 ] || echo /dev/$(basename ${n%/name}); done; };'
    ' line() { until read line <&3 && [ -n "$line" ]; do sleep 0.1; done; };'
)


class Client:
    """The other end of a socket character device."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE)
        until = time.monotonic() + DEADLINE
        while True:
            try:
                self.socket.connect(str(path))
                return
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)

    def wait_for(self, text: bytes, seen: bytearray) -> None:
        while text not in seen:
            data = self.socket.recv(65536)
            assert data, bytes(seen)
            seen += data


@pytest.fixture
def connect() -> Iterator[Callable[[Path], Client]]:
    clients: list[Client] = []

    def make(path: Path) -> Client:
        clients.append(Client(path))
        return clients[-1]

    yield make
    for client in clients:
        client.socket.close()


def devices(folder: Path, *ports: str) -> tuple[str, ...]:
    """A controller and ports on sockets; a port named con… is a console. The ports stand before the controller."""
    words: list[str] = []
    for name in ports:
        words += ["-chardev", f"socket,id=c-{name},path={folder}/{name}.socket,server,nowait"]
        words += ["-device", f"{'virtconsole' if name.startswith('con') else 'virtserialport'},id={name},chardev=c-{name}"]
    return (*words, "-device", "virtio-serial-device,id=serial0")


@pytest.mark.parametrize(("kernel", "smp"), [pytest.param("stock-elf", 2, marks=pytest.mark.long), ("small-elf", 1)])
def test_a_shell_on_hvc0(
    boot: Callable[..., Guest], connect: Callable[[Path], Client], tmp_path: Path, kernel: str, smp: int
) -> None:
    guest = boot(kernel, smp=smp, words="quiet console=hvc0", extra=devices(tmp_path, "con"))
    client = connect(tmp_path / "con.socket")
    seen = bytearray()
    # A shell that is not there yet would read what comes early; it shows itself by its prompt.
    client.wait_for(b"# ", seen)
    client.socket.sendall(b"tty; echo $((6 * 7)) answer; grep -o hvc0 /proc/consoles\n")
    client.wait_for(b"42 answer", seen)
    client.wait_for(b"\nhvc0", seen)
    assert b"/dev/hvc0" in seen
    text = "0123456789" * 90
    client.socket.sendall(f"cat >/tmp/in <<EOF\n{text}\nEOF\nmd5sum </tmp/in\n".encode())
    client.wait_for(hashlib.md5(f"{text}\n".encode()).hexdigest().encode(), seen)
    client.socket.sendall(b"exit\n")
    assert guest.wait_end() == 0


@pytest.mark.parametrize(("kernel", "smp", "mebibytes"), [
    pytest.param("stock-elf", 1, 10, marks=pytest.mark.long), ("small-elf", 2, 10),
    pytest.param("small-elf", 1, 100, marks=pytest.mark.long),
])
def test_megabytes_both_ways_through_a_named_port(
    boot: Callable[..., Guest], connect: Callable[[Path], Client], tmp_path: Path, kernel: str, smp: int, mebibytes: int
) -> None:
    """Both directions at once, on two ports; a second client finds what the first one left."""
    content = random.randbytes(mebibytes * MEBIBYTE + 12345)
    guest = boot(
        kernel,
        f"{FIND} ls /sys/class/virtio-ports; exec 3<>$(port in) 4<>$(port out.1); line; (head -c {len(content)} <&3 | md5sum) &"
        f" head -c {len(content)} /dev/urandom >/tmp/out; md5sum </tmp/out; cat /tmp/out >&4; wait;"
        " echo done; line; echo got $line",
        smp=smp,
        memory=128 + 3 * mebibytes + 96,
        extra=devices(tmp_path, "in", "out.1"),
    )
    sender, receiver = connect(tmp_path / "in.socket"), connect(tmp_path / "out.1.socket")
    sending = threading.Thread(target=sender.socket.sendall, args=(b"go\n" + content,), daemon=True)
    sending.start()
    received = bytearray()
    while len(received) < len(content):
        data = receiver.socket.recv(1 << 16)
        assert data, guest.account()
        received += data
    sending.join(DEADLINE + mebibytes)
    assert not sending.is_alive()
    guest.wait_for(b"done\n", stream=guest.stdout, seconds=DEADLINE + mebibytes)
    sender.socket.close()
    connect(tmp_path / "in.socket").socket.sendall(b"a second client\n")
    status, output = guest.finish()
    assert status == 0
    lines = output.splitlines()
    assert [line.rpartition("p")[2] for line in lines[:2]] == ["1", "2"]
    assert hashlib.md5(content).hexdigest() in output
    assert hashlib.md5(received).hexdigest() in output
    assert lines[-1] == "got a second client"


@pytest.mark.long
def test_a_reader_that_sleeps_loses_nothing(
    boot: Callable[..., Guest], connect: Callable[[Path], Client], tmp_path: Path
) -> None:
    """A host that does not read holds the guest up, a guest that does not read the host; the process does not grow."""
    size = 4 * MEBIBYTE
    content = random.randbytes(size)
    guest = boot(
        "small-elf",
        f"{FIND} exec 3<>$(port p); head -c {size} /dev/urandom >/tmp/out; md5sum </tmp/out;"
        f" cat /tmp/out >&3; echo written; sleep 1; head -c {size} <&3 | md5sum",
        extra=devices(tmp_path, "p"),
    )
    client = connect(tmp_path / "p.socket")
    guest.wait_for(b"-\n", stream=guest.stdout)
    client.socket.setblocking(False)
    sent, idle_since = 0, time.monotonic()
    while time.monotonic() < idle_since + 2.0:  # until nobody takes more: the guest sleeps in its write
        try:
            sent += client.socket.send(content[sent : sent + 65536])
            idle_since = time.monotonic()
        except BlockingIOError:
            time.sleep(0.05)
    assert sent < size
    assert b"written" not in guest.stdout
    resident = [line for line in Path(f"/proc/{guest.process.pid}/status").read_text().splitlines() if "RssAnon" in line]
    received = bytearray()
    until = time.monotonic() + DEADLINE
    while (sent < size or len(received) < size) and time.monotonic() < until:
        wants = [client.socket] if sent < size else []
        readable, writable, _ = select.select([client.socket], wants, [], 5)
        if readable:
            received += client.socket.recv(1 << 16)
        if writable:
            sent += client.socket.send(content[sent : sent + 65536])
    assert (sent, len(received)) == (size, size), resident
    status, output = guest.finish()
    digests = [line.split()[0] for line in output.splitlines() if line.endswith("-")]
    assert status == 0
    assert digests == [hashlib.md5(received).hexdigest(), hashlib.md5(content).hexdigest()]


@pytest.mark.parametrize("kernel", [pytest.param("stock-elf", marks=pytest.mark.long), "small-elf"])
def test_the_guest_sees_clients_come_and_go(
    boot: Callable[..., Guest], connect: Callable[[Path], Client], tmp_path: Path, kernel: str
) -> None:
    """A port without a client reads as ended: that is how a guest sees one leave. A write waits for the next."""
    guest = boot(
        kernel,
        f"{FIND} exec 3<>$(port p); line; echo got $line; while read line <&3; do echo more; done; echo gone; echo hello >&3;"
        " line; echo got $line",
        extra=devices(tmp_path, "p"),
    )
    first = connect(tmp_path / "p.socket")
    first.socket.sendall(b"the first\n")
    guest.wait_for(b"got the first\n", stream=guest.stdout)
    first.socket.close()
    guest.wait_for(b"gone\n", stream=guest.stdout)
    second = connect(tmp_path / "p.socket")
    second.wait_for(b"hello\n", bytearray())
    second.socket.sendall(b"the second\n")
    assert guest.finish() == (0, "got the first\ngone\ngot the second\n")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["pty", "file", "redirect-to-log"])
def test_a_port_on_every_kind_of_character_device(boot: Callable[..., Guest], tmp_path: Path, kind: str) -> None:
    file = tmp_path / "output"
    chardev = f"file,id=c,path={file}" if kind == "file" else f"{kind},id=c"
    log = tmp_path / "vmm.log"
    extra = ["-chardev", chardev, "-device", "virtserialport,id=p,chardev=c", "-device", "virtio-serial-device,id=s"]
    if kind == "redirect-to-log":
        extra += ["-D", str(log)]
    guest = boot(
        "small-elf",
        f"{FIND} exec 3<>$(port p); echo from the guest >&3; {'line; echo got $line' if kind == 'pty' else 'sleep 1'}",
        qmp=True,
        extra=tuple(extra),
    )
    if kind == "pty":
        entry = next(entry for entry in guest.execute("query-chardev") if entry["label"] == "c")
        terminal = os.open(entry["filename"].removeprefix("pty:"), os.O_RDWR | os.O_NOCTTY)
        try:
            os.write(terminal, b"to the guest\n")
            assert guest.finish() == (0, "got to the guest\n")
        finally:
            os.close(terminal)
        return
    assert guest.finish()[0] == 0
    if kind == "file":
        assert file.read_bytes() == b"from the guest\n"
    else:
        assert "from the guest" in log.read_text()


def test_ports_work_again_after_a_reset(boot: Callable[..., Guest], connect: Callable[[Path], Client], tmp_path: Path) -> None:
    guest = boot(
        "small-elf",
        f"{FIND} exec 3<>$(port p); echo up >&3; line; echo got $line; sleep 1000",
        smp=2,
        qmp=True,
        extra=devices(tmp_path, "con", "p"),
    )
    client = connect(tmp_path / "p.socket")
    seen = bytearray()
    for count in range(1, 4):
        client.socket.sendall(b"turn %d\n" % count)
        guest.wait_for(b"got turn %d\n" % count, stream=guest.stdout)
        if count < 3:
            guest.execute("system_reset")
    client.wait_for(b"up\nup\nup\n", seen)
    guest.execute("quit")
    assert guest.wait_end() == 0
