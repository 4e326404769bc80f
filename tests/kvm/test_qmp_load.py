"""QMP while a guest keeps a device busy without a pause: its disk, on the main loop and on an iothread, or its balloon."""

from __future__ import annotations

import os
import statistics
import struct
import time
from pathlib import Path

import pytest

from kata import Qmp
from kvm.guests import EBX, Asm
from kvm.test_devices import bring_up, queue_layout
from stratovirt.arch.x86_64 import layout
from unit.images import Load
from unit.virtio_driver import QUEUE_NOTIFY, GuestQueue, guest_memory

RINGS, BUFFERS, END = 0x30_0000, 0x34_0000, 0x80_0000
QUEUE_SIZE, BATCH, LENGTH = 64, 16, 64 << 10
QUESTIONS = 100
FIRST_PAGE = (32 << 20) >> 12
LIMIT = 1.0  # seconds, for a machine under load; on an idle one the median is 0.3 ms and nearly all come within 10 ms


def again_and_again(slot: layout.Slot, queue_size: int, batch: int, image: bytes) -> bytes:
    """A guest that makes the same `batch` chains of a device's first queue available whenever they have come back.

    `image` is what lies at RINGS: the queue, its available ring full, and what its buffers are to hold.
    """
    place = queue_layout(queue_size)
    asm = Asm().set_stack()
    bring_up(asm, slot.base, place, features=0)
    asm.text("running\n").mov(EBX, 0)
    again = asm.label()
    asm.raw(0x81, 0xC3, struct.pack("<I", batch))  # add ebx, batch
    asm.raw(0x66, 0x89, 0x1D, struct.pack("<I", place.avail + 2))  # mov [avail.idx], bx
    asm.store(slot.base + QUEUE_NOTIFY, 0)
    spin = asm.label()
    asm.load_eax(place.used + 2, 2).raw(0x66, 0x39, 0xD8).jnz(spin)  # cmp ax, bx
    asm.jmp(again)
    return asm.kernel(Load(image, RINGS))


def fill_available(queue: GuestQueue, heads: list[int]) -> None:
    for entry in range(queue.size):
        queue.memory.store_u16(queue.avail + 4 + 2 * entry, heads[entry % len(heads)])
    queue.memory.store_u16(queue.avail + 2, 0)


def reader() -> bytes:
    """Sixteen reads of 64 KiB a notification."""
    memory = guest_memory(END)
    queue = GuestQueue(memory, RINGS, QUEUE_SIZE)
    heads = []
    for number in range(BATCH):
        at = BUFFERS + 0x2_0000 * number
        memory.write(at, struct.pack("<IIQ", 0, 0, LENGTH // 512 * number))
        heads.append(queue.add([(at, 16, False), (at + 0x1000, LENGTH, True), (at + 0x800, 1, True)]))
    fill_available(queue, heads)
    image = memory.read(RINGS, BUFFERS + 0x2_0000 * BATCH - RINGS)
    return again_and_again(layout.slot(0), QUEUE_SIZE, BATCH, image)


def inflater() -> bytes:
    """Half of the memory goes into the balloon, 256 pages a buffer, over and over."""
    memory = guest_memory(END)
    queue = GuestQueue(memory, RINGS, QUEUE_SIZE)
    heads = []
    for number in range(QUEUE_SIZE):
        at = BUFFERS + 0x400 * number
        first = FIRST_PAGE + 256 * number
        memory.write(at, struct.pack("<256I", *range(first, first + 256)))
        heads.append(queue.add([(at, 0x400, False)]))
    fill_available(queue, heads)
    return again_and_again(layout.slot(6), QUEUE_SIZE, QUEUE_SIZE, memory.read(RINGS, BUFFERS + 0x400 * QUEUE_SIZE - RINGS))


def latencies(qmp: Qmp, command: str) -> list[float]:
    """Seconds that each of the questions took, in ascending order."""
    times = []
    for _ in range(QUESTIONS):
        began = time.monotonic()
        assert "class" not in qmp.ask(command)
        times.append(time.monotonic() - began)
        time.sleep(0.012)  # a hundred requests a second are let through
    return sorted(times)


def main_thread(pid: int) -> float:
    """Seconds of processor time that the main loop has had."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


def report(what: str, times: list[float]) -> None:
    print(f"{what}: median {1e3 * statistics.median(times):.2f} ms, 99 of 100 within {1e3 * times[-2]:.2f} ms, "
          f"slowest {1e3 * times[-1]:.2f} ms")


@pytest.mark.parametrize(("place", "aio"), [
    ("main", "off"), ("iothread", "off"), ("iothread", "threads"), ("iothread", "io_uring"),
])
def test_qmp_answers_while_the_disk_is_read(launch, tmp_path: Path, place: str, aio: str) -> None:
    image, socket = tmp_path / "disk.img", tmp_path / "qmp.socket"
    image.write_bytes(os.urandom(LENGTH * BATCH))
    keys = ",iothread=io0" if place == "iothread" else ""
    program = launch(reader(), "-qmp", f"unix:{socket},server,nowait", "-object", "iothread,id=io0", "-drive",
                     f"id=d,file={image},direct=off,aio={aio}", "-device",
                     f"virtio-blk-device,id=b,drive=d,queue-size={QUEUE_SIZE}{keys}")
    program.wait_for("running\n")
    qmp = Qmp(socket)

    def reads() -> int:
        (block,) = qmp.ask("query-blockstats")
        assert block["stats"]["failed_rd_operations"] == 0
        return int(block["stats"]["rd_operations"])

    before = reads()
    times = latencies(qmp, "query-status")
    served = reads() - before
    report(f"{place}, {aio}, {served} reads meanwhile", times)
    assert served > 10 * BATCH
    assert times[-1] < LIMIT, times[-5:]
    assert qmp.ask("quit") == {}
    qmp.close()
    assert program.finish()[0] == 0


def test_qmp_answers_while_half_of_the_memory_goes_into_the_balloon(launch, tmp_path: Path) -> None:
    socket = tmp_path / "qmp.socket"
    program = launch(inflater(), "-qmp", f"unix:{socket},server,nowait", "-device", "virtio-balloon-device,id=balloon0")
    program.wait_for("running\n")
    qmp = Qmp(socket)
    assert qmp.ask("balloon", value=64 << 20) == {}
    before = main_thread(program.process.pid)
    times = latencies(qmp, "query-balloon")
    worked = main_thread(program.process.pid) - before
    report(f"balloon, {worked:.1f} s of work meanwhile", times)
    assert worked > 0.2  # answers alone take a hundredth
    assert times[-1] < LIMIT, times[-5:]
    assert qmp.ask("quit") == {}
    qmp.close()
    assert program.finish()[0] == 0
