"""What a guest's driver sees of a disk that comes and goes: an interrupt, its cause, and the new capacity."""

from __future__ import annotations

from pathlib import Path

from kvm.guests import DATA, Asm
from stratovirt.arch.x86_64 import layout
from stratovirt.config.vm import DriveConfig
from unit.virtio_driver import (
    ACKNOWLEDGE,
    CONFIG,
    DRIVER,
    DRIVER_FEATURES,
    DRIVER_FEATURES_SEL,
    DRIVER_OK,
    FEATURES_OK,
    INTERRUPT_ACK,
    INTERRUPT_STATUS,
    STATUS,
)

ROUNDS = 10
CAUSE, CAPACITY = DATA + 4, DATA + 8
CONFIG_CHANGED = 2


def test_each_change_interrupts_the_guest_once_and_shows_the_new_capacity(machine, tmp_path: Path) -> None:
    slot = layout.slot(1)
    window = slot.base
    asm = Asm().set_stack().gate(32 + slot.irq, "disk").load_idt().pic().store(DATA, 0)
    asm.store(window + STATUS, 0).store(window + STATUS, ACKNOWLEDGE | DRIVER)
    asm.store(window + DRIVER_FEATURES_SEL, 1).store(window + DRIVER_FEATURES, 1)
    asm.store(window + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)
    asm.store(window + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
    asm.load_eax(window + CONFIG).store_eax(CAPACITY).store(CAUSE, 0xFF).sti()
    again = asm.label()
    asm.load_eax(DATA).cmp_eax(2 * ROUNDS).jb(again).power_off()
    asm.handler("disk").load_eax(window + INTERRUPT_STATUS).store_eax(CAUSE).store_eax(window + INTERRUPT_ACK)
    asm.load_eax(window + CONFIG).store_eax(CAPACITY).inc(DATA).end_of_interrupt()
    board = machine(asm.kernel(), "-qmp", f"unix:{tmp_path / 'never-bound'},server,nowait").start()
    board.run_until(lambda: board.word(CAUSE) == 0xFF)
    assert board.word(CAPACITY) == 0
    hotplug = board.vm.hotplug
    for number in range(ROUNDS):
        image = tmp_path / f"image{number}"
        image.write_bytes(bytes(512 * (number + 5)))
        hotplug.add_node(DriveConfig("n", str(image), direct=False))
        hotplug.plug_disk("n", "n", 1)
        board.run_until(lambda number=number: board.word(DATA) == 2 * number + 1)
        assert (board.word(CAUSE), board.word(CAPACITY)) == (CONFIG_CHANGED, number + 5)
        hotplug.unplug("n")
        board.run_until(lambda number=number: board.word(DATA) == 2 * number + 2)
        assert (board.word(CAUSE), board.word(CAPACITY)) == (CONFIG_CHANGED, 0)
    board.run()
    assert [name for name, _ in board.told].count("DEVICE_DELETED") == ROUNDS
