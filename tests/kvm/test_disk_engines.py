"""A real vCPU and every engine: kicks arrive through ioeventfd, completions through the engine's eventfd, nothing is lost."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from kvm.guests import EAX, EBX, Asm
from kvm.test_devices import BUFFERS, bring_up, prepare, queue_layout
from kvm.test_snapshot_chain import chain_of, differing
from stratovirt.arch.x86_64 import layout
from stratovirt.backends import aio
from stratovirt.errors import ConfigError
from unit.virtio_devices import disk_content
from unit.virtio_driver import QUEUE_NOTIFY

ROUNDS = 200


@pytest.mark.parametrize("engine", ["off", *aio.ENGINES])
def test_many_kicks_lose_no_request(machine, tmp_path: Path, engine: str) -> None:
    """One kick a request, the guest spinning on the used index in between; sixteen requests in turn, reads and writes."""
    try:
        aio.probe(engine)
    except ConfigError as error:
        pytest.skip(str(error))
    image = tmp_path / "disk.img"
    image.write_bytes(disk_content(64))
    if engine == "native":
        try:
            os.close(os.open(image, os.O_RDWR | os.O_DIRECT))
        except OSError:
            pytest.skip("the file system of the tests has no O_DIRECT")
    place = queue_layout()
    asm = Asm()
    bring_up(asm, layout.slot(0).base, place)
    asm.mov(EBX, 0)
    loop = asm.label()
    asm.raw(0x43)  # inc ebx
    asm.raw(0x66, 0x89, 0x1D, struct.pack("<I", place.avail + 2))  # mov [avail.idx], bx
    asm.store(layout.slot(0).base + QUEUE_NOTIFY, 0)
    spin = asm.label()
    asm.mov(EAX, 0).load_eax(place.used + 2, 2).raw(0x39, 0xD8).jnz(spin)  # cmp eax, ebx
    asm.cmp_eax(ROUNDS).jnz(loop).power_off()
    vm = machine(asm.kernel(), "-drive", f"file={image},id=d0,aio={engine}", "-device", "virtio-blk-device,drive=d0,id=blk0")
    prepare(vm, [(0, 9), (1, 11), (0, 63)])
    for slot in range(16):
        vm.memory.store_u16(place.avail + 4 + 2 * slot, 3 * (slot % 3))
    vm.run()
    content = disk_content(64)
    assert vm.memory.load_u16(place.used + 2) == ROUNDS
    assert [vm.memory.read(BUFFERS + 0x1000 * number + 0x800, 1) for number in range(3)] == [b"\0"] * 3
    assert vm.memory.read(BUFFERS + 0x200, 512) == content[9 * 512 : 10 * 512]
    assert vm.memory.read(BUFFERS + 0x2200, 512) == content[63 * 512 :]
    assert image.read_bytes() == content[: 11 * 512] + b"\1" * 512 + content[12 * 512 :]


@pytest.mark.parametrize("iothread", [False, True])
@pytest.mark.parametrize("engine", ["off", "threads", "io_uring"])
def test_what_a_disk_writes_into_memory_is_counted(machine, tmp_path: Path, engine: str, iothread: bool) -> None:
    """The guest reads one sector over and over: only the device writes there, and an incremental snapshot has it."""
    try:
        aio.probe(engine)
    except ConfigError as error:
        pytest.skip(str(error))
    image = tmp_path / "disk.img"
    image.write_bytes(disk_content(64))
    place = queue_layout()
    asm = Asm()
    bring_up(asm, layout.slot(0).base, place)
    asm.mov(EBX, 0)
    loop = asm.label()
    asm.raw(0x43)  # inc ebx
    asm.raw(0x66, 0x89, 0x1D, struct.pack("<I", place.avail + 2))  # mov [avail.idx], bx
    asm.store(layout.slot(0).base + QUEUE_NOTIFY, 0)
    spin = asm.label()
    asm.load_eax(place.used + 2, 2).raw(0x66, 0x39, 0xD8).jnz(spin).jmp(loop)  # cmp ax, bx
    more, keys = (("-object", "iothread,id=io0"), ",iothread=io0") if iothread else ((), "")
    vm = machine(asm.kernel(), "-drive", f"file={image},id=d0,direct=off,aio={engine}", *more,
                 "-device", f"virtio-blk-device,drive=d0,id=blk0{keys}")
    prepare(vm, [(0, 9)])
    sector = BUFFERS + 0x200
    vm.start().run_until(lambda: vm.memory.read(sector, 512) == disk_content(64)[9 * 512 : 10 * 512])
    vm.vm.snapshot(str(tmp_path / "a"), track=True)
    for number, base in ((1, "a"), (2, "whole1")):
        with open(image, "r+b") as file:
            file.seek(9 * 512)
            file.write(bytes((number,)) * 512)
        vm.vm.resume()
        vm.run_until(lambda number=number: vm.memory.read(sector, 512) == bytes((number,)) * 512)
        vm.vm.snapshot(str(tmp_path / f"diff{number}"), str(tmp_path / base))
        vm.vm.snapshot(str(tmp_path / f"whole{number}"))
        assert differing(tmp_path / f"diff{number}", tmp_path / f"whole{number}") == []
        ranges = chain_of(tmp_path / f"diff{number}").links[0].ranges
        assert any(start <= sector < end for start, end in ranges or []) and len(ranges or []) < 10
