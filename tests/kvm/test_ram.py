"""Guests on memory that is a file: what they write is what another process reads, and what it writes they read."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from kvm.guests import CODE, DATA, Asm
from kvm.memories import KINDS, arguments
from unit.images import Load

WORD = 0x1234_5678


@pytest.mark.parametrize("kind", ["mem-share", "directory, shared", "memfd object", "file object"])
def test_another_process_and_the_guest_see_each_other(machine, tmp_path: Path, kind: str) -> None:
    """The kernel and the initrd too: they are in the file, not mapped over it."""
    asm = Asm().store(DATA, WORD).wait_nonzero(DATA + 4).store_eax(DATA + 8).power_off()
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"070701" + b"x" * 9000)
    payload = bytes(range(256)) * 1024
    vm = machine(asm.kernel(Load(payload, 0x40_0000, memory_size=len(payload) + 5000)), "-initrd", str(initrd),
                 *arguments(kind, tmp_path))
    assert vm.memory.shared
    region = vm.memory.regions[0]
    seen = mmap.mmap(region.fd, region.size, flags=mmap.MAP_SHARED, offset=region.fd_offset)
    assert seen[CODE : CODE + 4] == asm.build()[:4]
    assert seen[0x40_0000 : 0x40_0000 + len(payload) + 5000] == payload.ljust(len(payload) + 5000, b"\0")
    assert seen.find(initrd.read_bytes()) > CODE
    vm.start()
    vm.run_until(lambda: int.from_bytes(seen[DATA : DATA + 4], "little") == WORD)
    seen[DATA + 4 : DATA + 8] = (99).to_bytes(4, "little")
    vm.run()
    assert int.from_bytes(seen[DATA + 8 : DATA + 12], "little") == 99
    assert vm.word(DATA + 8) == 99


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_that_is_not_empty_is_used_as_it_is(machine, tmp_path: Path, shared: bool) -> None:
    """Behind the kernel's bytes there is zero all the same; and only shared memory goes back into the file."""
    path = tmp_path / "memory"
    path.write_bytes(b"\xa5" * (128 << 20))
    asm = Asm().load_eax(DATA).store_eax(DATA + 4).store(DATA, WORD).power_off()
    vm = machine(asm.kernel(Load(b"data", 0x40_0000, memory_size=9000)), "-mem-path", str(path), "-machine",
                 f"microvm,mem-share={'on' if shared else 'off'}")
    assert vm.memory.read(0x40_0000, 9000) == b"data".ljust(9000, b"\0")
    vm.run()
    assert (vm.word(DATA + 4), vm.word(DATA)) == (0xA5A5_A5A5, WORD)
    with path.open("rb") as file:
        file.seek(DATA)
        assert int.from_bytes(file.read(4), "little") == (WORD if shared else 0xA5A5_A5A5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dump", ["on", "off"])
def test_core_dumps(machine, tmp_path: Path, kind: str, dump: str) -> None:
    """The kernel is told which memory is not for core dumps: the flag dd of its mapping."""
    words = arguments(kind, tmp_path)
    if "-machine" in words:
        words[words.index("-machine") + 1] += f",dump-guest-core={dump}"
    else:
        words += ["-machine", f"microvm,dump-guest-core={dump}"]
    address = machine(Asm().power_off().kernel(), *words).memory.regions[0].host.address
    inside, flags = False, []
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        name, *rest = line.split()
        if "-" in name and not name.endswith(":"):
            start, _, end = name.partition("-")
            inside = int(start, 16) <= address < int(end, 16)
        elif inside and name == "VmFlags:":
            flags = rest
    assert ("dd" in flags) == (dump == "off")


@pytest.mark.parametrize(("words", "expected"), [
    (("-mem-path", "/dev/null"), "-mem-path /dev/null: this is not a regular file"),
    (("-mem-path", "PATH/small"), "the file has 4 bytes"),
    (("-object", "memory-backend-ram,id=m,size=128M,host-nodes=99,policy=bind", "-machine", "microvm,memory-backend=m"),
     "host-nodes 99: mbind"),
])
def test_what_does_not_work_is_one_line(launch, tmp_path: Path, words: tuple[str, ...], expected: str) -> None:
    (tmp_path / "small").write_bytes(b"tiny")
    program = launch(Asm().text("ran").power_off().kernel(), *(word.replace("PATH", str(tmp_path)) for word in words))
    status, out, error = program.finish()
    assert (status, out) == (1, "")
    assert expected in error
    assert "Traceback" not in error
    assert len(error.splitlines()) == 1


def test_an_object_that_nothing_refers_to_is_named_in_the_log(launch) -> None:
    program = launch(Asm().power_off().kernel(), "-object", "memory-backend-ram,id=spare,size=1G")
    status, _, error = program.finish()
    assert status == 0
    assert "spare: this memory is not used" in error
