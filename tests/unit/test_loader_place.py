"""Segments into RAM: what is mapped, what is copied, where the initrd goes."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stratovirt.arch.x86_64 import layout
from stratovirt.errors import ConfigError
from stratovirt.loader import image as loader
from stratovirt.loader.image import Segment, page_parts
from stratovirt.loader.initrd import place_initrd

MIB = 1 << 20
PAGE = 4096


def test_the_loader_and_the_layout_agree():
    assert loader.LOW_MEMORY == layout.HIGH_MEMORY
    assert loader.IDENTITY_MAPPED == layout.IDENTITY_MAPPED
    assert loader.INITRD_LIMIT == layout.INITRD_LIMIT


def test_whole_pages_are_mapped_and_the_rest_is_copied():
    parts = page_parts(Segment(0x1800, 20 * PAGE, 0x10_0800, 20 * PAGE))
    assert parts.mapped == (0x2000, 0x10_1000, 19 * PAGE)
    assert parts.copied == [(0x1800, 0x10_0800, 0x800), (0x15000, 0x11_4000, 0x800)]


def test_a_segment_of_whole_pages_is_all_mapped():
    parts = page_parts(Segment(PAGE, 32 * PAGE, 16 * MIB, 64 * PAGE))
    assert (parts.mapped, parts.copied) == ((PAGE, 16 * MIB, 32 * PAGE), [])


def test_what_does_not_line_up_or_is_small_is_copied():
    for segment in (Segment(0x200, 32 * PAGE, 16 * MIB, 32 * PAGE), Segment(0, 15 * PAGE, 16 * MIB, 15 * PAGE)):
        parts = page_parts(segment)
        assert parts.mapped is None
        assert parts.copied == [(segment.file_offset, segment.address, segment.file_size)]


def test_bss_alone_needs_nothing():
    parts = page_parts(Segment(0, 0, 16 * MIB, 64 * PAGE))
    assert (parts.mapped, parts.copied) == (None, [])


@settings(max_examples=500, deadline=None)
@given(st.integers(0, 5 * PAGE), st.integers(0, 40 * PAGE), st.integers(0, 5 * PAGE), st.booleans(), st.integers(0, 2 * PAGE))
def test_loading_by_parts_gives_what_copying_gives(offset, size, address, congruent, bss):
    """Done for real on bytearrays, where mapping copies whole pages with whatever the file has there."""
    if congruent:
        address = address - address % PAGE + offset % PAGE
    file = bytes(1 + (7 * index) % 255 for index in range(offset + size + PAGE))
    expected = bytearray(address + size + bss + PAGE)
    expected[address : address + size] = file[offset : offset + size]
    ram = bytearray(len(expected))
    parts = page_parts(Segment(offset, size, address, size + bss))
    if parts.mapped:
        assert not any(value % PAGE for value in parts.mapped)
    for start, target, length in [*([parts.mapped] if parts.mapped else []), *parts.copied]:
        assert length > 0
        ram[target : target + length] = file[start : start + length]
    assert ram == expected


def test_the_initrd_goes_as_high_as_it_may():
    assert place_initrd(5 * PAGE + 1, [(0, 128 * MIB)], 0x37FF_FFFF, 32 * MIB) == 128 * MIB - 6 * PAGE
    assert place_initrd(PAGE, [(0, 3072 * MIB), (1 << 32, MIB)], 0x37FF_FFFF, 32 * MIB) == 0x3800_0000 - PAGE
    assert place_initrd(PAGE, [(0, 3072 * MIB)], 0x7FFF_FFFF, 32 * MIB) == 0x8000_0000 - PAGE


@settings(deadline=None)
@given(st.integers(1, 4096 * MIB), st.integers(128, 3072), st.integers(0, 2048 * MIB),
       st.sampled_from([0x37FF_FFFF, 0x7FFF_FFFF]))
def test_the_initrd_is_inside_ram_or_refused_for_good_reason(size, mib, kernel_end, limit):
    assume(kernel_end <= mib * MIB)
    try:
        address = place_initrd(size, [(0, mib * MIB)], limit, kernel_end, "x")
    except ConfigError as error:
        assert (error.option, error.value) == ("-initrd", "x")
        assert min(limit + 1, mib * MIB) - max(kernel_end, MIB) < size + 2 * PAGE
        return
    assert address % PAGE == 0
    assert max(kernel_end, MIB) <= address
    assert address + size <= min(limit + 1, mib * MIB)
    assert address + size > min(limit + 1, mib * MIB) - PAGE


def test_an_initrd_that_does_not_fit_says_how_much_memory_it_takes():
    with pytest.raises(ConfigError, match="at least -m 232M"):
        place_initrd(200 * MIB, [(0, 128 * MIB)], 0x37FF_FFFF, 32 * MIB)
    assert place_initrd(200 * MIB, [(0, 232 * MIB)], 0x37FF_FFFF, 32 * MIB) == 32 * MIB


def test_an_initrd_that_no_memory_would_help_says_so():
    with pytest.raises(ConfigError, match="at most 864 MiB"):
        place_initrd(1000 * MIB, [(0, 3072 * MIB)], 0x37FF_FFFF, 32 * MIB)
