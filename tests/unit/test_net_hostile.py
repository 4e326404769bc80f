"""A driver that writes anything anywhere: the device stays sane, and gives back what it popped once at most."""

from __future__ import annotations

import random

import pytest

from stratovirt.virtio.net import CTRL, RX, TX
from unit import virtio_driver as vd
from unit.test_net import Interface, frame

pytestmark = pytest.mark.usefixtures("implementation")

ROUNDS = 60


def hostile_chain(rng: random.Random, size: int) -> list[tuple[int, int, int, int]]:
    """Descriptors of a chain that is well-formed more often than not."""
    pieces = rng.choice((1, 1, 2, 3, 5, 20))
    directions = sorted(rng.choice((0, vd.WRITE)) for _ in range(pieces))
    chain = []
    for number, direction in enumerate(directions):
        address = rng.choice((0x4_0000, 0x8_0000, 0xC_0000, rng.randrange(vd.RAM_SIZE)))
        length = rng.choice((1, 2, 7, 12, 14, 60, 1500, 4096, rng.randrange(1, 70_000)))
        if rng.random() < 0.02:
            address, length = rng.choice(((vd.RAM_SIZE, 1), ((1 << 64) - 4, 8), (0x4_0000, 0), (0x4_0000, 0xFFFF_FFFF)))
        more = number + 1 < pieces
        flags = direction | (vd.NEXT if more else 0) | (rng.randrange(8) if rng.random() < 0.02 else 0)
        following = number + 1 if rng.random() > 0.02 else rng.randrange(0x1_0000)
        chain.append((address, length, flags, following))
    return chain


@pytest.mark.parametrize("seed", range(12))
def test_hostile_drivers(seed: int) -> None:
    rng = random.Random(seed)
    net = Interface()
    try:
        for _ in range(ROUNDS):
            net.driver.write(vd.STATUS, 0)
            for fd in net.driver.transport.notify_fds:
                net.loop.remove(fd)
            net.start(vd.VERSION_1 | rng.getrandbits(32) & net.driver.offered())
            returned = {RX: 0, TX: 0, CTRL: 0}
            for _ in range(rng.randrange(1, 12)):
                index = rng.choice((RX, RX, TX, TX, CTRL))
                queue = net.driver.queues[index]
                chain = hostile_chain(rng, queue.size)
                base = rng.randrange(queue.size - len(chain))
                for number, (address, length, flags, following) in enumerate(chain):
                    queue.describe(base + number, address, length, flags, (base + following) & 0xFFFF)
                queue.publish(base, rng.choice((1, 1, 1, 1, 1, 1, 1, 2, 0x8000)) if rng.random() < 0.05 else 1)
                if rng.random() < 0.5:
                    net.memory.write(rng.choice((0x4_0000, 0x8_0000)), rng.randbytes(rng.choice((12, 64, 2000))))
                if rng.random() < 0.7:
                    try:
                        net.arrive(frame(rng.choice((14, 60, 1514, 9000, 40_000))))
                    except BlockingIOError:
                        net.settle()
                net.driver.write(vd.QUEUE_NOTIFY, index)
                net.settle()
                net.sent()
                returned[index] += len(queue.collect())
            if not net.driver.status & vd.NEEDS_RESET:
                for index in (RX, TX, CTRL):
                    assert returned[index] + len(net.driver.queues[index].collect()) <= net.driver.queues[index].avail_index
        # and after all that it still serves an honest driver
        net.driver.write(vd.STATUS, 0)
        for fd in net.driver.transport.notify_fds:
            net.loop.remove(fd)
        net.start()
        net.post([2000])
        net.arrive(frame())
        net.settle()
        assert net.rx.collect() == [(0, 72)]
        net.send([bytes(12) + frame()])
        assert net.sent() == [bytes(12) + frame()]
    finally:
        net.close()
