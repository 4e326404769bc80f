"""Kernels, initrds and command lines: damaged or absurd ones end in a machine or in a ConfigError of one line."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

from fuzz.fuzzing import fuzz, mutate
from stratovirt.arch.x86_64 import layout
from stratovirt.cli import command
from stratovirt.errors import ConfigError
from stratovirt.loader.image import page_parts, place
from stratovirt.loader.initrd import identify_initrd, place_initrd
from stratovirt.loader.kernel import identify_kernel
from unit.images import Load, bzimage, elf, pvh_elf, xen_note

RAM = layout.ram_ranges(128 << 20)
KERNELS = (
    pvh_elf(), bzimage(), bzimage(tail=b"signature"),
    elf([Load(b"\xf4" * 5000, 0x10_0000), Load(b"data" * 3000, 0x20_0000, memory_size=0x4_0000)], entry=0x10_0000,
        notes=xen_note(0x10_0000, 8) + xen_note(0x10_0000)),
    elf([Load(b"\xf4" * 64, 0x100_0000, vaddr=0xFFFF_FFFF_8100_0000)], entry=0xFFFF_FFFF_8100_0000),
    b"flat binary " * 100, b"\x1f\x8b\x08" + bytes(64), b"MZ" + bytes(600), b"070701" + b"0" * 200,
)


def test_kernel_images() -> None:
    def one(generator: random.Random) -> None:
        data = mutate(generator, generator.choice(KERNELS))
        try:
            image = identify_kernel(memoryview(data), "kernel")
            end = place(image, RAM)
        except ConfigError as error:
            assert "\n" not in str(error)
            return
        assert 0 < end <= (1 << 64)
        for segment in image.segments:  # what is left can be loaded: every byte from the file, every byte into RAM
            assert segment.file_size == 0 or 0 <= segment.file_offset <= len(data) - segment.file_size
            assert segment.file_size <= segment.memory_size
            assert layout.HIGH_MEMORY <= segment.address < segment.end <= RAM[0][1]
            parts = page_parts(segment)
            total = sum(length for _, _, length in parts.copied) + (parts.mapped[2] if parts.mapped else 0)
            assert total >= segment.file_size
            if parts.mapped is not None:
                assert not (parts.mapped[0] | parts.mapped[1]) % 4096
                assert parts.mapped[0] + parts.mapped[2] <= (len(data) + 4095 & -4096)
        assert any(segment.address <= image.entry < segment.end for segment in image.segments)

    tracemalloc.start()
    try:
        fuzz(one, 6000)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_initrd_images() -> None:
    starts = (b"070701" + b"0" * 300, b"\x1f\x8b\x08" + bytes(300), b"\xfd7zXZ\0" + bytes(300), b"text\n" * 50, bytes(300))

    def one(generator: random.Random) -> None:
        data = mutate(generator, generator.choice(starts))
        size = generator.choice((len(data), generator.randrange(1 << 28), generator.getrandbits(64)))
        end = generator.choice((0x20_0000, generator.randrange(1 << 28)))
        try:
            assert identify_initrd(memoryview(data), "initrd")
            address = place_initrd(size, RAM, layout.INITRD_LIMIT, end, "initrd")
        except ConfigError as error:
            assert "\n" not in str(error)
            return
        assert address % 4096 == 0
        assert end <= address
        assert address + size <= RAM[0][1]

    fuzz(one, 5000)


WORDS = ("-machine", "microvm", "-m", "128", "-smp", "4,cores=2", "-kernel", "/k", "-serial", "stdio", "-drive",
         "file=/d,id=d0,if=none,readonly=on,direct=off,aio=off", "-device", "virtio-blk-device,drive=d0,id=b0,queue-size=64",
         "-object", "rng-random,id=r0,filename=/dev/urandom", "virtio-rng-device,rng=r0,id=rng0,max-bytes=1000,period=10",
         "-qmp", "unix:/tmp/q,server,nowait", "tcp:127.0.0.1:1,server,nowait", "-chardev", "socket,id=c,path=/s,server,nowait",
         "-mon", "chardev=c,id=m,mode=control", "-daemonize", "-pidfile", "/p", "-D", "-S", "-append", "console=ttyS0", "-name",
         "-cpu", "host", "-action", "reboot=reset", "-no-reboot", "-initrd", "/i", "--", "", "=", ",", ",,", "=,=", "id=", "\0",
         "-", "-device", "-h", "\udcff", "é" * 300, "9" * 50, "-1", "0x10", "1e9", "1G", "18446744073709551616")


def test_command_lines() -> None:
    def one(generator: random.Random) -> None:
        words = [generator.choice(WORDS) for _ in range(generator.randint(1, 14))]
        if generator.random() < 0.5:
            words = ["-machine", "microvm", "-kernel", "/k", *words]
        if generator.random() < 0.7:
            at = generator.randrange(len(words))
            raw = mutate(generator, words[at].encode("utf-8", "surrogateescape"), 3)
            words[at] = raw.decode("utf-8", "surrogateescape")
        try:
            command.parse(words)
        except ConfigError as error:
            text = str(error)
            assert text
            assert "\n" not in text

    fuzz(one, 6000)


def test_a_pid_file_or_socket_was_never_made() -> None:
    """Parsing touches nothing: the paths of the words above do not come into being."""
    assert not any(Path(name).exists() for name in ("/k", "/d", "/s", "/p", "/i", "/tmp/q"))
