"""virtio-blk: what a driver sees of a disk, and what it cannot do to it."""

from __future__ import annotations

import os
import resource
import struct
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unit.virtio_devices import SECTOR, BlockDriver, disk_content
from unit.virtio_driver import CONFIG, DATA, EVENT_IDX, NEEDS_RESET, VERSION_1

pytestmark = pytest.mark.usefixtures("implementation")

IN, OUT, FLUSH, GET_ID = 0, 1, 4, 8
OK, IOERR, UNSUPPORTED = 0, 1, 2
F_RO, F_FLUSH = 1 << 5, 1 << 9
SECTORS = 64

HEADER_AT, STATUS_AT, DATA_AT = DATA, DATA + 0x100, DATA + 0x1000


@pytest.fixture
def disk(tmp_path: Path):
    driver = BlockDriver(tmp_path, SECTORS)
    driver.start()
    yield driver
    driver.close()


def pieces(address: int, length: int, cuts: list[int], writable: bool) -> list[tuple[int, int, bool]]:
    """[address, address + length) as descriptors, cut at each offset of `cuts` inside it."""
    borders = [0, *sorted({cut for cut in cuts if 0 < cut < length}), length]
    return [(address + low, high - low, writable) for low, high in pairwise(borders)]


def command(driver: BlockDriver, kind: int, sector: int = 0, data: bytes = b"", room: int = 0) -> tuple[int, int, bytes]:
    """One request in one piece each: (status, used length, what came into the `room` bytes)."""
    memory = driver.memory
    memory.write(HEADER_AT, struct.pack("<IIQ", kind, 0, sector))
    memory.write(STATUS_AT, b"\xee")
    memory.write(DATA_AT, data or bytes(room))
    buffers = [(HEADER_AT, 16, False)]
    if data:
        buffers.append((DATA_AT, len(data), False))
    if room:
        buffers.append((DATA_AT, room, True))
    used = driver.request([*buffers, (STATUS_AT, 1, True)])
    return memory.read(STATUS_AT, 1)[0], used, memory.read(DATA_AT, room)


# -- data


def test_reads_and_writes_sectors(disk: BlockDriver) -> None:
    assert command(disk, IN, 3, room=1024) == (OK, 1025, disk_content(SECTORS)[3 * SECTOR : 5 * SECTOR])
    assert command(disk, OUT, 62, b"w" * 1024) == (OK, 1, b"")
    assert disk.path.read_bytes()[62 * SECTOR :] == b"w" * 1024
    assert command(disk, IN, 62, room=512)[2] == b"w" * 512
    assert disk.host_errors == []


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header_cuts=st.lists(st.integers(1, 15), max_size=4), data_cuts=st.lists(st.integers(1, 1023), max_size=8),
       indirect=st.booleans(), write=st.booleans(), joined=st.booleans())
def test_any_split_of_a_request_gives_the_same_result(disk: BlockDriver, header_cuts: list[int], data_cuts: list[int],
                                                      indirect: bool, write: bool, joined: bool) -> None:
    memory = disk.memory
    expected = os.urandom(1024)
    memory.write(HEADER_AT, struct.pack("<IIQ", OUT if write else IN, 0, 8))
    header = pieces(HEADER_AT, 16, header_cuts, False)
    if write:
        memory.write(DATA_AT, expected)
        if joined:  # header and data in one run of memory, whose pieces may hold some of both
            memory.write(HEADER_AT + 16, expected)
            buffers = pieces(HEADER_AT, 16 + 1024, [*header_cuts, *(16 + cut for cut in data_cuts)], False)
            status_at = DATA_AT
        else:
            buffers = header + pieces(DATA_AT, 1024, data_cuts, False)
            status_at = STATUS_AT
        buffers.append((status_at, 1, True))
    else:
        with open(disk.path, "r+b") as file:
            file.seek(8 * SECTOR)
            file.write(expected)
        if joined:  # data and status likewise
            buffers, status_at = header + pieces(DATA_AT, 1025, data_cuts, True), DATA_AT + 1024
        else:
            buffers, status_at = header + pieces(DATA_AT, 1024, data_cuts, True) + [(STATUS_AT, 1, True)], STATUS_AT
    memory.write(status_at, b"\xee")
    used = disk.request(buffers, indirect_at=DATA + 0x8000 if indirect else 0)
    assert memory.read(status_at, 1) == b"\0"
    assert used == (1 if write else 1025)
    if write:
        assert disk.path.read_bytes()[8 * SECTOR : 10 * SECTOR] == expected
    else:
        assert memory.read(DATA_AT, 1024) == expected


@pytest.mark.parametrize("direct", [False, None])
@pytest.mark.parametrize("offset", [0, 1, 7, 256, 4095])
def test_buffers_need_no_alignment(tmp_path: Path, direct: bool | None, offset: int) -> None:
    """O_DIRECT wants aligned buffers; guests need not give them."""
    driver = BlockDriver(tmp_path, SECTORS, direct=direct)
    driver.start()
    memory = driver.memory
    for kind in (IN, OUT, IN):
        memory.write(HEADER_AT, struct.pack("<IIQ", kind, 0, 1))
        if kind == OUT:
            memory.write(DATA_AT + offset, b"z" * 1024)
        data = pieces(DATA_AT + offset, 1024, [100], kind == IN)
        driver.request([(HEADER_AT, 16, False), *data, (STATUS_AT, 1, True)])
        assert memory.read(STATUS_AT, 1)[0] == OK
    assert memory.read(DATA_AT + offset, 1024) == b"z" * 1024
    assert command(driver, FLUSH)[0] == OK
    assert driver.path.read_bytes()[SECTOR : 3 * SECTOR] == b"z" * 1024
    driver.close()


# -- limits


@pytest.mark.parametrize("sector", [SECTORS, SECTORS - 1, SECTORS + 1, 1 << 54, (1 << 55) - 1, 1 << 55, 1 << 63, (1 << 64) - 1,
                                    (1 << 64) - 2])
def test_sectors_outside_the_disk_are_refused(disk: BlockDriver, sector: int) -> None:
    before = disk.path.read_bytes()
    for kind in (IN, OUT):
        status, used, _ = command(disk, kind, sector, b"x" * 1024 if kind == OUT else b"", 1024 if kind == IN else 0)
        assert (status, used) == (IOERR, 1)
    assert disk.path.read_bytes() == before
    assert not disk.status & NEEDS_RESET
    assert command(disk, IN, SECTORS - 1, room=512)[0] == OK


@pytest.mark.parametrize("length", [1, 511, 513])
def test_parts_of_sectors_are_refused(disk: BlockDriver, length: int) -> None:
    assert command(disk, IN, 0, room=length)[:2] == (IOERR, 1)
    assert command(disk, OUT, 0, b"x" * length)[:2] == (IOERR, 1)


def test_nothing_to_transfer_is_a_success(disk: BlockDriver) -> None:
    assert command(disk, IN)[:2] == (OK, 1)
    assert command(disk, OUT)[:2] == (OK, 1)
    assert command(disk, IN, (1 << 64) - 1)[:2] == (IOERR, 1)


@pytest.mark.parametrize(("readable", "writable"), [(16, 0), (15, 1), (0, 1), (0, 600)])
def test_a_request_without_header_or_status_breaks_the_device(disk: BlockDriver, readable: int, writable: int) -> None:
    buffers = [(HEADER_AT, readable, False)] if readable else []
    if writable:
        buffers.append((STATUS_AT, writable, True))
    assert disk.request(buffers) == 0
    assert disk.status & NEEDS_RESET
    disk.start()
    assert command(disk, IN, 0, room=512)[0] == OK


# -- other commands


def test_get_id_gives_the_serial_number_as_far_as_there_is_room(disk: BlockDriver) -> None:
    assert command(disk, GET_ID, room=20) == (OK, 21, b"disk-1".ljust(20, b"\0"))
    assert command(disk, GET_ID, room=32) == (OK, 21, b"disk-1".ljust(32, b"\0"))
    assert command(disk, GET_ID, room=4) == (OK, 5, b"disk")
    assert command(disk, GET_ID)[:2] == (OK, 1)


@pytest.mark.parametrize("kind", [2, 3, 5, 9, 11, 13, 0x8000_0000, 0xFFFF_FFFF])
def test_other_commands_are_unsupported(disk: BlockDriver, kind: int) -> None:
    assert command(disk, kind, room=512) == (UNSUPPORTED, 1, bytes(512))
    assert not disk.status & NEEDS_RESET


def test_flush_reaches_the_disk(disk: BlockDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    monkeypatch.setattr(disk.image, "flush", lambda: flushed.append(1))
    assert command(disk, FLUSH)[:2] == (OK, 1)
    assert flushed == [1]
    command(disk, OUT, 0, b"x" * 512)
    assert flushed == [1]  # the driver can flush: the disk may keep writes back


def test_writes_go_through_for_a_driver_that_cannot_flush(disk: BlockDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    monkeypatch.setattr(disk.image, "flush", lambda: flushed.append(1))
    disk.start(VERSION_1)
    command(disk, OUT, 0, b"x" * 512)
    assert flushed == [1]


def test_a_readonly_disk_says_so_and_refuses_writes(tmp_path: Path) -> None:
    driver = BlockDriver(tmp_path, SECTORS, readonly=True)
    driver.start()
    assert driver.offered() & F_RO
    before = driver.path.read_bytes()
    assert command(driver, OUT, 0, b"x" * 512)[:2] == (IOERR, 1)
    assert command(driver, FLUSH)[0] == OK
    assert command(driver, IN, 1, room=512)[2] == before[SECTOR : 2 * SECTOR]
    assert driver.path.read_bytes() == before
    driver.close()


def test_a_writable_disk_offers_flush_and_not_read_only(disk: BlockDriver) -> None:
    assert disk.offered() & F_FLUSH
    assert not disk.offered() & F_RO


def test_config_space_tells_capacity_and_block_size(tmp_path: Path) -> None:
    driver = BlockDriver(tmp_path, SECTORS, queue_size=16)
    assert driver.read(CONFIG, 8) == SECTORS
    assert driver.read(CONFIG + 4) == 0  # the upper half of the capacity, as Linux reads it
    assert driver.read(CONFIG + 12) == 14  # seg_max: header and status take two
    assert driver.read(CONFIG + 20) == 512
    assert driver.read(CONFIG + 34, 2) == 1
    driver.close()


def test_a_long_serial_number_is_cut_to_20_bytes(tmp_path: Path) -> None:
    driver = BlockDriver(tmp_path, SECTORS, serial="0123456789" * 3)
    driver.start()
    assert command(driver, GET_ID, room=20)[2] == b"01234567890123456789"
    driver.close()


# -- the host's failures


def test_an_image_that_shrinks_gives_an_io_error(disk: BlockDriver) -> None:
    os.truncate(disk.path, 10 * SECTOR + 100)
    status, used, _ = command(disk, IN, 10, room=512)
    assert (status, used) == (IOERR, 1)
    assert "ends there" in str(disk.host_errors[0])
    assert command(disk, IN, 63, room=512)[0] == IOERR
    assert command(disk, IN, 9, room=512)[0] == OK
    assert not disk.status & NEEDS_RESET


def test_a_full_host_file_system_gives_an_io_error(disk: BlockDriver) -> None:
    os.truncate(disk.path, 8 * SECTOR)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * SECTOR, hard))
    try:
        assert command(disk, OUT, 32, b"x" * 512)[:2] == (IOERR, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in str(disk.host_errors[0])
    assert command(disk, OUT, 32, b"x" * 512)[0] == OK


def test_a_failed_flush_gives_an_io_error(disk: BlockDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", refuse)
    assert command(disk, FLUSH)[:2] == (IOERR, 1)
    assert len(disk.host_errors) == 1


# -- many at once


def fill(driver: BlockDriver, count: int) -> None:
    queue = driver.queues[0]
    for number in range(count):
        driver.memory.write(HEADER_AT + 16 * number, struct.pack("<IIQ", IN, 0, number % SECTORS))
        queue.add([(HEADER_AT + 16 * number, 16, False), (DATA_AT + 512 * number, 512, True),
                   (DATA + 0x800 + number, 1, True)])


def test_a_batch_is_served_with_one_interrupt(disk: BlockDriver) -> None:
    fill(disk, 60)
    disk.notify()
    assert len(disk.queues[0].collect()) == 60
    assert disk.line.count == 1
    content = disk_content(SECTORS)
    for number in range(60):
        assert disk.memory.read(DATA_AT + 512 * number, 512) == content[512 * number : 512 * (number + 1)]


def test_event_index_holds_the_interrupt_back(disk: BlockDriver) -> None:
    queue = disk.start(VERSION_1 | EVENT_IDX)
    queue.set_used_event(4)
    fill(disk, 4)
    disk.notify()
    assert disk.line.count == 0
    queue.release_all()
    fill(disk, 1)
    disk.notify()
    assert disk.line.count == 1
    assert len(queue.collect()) == 5


def test_buffers_made_available_before_driver_ok_are_served(disk: BlockDriver) -> None:
    disk.negotiate()
    disk.queues = [disk.set_up_queue(0)]
    fill(disk, 3)
    disk.serve()
    assert disk.queues[0].collect() == []
    disk.add_status(4)
    disk.serve()
    assert len(disk.queues[0].collect()) == 3
