"""Virtio devices against a driver that writes anything anywhere: only GuestErrors, which end in the device's error state."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from fuzz.fuzzing import fuzz
from unit.virtio_devices import BlockDriver, NetDriver, RngDriver, disk_content
from unit.virtio_driver import (
    DATA,
    INDIRECT,
    NEEDS_RESET,
    NEXT,
    QUEUE_NOTIFY,
    RAM_SIZE,
    RINGS,
    STATUS,
    VERSION_1,
    WRITE,
    Driver,
    GuestQueue,
)

pytestmark = pytest.mark.usefixtures("implementation")

SECTORS = 64
KINDS = ("block", "block-readonly", "rng", "rng-limited", "net", "net-pairs")


@pytest.fixture(params=KINDS)
def driver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Driver]:
    made: Driver
    if request.param.startswith("block"):
        made = BlockDriver(tmp_path, SECTORS, readonly=request.param == "block-readonly", queue_size=64)
    elif request.param.startswith("rng"):
        made = RngDriver(rate=1000.0 if request.param == "rng-limited" else None)
    else:
        made = NetDriver(pairs=3 if request.param == "net-pairs" else 1)
    yield made
    made.close()


def any_address(generator: random.Random) -> int:
    return generator.choice((
        generator.randrange(RAM_SIZE), DATA + 16 * generator.randrange(256), RAM_SIZE - generator.randrange(1, 64),
        RAM_SIZE + generator.randrange(64), RINGS + generator.randrange(0x8000), generator.getrandbits(64),
        (1 << 64) - generator.randrange(1, 4096)))


def any_descriptor(generator: random.Random, count: int) -> tuple[int, int, int, int]:
    sane = generator.random() < 0.6
    address = DATA + generator.randrange(0x8_0000) if sane else any_address(generator)
    length = generator.choice((1, 16, 20, 512, 513, 1024)) if sane else generator.choice(
        (0, 1, 16, generator.randrange(4096), 0xFFFF, RAM_SIZE, 0x7FFF_FFFF, 0xFFFF_FFFF, 16 * generator.randrange(70_000)))
    flags = generator.choice((0, 0, NEXT, NEXT, WRITE, WRITE | NEXT, INDIRECT, INDIRECT | WRITE)) if generator.random() < 0.95 \
        else generator.getrandbits(16)
    following = generator.randrange(count) if generator.random() < 0.9 else generator.getrandbits(16)
    return address, length, flags, following


def fill(generator: random.Random, queue: GuestQueue) -> int:
    """A random table, random available entries; how many are made available."""
    for index in range(queue.size):
        queue.describe(index, *any_descriptor(generator, queue.size))
    for number in range(32):  # indirect tables and headers that mean something
        queue.memory.write(DATA + 16 * number, struct.pack("<QIHH", *any_descriptor(generator, 32)))
        queue.memory.write(DATA + 0x1000 + 16 * number, struct.pack(
            "<IIQ", generator.choice((0, 1, 4, 8, 11, 13, generator.getrandbits(32))), 0,
            generator.choice((generator.randrange(SECTORS + 2), generator.getrandbits(64)))))
    count = generator.randint(1, queue.size)
    for _ in range(count):
        queue.publish(generator.randrange(queue.size) if generator.random() < 0.97 else generator.getrandbits(16))
    if generator.random() < 0.05:
        queue.publish(0, move=generator.getrandbits(16))
        count = queue.size
    if generator.random() < 0.3:
        queue.set_used_event(generator.getrandbits(16))
    return count


def test_rings_with_anything_in_them(driver: Driver) -> None:
    def one(generator: random.Random) -> None:
        features = driver.offered() & generator.getrandbits(64) | VERSION_1 if generator.random() < 0.7 else None
        driver.start(features, size=generator.choice((0, 1, 2, 8, 32)))
        driver.serve()
        for number, queue in enumerate(driver.queues):
            before = queue.used_idx()
            count = fill(generator, queue)
            driver.notify(number)
            if isinstance(driver, RngDriver):
                driver.advance(1000.0)
            returned = (queue.used_idx() - before) & 0xFFFF
            # chains may lie over the used ring itself, whose index then says anything; the device's own count does not
            own = driver.device.queues[number] if driver.device.queues else None
            assert own is None or own._next_used <= count, (own._next_used, count, returned)
        if driver.status & NEEDS_RESET:
            driver.write(STATUS, 0)
            assert driver.status == 0

    fuzz(one, 700)
    if isinstance(driver, BlockDriver) and driver.image.readonly:
        assert driver.path.read_bytes() == disk_content(SECTORS)


def test_registers_in_any_order(driver: Driver) -> None:
    registers = (0x014, 0x020, 0x024, 0x030, 0x038, 0x044, 0x050, 0x064, 0x070, 0x070, 0x080, 0x084, 0x090, 0x094, 0x0A0, 0x0A4)

    def one(generator: random.Random) -> None:
        for _ in range(200):
            window = generator.choice(driver.transport.windows)
            pick = generator.random()
            if pick < 0.1:
                offset, size = generator.randrange(0x200), generator.choice((1, 2, 4, 8))
                value = window.read(offset, size)
                assert 0 <= value < 1 << 8 * size
            elif pick < 0.2:
                offset, size = generator.randrange(0x200), generator.choice((1, 2, 4, 8))
                window.write(offset, size, generator.getrandbits(8 * size))
            elif pick < 0.3:
                step = generator.choice((0, 1, 3, 0xB, 0xF))
                window.write(STATUS, 4, step)
            else:
                value = generator.choice((0, 1, 2, 3, 16, RINGS, RINGS + 0x1000, 0xFFFF_FFFF, generator.getrandbits(32)))
                window.write(generator.choice(registers), 4, value)
            if generator.random() < 0.1:
                driver.serve()
            status = driver.transport.status
            assert not status & 4 or status & 8  # DRIVER_OK never without FEATURES_OK
        driver.transport.reset()
        driver.start()
        driver.serve()
        assert driver.device.active

    fuzz(one, 200)


def test_block_requests_against_a_model(tmp_path: Path) -> None:
    """Requests that are in order but for their content, split at random, against a byte array."""
    driver = BlockDriver(tmp_path, SECTORS, queue_size=64)
    driver.start()
    model = bytearray(disk_content(SECTORS))

    def one(generator: random.Random) -> None:
        kind = generator.choice((0, 0, 1, 1, 4, 8, generator.getrandbits(32)))
        sector = generator.choice((generator.randrange(SECTORS), SECTORS - 1, SECTORS, generator.getrandbits(64)))
        length = generator.choice((512, 512, 1024, 4096, 0, 511, generator.randrange(5000)))
        memory, at = driver.memory, DATA + generator.randrange(64)
        memory.write(at, struct.pack("<IIQ", kind, generator.getrandbits(32), sector))
        data_at, data = at + 16, generator.randbytes(length)
        status_at = data_at + length
        memory.write(data_at, data)
        memory.write(status_at, b"\xee")
        split = status_at if kind == 1 else data_at  # what lies before is the driver's, the rest the device's
        more = [generator.randrange(at, status_at + 2) for _ in range(generator.randrange(6))]
        cuts = sorted({at, split, status_at + 1, *more})
        buffers = [(low, high - low, low >= split) for low, high in pairwise(cuts)]
        used = driver.request(buffers, indirect_at=0x8_0000 if generator.random() < 0.5 else 0)
        status = memory.read(status_at, 1)[0]
        fits = length % 512 == 0 and sector + length // 512 <= SECTORS
        if kind in (0, 1):
            assert status == (0 if fits else 1)
        if kind == 0 and fits:
            assert used == length + 1
            assert memory.read(data_at, length) == model[sector * 512 : sector * 512 + length]
        elif kind == 1 and fits:
            assert used == 1
            model[sector * 512 : sector * 512 + length] = data
        elif kind == 4:
            assert status == 0
        elif kind not in (0, 1, 4, 8):
            assert status in (1, 2)

    fuzz(one, 3000)
    assert driver.path.read_bytes() == model
    driver.close()


def test_notifications_of_anything(driver: Driver) -> None:
    driver.start()
    driver.serve()

    def one(generator: random.Random) -> None:
        driver.write(QUEUE_NOTIFY, generator.choice((0, 1, 2, 0xFFFF, 0xFFFF_FFFF, generator.getrandbits(32))),
                     generator.choice((1, 2, 4, 8)))
        driver.serve()

    fuzz(one, 500)
    assert not driver.status & NEEDS_RESET
