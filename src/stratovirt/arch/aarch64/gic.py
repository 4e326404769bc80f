"""The registers of a GIC that a reset puts back, as (offset, value) for KVM's register interface.

What is set by writing ones to one register and cleared by writing them to another is cleared: enables and active states.
Pending states are written whole. The GIC architecture leaves much of the rest undefined after a reset; here it is as in a GIC
that KVM has just made: zero, but for the group of a GICv3's interrupts, which is 1.
Spec: IHI 0069 (v3), 12.9, 12.11; IHI 0048 (v2), 4.3; Linux Documentation/virt/kvm/devices/arm-vgic-v3.rst, arm-vgic.rst.
"""

from __future__ import annotations

from stratovirt.arch.aarch64.registers import system_encoding

_ALL = 0xFFFF_FFFF
_CTLR, _IGROUPR, _ICENABLER, _ISPENDR, _ICPENDR, _ICACTIVER = 0x000, 0x080, 0x180, 0x200, 0x280, 0x380
_IPRIORITYR, _ITARGETSR, _ICFGR, _IROUTER = 0x400, 0x800, 0xC00, 0x6000
_SGI_FRAME = 0x1_0000  # of a redistributor
_GICR_PROPBASER, _GICR_PENDBASER = 0x070, 0x078


def _states(first: int, last: int, base: int, pending: tuple[int, int], group: int) -> list[tuple[int, int]]:
    """One-bit states of interrupts `first` to `last` - 1, 32 to a register."""
    values: list[tuple[int, int]] = []
    for word in range(first // 32, last // 32):
        at = base + 4 * word
        values += [(_ICENABLER + at, _ALL), (_ICACTIVER + at, _ALL), (pending[0] + at, pending[1]), (_IGROUPR + at, group)]
    return values


def _words(first: int, last: int, register: int, width: int) -> list[tuple[int, int]]:
    """Zero in every register of `width` bits for each interrupt."""
    return [(register + offset, 0) for offset in range(first * width // 8, last * width // 8, 4)]


def v3_distributor(interrupts: int) -> list[tuple[int, int]]:
    """32-bit registers at their offsets in the distributor. A pending state is written whole to ISPENDR."""
    values = [(_CTLR, 0), *_states(32, interrupts, 0, (_ISPENDR, 0), _ALL)]
    values += _words(32, interrupts, _IPRIORITYR, 8) + _words(32, interrupts, _ICFGR, 2)
    return values + [(_IROUTER + offset, 0) for offset in range(8 * 32, 8 * interrupts, 4)]


def v3_redistributor() -> list[tuple[int, int]]:
    """32-bit registers at their offsets in one redistributor: LPIs are off before their tables are forgotten."""
    values = [(_CTLR, 0)]
    values += [(register + half, 0) for register in (_GICR_PROPBASER, _GICR_PENDBASER) for half in (0, 4)]
    values += _states(0, 32, _SGI_FRAME, (_ISPENDR, 0), _ALL)
    return values + _words(0, 32, _SGI_FRAME + _IPRIORITYR, 8) + [(_SGI_FRAME + _ICFGR + 4, 0)]


# System registers of the processor interface, by their encoding: priority mask, active priorities, group enables.
V3_CPU_INTERFACE = [
    (system_encoding(3, 0, 12, 12, 6), 0),  # ICC_IGRPEN0_EL1
    (system_encoding(3, 0, 12, 12, 7), 0),  # ICC_IGRPEN1_EL1
    (system_encoding(3, 0, 4, 6, 0), 0),  # ICC_PMR_EL1
    (system_encoding(3, 0, 12, 8, 4), 0),  # ICC_AP0R0_EL1
    (system_encoding(3, 0, 12, 9, 0), 0),  # ICC_AP1R0_EL1
]


def v2_distributor(interrupts: int, first_processor: bool) -> list[tuple[int, int]]:
    """32-bit registers at their offsets in the distributor; those of the first 32 interrupts are every processor's own."""
    if not first_processor:
        return _states(0, 32, 0, (_ICPENDR, _ALL), 0) + _words(0, 32, _IPRIORITYR, 8)
    values = [(_CTLR, 0), *_states(0, interrupts, 0, (_ICPENDR, _ALL), 0)]
    values += _words(0, interrupts, _IPRIORITYR, 8)
    return values + _words(32, interrupts, _ITARGETSR, 8) + _words(32, interrupts, _ICFGR, 2)


V2_CPU_INTERFACE = [(0x00, 0), (0x04, 0), (0x08, 0), (0xD0, 0)]  # GICC_CTLR, PMR, BPR, APR0
