"""Registers of an arm64 processor by the numbers that KVM has for them, and the state that one starts with.

A number (Linux Documentation/virt/kvm/api.rst, KVM_SET_ONE_REG) says the architecture, the size, the group and the register in
it: for core registers a multiple of 4 bytes into struct kvm_regs, for system registers the fields of MRS and MSR.
"""

from __future__ import annotations

_U64 = 0x6030_0000_0000_0000
_CORE = _U64 | 0x0010 << 16
_SYSTEM = _U64 | 0x0013 << 16


def system_encoding(op0: int, op1: int, crn: int, crm: int, op2: int) -> int:
    """The 16 bits that name a system register."""
    return op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2


# struct kvm_regs { struct user_pt_regs { u64 regs[31], sp, pc, pstate; } regs; u64 sp_el1, elr_el1, spsr[5]; … }
X = tuple(_CORE | 2 * number for number in range(31))
SP = _CORE | 2 * 31
PC = _CORE | 2 * 32
PSTATE = _CORE | 2 * 33
SP_EL1 = _CORE | 2 * 34
ELR_EL1 = _CORE | 2 * 35

MPIDR_EL1 = _SYSTEM | system_encoding(3, 0, 0, 0, 5)
ID_AA64MMFR0_EL1 = _SYSTEM | system_encoding(3, 0, 0, 7, 0)
ESR_EL1 = _SYSTEM | system_encoding(3, 0, 5, 2, 0)
FAR_EL1 = _SYSTEM | system_encoding(3, 0, 6, 0, 0)
SCTLR_EL1 = _SYSTEM | system_encoding(3, 0, 1, 0, 0)

# What a register is of: bits 16 to 27 of its number. SVE's lengths are settled before a vCPU is finalized.
GROUP = 0xFFF_0000
FIRMWARE_GROUPS = (0x14 << 16, 0x16 << 16)  # pseudo registers: the versions of PSCI and of other services that KVM offers
SVE_LENGTHS = 0x6060_0000_0015_FFFF

# The counters behind CNTVCT and CNTPCT: to write one is to set its distance from the host's, for all vCPUs of a machine.
TIMER_COUNTERS = (_SYSTEM | system_encoding(3, 3, 14, 3, 2), _SYSTEM | system_encoding(3, 3, 14, 0, 1))
# The names that core registers have in a snapshot; others go by their numbers.
NAMES = {
    **{f"x{number}": register for number, register in enumerate(X)}, "sp": SP, "pc": PC, "pstate": PSTATE, "sp_el1": SP_EL1,
    "elr_el1": ELR_EL1,
}

PSTATE_EL1H = 0x5
PSTATE_MASKED = 0x3C0  # D, A, I and F


def entry_state(entry: int, fdt: int) -> list[tuple[int, int]]:
    """(register, value) of a boot processor at its kernel's entry: x0 on the FDT, x1 to x3 zero, interrupts masked."""
    return [(X[0], fdt), (X[1], 0), (X[2], 0), (X[3], 0), (PC, entry), (PSTATE, PSTATE_EL1H | PSTATE_MASKED)]


def mpidr(index: int) -> int:
    """The affinity that KVM gives vCPU `index`: 16 to a cluster, for a GICv3 reaches 16 with one list of targets."""
    return index & 0xF | (index >> 4 & 0xFF) << 8 | (index >> 12 & 0xFF) << 16


def has_page_size(mmfr0: int, size: int) -> bool:
    """Whether a processor with this ID_AA64MMFR0_EL1 translates with pages of `size` bytes."""
    if size == 16 << 10:
        return mmfr0 >> 20 & 0xF != 0
    return mmfr0 >> (24 if size == 64 << 10 else 28) & 0xF != 0xF
