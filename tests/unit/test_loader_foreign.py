"""Files that are no kernel, or no initrd, are named; what nothing recognizes is a flat binary, or a RAM disk."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import struct
import tarfile
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratovirt.errors import ConfigError
from stratovirt.loader.foreign import what_is
from stratovirt.loader.initrd import identify_initrd
from stratovirt.loader.kernel import identify_kernel
from unit.images import bzimage, pvh_elf

MIB = 1 << 20
CONTENT = random.Random(1).randbytes(5000)


def at(offset: int, data: bytes, size: int = 0x20000) -> bytes:
    image = bytearray(max(size, offset + len(data)))
    image[offset : offset + len(data)] = data
    return bytes(image)


def mbr(*partitions: tuple[int, int, int]) -> bytes:
    table = b"".join(struct.pack("<BxxxBxxxII", status, kind, 2048, sectors) for status, kind, sectors in partitions)
    return at(446, table.ljust(64, b"\0") + b"\x55\xaa")


def ext4() -> bytes:
    superblock = bytearray(1024)
    struct.pack_into("<I", superblock, 24, 2)
    struct.pack_into("<HHH", superblock, 56, 0xEF53, 1, 1)
    struct.pack_into("<I", superblock, 76, 1)
    return at(1024, bytes(superblock))


def pe(machine: int) -> bytes:
    image = bytearray(at(0, b"MZ"))
    struct.pack_into("<I", image, 0x3C, 0x80)
    image[0x80:0x86] = b"PE\0\0" + machine.to_bytes(2, "little")
    return bytes(image)


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    return buffer.getvalue()


def zip_archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x", "y")
    return buffer.getvalue()


FILES = [
    (gzip.compress(CONTENT), "gzip"),
    (lzma.compress(CONTENT), "xz"),
    (lzma.compress(CONTENT, format=lzma.FORMAT_ALONE), "lzma"),
    (bz2.compress(CONTENT), "bzip2"),
    (b"\x28\xb5\x2f\xfd" + CONTENT, "zstd"),
    (b"\x02\x21\x4c\x18" + CONTENT, "lz4"),
    (b"\x89LZO\0\r\n\x1a\n" + CONTENT, "lzo"),
    (b"070701" + b"0" * 104 + b"TRAILER!!!", "cpio"),
    (at(0, b"MZ") [:56] + b"ARM\x64" + bytes(4096), "arm64"),
    (at(56, b"RSC\x05"), "RISC-V"),
    (at(36, b"\x18\x28\x6f\x01"), "32-bit ARM"),
    (pe(0x8664), "EFI or Windows program for x86_64"),
    (pe(0xAA64), "arm64"),
    (at(0, b"MZ\0\0zimg"), "zboot"),
    (at(0, b"QFI\xfb\0\0\0\3"), "qcow2"),
    (at(0, b"KDMV"), "VMDK"),
    (at(0x8001, b"CD001"), "ISO 9660"),
    (at(0x200, b"EFI PART"), "GPT"),
    (mbr((0x80, 0x83, 4096)), "partition table"),
    (mbr((0, 0xEE, 4096), (0, 0, 0)), "partition table"),
    (at(54, b"FAT16   ")[:510] + b"\x55\xaa" + bytes(4096), "FAT"),
    (ext4(), "ext4"),
    (at(0, b"hsqs"), "squashfs"),
    (at(0x10040, b"_BHRfS_M"), "btrfs"),
    (at(0, b"XFSB\0\0\x10\0"), "XFS"),
    (tar(), "tar"),
    (zip_archive(), "ZIP"),
    (b"!<arch>\ndebian-binary", "Debian package"),
    (at(40, b"_FVH"), "UEFI firmware"),
    (b"#!/bin/sh\nexec true\n", "script"),
    (b"menuentry 'Debian' {\n  linux /vmlinuz\n}\n", "text"),
    ("Grüße\n".encode() * 200, "text"),
    (b"x", "text"),
]


@pytest.mark.parametrize(("data", "said"), FILES, ids=[said for _, said in FILES])
def test_files_that_are_no_kernel_are_named(data, said):
    with pytest.raises(ConfigError) as caught:
        identify_kernel(memoryview(data), "file")
    assert said in caught.value.problem
    assert (caught.value.option, caught.value.value) == ("-kernel", "file")
    assert "bzImage" in str(caught.value)


def test_an_empty_file_is_refused():
    with pytest.raises(ConfigError, match="empty"):
        identify_kernel(memoryview(b""), "file")


@pytest.mark.parametrize("data", [
    b"\xf4",
    CONTENT,
    b"\x48\x8d\x25\x51\x3f\xa0\x01" + bytes(100_000),  # how vmlinux begins: lea ...(%rip), %rsp
    mbr((0x17, 0x83, 4096)),  # the boot signature by chance
    mbr((0, 0, 0)),
    at(0x438, b"\x53\xef\xff\xff"),  # the ext4 magic by chance
    b"BZh91234" + CONTENT,
    b"\x5d\0\0\x12\x34" + CONTENT,
    b"MZ" + bytes(1000),
    b"MZ" + b"\xff" * 1000,
], ids=range(10))
def test_anything_else_is_a_flat_binary_at_16_mib(data):
    image = identify_kernel(memoryview(data), "Image")
    assert (image.kind, image.protocol, image.entry) == ("flat", "linux64", 16 * MIB)
    segment, = image.segments
    assert (segment.file_offset, segment.file_size, segment.address, segment.memory_size) == (0, len(data), 16 * MIB, len(data))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(FILES), st.integers(0, 4096))
def test_cut_short_anywhere_it_is_still_answered(file, length):
    view = memoryview(file[0][:length])
    assert what_is(view) is None or isinstance(what_is(view), str)


@pytest.mark.parametrize(("data", "name"), [
    (b"070701" + b"0" * 200, "cpio"),
    (b"070702" + b"0" * 200, "cpio"),
    (gzip.compress(CONTENT), "gzip"),
    (lzma.compress(CONTENT), "xz"),
    (lzma.compress(CONTENT, format=lzma.FORMAT_ALONE), "lzma"),
    (bz2.compress(CONTENT), "bzip2"),
    (b"\x28\xb5\x2f\xfd" + CONTENT, "zstd"),
    (b"\x02\x21\x4c\x18" + CONTENT, "lz4"),
    (b"\x89LZO\0\r\n\x1a\n" + CONTENT, "lzo"),
    (ext4(), "image"),
    (at(0, b"hsqs"), "image"),
    (at(0, b"\x45\x3d\xcd\x28"), "image"),
    (CONTENT, "image"),
])
def test_what_the_kernel_takes_as_initrd(data, name):
    assert identify_initrd(memoryview(data), "initrd") == name


@pytest.mark.parametrize(("data", "said"), [
    (b"", "empty"),
    (pvh_elf(), "ELF file"),
    (bzimage(), "a kernel"),
    (at(56, b"ARM\x64"), "a kernel"),
    (b"#!/bin/sh\n", "text"),
    (b"hello\n", "text"),
    (b"070707" + b"0" * 100, "newc"),
    (b"\x04\x22\x4d\x18" + CONTENT, "lz4 -l"),
])
def test_what_is_surely_no_initrd(data, said):
    with pytest.raises(ConfigError) as caught:
        identify_initrd(memoryview(data)[:1024], "initrd")
    assert said in caught.value.problem
    assert (caught.value.option, caught.value.value) == ("-initrd", "initrd")
