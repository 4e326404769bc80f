"""The registers that a GIC's state consists of, for KVM's register interface: what a snapshot keeps, in the order of return.

A family is one register for each interrupt, or a part of one: (name, offset at interrupt 0, bits for each interrupt, offset of
the registers that clear what these set, or 0). Its values are kept one after the other, as 32-bit words. Whether an interrupt
is enabled and how it is triggered come before whether it is pending, which is judged by them.
Spec: IHI 0069 (v3), 12.9, 12.11, 12.19; IHI 0048 (v2), 4.3, 4.4; Linux Documentation/virt/kvm/devices/arm-vgic*.rst.
"""

from __future__ import annotations

from stratovirt.arch.aarch64.registers import system_encoding

IIDR = 0x008  # of the distributor: which revision of KVM's GIC it is, on which the meaning of the others depends

_STATES = (("IGROUPR", 0x080, 1, 0), ("ISENABLER", 0x100, 1, 0x180), ("ICFGR", 0xC00, 2, 0))
_V3_STATES = (*_STATES, ("ISPENDR", 0x200, 1, 0), ("ISACTIVER", 0x300, 1, 0x380), ("IPRIORITYR", 0x400, 8, 0))
_V2_STATES = (*_STATES, ("ISPENDR", 0x200, 1, 0x280), ("ISACTIVER", 0x300, 1, 0x380), ("IPRIORITYR", 0x400, 8, 0))
V3_SHARED = (("IROUTER", 0x6000, 64, 0), *_V3_STATES)
V3_PRIVATE = _V3_STATES  # in the second frame of a redistributor
V3_PRIVATE_FRAME = 0x1_0000
V2_SHARED = (("ITARGETSR", 0x800, 8, 0), *_V2_STATES)
# Software-generated interrupts of a GICv2 are pending for each sender: 8 bits for each of 16, half an interrupt's share of 32.
V2_PRIVATE = (*_V2_STATES, ("SPENDSGIR", 0xF20, 4, 0xF10))

# Single registers: (name, offset, size in bytes).
DISTRIBUTOR = (("CTLR", 0x000, 4),)
# LPIs are turned on by CTLR, once it is known where their tables are.
V3_REDISTRIBUTOR = (("PROPBASER", 0x070, 8), ("PENDBASER", 0x078, 8), ("CTLR", 0x000, 4))
V2_INTERFACE = (("CTLR", 0x00, 4), ("PMR", 0x04, 4), ("BPR", 0x08, 4), ("ABPR", 0x1C, 4), ("APR", 0xD0, 4))

# System registers of a GICv3's processor interface, by their encoding.
V3_INTERFACE = (
    ("ICC_SRE_EL1", system_encoding(3, 0, 12, 12, 5)), ("ICC_CTLR_EL1", system_encoding(3, 0, 12, 12, 4)),
    ("ICC_IGRPEN0_EL1", system_encoding(3, 0, 12, 12, 6)), ("ICC_IGRPEN1_EL1", system_encoding(3, 0, 12, 12, 7)),
    ("ICC_PMR_EL1", system_encoding(3, 0, 4, 6, 0)), ("ICC_BPR0_EL1", system_encoding(3, 0, 12, 8, 3)),
    ("ICC_BPR1_EL1", system_encoding(3, 0, 12, 12, 3)),
)
ICC_CTLR = V3_INTERFACE[1][1]
# Active priorities, as many registers of each as there are bits of priority to tell groups apart.
V3_ACTIVE_PRIORITIES = tuple((f"ICC_AP{group}R{number}_EL1", system_encoding(3, 0, 12, 8 + group, 4 * (1 - group) + number))
                             for number in range(4) for group in (0, 1))

# Registers of an ITS: (name, offset), each read and written as 64 bits. Its tables lie in guest memory, and CTLR is the last.
ITS_BEFORE_TABLES = (("IIDR", 0x0004), ("CBASER", 0x0080), ("CWRITER", 0x0088), ("CREADR", 0x0090),
                     *((f"BASER{number}", 0x0100 + 8 * number) for number in range(8)))
ITS_CTLR = 0x0000


def active_priority_registers(icc_ctlr: int) -> tuple[tuple[str, int], ...]:
    """Those that a processor interface with this ICC_CTLR_EL1 has: 4 pairs for 7 bits of priority, 2 for 6, 1 for 5."""
    bits = (icc_ctlr >> 8 & 7) + 1
    return V3_ACTIVE_PRIORITIES[: 2 << max(0, min(bits, 7) - 5)]


def family_offsets(register: int, width: int, first: int, last: int) -> range:
    """Offsets of the 32-bit words of interrupts `first` to `last` - 1."""
    return range(register + first * width // 8, register + last * width // 8, 4)
