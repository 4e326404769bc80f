"""QMP while a guest reads its disk without a pause, on the main loop and on an iothread."""

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
LIMIT = 1.0  # seconds, for a machine under load; on an idle one the median is 0.3 ms and nearly all come within 10 ms


def guest() -> bytes:
    """Sixteen reads of 64 KiB a notification, again and again."""
    place = queue_layout(QUEUE_SIZE)
    asm = Asm().set_stack()
    bring_up(asm, layout.slot(0).base, place)
    asm.text("running\n").mov(EBX, 0)
    again = asm.label()
    asm.raw(0x83, 0xC3, BATCH)  # add ebx, BATCH
    asm.raw(0x66, 0x89, 0x1D, struct.pack("<I", place.avail + 2))  # mov [avail.idx], bx
    asm.store(layout.slot(0).base + QUEUE_NOTIFY, 0)
    spin = asm.label()
    asm.load_eax(place.used + 2, 2).raw(0x66, 0x39, 0xD8).jnz(spin)  # cmp ax, bx
    asm.jmp(again)
    memory = guest_memory(END)
    queue = GuestQueue(memory, RINGS, QUEUE_SIZE)
    heads = []
    for number in range(BATCH):
        at = BUFFERS + 0x2_0000 * number
        memory.write(at, struct.pack("<IIQ", 0, 0, LENGTH // 512 * number))
        heads.append(queue.add([(at, 16, False), (at + 0x1000, LENGTH, True), (at + 0x800, 1, True)]))
    for entry in range(QUEUE_SIZE):
        memory.store_u16(queue.avail + 4 + 2 * entry, heads[entry % BATCH])
    memory.store_u16(queue.avail + 2, 0)
    return asm.kernel(Load(memory.read(RINGS, BUFFERS + 0x2_0000 * BATCH - RINGS), RINGS))


@pytest.mark.parametrize(("place", "aio"), [("main", "off"), ("iothread", "off")])
def test_qmp_answers_while_the_disk_is_read(launch, tmp_path: Path, place: str, aio: str) -> None:
    image, socket = tmp_path / "disk.img", tmp_path / "qmp.socket"
    image.write_bytes(os.urandom(LENGTH * BATCH))
    keys = ",iothread=io0" if place == "iothread" else ""
    program = launch(guest(), "-qmp", f"unix:{socket},server,nowait", "-object", "iothread,id=io0", "-drive",
                     f"id=d,file={image},direct=off,aio={aio}", "-device",
                     f"virtio-blk-device,id=b,drive=d,queue-size={QUEUE_SIZE}{keys}")
    program.wait_for("running\n")
    qmp = Qmp(socket)

    def reads() -> int:
        (block,) = qmp.ask("query-blockstats")
        assert block["stats"]["failed_rd_operations"] == 0
        return int(block["stats"]["rd_operations"])

    before, times = reads(), []
    for _ in range(QUESTIONS):
        began = time.monotonic()
        assert qmp.ask("query-status")["running"] is True
        times.append(time.monotonic() - began)
        time.sleep(0.012)  # a hundred requests a second are let through
    times.sort()
    served = reads() - before
    print(f"{place}, {aio}: {served} reads meanwhile; QMP: median {1e3 * statistics.median(times):.2f} ms, "
          f"99 of 100 within {1e3 * times[-2]:.2f} ms, slowest {1e3 * times[-1]:.2f} ms")
    assert served > 10 * BATCH
    assert times[-1] < LIMIT, times[-5:]
    assert qmp.ask("quit") == {}
    qmp.close()
    assert program.finish()[0] == 0
