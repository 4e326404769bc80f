"""virtio-blk, batches: neighbours on the disk become one transfer, and every request still has its own answer."""

from __future__ import annotations

import os
import random
import select
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stratovirt.backends import aio
from stratovirt.backends.aio_kernel import KernelEngine
from stratovirt.backends.aio_threads import ThreadEngine
from stratovirt.backends.block import BlockRequest, RawImage
from stratovirt.config.vm import DriveConfig
from stratovirt.errors import HostError
from stratovirt.virtio.block_request import MAX_MERGED, MAX_VECTORS, DiskRequest, merge
from unit.test_block_features import (
    DATA_AT,
    ENGINES,
    FLUSH,
    HEADER_AT,
    IN,
    IOERR,
    OK,
    OUT,
    SECTORS,
    STATUS_AT,
    Disk,
    usable,
)
from unit.virtio_devices import SECTOR, disk_content
from unit.virtio_driver import NEEDS_RESET, VERSION_1

pytestmark = pytest.mark.usefixtures("implementation")

KINDS = [pytest.param("off"), *ENGINES]


class SeenImage(RawImage):
    """Notes what it is asked for: kind, offset, length."""

    def __init__(self, drive: DriveConfig) -> None:
        super().__init__(drive)
        self.seen: list[tuple[int, int, int]] = []

    def perform(self, request: BlockRequest) -> None:
        self.seen.append((request.kind, request.offset // SECTOR, request.length // SECTOR))
        super().perform(request)


def seen_disk(folder: Path, engine: str = "off", **options: object) -> tuple[Disk, list[tuple[int, int, int]]]:
    disk = Disk(folder, engine, queue_size=256, kind=SeenImage, **options)  # type: ignore[arg-type]
    disk.start()
    assert isinstance(disk.image, SeenImage)
    return disk, disk.image.seen


@pytest.mark.reference
@pytest.mark.parametrize("engine", ["off", "threads"])
def test_neighbours_are_one_transfer_in_whatever_order_they_come(tmp_path: Path, engine: str) -> None:
    disk, seen = seen_disk(tmp_path, engine)
    sectors = list(range(10, 26))
    random.Random(3).shuffle(sectors)
    for number, sector in enumerate(sectors):
        disk.put(IN, sector, room=SECTOR, number=number)
    disk.put(IN, 40, room=SECTOR, number=20)
    disk.write(0x050, 0)
    returned = disk.wait(17)
    assert sorted(seen) == [(0, 10, 16), (0, 40, 1)]
    assert {written for _, written in returned} == {SECTOR + 1}
    content = disk_content(SECTORS)
    for number, sector in [*enumerate(sectors), (20, 40)]:
        assert disk.memory.read(DATA_AT + 0x1000 * number, SECTOR) == content[sector * SECTOR : (sector + 1) * SECTOR]
        assert disk.memory.read(STATUS_AT + number, 1) == b"\0"
    assert disk.block.operations[0] == 17 and disk.block.bytes[0] == 17 * SECTOR
    assert disk.line.count == 1 if engine == "off" else disk.line.count >= 1
    disk.close()


@pytest.mark.reference
def test_another_kind_in_between_keeps_its_place(tmp_path: Path) -> None:
    """Not that it must: but what a driver has asked for in an order is done in that order where that costs nothing."""
    disk, seen = seen_disk(tmp_path)
    for number, (kind, sector) in enumerate(((IN, 1), (OUT, 2), (OUT, 1), (IN, 1), (FLUSH, 0), (IN, 2), (IN, 3))):
        disk.put(kind, sector, b"w" * SECTOR if kind == OUT else b"", SECTOR if kind == IN else 0, number)
    disk.notify()
    assert seen == [(0, 1, 1), (1, 1, 2), (0, 1, 1), (2, 0, 0), (0, 2, 2)]
    assert len(disk.queues[0].collect()) == 7
    assert disk.memory.read(DATA_AT + 0x3000, SECTOR) == b"w" * SECTOR
    disk.close()


@pytest.mark.reference
def test_a_transfer_is_of_limited_size(tmp_path: Path) -> None:
    disk, seen = seen_disk(tmp_path)
    for number in range(3 * MAX_MERGED // 2):
        disk.put(IN, number, room=SECTOR, number=number)
    disk.notify()
    assert seen == [(0, 0, MAX_MERGED), (0, MAX_MERGED, MAX_MERGED // 2)]
    disk.close()
    view = memoryview(bytearray(SECTOR))
    pieces = MAX_VECTORS // 2
    requests = [DiskRequest(0, [view] * pieces, number * pieces * SECTOR, pieces * SECTOR, 0, number, view, 0,
                            None) for number in range(3)]  # type: ignore[arg-type]
    assert [len(request.views) for request in merge(requests)] == [MAX_VECTORS, pieces]


@pytest.mark.parametrize("engine", KINDS)
def test_each_of_a_merged_request_has_its_own_error(tmp_path: Path, engine: str) -> None:
    """The image is shorter than it was: what lies in it is read, what does not is an error, with one log line a failure."""
    disk = Disk(tmp_path, engine, queue_size=64)
    disk.start()
    os.truncate(disk.path, 5 * SECTOR)
    for number in range(8):
        disk.put(IN, number, room=SECTOR, number=number)
    disk.write(0x050, 0)
    returned = dict(disk.wait(8))
    content = disk_content(SECTORS)
    for number in range(8):
        good = number < 5
        assert disk.memory.read(STATUS_AT + number, 1)[0] == (OK if good else IOERR)
        assert returned[3 * number] == (SECTOR + 1 if good else 1)
        if good:
            assert disk.memory.read(DATA_AT + 0x1000 * number, SECTOR) == content[number * SECTOR : (number + 1) * SECTOR]
    assert len(disk.host_errors) == 3 and disk.block.failures[0] == 3
    assert disk.block._in_flight == [0]
    disk.close()


@pytest.mark.parametrize("engine", KINDS)
def test_a_request_that_breaks_the_device_comes_after_those_before_it(tmp_path: Path, engine: str) -> None:
    disk = Disk(tmp_path, engine, queue_size=64)
    disk.start()
    good = [disk.put(IN, number, room=SECTOR, number=number) for number in range(3)]
    bad = disk.queues[0].add([(HEADER_AT, 3, False)])
    disk.put(IN, 9, room=SECTOR, number=9)
    disk.write(0x050, 0)
    returned = disk.wait(4)
    for _ in range(3):
        disk.loop.run_once(0)
    returned += disk.queues[0].collect()
    assert disk.status & NEEDS_RESET
    assert sorted(returned) == sorted([*((head, SECTOR + 1) for head in good), (bad, 0)])
    assert disk.memory.read(STATUS_AT + 9, 1) == b"\xee"  # nothing that came later was touched
    disk.start()
    assert disk.command(IN, 5, room=SECTOR)[0] == OK
    disk.close()


@pytest.mark.parametrize("engine", KINDS)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 15), st.integers(1, 3)), min_size=1, max_size=21), st.booleans())
def test_any_batch_leaves_what_one_after_the_other_leaves(tmp_path: Path, engine: str, asked: list[tuple[bool, int, int]],
                                                          through: bool) -> None:
    """Reads and writes of a driver that, as drivers do, has no two on the way that overlap if one is a write."""
    (tmp_path / "disk.img").unlink(missing_ok=True)
    disk = Disk(tmp_path, engine, queue_size=64)
    disk.start(VERSION_1 if through else None)
    model = bytearray(disk_content(SECTORS))
    taken: set[int] = set()
    expected: list[bytes] = []
    count = 0
    for write, start, length in asked:
        sectors = set(range(4 * start, 4 * start + length)) if length < 3 else set(range(4 * start, 4 * start + 4))
        if sectors & taken:
            continue
        taken |= sectors
        low, size = SECTOR * 4 * start, SECTOR * len(sectors)
        data = bytes([count + 1]) * size
        if write:
            model[low : low + size] = data
        expected.append(b"" if write else bytes(model[low : low + size]))
        disk.put(OUT if write else IN, 4 * start, data if write else b"", 0 if write else size, count)
        count += 1
    disk.write(0x050, 0)
    returned = disk.wait(count)
    assert len({head for head, _ in returned}) == count
    for number, data in enumerate(expected):
        assert disk.memory.read(STATUS_AT + number, 1)[0] == OK
        if data:
            assert disk.memory.read(DATA_AT + 0x1000 * number, len(data)) == data
    assert disk.path.read_bytes() == bytes(model)
    disk.close()


class AtOnce(ThreadEngine):
    """Everything is finished when it has begun, and `fd` says nothing of it."""

    def __init__(self, image: RawImage) -> None:
        super().__init__(image)
        self.asked: list[BlockRequest] = []
        self.done: list[BlockRequest] = []

    def hand_over(self, request: BlockRequest) -> None:
        self.asked.append(request)

    def kick(self) -> bool:
        for request in self.asked:
            try:
                self.image.perform(request)
            except HostError as error:
                request.error = error
        self.done += self.asked
        self.asked = []
        return bool(self.done)

    def reap(self) -> list[BlockRequest]:
        finished: list[BlockRequest] = []
        while self.kick():
            finished, self.done = finished + self.done, []
        self.in_flight -= len(finished)
        return finished


def test_what_ends_while_it_is_begun_needs_no_eventfd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aio, "open_engine", AtOnce)
    disk = Disk(tmp_path, "threads", queues=2)
    disk.start()
    for number in range(6):
        disk.put(IN, number % 4, room=SECTOR, number=number, queue=number // 4)
    for index in (0, 1):
        assert disk.line.count == index and disk.queues[index].collect() == []
        disk.device.process(index)
        assert len(disk.queues[index].collect()) == (4, 2)[index]
    assert disk.line.count == 2 and disk.block._in_flight == [0, 0]
    disk.close()


@pytest.mark.parametrize("engine", ["native", "io_uring"])
def test_an_engine_of_the_kernel_says_that_something_has_ended(tmp_path: Path, engine: str) -> None:
    """Its ring is looked at: empty while nothing was asked, not so from the moment that the eventfd tells, then empty again."""
    if not usable(engine):
        pytest.skip(f"this host has no {engine}")
    disk = Disk(tmp_path, engine)
    opened = aio.open_engine(disk.image)
    assert isinstance(opened, KernelEngine) and opened.name == engine and not opened.kick()
    opened.submit(BlockRequest(0, [memoryview(bytearray(SECTOR))], 0, SECTOR))
    opened.kick()
    assert select.select([opened.fd], [], [], 30)[0]
    assert opened.kick()
    assert len(opened.reap()) == 1
    assert not opened.kick()
    opened.close()
    disk.close()
