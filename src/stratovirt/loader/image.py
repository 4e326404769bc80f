"""What every kernel format comes down to: segments to put into RAM, an entry point, and how to enter.

Nothing here reads a file or touches RAM: a format module makes a KernelImage out of bytes, `place` checks it against the
machine's RAM, `page_parts` says which part of a segment can be mapped from the file instead of copied.
"""

from __future__ import annotations

from stratovirt.errors import ConfigError
from stratovirt.hostmap import PAGE_SIZE

MIB = 1 << 20

KERNEL_ACCEPTED = "an x86_64 Linux kernel: bzImage, ELF vmlinux, or a flat binary"

LOW_MEMORY = MIB  # below it lie the boot structures and the firmware tables
IDENTITY_MAPPED = 1 << 30  # what the page tables of the 64-bit protocol reach
INITRD_LIMIT = 0x37FF_FFFF
COMMAND_LINE_LIMIT = 2047  # COMMAND_LINE_SIZE of x86 Linux, less the terminator

_MAP_MINIMUM = 16 * PAGE_SIZE  # below this a copy costs less than a mapping of its own


class Segment:
    """`file_size` bytes of the file from `file_offset` on go to `address`; RAM up to `memory_size` behind them is zero."""

    __slots__ = ("address", "end", "file_offset", "file_size", "memory_size")

    def __init__(self, file_offset: int, file_size: int, address: int, memory_size: int) -> None:
        self.file_offset = file_offset
        self.file_size = file_size
        self.address = address
        self.memory_size = memory_size
        self.end = address + memory_size

    def __repr__(self) -> str:
        return (f"Segment(file_offset={self.file_offset:#x}, file_size={self.file_size:#x}, address={self.address:#x}, "
                f"memory_size={self.memory_size:#x})")


class KernelImage:
    """A kernel, taken apart.

    `kind` is "bzimage", "elf", "flat" or "image"; `protocol` is "linux64" (long mode, RSI on the zero page), "pvh" (32-bit
    protected mode, EBX on hvm_start_info) or "arm64" (EL1, x0 on the FDT).
    `end` is the first address behind everything that the kernel uses before it
    reads its memory map. The last five are those of the setup header; other kernels have its defaults.
    """

    __slots__ = ("cmdline_size", "end", "entry", "init_size", "initrd_addr_max", "kind", "path", "pref_address",
                 "protocol", "relocatable", "segments", "setup_header")

    def __init__(self, path: str, kind: str, protocol: str, segments: list[Segment], entry: int, *, setup_header: bytes = b"",
                 init_size: int = 0, pref_address: int = 0, relocatable: bool = False,
                 cmdline_size: int = COMMAND_LINE_LIMIT, initrd_addr_max: int = INITRD_LIMIT) -> None:
        self.path = path
        self.kind = kind
        self.protocol = protocol
        self.segments = segments
        self.entry = entry
        self.setup_header = setup_header
        self.init_size = init_size
        self.pref_address = pref_address
        self.relocatable = relocatable
        self.cmdline_size = cmdline_size
        self.initrd_addr_max = initrd_addr_max
        self.end = max(max(segment.end for segment in segments), pref_address + init_size if init_size else 0)


def refuse(path: str, problem: str, accepted: str = KERNEL_ACCEPTED) -> ConfigError:
    """The error for a kernel file that cannot be booted, to be raised."""
    return ConfigError(problem, option="-kernel", value=path, accepted=accepted)


def place(image: KernelImage, ram_ranges: list[tuple[int, int]]) -> int:
    """Check that the kernel fits into RAM, and return `image.end`, the first address that the initrd may have.

    Raises: ConfigError when a segment lies outside RAM, below 1 MiB or over another, or the entry point in none of them.
    """
    path = image.path
    low_end = ram_ranges[0][0] + ram_ranges[0][1]
    previous_end = LOW_MEMORY
    entry_found = False
    for segment in sorted(image.segments, key=_address):
        start, end = segment.address, segment.end
        if start < LOW_MEMORY:
            raise refuse(path, f"the kernel wants to be loaded at {start:#x}, below 1 MiB, where the boot structures are")
        if start < previous_end:
            raise refuse(path, f"two segments of the kernel overlap at {start:#x}")
        previous_end = end
        if not any(base <= start and end <= base + size for base, size in ram_ranges):
            raise _outside(path, start, end, low_end)
        if start <= image.entry < end:
            entry_found = True
    if not entry_found:
        raise refuse(path, f"the entry point {image.entry:#x} lies in no segment of the kernel")
    if image.init_size and image.end > low_end:
        raise _outside(path, image.pref_address, image.end, low_end)
    if image.protocol == "linux64" and image.end > IDENTITY_MAPPED:
        raise refuse(path, f"the kernel reaches up to {image.end:#x}, beyond the first GiB that is mapped when it is entered")
    if image.entry >= 1 << 32:
        raise refuse(path, f"the entry point {image.entry:#x} lies above 4 GiB")
    return image.end


def _address(segment: Segment) -> int:
    return segment.address


def _outside(path: str, start: int, end: int, low_end: int) -> ConfigError:
    problem = f"the kernel needs memory from {start:#x} to {end:#x}, which is not all RAM"
    if low_end < end <= 0xC000_0000:
        problem += f"; give the machine at least -m {-(-end // MIB)}M"
    return refuse(path, problem)


class PageParts:
    """How to get a segment into RAM. Each part is (file_offset, address, length).

    `mapped` is whole pages, to be mapped copy-on-write, or None; `copied` are the rest.
    """

    __slots__ = ("copied", "mapped")

    def __init__(self, mapped: tuple[int, int, int] | None, copied: list[tuple[int, int, int]]) -> None:
        self.mapped = mapped
        self.copied = copied


def page_parts(segment: Segment) -> PageParts:
    """Split a segment into what can be mapped and what must be copied.

    Whole pages can be mapped when file offset and address lie equally in their pages. The first and last partial page
    are copied: a mapped page would bring the neighbouring bytes of the file with it, into what must be zero (bss) or is
    another segment's.
    """
    size, address, offset = segment.file_size, segment.address, segment.file_offset
    if size == 0:
        return PageParts(None, [])
    first = (address + PAGE_SIZE - 1) & -PAGE_SIZE
    last = (address + size) & -PAGE_SIZE
    if (address - offset) % PAGE_SIZE or last - first < _MAP_MINIMUM:
        return PageParts(None, [(offset, address, size)])
    delta = offset - address
    copied = []
    if first > address:
        copied.append((offset, address, first - address))
    if last < address + size:
        copied.append((last + delta, last, address + size - last))
    return PageParts((first + delta, first, last - first), copied)
