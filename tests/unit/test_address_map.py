"""Who answers at an address."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratovirt.address_map import AddressMap


class Device:
    def __init__(self, name: str = "") -> None:
        self.name = name
        self.writes: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        return offset

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))


def test_an_empty_bus_reads_as_all_ones_and_swallows_writes() -> None:
    bus = AddressMap()
    for size in (1, 2, 3, 4, 8):
        assert bus.read(0x1234, size) == (1 << 8 * size) - 1
        bus.write(0x1234, size, 1)


def test_a_device_gets_offsets_into_its_range() -> None:
    bus, device = AddressMap(), Device()
    bus.claim(0x100, 0x10, device)
    assert bus.read(0x10C, 4) == 0xC
    bus.write(0x10F, 1, 7)
    assert device.writes == [(0xF, 1, 7)]


def test_an_access_past_the_end_of_a_range_belongs_to_nobody() -> None:
    bus, device = AddressMap(), Device()
    bus.claim(0x100, 0x10, device)
    bus.claim(0x110, 0x10, device)
    assert bus.read(0x10D, 4) == 0xFFFF_FFFF
    assert bus.read(0xFF, 2) == 0xFFFF
    bus.write(0x10F, 2, 1)
    bus.write(0xFF, 1, 1)
    assert device.writes == []


@pytest.mark.parametrize(("base", "size"), [(0x100, 0x10), (0x10F, 1), (0xFF, 2), (0x0, 0x1000), (0x108, 2), (0x108, 0x100)])
def test_ranges_do_not_overlap(base: int, size: int) -> None:
    bus = AddressMap()
    bus.claim(0x100, 0x10, Device())
    with pytest.raises(ValueError, match="range"):
        bus.claim(base, size, Device())
    assert bus.read(0x100, 1) == 0


def test_a_released_range_is_free_again() -> None:
    bus = AddressMap()
    bus.claim(0x100, 0x10, Device())
    bus.release(0x100)
    assert bus.read(0x100, 1) == 0xFF
    bus.claim(0x108, 0x10, Device())
    assert bus.read(0x109, 1) == 1


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 8)), max_size=12), st.integers(0, 70),
       st.sampled_from((1, 2, 4, 8)))
def test_lookup_agrees_with_a_plain_search(wanted: list[tuple[int, int]], address: int, size: int) -> None:
    bus, kept = AddressMap(), []
    for base, length in wanted:
        device = Device()
        overlaps = any(base < other + span and other < base + length for other, span, _ in kept)
        try:
            bus.claim(base, length, device)
        except ValueError:
            assert overlaps
        else:
            assert not overlaps
            kept.append((base, length, device))
    expected = [(device, address - base) for base, length, device in kept
                if base <= address and address + size <= base + length]
    assert bus.find(address, size) == (expected[0] if expected else None)
