"""The arm64 Image: what is taken, where it goes, and what is refused by its name."""

from __future__ import annotations

import gzip
import os
import struct
from typing import Any

import pytest

from stratovirt.arch.aarch64 import layout
from stratovirt.errors import ConfigError
from stratovirt.loader import arm64

MIB = 1 << 20
RAM = layout.ram_ranges(256 * MIB)


def image(*, text_offset: int = 0, image_size: int = 2 * MIB, flags: int = 0xA, magic: bytes = b"ARM\x64",
          start: bytes = b"MZ@\xfa", size: int = MIB) -> bytes:
    header = struct.pack("<4sIQQQQQQ4sI", start, 0x14000000, text_offset, image_size, flags, 0, 0, 0, magic, 64)
    return header + bytes(size - len(header))


def identify(data: bytes, ram: list[tuple[int, int]] = RAM) -> arm64.Arm64Image:
    return arm64.identify_image(memoryview(data), "/kernel", ram)


def refusal(data: bytes, ram: list[tuple[int, int]] = RAM) -> str:
    with pytest.raises(ConfigError) as caught:
        identify(data, ram)
    assert caught.value.option == "-kernel" and "arm64 Linux kernel" in str(caught.value)
    return str(caught.value)


def test_an_image_goes_where_its_header_says() -> None:
    kernel = identify(image())
    assert (kernel.entry, kernel.end) == (0x4020_0000, 0x4040_0000)
    (segment,) = kernel.segments
    assert (segment.file_offset, segment.file_size, segment.address, segment.memory_size) == (0, MIB, 0x4020_0000, 2 * MIB)
    assert kernel.cmdline_size == 2047
    kernel = identify(image(text_offset=0x8_0000, start=b"\0\0\0\x14"))
    assert (kernel.entry, kernel.end) == (0x4028_0000, 0x4048_0000)


def test_an_old_kernel_does_not_say_its_size() -> None:
    kernel = identify(image(text_offset=0, image_size=0))
    assert (kernel.entry, kernel.end) == (0x4028_0000, 0x4028_0000 + MIB)


def test_a_file_larger_than_its_image_size_counts_whole() -> None:
    assert identify(image(image_size=4096)).end == 0x4020_0000 + MIB


@pytest.mark.parametrize(("flags", "size"), [(0x8, 0), (0xA, 4096), (0xC, 16384), (0xE, 65536)])
def test_pages_of_every_size(flags: int, size: int) -> None:
    assert identify(image(flags=flags)).page_size == size


@pytest.mark.parametrize(("data", "words"), [
    (b"", "empty"),
    (image(magic=b"ARM\x65"), "magic"),
    (image()[:60], "ends within the header"),
    (image(flags=0xB), "big-endian"),
    (image(image_size=300 * MIB), "at least -m 302M"),
    (image(text_offset=1 << 63), "not all RAM"),
    (image(image_size=(1 << 64) - 1), "not all RAM"),
    (bytes(0x1F1) + b"\x04" + bytes(0x10) + b"HdrS" + bytes(4096), "x86_64 kernel (bzImage)"),
    (b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 2, 62) + bytes(100), "ELF file for x86_64"),
    (b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 2, 183) + bytes(100), "vmlinux"),
    (b"\x7fELF\x02\x02\x01" + bytes(9) + struct.pack(">HH", 2, 22) + bytes(100), "S/390"),
    (b"\x7fELF\x02", "no arm64 kernel"),
    (b"\xfd7zXZ\0" + bytes(100), "xz-compressed"),
    (b"QFI\xfb" + bytes(4096), "qcow2"),
    (b"#!/bin/sh\n", "script"),
    (b"070701" + bytes(200), "cpio"),
])
def test_what_is_refused_is_named(data: bytes, words: str) -> None:
    assert words in refusal(data)


def unpack(data: bytes, limit: int = 256 * MIB) -> bytes | None:
    return arm64.unpack(memoryview(data), "/kernel", limit)


def test_gzip_is_unpacked() -> None:
    assert unpack(image()) is None
    assert unpack(gzip.compress(image())) == image()
    assert unpack(gzip.compress(image()) + b"tail") == image()


def zboot(payload: bytes, name: bytes = b"gzip", size: int | None = None) -> bytes:
    length = len(payload) if size is None else size
    return struct.pack("<4s4sII8s32sI4x", b"MZ\0\0", b"zimg", 64, length, b"", name, 0xCD) + payload


def test_an_efi_kernel_with_a_packed_image_in_it() -> None:
    assert len(zboot(b"")) == 64
    assert unpack(zboot(gzip.compress(image()))) == image()
    for data, words in ((zboot(b"x", b"zstd22"), "zstd22"), (zboot(b"x", size=100), "cut off")):
        with pytest.raises(ConfigError, match=words):
            unpack(data)


@pytest.mark.parametrize(("data", "limit", "words"), [
    (gzip.compress(image())[:-100], MIB * 4, "cut off"),
    (b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + b"\xff" * 100, MIB * 4, "damaged"),
    (gzip.compress(bytes(64 * MIB)), MIB * 4, "larger than the machine's memory"),
])
def test_a_bad_gzip_stream_is_refused(data: bytes, limit: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        unpack(data, limit)


def test_an_unpacked_kernel_is_a_file_in_memory() -> None:
    from stratovirt.machine.boot import UnpackedFile

    file = UnpackedFile("/kernel", image())
    assert bytes(file.map()) == image()
    assert file.size == MIB
    os.close(file.fd)


def boot_config(tmp_path: Any, kernel: bytes, **changes: Any) -> Any:
    from stratovirt.config.vm import VmConfig

    config = VmConfig()
    (tmp_path / "kernel").write_bytes(kernel)
    config.kernel = str(tmp_path / "kernel")
    config.kernel_cmdline = "console=ttyAMA0"
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def test_a_boot_puts_kernel_tree_and_initrd_in_place_and_a_reset_again(tmp_path: Any) -> None:
    from stratovirt.firmware import fdt
    from stratovirt.hostmap import HostMapping
    from stratovirt.machine.aarch64.boot import Boot
    from stratovirt.memory import GuestMemory, RamRegion

    pytest.importorskip("zlib")
    try:
        fdt.load_library()
    except Exception:  # noqa: BLE001 - whatever it is, there is no libfdt
        pytest.skip("the bindings of libfdt are missing: install python3-libfdt")
    (tmp_path / "initrd").write_bytes(b"070701" + b"initrd" * 5000)
    kernel = image()[:-4] + b"tail"
    for packed in (kernel, gzip.compress(kernel)):
        config = boot_config(tmp_path, packed, memory_size=64 * MIB, initrd=str(tmp_path / "initrd"))
        boot = Boot(config, [layout.slot(0)], fdt.GICV3)
        region = RamRegion(layout.RAM, HostMapping(64 * MIB))
        memory = GuestMemory([region])
        for _ in range(2):
            boot.load(memory)
            assert memory.read(0x4020_0000, MIB) == kernel
            assert memory.read(layout.FDT, 4) == b"\xd0\x0d\xfe\xed"
            size = (tmp_path / "initrd").stat().st_size
            start = (layout.RAM + 64 * MIB - size) & -4096
            assert memory.read(start, size) == (tmp_path / "initrd").read_bytes()
            region.host.discard()


def test_the_command_line_is_never_cut(tmp_path: Any) -> None:
    from stratovirt.machine.aarch64.boot import Boot

    with pytest.raises(ConfigError, match="reads 2047"):
        Boot(boot_config(tmp_path, image(), kernel_cmdline="x" * 2048), [], "gicv3")
    with pytest.raises(ConfigError, match="zero byte"):
        Boot(boot_config(tmp_path, image(), kernel_cmdline="x\0y"), [], "gicv3")
