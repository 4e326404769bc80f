"""Where things lie in a microVM's physical address space: numbers, and functions from numbers to numbers.

    0000_0500  GDT, IDT             0009_FC00  MP floating pointer       C000_0000  end of low RAM (at most)
    0000_6000  PVH start_info       000D_0000  MP configuration table    F010_0000  virtio-mmio, command line's window
    0000_7000  zero page            000E_0000  RSDP, ACPI tables         F020_0000  virtio-mmio, ACPI's window
    0000_9000  page tables          000F_F000  generation ID             FEC0_0000  IOAPIC
    0002_0000  command line         0010_0000  kernel and initrd         FEE0_0000  LAPIC
                                                                         1_0000_0000  RAM above 3 GiB

Every virtio-mmio slot answers in two windows: the one that the command line announces, for kernels built for microVMs, and
the one that the DSDT announces, for stock kernels. A kernel that reads both must find each device once, so the transport
lets the window win that a driver uses first, and shows no device in the other.
"""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

# Low memory, below the EBDA.
GDT = 0x500
IDT = 0x520
PVH_START_INFO = 0x6000
ZERO_PAGE = 0x7000
BOOT_STACK = 0x8FF0
PML4 = 0x9000
PDPT = 0xA000
PAGE_DIRECTORY = 0xB000
IDENTITY_MAPPED = GIB  # what the initial page tables reach: the kernel must run below it until it has its own
COMMAND_LINE = 0x2_0000
COMMAND_LINE_END = 0x9_FC00
MP_FLOATING_POINTER = 0x9_FC00
EBDA_END = 0xA_0000

# Firmware tables. 254 processors do not fit in the 1 KiB at MP_FLOATING_POINTER; the pointer alone stays there, where
# kernels look for it. The RSDP lies in the BIOS area, which kernels scan when nobody tells them its address.
FIRMWARE = 0xD_0000
MP_TABLE = 0xD_0000
ACPI_TABLES = 0xE_0000
GENERATION_ID = 0xF_F000  # 16 bytes
FIRMWARE_END = 0x10_0000

HIGH_MEMORY = 0x10_0000
FLAT_KERNEL = 0x100_0000
INITRD_LIMIT = 0x37FF_FFFF  # last byte that every kernel of the boot protocol accepts

RAM_GAP = 0xC000_0000
RAM_GAP_END = 0x1_0000_0000

VIRTIO_MMIO = 0xF010_0000
VIRTIO_MMIO_ACPI = 0xF020_0000
VIRTIO_MMIO_SIZE = 0x200
VIRTIO_FIRST_IRQ = 5
GENERATION_IRQ = 16
VIRTIO_SLOTS = 11  # interrupts 5 to 15: all that the ISA numbers leave free

IOAPIC = 0xFEC0_0000
IOAPIC_PINS = 24
LAPIC = 0xFEE0_0000
KVM_IDENTITY_MAP = 0xFEF0_C000
KVM_TSS = 0xFEF0_D000  # three pages

# I/O ports.
SERIAL_PORT = 0x3F8
SERIAL_PORTS = 8
SERIAL_IRQ = 4
KEYBOARD_CONTROLLER_PORT = 0x64
KEYBOARD_CONTROLLER_RESET = 0xFE
SLEEP_CONTROL_PORT = 0xCE9
SLEEP_STATUS_PORT = 0xCEA
SLEEP_TYPE_S5 = 5
SLEEP_POWER_OFF = SLEEP_TYPE_S5 << 2 | 0x20  # what a guest writes to SLEEP_CONTROL_PORT: SLP_TYP, SLP_EN

E820_RAM = 1
E820_RESERVED = 2


class Slot:
    """One virtio-mmio slot: `base` is the command line's window, `acpi_base` the DSDT's, `irq` the GSI of both."""

    __slots__ = ("acpi_base", "base", "irq", "number", "windows")

    def __init__(self, number: int) -> None:
        if not 0 <= number < VIRTIO_SLOTS:
            raise ValueError(f"virtio-mmio slot {number}: there are {VIRTIO_SLOTS}")
        self.number = number
        self.base = VIRTIO_MMIO + VIRTIO_MMIO_SIZE * number
        self.acpi_base = VIRTIO_MMIO_ACPI + VIRTIO_MMIO_SIZE * number
        self.irq = VIRTIO_FIRST_IRQ + number
        self.windows = (self.base, self.acpi_base)


def slot(number: int) -> Slot:
    """The virtio-mmio slot `number`, 0 to VIRTIO_SLOTS - 1. Raises ValueError beyond."""
    return Slot(number)


def command_line_words(slots: list[Slot]) -> str:
    """What announces `slots` to a kernel without ACPI; to be appended, it begins with a space."""
    return "".join(f" virtio_mmio.device={VIRTIO_MMIO_SIZE}@0x{slot.base:08x}:{slot.irq}" for slot in slots)


def ram_ranges(size: int) -> list[tuple[int, int]]:
    """(base, size) of each run of RAM when the machine has `size` bytes: one, or two around the gap below 4 GiB."""
    if size <= RAM_GAP:
        return [(0, size)]
    return [(0, RAM_GAP), (RAM_GAP_END, size - RAM_GAP)]


def e820(size: int) -> list[tuple[int, int, int]]:
    """The guest's memory map as (base, size, type), in ascending order."""
    ranges = ram_ranges(size)
    entries = [
        (0, MP_FLOATING_POINTER, E820_RAM),
        (MP_FLOATING_POINTER, EBDA_END - MP_FLOATING_POINTER, E820_RESERVED),
        (FIRMWARE, FIRMWARE_END - FIRMWARE, E820_RESERVED),
        (HIGH_MEMORY, ranges[0][1] - HIGH_MEMORY, E820_RAM),
    ]
    if len(ranges) > 1:
        entries.append((*ranges[1], E820_RAM))
    return entries
