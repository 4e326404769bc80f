"""MP table: how a kernel without ACPI learns of processors, buses and interrupt wiring.

Two pieces: the 16-byte floating pointer, where kernels look for it, and the configuration table, wherever that points.
Spec: Intel MultiProcessor Specification 1.4, chapter 4.

Facts about KVM's interrupt controllers: as created, its PIC and IOAPIC get GSI n on pin n, the timer's GSI 0 too; real
boards have the timer on IOAPIC pin 2, and so has QEMU, which replaces KVM's routing table. This table describes KVM's own.
"""

from __future__ import annotations

import struct

# struct mpf { char signature[4]; uint32_t physptr; uint8_t length, specification, checksum, feature1..feature5; };
_FLOATING = struct.Struct("<4sIBBB5s")
assert _FLOATING.size == 16

# struct mpc { char signature[4]; uint16_t length; uint8_t spec; uint8_t checksum; char oem[8]; char productid[12];
#              uint32_t oemptr; uint16_t oemsize; uint16_t oemcount; uint32_t lapic; uint16_t extlength;
#              uint8_t extchecksum; uint8_t reserved; };
_HEADER = struct.Struct("<4sHBB8s12sIHHIHBB")
assert _HEADER.size == 44

# struct mpc_cpu { uint8_t type, apicid, apicver, cpuflag; uint32_t cpufeature, featureflag, reserved[2]; };
_PROCESSOR = struct.Struct("<BBBBIIQ")
assert _PROCESSOR.size == 20

# struct mpc_bus { uint8_t type, busid; char bustype[6]; };
_BUS = struct.Struct("<BB6s")
assert _BUS.size == 8

# struct mpc_ioapic { uint8_t type, apicid, apicver, flags; uint32_t apicaddr; };
_IOAPIC = struct.Struct("<BBBBI")
assert _IOAPIC.size == 8

# struct mpc_intsrc { uint8_t type, irqtype; uint16_t irqflag; uint8_t srcbus, srcbusirq, dstapic, dstirq; };
_INTERRUPT = struct.Struct("<BBHBBBB")
assert _INTERRUPT.size == 8

_MP_PROCESSOR, _MP_BUS, _MP_IOAPIC, _MP_INTSRC, _MP_LINTSRC = range(5)
_INT, _NMI, _, _EXTINT = range(4)
_SPEC_1_4 = 4
_ENABLED = 1
_BOOT_PROCESSOR = 2
_APIC_VERSION = 0x14  # integrated APIC; KVM's IOAPIC reports 11h in its register, the table's is not compared
_SIGNATURE = 0x600  # family 6
_FEATURES = 0x201  # FPU, APIC
_ISA_BUS = 0
_INTERRUPTS = 24  # 0 to 15 are ISA's; the other pins of the IOAPIC are wired the same way, so that any of them can be used
_ALL_LOCAL_APICS = 0xFF

MAX_PROCESSORS = 254


def _checksum(data: bytes) -> int:
    return -sum(data) & 0xFF


def ioapic_id(apic_ids: list[int]) -> int:
    """An APIC id that no processor has; 255 is the broadcast."""
    return min(max(apic_ids) + 2, MAX_PROCESSORS)


def floating_pointer(table_address: int) -> bytes:
    """The 16 bytes that go where kernels search: the last KiB of base memory, for example."""
    data = _FLOATING.pack(b"_MP_", table_address, 1, _SPEC_1_4, 0, bytes(5))
    return data[:10] + bytes([_checksum(data)]) + data[11:]


def configuration_table(apic_ids: list[int], lapic: int, ioapic: int) -> bytes:
    """The configuration table; the first of `apic_ids` boots, all are below 254; `lapic` and `ioapic` are addresses."""
    if not 1 <= len(apic_ids) <= MAX_PROCESSORS:
        raise ValueError(f"{len(apic_ids)} processors: an MP table describes 1 to {MAX_PROCESSORS}")
    ioapic_apic_id = ioapic_id(apic_ids)
    pack = _PROCESSOR.pack
    entries = [pack(_MP_PROCESSOR, apic_ids[0], _APIC_VERSION, _ENABLED | _BOOT_PROCESSOR, _SIGNATURE, _FEATURES, 0)]
    entries += [pack(_MP_PROCESSOR, n, _APIC_VERSION, _ENABLED, _SIGNATURE, _FEATURES, 0) for n in apic_ids[1:]]
    entries.append(_BUS.pack(_MP_BUS, _ISA_BUS, b"ISA   "))
    entries.append(_IOAPIC.pack(_MP_IOAPIC, ioapic_apic_id, _APIC_VERSION, _ENABLED, ioapic))
    pack = _INTERRUPT.pack
    entries += [pack(_MP_INTSRC, _INT, 0, _ISA_BUS, n, ioapic_apic_id, n) for n in range(_INTERRUPTS)]
    entries.append(pack(_MP_LINTSRC, _EXTINT, 0, _ISA_BUS, 0, 0, 0))
    entries.append(pack(_MP_LINTSRC, _NMI, 0, _ISA_BUS, 0, _ALL_LOCAL_APICS, 1))
    body = b"".join(entries)
    table = _HEADER.pack(b"PCMP", _HEADER.size + len(body), _SPEC_1_4, 0, b"STRATO  ", b"1.0         ", 0, 0, len(entries),
                         lapic, 0, 0, 0) + body
    return table[:7] + bytes([_checksum(table)]) + table[8:]
