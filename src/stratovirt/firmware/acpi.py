"""ACPI tables of a microVM: what a stock kernel needs to find processors, the serial port, virtio devices and the off switch.

    RSDP -> XSDT -> FADT -> DSDT
                 -> MADT

The machine declares itself hardware-reduced: no PM timer, no SCI, no legacy sleep registers, hence no FACS. Power-off is a
write to the sleep control register, reset one to the keyboard controller's port; both are declared in the FADT.
Spec: ACPI 6.3, section 5.2.
"""

from __future__ import annotations

import struct

from stratovirt.firmware import aml

TYPE_CHECKING = False
if TYPE_CHECKING:
    VirtioDevice = tuple[int, int, int, int]  # number, base, size, gsi

_OEM_ID = b"STRATO"
_CREATOR_ID = b"STRA"

# struct acpi_table_rsdp { char signature[8]; u8 checksum; char oem_id[6]; u8 revision; u32 rsdt_physical_address;
#                          u32 length; u64 xsdt_physical_address; u8 extended_checksum; u8 reserved[3]; };
_RSDP = struct.Struct("<8sB6sBIIQB3x")
assert _RSDP.size == 36
_RSDP_FIRST_PART = 20  # what the first checksum covers

# struct acpi_table_header { char signature[4]; u32 length; u8 revision; u8 checksum; char oem_id[6]; char oem_table_id[8];
#                            u32 oem_revision; char asl_compiler_id[4]; u32 asl_compiler_revision; };
_HEADER = struct.Struct("<4sIBB6s8sI4sI")
assert _HEADER.size == 36
_CHECKSUM = 9

# struct acpi_generic_address { u8 space_id; u8 bit_width; u8 bit_offset; u8 access_width; u64 address; };
_GENERIC_ADDRESS = struct.Struct("<BBBBQ")
assert _GENERIC_ADDRESS.size == 12
_SYSTEM_IO = 1
_BYTE_ACCESS = 1

# FADT, offsets from the start of the table (table 5-33); everything else is zero.
_FADT_SIZE = 276
_FADT_REVISION, _FADT_MINOR_REVISION = 6, 3
_FADT_DSDT = 40
_FADT_BOOT_FLAGS = 109
_FADT_FLAGS = 112
_FADT_RESET_REG = 116
_FADT_RESET_VALUE = 128
_FADT_MINOR = 131
_FADT_X_DSDT = 140
_FADT_SLEEP_CONTROL_REG = 244
_FADT_SLEEP_STATUS_REG = 256
_FADT_HYPERVISOR = 268

# IA-PC boot flags. That the bits for legacy devices and the 8042 are clear spares kernels the search for a keyboard.
_VGA_NOT_PRESENT = 1 << 2
_CMOS_RTC_NOT_PRESENT = 1 << 5
# Fixed feature flags.
_WBINVD = 1 << 0
_PWR_BUTTON = 1 << 4  # set: no fixed power button
_SLP_BUTTON = 1 << 5
_RESET_REG_SUP = 1 << 10
_HW_REDUCED_ACPI = 1 << 20

# struct acpi_madt_local_apic { u8 type, length; u8 processor_id; u8 id; u32 lapic_flags; };
_LOCAL_APIC = struct.Struct("<BBBBI")
assert _LOCAL_APIC.size == 8
# struct acpi_madt_io_apic { u8 type, length; u8 id; u8 reserved; u32 address; u32 global_irq_base; };
_IO_APIC = struct.Struct("<BBBBII")
assert _IO_APIC.size == 12
# struct acpi_madt_local_apic_nmi { u8 type, length; u8 processor_id; u16 inti_flags; u8 lint; };
_LOCAL_APIC_NMI = struct.Struct("<BBBHB")
assert _LOCAL_APIC_NMI.size == 6
_MADT_REVISION = 5
_PCAT_COMPAT = 1  # there is a pair of 8259s as well
_ALL_PROCESSORS = 0xFF
_PROCESSOR_ENABLED = 1

_XSDT_REVISION = 1
_DSDT_REVISION = 2  # integers are 64 bits wide

_ALIGN = 16


class AcpiConfig:
    """What the tables describe.

    `processors` are the APIC ids; `virtio` lists (number, base, size, gsi) per occupied slot; `serial` is (port,
    ports, irq) or None; `generation` is (address, gsi) of the generation ID, or None. `reset` and `sleep` are ports and
    values: (port, value), and (control port, status port, S5 type).
    """

    __slots__ = ("generation", "ioapic", "ioapic_id", "lapic", "processors", "reset", "serial", "sleep", "virtio")

    def __init__(self, processors: list[int], lapic: int, ioapic: int, ioapic_id: int, reset: tuple[int, int],
                 sleep: tuple[int, int, int], serial: tuple[int, int, int] | None, virtio: list[VirtioDevice],
                 generation: tuple[int, int] | None = None) -> None:
        self.generation = generation
        self.processors = processors
        self.lapic = lapic
        self.ioapic = ioapic
        self.ioapic_id = ioapic_id
        self.reset = reset
        self.sleep = sleep
        self.serial = serial
        self.virtio = virtio


def build(config: AcpiConfig, base: int) -> bytes:
    """All tables as they lie in memory from `base` on; the RSDP is the first, at `base` itself, which is 16-byte aligned."""
    if base % _ALIGN:
        raise ValueError(f"the RSDP must be 16-byte aligned, not at {base:#x}")
    blob = bytearray(_aligned(_RSDP.size))

    def add(table: bytes) -> int:
        address = base + len(blob)
        blob.extend(table)
        blob.extend(bytes(_aligned(len(table)) - len(table)))
        return address

    dsdt_address = add(dsdt(config))
    fadt_address = add(fadt(config, dsdt_address))
    madt_address = add(madt(config))
    xsdt_address = add(_table(b"XSDT", _XSDT_REVISION, struct.pack("<QQ", fadt_address, madt_address)))
    blob[: _RSDP.size] = rsdp(xsdt_address)
    return bytes(blob)


def rsdp(xsdt: int) -> bytes:
    """Root System Description Pointer, revision 2 (5.2.5.3)."""
    data = bytearray(_RSDP.pack(b"RSD PTR ", 0, _OEM_ID, 2, 0, _RSDP.size, xsdt, 0))
    data[8] = -sum(data[:_RSDP_FIRST_PART]) & 0xFF
    data[32] = -sum(data) & 0xFF
    return bytes(data)


def fadt(config: AcpiConfig, dsdt_address: int) -> bytes:
    """Fixed ACPI Description Table (5.2.9)."""
    table = bytearray(_FADT_SIZE)
    pack_into = struct.pack_into
    pack_into("<I", table, _FADT_DSDT, dsdt_address)
    pack_into("<H", table, _FADT_BOOT_FLAGS, _VGA_NOT_PRESENT | _CMOS_RTC_NOT_PRESENT)
    pack_into("<I", table, _FADT_FLAGS, _WBINVD | _PWR_BUTTON | _SLP_BUTTON | _RESET_REG_SUP | _HW_REDUCED_ACPI)
    reset_port, table[_FADT_RESET_VALUE] = config.reset
    table[_FADT_MINOR] = _FADT_MINOR_REVISION
    pack_into("<Q", table, _FADT_X_DSDT, dsdt_address)
    for offset, port in ((_FADT_RESET_REG, reset_port), (_FADT_SLEEP_CONTROL_REG, config.sleep[0]),
                         (_FADT_SLEEP_STATUS_REG, config.sleep[1])):
        _GENERIC_ADDRESS.pack_into(table, offset, _SYSTEM_IO, 8, 0, _BYTE_ACCESS, port)
    table[_FADT_HYPERVISOR : _FADT_HYPERVISOR + 8] = b"STRATOVM"
    return _table(b"FACP", _FADT_REVISION, table[_HEADER.size :])


def madt(config: AcpiConfig) -> bytes:
    """Multiple APIC Description Table (5.2.12): KVM wires GSI n to pin n, the timer's too, so nothing is overridden."""
    pack = _LOCAL_APIC.pack
    return _table(b"APIC", _MADT_REVISION, b"".join([
        struct.pack("<II", config.lapic, _PCAT_COMPAT),
        *[pack(0, _LOCAL_APIC.size, n, apic_id, _PROCESSOR_ENABLED) for n, apic_id in enumerate(config.processors)],
        _IO_APIC.pack(1, _IO_APIC.size, config.ioapic_id, 0, config.ioapic, 0),
        _LOCAL_APIC_NMI.pack(4, _LOCAL_APIC_NMI.size, _ALL_PROCESSORS, 0, 1),
    ]))


def dsdt(config: AcpiConfig) -> bytes:
    """Differentiated System Description Table: serial port, virtio-mmio devices, generation ID, the sleep type of S5."""
    devices = []
    if config.serial is not None:
        port, ports, irq = config.serial
        devices.append(aml.device(
            "COM1",
            aml.name("_HID", aml.eisa_id("PNP0501")),
            aml.name("_UID", aml.integer(0)),
            aml.name("_STA", aml.integer(0xF)),
            aml.name("_CRS", aml.resource_template(aml.io(port, ports), aml.irq(irq))),
        ))
    for number, base, size, gsi in config.virtio:
        devices.append(aml.device(
            f"VR{number:02X}",
            aml.name("_HID", aml.string("LNRO0005")),
            aml.name("_UID", aml.integer(number)),
            aml.name("_CCA", aml.integer(1)),
            aml.name("_CRS", aml.resource_template(aml.memory32_fixed(base, size), aml.interrupt(gsi))),
        ))
    if config.generation is not None:
        devices += _generation_id(*config.generation)
    zero = aml.integer(0)
    return _table(b"DSDT", _DSDT_REVISION, b"".join([
        aml.scope("_SB_", *devices) if devices else b"",
        aml.name("_S5_", aml.package(aml.integer(config.sleep[2]), zero, zero, zero)),
    ]))


def _generation_id(address: int, gsi: int) -> tuple[bytes, bytes]:
    """The device that tells a guest that it was cloned, and the one whose interrupt says that this has just happened.

    Spec: "Virtual Machine Generation ID" (Microsoft, 2012); Generic Event Device, ACPI 6.3, 5.6.9.
    """
    return (
        aml.device(
            "VGEN",
            aml.name("_HID", aml.string("STRV0001")),
            aml.name("_CID", aml.package(aml.string("VM_Gen_Counter"), aml.string("VMGENCTR"))),
            aml.name("_DDN", aml.string("VM_Gen_Counter")),
            aml.name("ADDR", aml.package(aml.integer(address & 0xFFFF_FFFF), aml.integer(address >> 32))),
        ),
        aml.device(
            "GED_",
            aml.name("_HID", aml.string("ACPI0013")),
            aml.name("_UID", aml.integer(0)),
            aml.name("_CRS", aml.resource_template(aml.interrupt(gsi))),
            aml.method("_EVT", 1, aml.notify("VGEN", 0x80), serialized=True),
        ),
    )


def _table(signature: bytes, revision: int, body: bytes | bytearray) -> bytes:
    table = bytearray(_HEADER.pack(signature, _HEADER.size + len(body), revision, 0, _OEM_ID, b"VIRT" + signature, 1,
                                   _CREATOR_ID, 1))
    table += body
    table[_CHECKSUM] = -sum(table) & 0xFF
    return bytes(table)


def _aligned(size: int) -> int:
    return (size + _ALIGN - 1) & -_ALIGN
