"""The zero page, page tables, PVH start info and memory layout, decoded with offsets from the specifications."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest

from stratovirt.arch.x86_64 import boot_params, layout, pvh
from stratovirt.errors import ConfigError
from stratovirt.loader.kernel import identify_kernel
from unit.images import bzimage

MIB = 1 << 20
GIB = 1 << 30


def u32(data, offset):
    return struct.unpack_from("<I", data, offset)[0]


def u64(data, offset):
    return struct.unpack_from("<Q", data, offset)[0]


def e820_of(page) -> list[tuple[int, int, int]]:
    return [struct.unpack_from("<QQI", page, 0x2D0 + 20 * index) for index in range(page[0x1E8])]


def test_a_bzimage_gets_its_own_header_back():
    image = identify_kernel(memoryview(bzimage()), "bzImage")
    page = boot_params.zero_page(image.setup_header, layout.e820(256 * MIB), (0x700_0000, 12345), rsdp=0xE_0000)
    assert len(page) == 4096
    header = bytearray(image.setup_header)
    header[0x210 - 0x1F1] = 0xFF
    struct.pack_into("<II", header, 0x218 - 0x1F1, 0x700_0000, 12345)
    struct.pack_into("<I", header, 0x228 - 0x1F1, 0x2_0000)
    struct.pack_into("<Q", header, 0x250 - 0x1F1, 0)  # a setup_data list in the file would point nowhere
    assert page[0x1F1 : 0x1F1 + len(header)] == header
    assert u64(page, 0x70) == 0xE_0000
    assert e820_of(page) == layout.e820(256 * MIB)


def test_other_kernels_get_a_fresh_header():
    page = boot_params.zero_page(b"", layout.e820(128 * MIB), initrd_addr_max=0x37FF_FFFF)
    assert page[0x1FE:0x200] == b"\x55\xaa"
    assert page[0x202:0x206] == b"HdrS"
    assert struct.unpack_from("<H", page, 0x206)[0] >= 0x20C
    assert (page[0x210], page[0x211]) == (0xFF, 1)
    assert (u32(page, 0x218), u32(page, 0x21C), u32(page, 0x228), u32(page, 0x22C)) == (0, 0, 0x2_0000, 0x37FF_FFFF)
    assert u64(page, 0x70) == 0


def test_a_header_that_is_too_long_does_not_reach_the_next_member():
    page = boot_params.zero_page(b"\xff" * 1000, [])
    assert page[0x290:] == bytes(4096 - 0x290)


def test_too_many_memory_ranges_are_a_mistake():
    with pytest.raises(ValueError, match="128"):
        boot_params.zero_page(b"", [(0, 1, 1)] * 129)


@pytest.mark.parametrize("size", [128 * MIB, 256 * MIB, 3 * GIB - 4096, 3 * GIB, 3 * GIB + MIB, 4 * GIB, 512 * GIB])
def test_the_memory_map_covers_ram_and_nothing_else(size):
    ranges = layout.ram_ranges(size)
    assert sum(length for _, length in ranges) == size
    assert all(base + length <= 0xC000_0000 or base >= 1 << 32 for base, length in ranges)
    entries = layout.e820(size)
    assert entries == sorted(entries)
    ends = [base + length for base, length, _ in entries]
    assert all(end <= base for end, (base, _, _) in zip(ends, entries[1:], strict=False))
    ram = [(base, length) for base, length, kind in entries if kind == 1]
    assert all(any(low <= base and base + length <= low + room for low, room in ranges) for base, length in ram)
    # all but the legacy hole is handed out
    assert sum(length for _, length in ram) == size - (0x10_0000 - 0x9_FC00)
    assert (0x9_FC00, 0x400, 2) in entries
    assert (0xD_0000, 0x3_0000, 2) in entries


def test_virtio_slots():
    first, last = layout.slot(0), layout.slot(10)
    assert (first.base, first.acpi_base, first.irq) == (0xF010_0000, 0xF020_0000, 5)
    assert (last.base, last.acpi_base, last.irq) == (0xF010_1400, 0xF020_1400, 15)
    for number in (-1, 11):
        with pytest.raises(ValueError, match="slot"):
            layout.slot(number)
    assert layout.command_line_words([first, layout.slot(1)]) == (
        " virtio_mmio.device=512@0xf0100000:5 virtio_mmio.device=512@0xf0100200:6")
    assert layout.command_line_words([]) == ""


def test_nothing_in_low_memory_overlaps():
    pieces = [*boot_params.descriptor_tables(), *boot_params.page_tables(),
              (layout.IDT, bytes(8)),
              (layout.PVH_START_INFO, pvh.start_info(layout.e820(512 * GIB), (1, 1))),
              (layout.ZERO_PAGE, boot_params.zero_page(b"", [])),
              (layout.COMMAND_LINE, bytes(layout.COMMAND_LINE_END - layout.COMMAND_LINE))]
    pieces.sort(key=lambda piece: piece[0])
    for (address, data), (following, _) in pairwise(pieces):
        assert address + len(data) <= following
    assert layout.ZERO_PAGE + 4096 <= layout.BOOT_STACK <= layout.PML4
    assert layout.ACPI_TABLES + (120 << 10) <= layout.GENERATION_ID <= layout.FIRMWARE_END - 16


def test_the_page_tables_map_the_first_gib_to_itself():
    memory = bytearray(0xC000)
    for address, data in boot_params.page_tables():
        memory[address : address + len(data)] = data
    for address in (0, 0x7000, 0x10_0000, 0x20_0000, 0x3FFF_FFFF, 0x1234_5678):
        pml4e = u64(memory, 0x9000 + 8 * (address >> 39))
        pdpte = u64(memory, (pml4e & ~0xFFF) + 8 * (address >> 30 & 511))
        pde = u64(memory, (pdpte & ~0xFFF) + 8 * (address >> 21 & 511))
        assert (pml4e & 0xFFF, pdpte & 0xFFF, pde & 0xFFF) == (3, 3, 0x83)
        assert (pde & ~0x1F_FFFF) + (address & 0x1F_FFFF) == address
    assert u64(memory, 0xA008) == 0  # the second GiB is not mapped


def test_the_gdt():
    (address, data), = boot_params.descriptor_tables()
    assert address == 0x500
    assert struct.unpack("<4Q", data) == (0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)
    assert boot_params.GDT_LIMIT == 31


def test_the_command_line_is_whole_or_refused():
    assert boot_params.command_line("console=ttyS0", 2047) == b"console=ttyS0\0"
    assert len(boot_params.command_line("x" * 2047, 2047)) == 2048
    with pytest.raises(ConfigError, match="2048 bytes long") as caught:
        boot_params.command_line("x" * 2048, 2047)
    assert caught.value.option == "-append"
    with pytest.raises(ConfigError, match="this kernel reads 523263"):
        boot_params.command_line("x" * (1 << 20), 0xFFFF_FFFF)
    with pytest.raises(ConfigError, match="zero byte"):
        boot_params.command_line("a\0b", 2047)
    assert boot_params.command_line("\udcff", 2047) == b"\xff\0"


def test_pvh_start_info_with_an_initrd():
    e820 = layout.e820(4 * GIB)
    data = pvh.start_info(e820, (0x700_0000, 12345), rsdp=0xE_0000)
    magic, version, flags, modules, modlist, cmdline, rsdp, memmap, count, reserved = struct.unpack_from("<4I4Q2I", data)
    assert (magic, version, flags, modules, reserved) == (0x336E_C578, 1, 0, 1, 0)
    assert (cmdline, rsdp, count) == (0x2_0000, 0xE_0000, 5)
    assert struct.unpack_from("<4Q", data, modlist - 0x6000) == (0x700_0000, 12345, 0, 0)
    entries = [struct.unpack_from("<QQII", data, memmap - 0x6000 + 24 * index) for index in range(count)]
    assert entries == [(*entry, 0) for entry in e820]
    assert memmap - 0x6000 + 24 * count == len(data)


def test_pvh_start_info_without_an_initrd():
    data = pvh.start_info([(0, 1, 1)])
    assert struct.unpack_from("<4I4Q2I", data) == (0x336E_C578, 1, 0, 0, 0, 0x2_0000, 0, 0x6000 + 56, 1, 0)
