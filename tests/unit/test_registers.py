"""The registers a boot processor starts with, against the two boot protocols."""

from __future__ import annotations

import struct

from stratovirt.arch.x86_64 import boot_params, layout, registers
from stratovirt.hypervisor.kvm import _uapi as uapi

SEGMENT = struct.Struct("<QIH10B")
NAMES = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")


def segments(sregs: bytes) -> dict[str, dict[str, int]]:
    fields = ("base", "limit", "selector", "type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable", "padding")
    return {name: dict(zip(fields, SEGMENT.unpack_from(sregs, 24 * number), strict=True)) for number, name in enumerate(NAMES)}


def control(sregs: bytes) -> tuple[int, int, int, int]:
    cr0, _, cr3, cr4 = struct.unpack_from("<4Q", sregs, 224)
    return cr0, cr3, cr4, struct.unpack_from("<Q", sregs, 264)[0]


def test_long_mode() -> None:
    sregs = registers.long_mode_sregs(bytearray(uapi.SIZEOF_SREGS))
    found = segments(sregs)
    cr0, cr3, cr4, efer = control(sregs)
    assert cr0 & 0x8000_0001 == 0x8000_0001
    assert cr4 & 1 << 5
    assert efer & 0x500 == 0x500
    assert cr3 == layout.PML4
    assert (found["cs"]["l"], found["cs"]["db"], found["cs"]["selector"]) == (1, 0, 0x10)
    for name in ("ds", "es", "ss"):
        segment = found[name]
        assert (segment["selector"], segment["base"], segment["limit"], segment["g"]) == (0x18, 0, 0xFFFF_FFFF, 1)


def test_protected_mode_is_flat_and_without_paging() -> None:
    sregs = registers.protected_mode_sregs(bytearray(uapi.SIZEOF_SREGS))
    found = segments(sregs)
    cr0, _, cr4, efer = control(sregs)
    assert cr0 & 0x8000_0001 == 1
    assert cr4 == efer == 0
    assert (found["cs"]["l"], found["cs"]["db"], found["cs"]["limit"], found["cs"]["type"]) == (0, 1, 0xFFFF_FFFF, 0xB)
    assert (found["tr"]["limit"], found["tr"]["type"], found["tr"]["s"], found["tr"]["present"]) == (0x67, 0xB, 0, 1)


def test_the_segments_agree_with_the_descriptor_table_in_memory() -> None:
    """A kernel that reloads a selector gets the segment it already had."""
    table = dict(boot_params.descriptor_tables())[layout.GDT]
    found = segments(registers.long_mode_sregs(bytearray(uapi.SIZEOF_SREGS)))
    for name in ("cs", "ds"):
        (entry,) = struct.unpack_from("<Q", table, found[name]["selector"])
        assert entry >> 47 & 1
        assert entry >> 53 & 1 == found[name]["l"]
        assert entry >> 55 & 1 == found[name]["g"] == 1
    (limit,) = struct.unpack_from("<H", registers.long_mode_sregs(bytearray(uapi.SIZEOF_SREGS)), 192 + 8)
    assert limit + 1 == len(table)


def test_general_registers_of_both_protocols() -> None:
    names = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
             "rip", "rflags")
    regs = registers.linux64_regs(0x100_0200, 0x7000)
    linux = dict(zip(names, struct.unpack("<18Q", regs), strict=True))
    assert (linux["rip"], linux["rsi"], linux["rflags"]) == (0x100_0200, 0x7000, 2)
    pvh = dict(zip(names, struct.unpack("<18Q", registers.pvh_regs(0x10_0000, 0x6000)), strict=True))
    assert (pvh["rip"], pvh["rbx"], pvh["rflags"]) == (0x10_0000, 0x6000, 2)
    assert pvh["rsi"] == 0


def test_virtual_wire_changes_only_lint0_and_lint1() -> None:
    before = bytearray(range(256)) * 4
    after = registers.virtual_wire_lapic(bytearray(before))
    changed = {offset & -16 for offset in range(1024) if after[offset] != before[offset]}
    assert changed <= {0x350, 0x360}
    for offset, mode in ((0x350, 0x700), (0x360, 0x400)):
        (value,) = struct.unpack_from("<I", after, offset)
        assert value & 0x700 == mode
        assert not value & 1 << 16
