"""The whole arm64 machine as a program, on any host: under the test accelerator, told that the host is aarch64."""

from __future__ import annotations

import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stratovirt.arch.aarch64 import layout
from stratovirt.errors import HostError
from stratovirt.firmware import fdt

SOURCE = Path(__file__).resolve().parents[2] / "src"
DEADLINE = 60.0
# The barrier alone is the host's own: its arm64 form is machine code.
AS_AARCH64 = f"""
import sys
sys.path.insert(0, {str(SOURCE)!r})
from stratovirt import hostmap
hostmap.ARCHITECTURE = "aarch64"
from stratovirt import barrier
barrier.create = lambda: lambda: None
from stratovirt.__main__ import main
sys.exit(main())
"""


class Program:
    def __init__(self, folder: Path, *arguments: str) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "mod-test"))
            listener.listen(1)
            listener.settimeout(DEADLINE)
            line = ["-machine", "microvm,accel=test", "-mod-test", str(folder / "mod-test"), "-disable-seccomp", *arguments]
            self.process = subprocess.Popen([sys.executable, "-IS", "-c", AS_AARCH64, *line], stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            self.peer, _ = listener.accept()
        self.peer.settimeout(DEADLINE)
        self._replies = self.peer.makefile("rb")
        assert self.ask("clock_step") == "OK 0"

    def ask(self, command: str) -> str:
        self.peer.sendall(command.encode() + b"\n")
        return self._replies.readline().decode().rstrip("\n")

    def load(self, address: int) -> int:
        return int(self.ask(f"readl {address:#x}").removeprefix("OK "), 16)

    def store(self, address: int, value: int) -> None:
        assert self.ask(f"writel {address:#x} {value:#x}") == "OK"

    def memory(self, address: int, length: int) -> bytes:
        return bytes.fromhex(self.ask(f"read {address:#x} {length:#x}").removeprefix("OK 0x"))

    def close(self) -> tuple[int, str]:
        self._replies.close()
        self.peer.close()
        _, errors = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, errors.decode()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    made: list[Program] = []

    def start(*arguments: str) -> Program:
        made.append(Program(tmp_path, *arguments))
        return made[-1]

    yield start
    for program in made:
        if program.process.poll() is None:
            program.process.kill()
            program.process.communicate()


def test_the_devices_are_where_the_map_says(launch: Callable[..., Program], tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"sector" + bytes(1 << 20))
    program = launch("-serial", f"file,path={tmp_path / 'serial'}", "-drive", f"id=d,file={tmp_path / 'disk'},direct=off",
                     "-device", "virtio-blk-device,drive=d,id=blk", "-object", "rng-random,id=r,filename=/dev/urandom",
                     "-device", "virtio-rng-device,rng=r,id=rng", "-m", "128M")
    for slot, device in ((0, 2), (6, 4)):
        base = layout.slot(slot).base
        assert [program.load(base + offset) for offset in (0, 4, 8)] == [0x74726976, 2, device]
    assert program.load(layout.slot(1).base) == 0xFFFF_FFFF
    assert program.load(layout.SERIAL + 0xFE0) == 0x11 and program.load(layout.RTC + 0xFE0) == 0x31
    assert program.load(layout.RTC) == 0  # the virtual clock starts in 1970
    for byte in b"hello\n":
        program.store(layout.SERIAL, byte)
    program.store(layout.SERIAL + 0x38, 0x20)  # the transmit interrupt
    assert program.ask(f"query_intx {layout.SERIAL_IRQ}") == "OK TRUE"
    program.store(layout.RAM + (128 << 20) - 4, 0x1234)
    assert program.load(layout.RAM + (128 << 20) - 4) == 0x1234
    assert program.load(layout.RAM + (128 << 20)) == 0xFFFF_FFFF
    assert program.ask("inb 0x3f8").endswith("ff")  # no ports here
    status, errors = program.close()
    assert status == 0, errors
    assert (tmp_path / "serial").read_bytes() == b"hello\n"


def test_a_disk_is_read_through_an_ordered_queue(launch: Callable[..., Program], tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"first sector".ljust(512, b".") + bytes(1 << 20))
    program = launch("-drive", f"id=d,file={tmp_path / 'disk'},direct=off", "-device", "virtio-blk-device,drive=d,id=blk")
    base, ring, data = layout.slot(0).base, layout.RAM + 0x1_0000, layout.RAM + 0x2_0000
    for status in (1, 3):
        program.store(base + 0x70, status)
    program.store(base + 0x24, 1)
    program.store(base + 0x20, 1)  # VERSION_1
    program.store(base + 0x70, 11)
    program.store(base + 0x38, 8)
    for offset, part in ((0x80, ring), (0x90, ring + 0x100), (0xA0, ring + 0x200)):
        program.store(base + offset, part)
    program.store(base + 0x44, 1)
    program.store(base + 0x70, 15)
    table = struct.pack("<QIHH", data, 16, 1, 1) + struct.pack("<QIHH", data + 0x1000, 512, 3, 2)
    table += struct.pack("<QIHH", data + 0x2000, 1, 2, 0)
    program.ask(f"write {ring:#x} {len(table):#x} 0x{table.hex()}")
    program.ask(f"write {ring + 0x100:#x} 6 0x000001000000")
    program.store(base + 0x50, 0)
    for _ in range(1000):
        if program.ask(f"query_intx {layout.slot(0).irq}") == "OK TRUE":
            break
    assert program.memory(ring + 0x202, 2) == b"\x01\x00"
    assert program.memory(data + 0x1000, 12) == b"first sector" and program.memory(data + 0x2000, 1) == b"\0"
    assert program.close()[0] == 0


def test_a_kernel_is_loaded_with_its_tree(launch: Callable[..., Program], tmp_path: Path) -> None:
    try:
        fdt.load_library()
    except HostError:
        pytest.skip("the bindings of libfdt are missing: install python3-libfdt")
    header = struct.pack("<IIQQQQQQ4sI", 0, 0, 0, 1 << 20, 0xA, 0, 0, 0, b"ARM\x64", 0)
    (tmp_path / "Image").write_bytes(header + b"kernel" * 10000)
    program = launch("-kernel", str(tmp_path / "Image"), "-append", "root=/dev/vda", "-smp", "3", "-serial",
                     f"file,path={tmp_path / 'serial'}")
    assert program.memory(layout.KERNEL + 64, 6) == b"kernel"
    magic, size = struct.unpack(">II", program.memory(layout.FDT, 8))
    assert magic == 0xD00D_FEED
    (tmp_path / "tree").write_bytes(program.memory(layout.FDT, size))
    assert program.close()[0] == 0
    if shutil.which("dtc"):
        text = subprocess.run(["dtc", "-q", "-I", "dtb", "-O", "dts", str(tmp_path / "tree")], capture_output=True, text=True,
                              check=True).stdout
        assert 'bootargs = "root=/dev/vda earlycon=pl011,mmio,0x09000000";' in text
        assert "cpu@2" in text and "pl011@9000000" in text


def test_a_kernel_of_the_other_architecture_is_refused_by_name(tmp_path: Path) -> None:
    elf = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 2, 62) + bytes(200)
    bzimage = bytearray(1024)
    bzimage[0x202:0x206] = b"HdrS"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "mod-test"))
        listener.listen(4)
        for content, words in ((elf, "ELF file for x86_64"), (bytes(bzimage), "x86_64 kernel (bzImage)")):
            (tmp_path / "kernel").write_bytes(content)
            line = ["-machine", "microvm,accel=test", "-mod-test", str(tmp_path / "mod-test")]
            line += ["-kernel", str(tmp_path / "kernel")]
            done = subprocess.run([sys.executable, "-IS", "-c", AS_AARCH64, *line], capture_output=True, text=True,
                                  timeout=DEADLINE, check=False)
            assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_launcher_rehearses_with_a_kernel_of_this_architecture() -> None:
    program = AS_AARCH64.partition("from stratovirt.__main__")[0] + "from stratovirt.launcher.practice import *\nrehearse()\n"
    done = subprocess.run([sys.executable, "-s", "-c", program], capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert (done.returncode, done.stderr) == (0, "")
