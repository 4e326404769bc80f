"""Registers a boot processor starts with: struct kvm_regs and struct kvm_sregs for the two ways into a kernel.

Spec: Linux x86 boot protocol, "64-bit boot protocol"; Xen PVH start ABI; Intel SDM volume 3, 3.4.5 (segments).
"""

from __future__ import annotations

import struct

from stratovirt.arch.x86_64 import layout

# struct kvm_segment { u64 base; u32 limit; u16 selector; u8 type, present, dpl, db, s, l, g, avl, unusable, padding; }
_SEGMENT = struct.Struct("<QIH10B")
# struct kvm_dtable { u64 base; u16 limit; u16 padding[3]; }
_TABLE = struct.Struct("<QH6x")

# struct kvm_sregs: cs ds es fs gs ss tr ldt (24 bytes each), gdt and idt (16 each), then u64 registers
_CS, _DS, _ES, _FS, _GS, _SS, _TR = (24 * number for number in range(7))
_GDT, _IDT, _CR0, _CR3, _CR4, _EFER = 192, 208, 224, 240, 248, 264

_CODE_SELECTOR = 0x10
_DATA_SELECTOR = 0x18
_CODE_TYPE, _DATA_TYPE, _BUSY_TSS_TYPE = 0xB, 0x3, 0xB

CR0_PE, CR0_ET, CR0_PG = 1 << 0, 1 << 4, 1 << 31
CR4_PAE = 1 << 5
EFER_LME, EFER_LMA = 1 << 8, 1 << 10
RFLAGS_RESERVED = 1 << 1


def _segment(selector: int, kind: int, db: int, long: int, limit: int = 0xFFFFFFFF, system: bool = False) -> bytes:
    granular = 0 if system else 1
    return _SEGMENT.pack(0, limit, selector, kind, 1, 0, db, 0 if system else 1, long, granular, 0, 0, 0)


def long_mode_sregs(sregs: bytearray) -> bytearray:
    """Flat 64-bit code with paging on, over the tables that boot_params puts into guest memory."""
    code, data = _segment(_CODE_SELECTOR, _CODE_TYPE, 0, 1), _segment(_DATA_SELECTOR, _DATA_TYPE, 1, 0)
    _set_segments(sregs, code, data)
    _TABLE.pack_into(sregs, _GDT, layout.GDT, 4 * 8 - 1)
    _TABLE.pack_into(sregs, _IDT, layout.IDT, 8 - 1)
    struct.pack_into("<Q", sregs, _CR0, CR0_PE | CR0_ET | CR0_PG)
    struct.pack_into("<Q", sregs, _CR3, layout.PML4)
    struct.pack_into("<Q", sregs, _CR4, CR4_PAE)
    struct.pack_into("<Q", sregs, _EFER, EFER_LME | EFER_LMA)
    return sregs


def protected_mode_sregs(sregs: bytearray) -> bytearray:
    """Flat 32-bit code with paging off (PVH: cr0.PE set, everything else clear; cs, ds, es, ss 4 GiB flat, tr 32-bit TSS)."""
    code, data = _segment(_CODE_SELECTOR, _CODE_TYPE, 1, 0), _segment(_DATA_SELECTOR, _DATA_TYPE, 1, 0)
    _set_segments(sregs, code, data)
    _TABLE.pack_into(sregs, _GDT, layout.GDT, 4 * 8 - 1)
    _TABLE.pack_into(sregs, _IDT, layout.IDT, 8 - 1)
    struct.pack_into("<Q", sregs, _CR0, CR0_PE | CR0_ET)
    return sregs


def _set_segments(sregs: bytearray, code: bytes, data: bytes) -> None:
    sregs[_CS : _CS + 24] = code
    for offset in (_DS, _ES, _FS, _GS, _SS):
        sregs[offset : offset + 24] = data
    sregs[_TR : _TR + 24] = _segment(0, _BUSY_TSS_TYPE, 0, 0, limit=0x67, system=True)


def linux64_regs(entry: int, zero_page: int) -> bytes:
    """RSI points at the zero page; RSP and RBP at the boot stack."""
    return _regs(rsi=zero_page, rsp=layout.BOOT_STACK, rbp=layout.BOOT_STACK, rip=entry)


def pvh_regs(entry: int, start_info: int) -> bytes:
    """EBX points at struct hvm_start_info."""
    return _regs(rbx=start_info, rip=entry)


def _regs(rbx: int = 0, rsi: int = 0, rsp: int = 0, rbp: int = 0, rip: int = 0) -> bytes:
    # struct kvm_regs: rax rbx rcx rdx rsi rdi rsp rbp r8-r15 rip rflags
    return struct.pack("<18Q", 0, rbx, 0, 0, rsi, 0, rsp, rbp, 0, 0, 0, 0, 0, 0, 0, 0, rip, RFLAGS_RESERVED)


# -- MSRs and the local APIC

_MSR_TSC = 0x10
_MSR_SYSENTER_CS, _MSR_SYSENTER_ESP, _MSR_SYSENTER_EIP = 0x174, 0x175, 0x176
_MSR_MISC_ENABLE, _MISC_ENABLE_FAST_STRING = 0x1A0, 1
_MSR_MTRR_DEF_TYPE = 0x2FF
_MSR_STAR, _MSR_LSTAR, _MSR_CSTAR, _MSR_SYSCALL_MASK, _MSR_KERNEL_GS_BASE = (
    0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084, 0xC0000102)

BOOT_MSRS: list[tuple[int, int]] = [
    (_MSR_SYSENTER_CS, 0), (_MSR_SYSENTER_ESP, 0), (_MSR_SYSENTER_EIP, 0),
    (_MSR_STAR, 0), (_MSR_LSTAR, 0), (_MSR_CSTAR, 0), (_MSR_SYSCALL_MASK, 0), (_MSR_KERNEL_GS_BASE, 0),
    (_MSR_TSC, 0), (_MSR_MISC_ENABLE, _MISC_ENABLE_FAST_STRING), (_MSR_MTRR_DEF_TYPE, 0),
]

FIRST_TSC: list[tuple[int, int]] = [(_MSR_TSC, 1)]
"""For a vCPU that has waited. KVM takes 0 for "as the others have it", and what is within a second for that as well: a counter
that has run for less goes on."""

_LVT_LINT0, _LVT_LINT1 = 0x350, 0x360
_DELIVERY_MODE_MASK, _DELIVERY_NMI, _DELIVERY_EXTINT, _LVT_MASKED = 0x700, 0x400, 0x700, 1 << 16


def virtual_wire_lapic(lapic: bytearray) -> bytearray:
    """LINT0 takes the PIC's interrupts, LINT1 is NMI: the "virtual wire" set-up of the MP specification, 3.6.2.2."""
    for offset, mode in ((_LVT_LINT0, _DELIVERY_EXTINT), (_LVT_LINT1, _DELIVERY_NMI)):
        (value,) = struct.unpack_from("<I", lapic, offset)
        struct.pack_into("<I", lapic, offset, value & ~(_DELIVERY_MODE_MASK | _LVT_MASKED) | mode)
    return lapic
