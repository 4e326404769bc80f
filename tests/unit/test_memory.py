"""Guest memory: the gate, the aligned accesses, and the host mapping behind it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratovirt.errors import GuestError, HostError
from stratovirt.hostmap import HUGE_PAGE_SIZE, PAGE_SIZE, HostMapping
from unit.virtio_driver import HIGH_RAM, RAM_SIZE, guest_memory

MEMORY = guest_memory(high=RAM_SIZE)
ENDS = st.sampled_from((0, RAM_SIZE, HIGH_RAM, HIGH_RAM + RAM_SIZE, 1 << 32, 1 << 63, 1 << 64))
ADDRESSES = st.one_of(st.builds(lambda end, by: max(0, end + by), ENDS, st.integers(-16, 16)), st.integers(0, 1 << 64))
LENGTHS = st.one_of(st.integers(0, 16), st.integers(0, 1 << 33))


def is_ram(address: int, length: int) -> bool:
    return any(base <= address and address + length <= base + RAM_SIZE for base in (0, HIGH_RAM))


@given(ADDRESSES, LENGTHS)
def test_a_range_is_either_wholly_ram_or_an_error(address: int, length: int) -> None:
    if is_ram(address, length):
        assert len(MEMORY.slice(address, length)) == length
    else:
        with pytest.raises(GuestError, match="not RAM"):
            MEMORY.slice(address, length)
        with pytest.raises(GuestError):
            MEMORY.read(address, length)


@given(ADDRESSES, st.sampled_from((2, 4, 8)), st.integers(0, (1 << 64) - 1))
def test_words_are_aligned_and_little_endian(address: int, size: int, value: int) -> None:
    value &= (1 << 8 * size) - 1
    load = {2: MEMORY.load_u16, 4: MEMORY.load_u32, 8: MEMORY.load_u64}[size]
    store = {2: MEMORY.store_u16, 4: MEMORY.store_u32, 8: MEMORY.store_u64}[size]
    if is_ram(address, size) and address % size == 0:
        store(address, value)
        assert load(address) == value
        assert MEMORY.read(address, size) == value.to_bytes(size, "little")
    else:
        with pytest.raises(GuestError):
            load(address)
        with pytest.raises(GuestError):
            store(address, value)


def test_negative_addresses_and_lengths_are_refused() -> None:
    for address, length in ((-1, 1), (-16, 32), (0, -1), (HIGH_RAM - 1, 1), (16, -16)):
        with pytest.raises(GuestError):
            MEMORY.slice(address, length)


def test_a_slice_is_the_memory_itself() -> None:
    memory = guest_memory()
    memory.slice(100, 4)[:] = b"here"
    assert memory.read(100, 4) == b"here"
    copy = memory.read(100, 4)
    memory.write(100, b"gone")
    assert copy == b"here"


def test_a_write_past_the_end_changes_nothing() -> None:
    memory = guest_memory()
    with pytest.raises(GuestError):
        memory.write(RAM_SIZE - 2, b"1234")
    assert memory.read(RAM_SIZE - 2, 2) == b"\0\0"


def test_memory_starts_as_zero_and_is_zero_again_after_a_discard() -> None:
    host = HostMapping(4 * PAGE_SIZE)
    assert bytes(host.view) == bytes(4 * PAGE_SIZE)
    host.view[:] = b"x" * (4 * PAGE_SIZE)
    host.discard()
    assert bytes(host.view) == bytes(4 * PAGE_SIZE)


def test_a_file_is_laid_over_memory_and_never_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"A" * PAGE_SIZE + b"B" * 100)
    host = HostMapping(8 * PAGE_SIZE)
    fd = os.open(path, os.O_RDONLY)
    host.map_file(2 * PAGE_SIZE, fd, 0, PAGE_SIZE + 100)
    os.close(fd)
    assert bytes(host.view[2 * PAGE_SIZE : 4 * PAGE_SIZE]) == (b"A" * PAGE_SIZE + b"B" * 100).ljust(2 * PAGE_SIZE, b"\0")
    host.view[2 * PAGE_SIZE] = 0
    assert path.read_bytes()[:1] == b"A"
    host.discard()
    assert host.view[2 * PAGE_SIZE] == ord("A")
    assert host.view[PAGE_SIZE] == 0


@pytest.mark.parametrize(("offset", "file_offset", "length"), [
    (1, 0, 4096), (0, 1, 4096), (-4096, 0, 4096), (0, 0, 0), (0, 0, -1), (4096, 0, 4 * 4096), (1 << 40, 0, 4096)])
def test_a_file_outside_the_mapping_is_refused(offset: int, file_offset: int, length: int) -> None:
    host = HostMapping(4 * PAGE_SIZE)
    with pytest.raises(ValueError, match="map_file"):
        host.map_file(offset, 0, file_offset, length)


@pytest.mark.parametrize("size", [1 << 62, 1 << 80])
def test_more_than_the_host_can_map_is_an_error_that_names_the_option(size: int) -> None:
    with pytest.raises(HostError, match="-m"):
        HostMapping(size)


@pytest.mark.parametrize("size", [HUGE_PAGE_SIZE, HUGE_PAGE_SIZE + PAGE_SIZE, 64 * HUGE_PAGE_SIZE])
def test_memory_begins_where_a_huge_page_may(size: int) -> None:
    hosts = [HostMapping(size) for _ in range(4)]
    for host in hosts:
        assert host.address % HUGE_PAGE_SIZE == 0 and len(host.view) == host.size == size
        host.view[0] = host.view[size - 1] = 7
    for host in hosts:
        host.discard()
        host.populate(0, PAGE_SIZE)
        assert host.view[0] == host.view[size - 1] == 0
