"""Where things lie in an arm64 microVM's physical address space: numbers, and functions from numbers to numbers.

    0800_0000  GIC distributor               0900_0000  PL011 serial port, boot-time register at +F00
    0801_0000  GICv2 processor interface     0901_0000  PL031 clock
    0808_0000  GICv3 ITS                     0A00_0000  virtio-mmio, 200h for each slot
    080A_0000  GICv3 redistributors          4000_0000  RAM: FDT, at 2 MiB the kernel, at its end the initrd
    401E_0000  64 KiB for what KVM tells each processor of stolen time, with -cpu host,kvm-steal-time=on
    401F_0000  the last 64 KiB before the kernel: the generation ID, in a page that the guest takes for a device's
    40_0000_0000  redistributors beyond the 123rd, or behind RAM where that reaches so far

Interrupts are shared peripheral interrupts (SPIs), by the number that KVM takes as GSI and the FDT names: 16 says that the
generation ID is another, 32 to 37 are the replaceable slots', 38 the clock's, 39 the serial port's, 40 and up those of the
other slots.
Spec: Arm GIC architecture, IHI 0069 (v3) and 0048 (v2); Linux Documentation/arm64/booting.rst.
"""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

GIC_DISTRIBUTOR, GIC_DISTRIBUTOR_SIZE = 0x0800_0000, 0x1_0000
GICV2_CPU, GICV2_CPU_SIZE = 0x0801_0000, 0x1_0000
GIC_ITS, GIC_ITS_SIZE = 0x0808_0000, 0x2_0000
GIC_REDISTRIBUTORS = 0x080A_0000
GIC_REDISTRIBUTOR_SIZE = 0x2_0000  # for each processor
GIC_REDISTRIBUTOR_COUNT = 123  # that fit below the serial port
GIC_HIGH_REDISTRIBUTORS = 0x40_0000_0000
GIC_INTERRUPTS = 224  # 32 private ones and SPIs up to 191
GICV2_MAX_CPUS = 8
PRIVATE_INTERRUPTS = 32  # what lies before SPI 0 in the GIC's own numbering

SERIAL, SERIAL_SIZE = 0x0900_0000, 0x1000
BOOT_TIME = 0x0900_0F00
RTC, RTC_SIZE = 0x0901_0000, 0x1000
VIRTIO_MMIO = 0x0A00_0000
VIRTIO_MMIO_SIZE = 0x200

GENERATION_IRQ = 16
VIRTIO_FIRST_IRQ = 32
REPLACEABLE_SLOTS = 6
RTC_IRQ = 38
SERIAL_IRQ = 39
_OTHER_SLOTS_IRQ = 40
_LAST_IRQ = 191
VIRTIO_SLOTS = REPLACEABLE_SLOTS + _LAST_IRQ + 1 - _OTHER_SLOTS_IRQ

# Private peripheral interrupts, numbered from 0 as an FDT does.
TIMER_PPIS = (13, 14, 11, 10)  # secure, non-secure, virtual, hypervisor
PMU_PPI = 7
MAINTENANCE_PPI = 9

RAM = 0x4000_0000
FDT = RAM
GENERATION_ID, GENERATION_ID_SIZE = RAM + 2 * MIB - 64 * KIB, 64 * KIB  # a whole page of any size that kernels have
STEAL_TIME, STEAL_TIME_SIZE = GENERATION_ID - 64 * KIB, 64 * KIB
STEAL_TIME_EACH = 64  # bytes for a processor
FDT_LIMIT = STEAL_TIME - FDT
KERNEL = RAM + 2 * MIB  # what the kernel's text_offset is added to
INITRD_WINDOW = 32 * GIB  # kernel and initrd lie within so much
COMMAND_LINE_LIMIT = 2047  # COMMAND_LINE_SIZE of arm64 Linux, less the terminator


class Slot:
    """One virtio-mmio slot: `base` is where its registers are, `irq` its SPI."""

    __slots__ = ("base", "irq", "number", "windows")

    def __init__(self, number: int) -> None:
        if not 0 <= number < VIRTIO_SLOTS:
            raise ValueError(f"virtio-mmio slot {number}: there are {VIRTIO_SLOTS}")
        self.number = number
        self.base = VIRTIO_MMIO + VIRTIO_MMIO_SIZE * number
        self.windows = (self.base,)
        self.irq = VIRTIO_FIRST_IRQ + number
        if number >= REPLACEABLE_SLOTS:
            self.irq = _OTHER_SLOTS_IRQ + number - REPLACEABLE_SLOTS


def slot(number: int) -> Slot:
    """The virtio-mmio slot `number`, 0 to VIRTIO_SLOTS - 1. Raises ValueError beyond."""
    return Slot(number)


def ram_ranges(size: int) -> list[tuple[int, int]]:
    """(base, size) of each run of RAM when the machine has `size` bytes: always one."""
    return [(RAM, size)]


def redistributors(cpus: int, ram_size: int) -> list[tuple[int, int]]:
    """(base, how many) of each run of GICv3 redistributors."""
    if cpus <= GIC_REDISTRIBUTOR_COUNT:
        return [(GIC_REDISTRIBUTORS, cpus)]
    high = max(GIC_HIGH_REDISTRIBUTORS, -(-(RAM + ram_size) // GIB) * GIB)
    return [(GIC_REDISTRIBUTORS, GIC_REDISTRIBUTOR_COUNT), (high, cpus - GIC_REDISTRIBUTOR_COUNT)]


def address_bits(cpus: int, ram_size: int) -> int:
    """How many bits the largest physical address has."""
    base, count = redistributors(cpus, ram_size)[-1]
    return (max(RAM + ram_size, base + count * GIC_REDISTRIBUTOR_SIZE) - 1).bit_length()
