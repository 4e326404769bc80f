"""What a launcher does before it serves, so that its children write to fewer of the pages that they share with it.

An interpreter writes where it only reads: counts of references, caches in the code that it runs, keys of attributes that are
set for the first time. Each first write to a page in a child copies the page, at 2 us and 4 KiB. Three remedies, which took
nearly half of those pages away:

- A few machines with the smallest of guests are run in the launcher itself. After that the code is specialized and the
  classes know their attributes.
- Code that a machine goes through once in its life is settled after that: the interpreter counts its runs no more.
- The free places in half-used pages are taken, so that what a child makes goes to pages of its own instead of one place
  here and one there.

What is left of those writes, a spare child does before its request has come: it copies those pages (`written.py`), and for a
clone, which others write to as well, it builds a machine of which KVM knows nothing (`rehearse`).
"""

from __future__ import annotations

import gc
import os
import struct
import time

from stratovirt import log
from stratovirt.errors import StratoVirtError
from stratovirt.hostmap import ARCHITECTURE
from stratovirt.native import compiled

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType

    from stratovirt.machine.boot import Boot
    from stratovirt.memory import RamRegion

RUNS = 8  # what CPython needs to specialize a function that is called once in each
SECONDS = 2.0

_LOAD, _CODE_OFFSET = 0x10_0000, 0x1000
_NOTE_PVH_ENTRY = 18  # XEN_ELFNOTE_PHYS32_ENTRY
_ARM64_ENTRY = 64  # behind the Image's header
_ARM64_RESET = (0x52B08000, 0x72800120, 0xD4000002)  # w0 = 84000009; hvc #0: PSCI SYSTEM_RESET
_ARM64_HALT = (0xD503207F, 0x17FFFFFF)  # wfi, for ever
_RESET = bytes((0xB0, 0xFE, 0xE6, 0x64))  # mov al, FE; out 64, al
_HALT = bytes((0xF4, 0xEB, 0xFD))  # hlt, for ever

_Function = type(lambda: None)
_DISK = "-drive id=d,file=/proc/self/fd/{},readonly=on,direct=off -device virtio-blk-device,id=b,drive=d"
_SMALLEST, _LARGEST, _STEP = 48, 512, 16  # size classes of the interpreter's allocator, as far as bytes can have them
_BYTES_OVERHEAD = 33
_IN_A_ROW = 12 << 10  # bytes; a pool has 16 KiB, less its header
_FRESH = 2
# What a guest keeps busy: it shall be specialized when that guest is there, for what it does.
_BUSY = ("address_map", "backends", "barrier", "devices", "hypervisor", "iothread", "loop", "memory", "snapshot", "vhost",
         "virtio")
_BUSY_MODULES = tuple(f"stratovirt.{name}" for name in _BUSY)
_MOST = 20_000


def guest(architecture: str = ARCHITECTURE, reset: bool = True) -> bytes:
    """A kernel that resets the machine, or halts: an ELF file with a PVH note, on arm64 an Image."""
    if architecture == "aarch64":
        jump, flags = 0x14000000 | _ARM64_ENTRY // 4, 1 << 1 | 1 << 3  # pages of 4 KiB, anywhere in RAM
        header = struct.pack("<IIQQQQQQ4sI", jump, 0, 0, 0x1000, flags, 0, 0, 0, b"ARM\x64", 0)
        words = (*_ARM64_RESET, *_ARM64_HALT) if reset else _ARM64_HALT
        return header + struct.pack(f"<{len(words)}I", *words)
    code = _RESET + _HALT if reset else _HALT
    note = struct.pack("<III4sI", 4, 4, _NOTE_PVH_ENTRY, b"Xen\0", _LOAD)
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, _LOAD, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 5, _CODE_OFFSET, _LOAD, _LOAD, len(code), len(code), 0x1000)
    notes = struct.pack("<IIQQQQQQ", 4, 4, 64 + 2 * 56, 0, 0, len(note), len(note), 4)
    return (header + load + notes + note).ljust(_CODE_OFFSET, b"\0") + code


def practise(runs: int = RUNS) -> bool:
    """Run machines; False when there is no KVM to run them. Thread: main, and the only one again afterwards."""
    before = _open_descriptors()
    kernel = os.memfd_create("practice", os.MFD_CLOEXEC)
    try:
        os.write(kernel, guest())
        for _ in range(runs):
            _run_once(kernel)
            rehearse()
    except StratoVirtError as error:
        log.warn(f"no practice, and machines start a little slower: {error}")
        return False
    finally:
        gc.collect()  # mappings have descriptors of their own, and close them
        for fd in _open_descriptors() - before:  # a machine leaves its to the end of its process
            os.close(fd)
    deadline = time.monotonic() + SECONDS
    while len(os.listdir("/proc/self/task")) > 1 and time.monotonic() < deadline:
        time.sleep(0.001)  # a vCPU's thread has done its last act, and is about to end
    return True


def _open_descriptors() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")}


def _run_once(kernel: int) -> None:
    from stratovirt.cli import command
    from stratovirt.loop import EventLoop
    from stratovirt.machine.microvm import MicroVm

    config = command.parse([*_arguments(kernel), *_DISK.format(kernel).split()])
    loop = EventLoop()
    machine = MicroVm(config, loop, time.monotonic())
    try:
        machine.build()
        machine.start()
        loop.call_later(SECONDS, loop.stop)  # a KVM that does not run it
        loop.run()
    finally:
        machine.close()
        loop.close()


def _arguments(kernel: int) -> list[str]:
    return ["-machine", "microvm", "-m", "128M", "-smp", "1", "-kernel", f"/proc/self/fd/{kernel}"]


class _NoAccelerator:
    """Takes everything and does nothing."""

    now = staticmethod(time.time)

    @property
    def vm(self) -> _NoAccelerator:
        return self

    def add_memory(self, region: RamRegion) -> None: ...

    def create_interrupt_chips(self) -> str:
        return ""

    def create_irqfd(self, gsi: int) -> _NoAccelerator:
        return self

    def create_level_line(self, spi: int) -> _NoAccelerator:
        return self

    def set_level(self, high: bool) -> None: ...

    def device_loop(self, loop: object, call: object) -> object:
        return loop

    def create_processors(self, boot: Boot | None) -> None: ...

    def stop(self) -> None: ...


def rehearse() -> None:
    """Build a machine as far as it can be without KVM, and forget it. The caller closes what is open."""
    from stratovirt.cli import command
    from stratovirt.loop import EventLoop
    from stratovirt.machine.microvm import MicroVm

    kernel = os.memfd_create("practice", os.MFD_CLOEXEC)
    os.write(kernel, guest())
    machine = MicroVm(command.parse(_arguments(kernel)), EventLoop(), time.monotonic())
    machine._create_accelerator = _NoAccelerator  # type: ignore[method-assign, assignment]
    machine.build()
    gc.collect()  # what the launcher had is frozen, and not looked at


def settle() -> None:
    """Have the interpreter write no more to code that no guest keeps busy. It runs as fast as it does now, and never faster."""
    if compiled is None:
        return
    seen: set[int] = set()
    for one in gc.get_objects():
        if type(one) is _Function and not str(one.__module__).startswith(_BUSY_MODULES):
            _settle(one.__code__, seen)


def _settle(code: CodeType, seen: set[int]) -> None:
    if id(code) in seen:
        return
    seen.add(id(code))
    compiled.settle_code(code)  # type: ignore[union-attr]  # `settle` has looked
    for one in code.co_consts:
        if type(one) is type(code):
            _settle(one, seen)


def fill_gaps() -> list[object]:
    """Take the free places; they stay taken as long as the result is kept."""
    gc.collect()
    kept: list[object] = []
    for size in range(_SMALLEST, _LARGEST + 1, _STEP):
        made: list[bytes] = []
        expected, in_a_row, fresh = 0, 0, 0
        # When most of a pool has come out in a row it was a new one, or had hardly been begun; the second of them is new.
        while fresh < _FRESH and len(made) < _MOST:
            one = bytes(size - _BYTES_OVERHEAD)
            made.append(one)
            in_a_row = in_a_row + 1 if id(one) == expected else 0
            expected = id(one) + size
            if in_a_row * size == _IN_A_ROW // size * size:
                fresh += 1
        kept.append(tuple(made))
    return kept
