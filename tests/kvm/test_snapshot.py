"""Snapshots with tiny guests: what counted goes on counting, what rang goes on ringing, and bad files are refused by name."""

from __future__ import annotations

import time
from pathlib import Path

from kvm.guests import DATA, Asm

TICKS, TURNS, MARK = DATA, DATA + 4, DATA + 8


def counter() -> bytes:
    """Counts timer interrupts and turns of a loop; says so on the serial port every 16 ticks."""
    asm = Asm().set_stack().load_idt().gate(32, "tick").pic(mask_master=0xFE, mask_slave=0xFF)
    asm.out(0x43, 0x34).out(0x40, 0xA9).out(0x40, 0x04)  # 1 kHz
    asm.store(MARK, 0x5EED).text("up\n").sti()
    again = asm.label()
    asm.inc(TURNS).load_eax(TICKS).raw(0x25, b"\x0f\0\0\0").cmp_eax(0).jnz(again)  # and eax, 15
    asm.load_eax(MARK).cmp_eax(0x5EED).jnz("lost").text(".")
    asm.label("wait")
    asm.load_eax(TICKS).raw(0x25, b"\x0f\0\0\0").cmp_eax(0).jz("wait").jmp(again)
    asm.label("lost")
    asm.text("lost\n").power_off()
    asm.handler("tick").inc(TICKS).end_of_interrupt()
    return asm.kernel()


def take(machine, directory: Path) -> None:
    machine.vm.snapshot(str(directory))


def test_a_counter_goes_on_and_so_does_its_timer(machine, tmp_path) -> None:
    first = machine(counter(), "-serial", f"file,path={tmp_path / 'first'}").start()
    first.run_until(lambda: first.word(TICKS) > 20)
    take(first, tmp_path / "snap")
    assert first.vm.state == "paused" and first.vm.migration == "completed"
    ticks, turns = first.word(TICKS), first.word(TURNS)
    second = machine(counter(), "-serial", f"file,path={tmp_path / 'second'}", "-incoming", f"file:{tmp_path / 'snap'}")
    assert (second.word(TICKS), second.word(TURNS), second.vm.state) == (ticks, turns, "created")
    second.start()
    second.run_until(lambda: second.word(TICKS) > ticks + 40 and second.word(TURNS) > turns)
    assert second.vm.state == "running"
    first.vm.resume()
    first.run_until(lambda: first.word(TICKS) > ticks + 40)
    second.vm.pause()
    deadline = time.monotonic() + 10
    while b"." not in (tmp_path / "second").read_bytes() and time.monotonic() < deadline:
        second.loop.run_once(0.01)
    assert set((tmp_path / "second").read_bytes()) == set(b"."), "no boot, no lost mark"
    assert first.word(TICKS) != 0 and (tmp_path / "snap" / "memory").stat().st_blocks * 512 < 1 << 21, "zero pages are holes"
