"""The network under load, by every way that frames can take: this process on its main loop and on iothreads, and vhost-net."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from guest import assets
from linux_guest import Guest
from networks import CONFIGURE, GUEST, HOST, Iperf, complaints, network, run

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


@pytest.mark.parametrize("way", WAYS)
def test_ping_and_iperf_both_ways(boot: Callable[..., Guest], make_tap: Callable[..., str], way: str) -> None:
    more, netdev, device, pairs = WAYS[way]
    tap = make_tap(*(["multi_queue"] if pairs > 1 else []))
    up, down = Iperf(5201), Iperf(5202)
    command = f"""{CONFIGURE}
    ls /sys/class/net/eth0/queues | wc -l
    ping -c 3 -i 0.2 -q {HOST} >/tmp/ping && ping -c 3 -i 0.2 -q -s 1400 {HOST} >/tmp/ping; echo ping $?
    iperf3 -c {HOST} -p 5201 -t {SECONDS} -P {2 * pairs} >/tmp/out 2>&1; echo up $?
    iperf3 -c {HOST} -p 5202 -t {SECONDS} -P {2 * pairs} -R >/tmp/out 2>&1; echo down $?
    ping -c 3 -i 0.2 -q {HOST} >/tmp/ping; echo ping $?
    echo ready
    cat >/dev/null </dev/console
    """
    guest = boot("small-elf", command, smp=pairs, memory=384, programs=("iperf3",),
                 extra=network(tap, *more, keys=device, netdev_keys=netdev))
    guest.wait_for(b"ready\n", stream=guest.stdout)
    run(str(assets.busybox()), "ping", "-c", "3", "-q", GUEST)
    assert guest.stdout.decode().splitlines()[1:5] == ["ping 0", "up 0", "down 0", "ping 0"]
    for test, word in ((up, "sum_received"), (down, "sum_sent")):
        assert test.finish()[word]["bytes"] > 1 << 20
    assert complaints(guest) == []
