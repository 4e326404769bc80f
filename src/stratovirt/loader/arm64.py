"""The arm64 kernel Image, plain or packed with gzip, with or without an EFI stub.

Layout of the header, 64 bytes, little-endian:
    u32 code0, code1    instructions; with an EFI stub the first two bytes are "MZ"
    u64 text_offset     where the image goes, from a base aligned to 2 MiB
    u64 image_size      memory that it needs from there on, bss included; 0 in kernels before 3.17
    u64 flags           bit 0 big-endian; bits 1-2 page size: 1 4 KiB, 2 16 KiB, 3 64 KiB; bit 3 may lie anywhere
    u64 res2, res3, res4
    u32 magic           "ARM\\x64"
    u32 res5            with an EFI stub: offset of the PE header

A kernel built for EFI alone (CONFIG_EFI_ZBOOT) is a small program with a packed Image in it; one that is packed with gzip is
unpacked here. Its header: "MZ\\0\\0", "zimg", u32 payload offset, u32 payload size, 8 bytes, name of the compression.
Spec: Linux Documentation/arm64/booting.rst; drivers/firmware/efi/libstub/zboot-header.S.
"""

from __future__ import annotations

import struct

from stratovirt.arch.aarch64 import layout
from stratovirt.loader.image import MIB, KernelImage, Segment, refuse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.errors import ConfigError

ACCEPTED = "an arm64 Linux kernel: Image, with or without an EFI stub, plain or packed with gzip"

_HEADER = struct.Struct("<IIQQQQQQ4sI")
assert _HEADER.size == 64
_MAGIC = b"ARM\x64"
_FLAG_BIG_ENDIAN = 1
_OLD_TEXT_OFFSET = 0x8_0000  # of kernels that do not say how large they are
_GZIP = b"\x1f\x8b"
PAGE_SIZES = {0: 0, 1: 4 << 10, 2: 16 << 10, 3: 64 << 10}


class Arm64Image(KernelImage):
    """`page_size` is the one that the kernel was built for, 0 if it does not say."""

    __slots__ = ("page_size",)

    def __init__(self, path: str, segment: Segment, page_size: int) -> None:
        super().__init__(path, "image", "arm64", [segment], segment.address, cmdline_size=layout.COMMAND_LINE_LIMIT,
                         initrd_addr_max=layout.RAM + layout.INITRD_WINDOW - 1)
        self.page_size = page_size


def unpack(view: memoryview, path: str, limit: int) -> bytes | None:
    """The Image inside a gzip-packed file or an EFI zboot kernel, None for any other file.

    `limit` is how much is unpacked at most: what does not fit into RAM is of no use.
    Raises: ConfigError when it is damaged, too large, or packed otherwise.
    """
    if bytes(view[4:8]) == b"zimg" and bytes(view[:2]) == b"MZ" and len(view) >= 64:
        offset, size = struct.unpack_from("<II", view, 8)
        name = bytes(view[24:56]).split(b"\0")[0]
        if not name.startswith(b"gzip"):
            packing = name.decode("ascii", "replace")
            raise _refuse(path, f"this EFI kernel is packed with {packing}; unpack the Image in it first")
        if offset + size > len(view):
            raise _refuse(path, "this EFI kernel is cut off: the Image in it ends after the end of the file")
        view = view[offset : offset + size]
    if bytes(view[:2]) != _GZIP:
        return None
    import zlib

    stream = zlib.decompressobj(wbits=31)
    try:
        data = stream.decompress(view, limit)
    except zlib.error as error:
        raise _refuse(path, f"the gzip stream in it is damaged: {error}") from error
    if stream.unconsumed_tail:
        raise _refuse(path, f"unpacked it is larger than the machine's memory, {limit // MIB} MiB")
    if not stream.eof:
        raise _refuse(path, "the gzip stream in it is cut off")
    return data


def identify_image(view: memoryview, path: str, ram: list[tuple[int, int]]) -> Arm64Image:
    """The kernel in `view`, the whole unpacked file, with its place in RAM. `path` is for messages.

    Raises: ConfigError when it is recognizably something else, damaged, or does not fit.
    """
    if len(view) == 0:
        raise _refuse(path, "the file is empty")
    if bytes(view[56:60]) != _MAGIC:
        raise _refuse(path, f"this is {_what_is(view)}")
    if len(view) < _HEADER.size:
        raise _refuse(path, "the file ends within the header of the Image")
    _, _, text_offset, image_size, flags, _, _, _, _, _ = _HEADER.unpack_from(view)
    if flags & _FLAG_BIG_ENDIAN:
        raise _refuse(path, "this arm64 kernel is big-endian, and the devices of this machine are little-endian")
    if image_size == 0:
        text_offset = _OLD_TEXT_OFFSET
    needed = max(image_size, len(view))
    start = layout.KERNEL + text_offset
    base, size = ram[0]
    if start + needed > base + size:
        problem = f"the kernel needs memory from {start:#x} to {start + needed:#x}, which is not all RAM"
        if needed < 64 << 30 and text_offset < 64 << 30:
            problem += f"; give the machine at least -m {-(-(start + needed - base) // MIB)}M"
        raise _refuse(path, problem)
    return Arm64Image(path, Segment(0, len(view), start, needed), PAGE_SIZES[flags >> 1 & 3])


def _what_is(view: memoryview) -> str:
    """What a file without the magic is, with its article."""
    from stratovirt.loader import elf, foreign

    if bytes(view[:4]) == b"\x7fELF" and len(view) >= 20:
        machine = struct.unpack_from(">H" if view[5] == 2 else "<H", view, 18)[0]
        if machine == elf.EM_AARCH64:
            return "an arm64 ELF file (vmlinux); the kernel to boot is the Image made from it"
        return f"an ELF file for {elf.machine_name(machine)}, not for aarch64"
    if bytes(view[0x202:0x206]) == b"HdrS":
        return "an x86_64 kernel (bzImage), and this is an aarch64 host"
    return foreign.what_is(view) or "no arm64 kernel: the magic of the Image's header, ARM\\x64 at offset 56, is missing"


def _refuse(path: str, problem: str) -> ConfigError:
    return refuse(path, problem, ACCEPTED)
