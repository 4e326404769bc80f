"""The network under load, by every way that frames can take: this process on its main loop and on iothreads, and vhost-net."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable

import pytest
from guest import assets
from linux_guest import DEADLINE, Guest
from networks import (
    CONFIGURE,
    GUEST,
    HOST,
    MEBIBYTE,
    NC,
    NETCAT,
    PATTERN,
    Iperf,
    Server,
    checksum,
    complaints,
    make_data,
    network,
    open_tap,
    receive_all,
    run,
    send_all,
    send_seed,
)

IOTHREADS = ("-object", "iothread,id=in0", "-object", "iothread,id=out0")
# ways: more options, keys of -netdev, keys of -device, queue pairs
WAYS = {
    "main loop": ((), "", "", 1),
    "rx and tx iothread": (IOTHREADS, "", ",rx-iothread=in0,tx-iothread=out0", 1),
    "two queues": (IOTHREADS, ",queues=2", ",mq=on,rx-iothread=in0,tx-iothread=out0", 2),
    "vhost": ((), ",vhost=on", "", 1),
    "vhost, two queues": ((), ",vhost=on,queues=2", ",mq=on,vectors=6", 2),
}
SECONDS = 3
AMOUNT = 32  # MiB
AMOUNT_THERE_AND_BACK = 8  # MiB: both directions at once are slow on the emulated host's one processor


class Copy:
    """So many MiB to the guest, which sends them back while they come: `command` is the guest's part."""

    def __init__(self, amount: int) -> None:
        self._digest = hashlib.md5()
        self._amount = amount
        self._there, self._back = Server(lambda connection: send_all(connection, amount)), Server(receive_all(self._digest))
        self.command = f"{NC} {HOST} {self._there.port} </dev/null | {NC} {HOST} {self._back.port}"

    def finish(self) -> None:
        for server in (self._there, self._back):
            server.finish()
        assert self._digest.hexdigest() == checksum(self._amount)


@pytest.mark.parametrize("way", WAYS)
def test_ping_and_iperf_both_ways(boot: Callable[..., Guest], make_tap: Callable[..., str], way: str) -> None:
    more, netdev, device, pairs = WAYS[way]
    tap = make_tap(*(["multi_queue"] if pairs > 1 else []))
    up, down = Iperf(5201), Iperf(5202)
    copy = Copy(AMOUNT_THERE_AND_BACK)
    command = f"""{CONFIGURE}
    ls /sys/class/net/eth0/queues | wc -l
    ping -c 3 -i 0.2 -q {HOST} >/tmp/ping && ping -c 3 -i 0.2 -q -s 1400 {HOST} >/tmp/ping; echo ping $?
    iperf3 -c {HOST} -p 5201 -t {SECONDS} -P {2 * pairs} >/tmp/out 2>&1; echo up $?
    iperf3 -c {HOST} -p 5202 -t {SECONDS} -P {2 * pairs} -R >/tmp/out 2>&1; echo down $?
    ping -c 3 -i 0.2 -q {HOST} >/tmp/ping; echo ping $?
    {copy.command}
    echo ready
    cat >/dev/null </dev/console
    """
    guest = boot("small-elf", command, smp=pairs, memory=384, programs=("iperf3", NETCAT),
                 extra=network(tap, *more, keys=device, netdev_keys=netdev))
    guest.wait_for(b"ready\n", stream=guest.stdout, seconds=300)
    run(str(assets.busybox()), "ping", "-c", "3", "-q", GUEST)
    assert guest.stdout.decode().splitlines()[1:5] == ["ping 0", "up 0", "down 0", "ping 0"]
    copy.finish()
    for test, word in ((up, "sum_received"), (down, "sum_sent")):
        result = test.finish()[word]
        assert result["bytes"] > MEBIBYTE
        print(f"{way}, {word}: {result['bits_per_second'] / 1e6:.0f} Mbit/s")
    assert complaints(guest) == []


@pytest.mark.long
@pytest.mark.parametrize("way", ["main loop", "vhost"])
def test_a_gibibyte_to_the_guest(boot: Callable[..., Guest], tap: str, way: str) -> None:
    server = Server(lambda connection: send_all(connection, 1024))
    guest = boot("small-elf", f"{CONFIGURE} {NC} {HOST} {server.port} </dev/null | md5sum", programs=(NETCAT,),
                 extra=network(tap, netdev_keys=WAYS[way][1]))
    assert guest.finish(900) == (0, f"{checksum(1024)}  -\n")
    server.finish()
    assert complaints(guest) == []


@pytest.mark.long
@pytest.mark.parametrize("way", ["main loop", "vhost"])
def test_a_gibibyte_from_the_guest(boot: Callable[..., Guest], tap: str, way: str) -> None:
    digest = hashlib.md5()
    seed, server = Server(send_seed), Server(receive_all(digest))
    command = f"{CONFIGURE} {NC} {HOST} {seed.port} </dev/null >/tmp/seed\n({make_data(1024)}) | {NC} {HOST} {server.port}"
    guest = boot("small-elf", command, programs=(NETCAT,), extra=network(tap, netdev_keys=WAYS[way][1]))
    assert guest.finish(900) == (0, "")
    server.finish()
    assert digest.hexdigest() == checksum(1024)
    assert complaints(guest) == []


class Stream:
    """An endless stream to whoever connects, until `stop`."""

    def __init__(self) -> None:
        self._stopping = threading.Event()
        self._server = Server(self._serve)
        self.port = self._server.port
        self.sent = 0

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(1.0)
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):  # while there is no cable
                self.sent += connection.send(PATTERN[: 1 << 16])

    def stop(self) -> None:
        self._stopping.set()
        self._server.finish()


@pytest.mark.parametrize("vhost", ["off", "on"])
def test_ten_times_out_and_in_again_under_traffic(boot: Callable[..., Guest], tap: str, vhost: str) -> None:
    """Pings from the guest, and a stream to it that goes on after every gap; the descriptors come by QMP every other time."""
    stream, copy = Stream(), Copy(AMOUNT)
    command = f"""{CONFIGURE}
    until [ "$(cat /sys/class/net/eth0/carrier)" = 1 ]; do sleep 0.1; done
    ping -q {HOST} >/dev/null &
    ping -q -s 1400 {HOST} >/dev/null &
    {NC} {HOST} {stream.port} </dev/null >/dev/null &
    ping -c 1 -q {HOST} >/tmp/ping && echo streaming
    head -n 1 </dev/console >/dev/null
    {copy.command}
    """
    guest = boot("small-elf", command, qmp=True, memory=384, programs=(NETCAT,))
    for number in range(10):
        arguments: dict[str, object] = {"ifname": tap}
        if number % 2:
            arguments = {"fd": _pass(guest, "tap-fd", open_tap(tap))}
        if vhost == "on":
            arguments["vhost"] = True
            if number % 2:
                arguments["vhostfd"] = _pass(guest, "vhost-fd", os.open("/dev/vhost-net", os.O_RDWR))
        guest.execute("netdev_add", id="net0", **arguments)
        guest.execute("device_add", id="net0", driver="virtio-net-device", netdev="net0", addr="0")
        if number == 0:
            guest.wait_for(b"streaming\n", stream=guest.stdout)
        before = stream.sent
        _until(_answers, f"an answer to a ping after plug {number}")  # the first may be lost while both ends see a link again
        _until(lambda before=before: stream.sent > before + MEBIBYTE, f"a MiB of the stream after plug {number}")
        if number < 9:
            guest.execute("device_del", id="net0")
            guest.wait_event("DEVICE_DELETED")
            guest.execute("netdev_del", id="net0")
    stream.stop()
    guest.type("go on\n")
    assert guest.finish() == (0, "streaming\n")
    copy.finish()
    assert complaints(guest) == []


def _pass(guest: Guest, name: str, fd: int) -> str:
    guest.monitor.send_fd_scm(fd)
    guest.execute("getfd", fdname=name)
    os.close(fd)
    return name


def _answers() -> bool:
    """Does the guest answer a ping within two seconds?"""
    command = [str(assets.busybox()), "ping", "-c", "1", "-W", "2", "-q", GUEST]
    return subprocess.run(command, check=False, capture_output=True, timeout=DEADLINE).returncode == 0


def _until(condition: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + DEADLINE / 2
    while not condition():
        if time.monotonic() > until:
            state = subprocess.run(["ip", "-s", "link"], capture_output=True, text=True, check=False).stdout
            raise AssertionError(f"no {what}\n{state}")
        time.sleep(0.01)
