"""The MP table, walked as a kernel does."""

from __future__ import annotations

import struct

import pytest

from stratovirt.arch.x86_64 import layout
from stratovirt.firmware import mptable

SIZES = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}


def walk(table: bytes) -> dict[int, list[bytes]]:
    entries: dict[int, list[bytes]] = {kind: [] for kind in SIZES}
    position = 44
    while position < len(table):
        kind = table[position]
        entries[kind].append(table[position : position + SIZES[kind]])
        position += SIZES[kind]
    assert position == len(table)
    return entries


def test_the_floating_pointer():
    data = mptable.floating_pointer(0xD_0000)
    assert len(data) == 16
    assert data[:4] == b"_MP_"
    assert struct.unpack_from("<I", data, 4)[0] == 0xD_0000
    assert data[8:10] == bytes([1, 4])
    assert data[11:] == bytes(5)  # no default configuration: there is a table
    assert sum(data) & 0xFF == 0


@pytest.mark.parametrize("apic_ids", [[0], [0, 1], [0, 1, 4, 5], list(range(0, 254, 2)), list(range(253)), list(range(254))],
                         ids=lambda apic_ids: f"{len(apic_ids)} up to {apic_ids[-1]}")
def test_the_configuration_table(apic_ids):
    table = mptable.configuration_table(apic_ids, layout.LAPIC, layout.IOAPIC)
    signature, length, revision, _, oem, product, oem_pointer, oem_size, count, lapic, extended, _, _ = struct.unpack_from(
        "<4sHBB8s12sIHHIHBB", table)
    assert (signature, length, revision) == (b"PCMP", len(table), 4)
    assert (oem.strip(), product.strip()) == (b"STRATO", b"1.0")
    assert (oem_pointer, oem_size, lapic, extended) == (0, 0, 0xFEE0_0000, 0)
    assert sum(table) & 0xFF == 0
    entries = walk(table)
    assert count == sum(map(len, entries.values()))

    cpus = [struct.unpack("<BBBBIIQ", entry) for entry in entries[0]]
    assert [cpu[1] for cpu in cpus] == apic_ids
    assert [cpu[3] for cpu in cpus] == [3] + [1] * (len(apic_ids) - 1)
    assert all(cpu[2] == 0x14 and cpu[4:6] == (0x600, 0x201) for cpu in cpus)

    assert entries[1] == [b"\x01\x00ISA   "]
    (_, ioapic_id, _, enabled, address), = [struct.unpack("<BBBBI", entry) for entry in entries[2]]
    assert ioapic_id not in apic_ids
    assert ioapic_id < 255
    assert ioapic_id == mptable.ioapic_id(apic_ids)
    assert (enabled, address) == (1, 0xFEC0_0000)

    interrupts = [struct.unpack("<BBHBBBB", entry) for entry in entries[3]]
    assert [(entry[4], entry[6]) for entry in interrupts] == [(pin, pin) for pin in range(layout.IOAPIC_PINS)]
    assert all(entry[1:4] == (0, 0, 0) and entry[5] == ioapic_id for entry in interrupts)
    local = [struct.unpack("<BBHBBBB", entry) for entry in entries[4]]
    assert [(entry[1], entry[5], entry[6]) for entry in local] == [(3, 0, 0), (1, 0xFF, 1)]


def test_the_largest_table_fits_where_it_goes():
    table = mptable.configuration_table(list(range(254)), layout.LAPIC, layout.IOAPIC)
    assert len(table) <= layout.ACPI_TABLES - layout.MP_TABLE
    assert layout.MP_FLOATING_POINTER % 16 == 0


@pytest.mark.parametrize("count", [0, 255])
def test_more_or_fewer_processors_are_a_mistake(count):
    with pytest.raises(ValueError, match="processors"):
        mptable.configuration_table(list(range(count)), layout.LAPIC, layout.IOAPIC)
