"""What a file is that is no kernel for this machine: names for error messages.

A flat binary has no signature, so only what cannot be one by accident is named: long magic numbers, or short ones together
with a plausible structure behind them.
"""

from __future__ import annotations

import struct

_COMPRESSED = (
    (b"\x1f\x8b\x08", "gzip"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"\x02\x21\x4c\x18", "lz4"),
    (b"BZh", "bzip2"),
    (b"\x5d\0\0", "lzma"),
    (b"\x89LZO\0\r\n\x1a\n", "lzo"),
)

_CPIO = (b"070701", b"070702", b"070707", b"\xc7\x71")

# (offset, magic, what it is)
_SIGNATURES = (
    (56, b"ARM\x64", "an arm64 (aarch64) kernel Image"),
    (56, b"RSC\x05", "a RISC-V kernel Image"),
    (36, b"\x18\x28\x6f\x01", "a 32-bit ARM zImage"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
    (0, b"KDMV", "a VMDK disk image"),
    (0, b"# Disk DescriptorFile", "a VMDK disk image's descriptor"),
    (0, b"vhdxfile", "a VHDX disk image"),
    (0, b"conectix", "a VHD disk image"),
    (64, b"\x7f\x10\xda\xbe", "a VDI disk image"),
    (0, b"LUKS\xba\xbe", "a LUKS encrypted disk image"),
    (0x8001, b"CD001", "an ISO 9660 CD-ROM image"),
    (0x200, b"EFI PART", "a disk image with a GPT"),
    (0x1000, b"EFI PART", "a disk image with a GPT"),
    (0x10040, b"_BHRfS_M", "a btrfs file system image"),
    (0x400, b"\x10\x20\xf5\xf2", "an F2FS file system image"),
    (0, b"XFSB\0\0", "an XFS file system image"),
    (0, b"hsqs", "a squashfs file system image"),
    (0x400, b"\xe2\xe1\xf5\xe0", "an EROFS file system image"),
    (0, b"\x45\x3d\xcd\x28", "a cramfs file system image"),
    (257, b"ustar", "a tar archive"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"!<arch>\n", "an ar archive or Debian package"),
    (0, b"\xed\xab\xee\xdb", "an RPM package"),
    (40, b"_FVH", "a UEFI firmware image"),
    (0, b"\x27\x05\x19\x56", "a U-Boot uImage"),
    (0, b"\xd0\x0d\xfe\xed", "a device tree or FIT image"),
    (0, b"\x89PNG\r\n", "a PNG picture"),
    (0, b"%PDF-", "a PDF document"),
)

_PE_MACHINES = {0x014C: "32-bit x86", 0x01C2: "32-bit ARM", 0x0200: "Itanium", 0x8664: "x86_64", 0xAA64: "arm64 (aarch64)",
                0x5064: "RISC-V", 0x6264: "LoongArch"}

_TEXT_SAMPLE = 512
_TEXT = bytes([9, 10, 12, 13, 27, *range(0x20, 0x7F), *range(0x80, 0x100)])


def compression(head: bytes | memoryview) -> str | None:
    """The name of the compression that the file begins with."""
    head = bytes(head[:16])
    for magic, name in _COMPRESSED:
        if head.startswith(magic) and (name != "bzip2" or head[4:10] == b"1AY&SY") and (name != "lzma" or _is_lzma(head)):
            return name
    return None


def is_cpio(head: bytes | memoryview) -> bool:
    return bytes(head[:6]).startswith(_CPIO)


def is_text(head: bytes | memoryview) -> bool:
    """Whether the file begins like text: valid UTF-8 without control characters, with a line end or short."""
    sample = bytes(head[:_TEXT_SAMPLE])
    if sample.translate(None, _TEXT):
        return False
    try:
        sample.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start >= len(sample) - 3 and len(sample) == _TEXT_SAMPLE
    return bool(sample)


def what_is(view: memoryview) -> str | None:
    """What the file is, with its article, when it is recognizably not a kernel for this machine."""
    name = compression(view)
    if name is not None:
        return f"a {name}-compressed file; decompress it first"
    if is_cpio(view):
        return "a cpio archive (an initramfs; that belongs to -initrd)"
    for offset, magic, name in _SIGNATURES:
        if view[offset : offset + len(magic)] == magic:
            return name
    start = bytes(view[:2])
    if start == b"#!":
        return "a script"
    if start == b"MZ":
        name = _pe_name(view)
        if name is not None:
            return name
    if _is_ext4(view):
        return "an ext2, ext3 or ext4 file system image"
    if _is_fat(view):
        return "a FAT file system image"
    if _has_partition_table(view):
        return "a disk image with a partition table"
    if is_text(view):
        return "a text file"
    return None


def _is_lzma(head: bytes) -> bool:
    """An .lzma file: dictionary of 2**n bytes, then a size that is unknown (all ones) or below 2**48."""
    if len(head) < 13:
        return False
    dictionary: int = struct.unpack_from("<I", head, 1)[0]
    size: int = struct.unpack_from("<Q", head, 5)[0]
    return dictionary & (dictionary - 1) == 0 and dictionary > 0 and (size == (1 << 64) - 1 or size < 1 << 48)


def _pe_name(view: memoryview) -> str | None:
    if bytes(view[4:8]) == b"zimg":
        return "a compressed EFI kernel image (zboot); decompress it first"
    if len(view) < 64:
        return None
    header = struct.unpack_from("<I", view, 0x3C)[0]
    if bytes(view[header : header + 4]) != b"PE\0\0" or len(view) < header + 6:
        return None
    machine = struct.unpack_from("<H", view, header + 4)[0]
    return f"an EFI or Windows program for {_PE_MACHINES.get(machine, f'machine {machine:#x}')}"


def _is_ext4(view: memoryview) -> bool:
    """The superblock at 1024: magic EF53, and block size, state and revision within what exists."""
    if len(view) < 2048 or bytes(view[0x438:0x43A]) != b"\x53\xef":
        return False
    log_block_size = struct.unpack_from("<I", view, 0x418)[0]
    state, errors, _, _, _, _, revision = struct.unpack_from("<HHHIIII", view, 0x43A)
    return bool(log_block_size <= 6 and state <= 7 and errors <= 3 and revision <= 1)


def _is_boot_sector(view: memoryview) -> bool:
    return bytes(view[510:512]) == b"\x55\xaa"


def _is_fat(view: memoryview) -> bool:
    return _is_boot_sector(view) and b"FAT" in (bytes(view[54:57]), bytes(view[82:85]))


def _has_partition_table(view: memoryview) -> bool:
    """An MBR: the signature, status bytes that are 0 or 80h, and at least one partition with a type and a size."""
    if not _is_boot_sector(view):
        return False
    used = 0
    for offset in range(446, 510, 16):
        status, kind, sectors = view[offset], view[offset + 4], struct.unpack_from("<I", view, offset + 12)[0]
        if status not in (0, 0x80):
            return False
        used += kind != 0 and sectors != 0
    return used > 0
