"""A network interface whose frames another process moves: DPDK's testpmd between the guest and a tap of the host."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from backends import Backend
from guest import assets
from linux_guest import Guest
from networks import (
    CONFIGURE,
    GUEST,
    HOST,
    MAKE_DATA,
    NC,
    NETCAT,
    Iperf,
    Server,
    checksum,
    make_data,
    receive_all,
    run,
    send_all,
    send_seed,
)

TESTPMD = "/usr/bin/dpdk-testpmd"
TAP = "stratodpdk"

pytestmark = pytest.mark.skipif(not os.path.exists(TESTPMD), reason="no dpdk-testpmd: Debian's dpdk-dev")


def start_testpmd(backend: Callable[..., Backend], socket: Path, pairs: int = 1, keys: str = "") -> Backend:
    """Between vhost-user and a tap, which has the host's address."""
    process = backend(
        socket, TESTPMD, "--no-huge", "-m", "256", "--no-pci", "--lcores", "(0-1)@0", "--file-prefix", socket.parent.name,
        "--vdev", f"net_vhost0,iface={socket},queues={pairs}{keys}", "--vdev", f"net_tap0,iface={TAP}", "--",
        "--forward-mode=io", "--auto-start", "--total-num-mbufs=8192", f"--rxq={pairs}", f"--txq={pairs}",
        "--stats-period=1000")
    run("ip", "addr", "replace", f"{HOST}/24", "dev", TAP)
    run("ip", "link", "set", TAP, "up")
    return process


def network(socket: Path, more: str = "", keys: str = "") -> tuple[str, ...]:
    return ("-chardev", f"socket,id=dpdk,path={socket},reconnect=1", "-netdev", f"vhost-user,id=net0,chardev=dpdk{more}",
            "-device", f"virtio-net-device,id=eth0,netdev=net0,mac=52:54:00:ab:cd:ef{keys}")


def test_ping_tcp_and_iperf_both_ways(boot: Callable[..., Guest], backend: Callable[..., Backend], place: Path) -> None:
    start_testpmd(backend, place / "socket")
    from_guest = hashlib.md5()
    seed, to_host, to_guest = Server(send_seed), Server(receive_all(from_guest)), Server(send_all)
    send, receive = Iperf(5201), Iperf(5202)
    command = f"""{CONFIGURE}
    ping -c 3 -i 0.2 -q {HOST} >/tmp/ping && ping -c 3 -i 0.2 -q -s 1400 {HOST} >/tmp/ping; echo ping $?
    {NC} {HOST} {seed.port} </dev/null >/tmp/seed
    {MAKE_DATA}
    {NC} {HOST} {to_host.port} </tmp/data; echo sent $?
    {NC} {HOST} {to_guest.port} </dev/null | md5sum
    md5sum </tmp/data
    iperf3 -c {HOST} -p 5201 -t 5 >/tmp/iperf || cat /tmp/iperf
    iperf3 -c {HOST} -p 5202 -t 5 -R >/tmp/iperf || cat /tmp/iperf
    echo ready
    cat >/dev/null </dev/console
    """
    guest = boot("small-elf", command, memory=384, shared=True, programs=("iperf3", NETCAT), extra=network(place / "socket"))
    guest.wait_for(b"ready\n", stream=guest.stdout, seconds=600)
    for server in (seed, to_host, to_guest):
        server.finish()
    for direction, iperf in (("to the host", send), ("to the guest", receive)):
        end = iperf.finish()
        rate = end["sum_received"]["bits_per_second"] or end["sum_sent"]["bits_per_second"]
        print(f"iperf3 {direction}: {rate / 1e6:.1f} Mbit/s")
        assert rate > 0
    run(str(assets.busybox()), "ping", "-c", "3", "-q", GUEST)
    expected = checksum()
    lines = guest.stdout.decode().splitlines()
    assert lines[:2] == ["ping 0", "sent 0"] and lines[4:] == ["ready"]
    assert [line.split()[0] for line in lines[2:4]] == [expected, expected]
    assert from_guest.hexdigest() == expected


@pytest.mark.long
def test_a_gibibyte_to_the_guest(boot: Callable[..., Guest], backend: Callable[..., Backend], place: Path) -> None:
    start_testpmd(backend, place / "socket")
    server = Server(lambda connection: send_all(connection, 1024))
    guest = boot("small-elf", f"{CONFIGURE} {NC} {HOST} {server.port} </dev/null | md5sum", shared=True, programs=(NETCAT,),
                 extra=network(place / "socket"))
    assert guest.finish(1800) == (0, f"{checksum(1024)}  -\n")
    server.finish()


@pytest.mark.long
def test_a_gibibyte_from_the_guest(boot: Callable[..., Guest], backend: Callable[..., Backend], place: Path) -> None:
    start_testpmd(backend, place / "socket")
    digest = hashlib.md5()
    seed, server = Server(send_seed), Server(receive_all(digest))
    command = f"{CONFIGURE} {NC} {HOST} {seed.port} </dev/null >/tmp/seed\n({make_data(1024)}) | {NC} {HOST} {server.port}"
    guest = boot("small-elf", command, shared=True, programs=(NETCAT,), extra=network(place / "socket"))
    assert guest.finish(1800) == (0, "")
    server.finish()
    assert digest.hexdigest() == checksum(1024)


def test_the_back_end_dies_and_comes_back_and_the_guest_starts_again(
    boot: Callable[..., Guest], backend: Callable[..., Backend], place: Path
) -> None:
    process = start_testpmd(backend, place / "socket", pairs=2)
    carrier = "/sys/class/net/eth0/carrier"
    command = f"""{CONFIGURE}
    ping -c 2 -q {HOST} >/tmp/ping && echo up $(cat {carrier}) >/dev/console
    ping -q {HOST} >/dev/null &
    while [ "$(cat {carrier})" = 1 ]; do sleep 0.1; done
    echo down >/dev/console
    while [ "$(cat {carrier})" = 0 ]; do sleep 0.1; done
    until ping -c 2 -W 2 -q {HOST} >/tmp/ping; do sleep 1; done
    echo again >/dev/console
    sleep 1000
    """
    guest = boot("small-elf", command, smp=2, shared=True, qmp=True, extra=network(place / "socket", ",queues=2", ",mq=on"))
    guest.wait_for(b"up 1")
    process.kill()
    process.wait()
    guest.wait_for(b"down")
    assert guest.execute("query-status")["running"]
    start_testpmd(backend, place / "socket", pairs=2)
    guest.wait_for(b"again")
    guest.execute("system_reset")
    guest.wait_for(b"up 1", count=2)
    guest.execute("quit")
    assert guest.wait_end() == 0
    assert "eth0: the back end at" in guest.errors


def test_a_network_of_another_process_comes_and_goes(
    boot: Callable[..., Guest], backend: Callable[..., Backend], place: Path
) -> None:
    """Behind an interface whose driver has been there since the boot, with segmentation, for which DPDK has a key."""
    start_testpmd(backend, place / "socket", keys=",tso=1")
    carrier = "/sys/class/net/eth0/carrier"
    command = f"""{CONFIGURE}
    for round in 0 1 2; do
        while [ "$(cat {carrier})" != 1 ]; do sleep 0.1; done
        until ping -c 2 -W 2 -q {HOST} >/tmp/ping; do sleep 1; done
        echo up
        while [ "$(cat {carrier})" != 0 ]; do sleep 0.1; done
        echo down
    done
    """
    guest = boot("small-elf", command, shared=True, qmp=True, extra=("-chardev", f"socket,id=dpdk,path={place / 'socket'}"))
    for number in range(3):
        guest.execute("netdev_add", id="net0", type="vhost-user", chardev="dpdk")
        guest.execute("device_add", id="net0", driver="virtio-net-device", netdev="net0")
        guest.wait_for(b"up\n", stream=guest.stdout, count=number + 1)
        guest.execute("device_del", id="net0")
        guest.wait_event("DEVICE_DELETED")
        guest.execute("netdev_del", id="net0")
        guest.wait_for(b"down\n", stream=guest.stdout, count=number + 1)
    assert guest.finish() == (0, "up\ndown\n" * 3)
    assert "[seccomp]" not in guest.errors
