"""The initial RAM disk: what it may be and where it goes."""

from __future__ import annotations

from stratovirt.errors import ConfigError
from stratovirt.hostmap import PAGE_SIZE
from stratovirt.loader.image import LOW_MEMORY, MIB

INITRD_ACCEPTED = "a cpio archive, compressed or not, or a file system image"


def identify_initrd(head: memoryview, path: str) -> str:
    """Name what the initrd is, given at least its first KiB: "cpio", a compression's name, or "image".

    The kernel takes any RAM disk image, so what nothing recognizes is accepted.
    Raises: ConfigError for a file that is surely a mistake: empty, a kernel, text.
    """
    if len(head) == 0:
        raise _refuse(path, "the file is empty")
    start = bytes(head[:6])
    if start in (b"070701", b"070702"):
        return "cpio"
    from stratovirt.loader import foreign

    if start.startswith(b"\x04\x22\x4d\x18"):
        raise _refuse(path, "this is an lz4 frame, which Linux does not unpack; compress it with lz4 -l")
    name = foreign.compression(head)
    if name is not None:
        return name
    if foreign.is_cpio(head):
        raise _refuse(path, "this cpio archive is of a format that Linux does not unpack; make it with cpio -H newc")
    if start.startswith(b"\x7fELF"):
        raise _refuse(path, "this is an ELF file, not an initrd")
    if bytes(head[0x202:0x206]) == b"HdrS" or bytes(head[56:60]) == b"ARM\x64":
        raise _refuse(path, "this is a kernel, not an initrd")
    if foreign.is_text(head):
        raise _refuse(path, "this is a text file")
    return "image"


def place_initrd(size: int, ram_ranges: list[tuple[int, int]], limit: int, kernel_end: int, path: str = "") -> int:
    """The highest page-aligned address for `size` bytes: up to `limit` (the last byte allowed) and the end of low RAM.

    `kernel_end` is what `place` returned. Raises: ConfigError when there is no room above the kernel.
    """
    low_end = ram_ranges[0][0] + ram_ranges[0][1]
    address = (min(limit + 1, low_end) - size) & -PAGE_SIZE
    lowest = (max(kernel_end, LOW_MEMORY) + PAGE_SIZE - 1) & -PAGE_SIZE
    if address >= lowest:
        return address
    problem = f"the initrd of {size} bytes does not fit into memory above the kernel, which ends at {kernel_end:#x}"
    needed = lowest + ((size + PAGE_SIZE - 1) & -PAGE_SIZE)
    if needed <= limit + 1:
        problem += f"; give the machine at least -m {-(-(needed - ram_ranges[0][0]) // MIB)}M"
    else:
        problem += f": this kernel takes at most {max(0, (limit + 1 & -PAGE_SIZE) - lowest) // MIB} MiB"
    raise ConfigError(problem, option="-initrd", value=path)


def _refuse(path: str, problem: str) -> ConfigError:
    return ConfigError(problem, option="-initrd", value=path, accepted=INITRD_ACCEPTED)
