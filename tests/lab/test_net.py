"""Real Linux on a tap: pings and TCP both ways, a restart in place, and a tap that is taken away from a running guest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

import pytest
from guest import assets
from linux_guest import Guest
from networks import (
    AMOUNT,
    CONFIGURE,
    GUEST,
    HOST,
    MAKE_DATA,
    MEBIBYTE,
    NC,
    NETCAT,
    Server,
    checksum,
    complaints,
    network,
    open_tap,
    receive_all,
    run,
    send_all,
    send_seed,
)


@pytest.mark.parametrize(("kernel", "smp", "more", "keys"), [
    ("small-elf", 1, (), ""),
    ("small-elf", 2, ("-object", "iothread,id=io0"), ",iothread=io0"),
    ("stock-elf", 2, (), ",queue-size=1024"),
], ids=["small", "small-iothread", "stock"])
def test_ping_and_tcp_both_ways(
    boot: Callable[..., Guest], tap: str, kernel: str, smp: int, more: tuple[str, ...], keys: str
) -> None:
    from_guest = hashlib.md5()
    seed, to_host, to_guest = Server(send_seed), Server(receive_all(from_guest)), Server(send_all)
    command = f"""{CONFIGURE}
    cat /sys/class/net/eth0/address
    ping -c 3 -i 0.2 -q {HOST} >/tmp/ping && ping -c 3 -i 0.2 -q -s 1400 {HOST} >/tmp/ping; echo ping $?
    {NC} {HOST} {seed.port} </dev/null >/tmp/seed
    {MAKE_DATA}
    {NC} {HOST} {to_host.port} </tmp/data; echo sent $?
    {NC} {HOST} {to_guest.port} </dev/null | md5sum
    md5sum </tmp/data
    echo ready
    cat >/dev/null </dev/console
    """
    guest = boot(kernel, command, smp=smp, memory=384, programs=(NETCAT,), extra=network(tap, *more, keys=keys))
    guest.wait_for(b"ready\n", stream=guest.stdout, seconds=600)
    for server in (seed, to_host, to_guest):
        server.finish()
    run(str(assets.busybox()), "ping", "-c", "3", "-q", GUEST)
    run(str(assets.busybox()), "ping", "-c", "3", "-q", "-s", "1400", GUEST)
    expected = checksum()
    lines = guest.stdout.decode().splitlines()
    assert lines[:3] == ["52:54:00:ab:cd:ef", "ping 0", "sent 0"]
    assert [line.split()[0] for line in lines[3:5]] == [expected, expected]
    assert from_guest.hexdigest() == expected
    assert complaints(guest) == []


def test_the_network_works_after_a_restart_in_place(boot: Callable[..., Guest], tap: str) -> None:
    command = f"""{CONFIGURE}
    ping -c 2 -q {HOST} >/tmp/ping && echo answer-$((1 + 1)) >/dev/console
    cat >/dev/null </dev/console
    """
    guest = boot("small-elf", command, qmp=True,
                 extra=network(tap, "-object", "iothread,id=io0", keys=",iothread=io0"))
    guest.wait_for(b"answer-2")
    for times in (2, 3):
        guest.execute("system_reset")
        guest.wait_for(b"answer-2", count=times)
    guest.execute("quit")
    assert guest.wait_end() == 0


def test_an_inherited_descriptor(boot: Callable[..., Guest], tap: str) -> None:
    """As Kata and libvirt start it: the tap is opened by somebody else and passed on."""
    fd = open_tap(tap)
    try:
        os.set_inheritable(fd, True)
        guest = boot("small-elf", f"{CONFIGURE} ping -c 2 -q {HOST} >/tmp/ping; echo ping $?", descriptors=(fd,),
                     extra=("-netdev", f"tap,id=net0,fd={fd}", "-device", "virtio-net-device,id=eth0,netdev=net0"))
    finally:
        os.close(fd)
    assert guest.finish() == (0, "ping 0\n")


@pytest.mark.parametrize("vhost", ["off", "on"])
def test_a_tap_that_is_taken_away_is_a_link_that_went_down(boot: Callable[..., Guest], tap: str, vhost: str) -> None:
    command = f"""{CONFIGURE}
    ping -q {HOST} >/dev/null &
    ping -c 2 -q {HOST} >/tmp/ping && echo up $(cat /sys/class/net/eth0/carrier)
    while [ "$(cat /sys/class/net/eth0/carrier)" = 1 ]; do sleep 0.1; done
    echo down
    ping -c 2 -W 1 -q {HOST} >/tmp/ping; echo still alive
    """
    guest = boot("small-elf", command, qmp=True, extra=network(tap, netdev_keys=f",vhost={vhost}"))
    guest.wait_for(b"up 1\n", stream=guest.stdout)
    run("ip", "link", "del", tap)
    guest.wait_for(b"down\n", stream=guest.stdout)
    assert guest.execute("query-status")["running"] is True
    assert guest.finish() == (0, "up 1\ndown\nstill alive\n")
    (line,) = complaints(guest)
    assert tap in line and "the link is down" in line


def test_a_disk_and_an_interface_share_an_iothread(boot: Callable[..., Guest], tap: str, tmp_path: os.PathLike[str]) -> None:
    """Both at once: neither stops the other, and the disk holds what came over the network."""
    image = os.path.join(tmp_path, "image")
    with open(image, "wb") as file:
        file.truncate(AMOUNT * MEBIBYTE)
    to_guest = Server(send_all)
    command = f"""{CONFIGURE}
    {NC} {HOST} {to_guest.port} </dev/null | dd of=/dev/vda bs=64k iflag=fullblock oflag=direct 2>/dev/null; sync
    """
    disk = ("-object", "iothread,id=io0", "-drive", f"id=disk,file={image},direct=off",
            "-device", "virtio-blk-device,drive=disk,id=blk0,iothread=io0")
    guest = boot("small-elf", command, programs=(NETCAT,), extra=network(tap, *disk, keys=",iothread=io0"))
    assert guest.finish(600) == (0, "")
    with open(image, "rb") as file:
        assert hashlib.md5(file.read()).hexdigest() == checksum()
