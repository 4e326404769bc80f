"""A reset in place gives a guest the machine it had at its first instruction: everything it can read is as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvm.guests import DATA, EAX, EBX, ECX, EDX, Asm
from kvm.memories import KINDS, arguments
from stratovirt.arch.x86_64 import layout

REPORT = 0x510
LAPIC, IOAPIC = layout.LAPIC, layout.IOAPIC
VIRTIO = layout.slot(6).base
RNG = ("-object", "rng-random,id=r0,filename=/dev/urandom", "-device", "virtio-rng-device,rng=r0,id=rng0")


class Reports:
    """What the guest wrote, boot by boot: each starts with MARK."""

    MARK = 0xB007_B007

    def __init__(self) -> None:
        self.boots: list[list[int]] = []

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if value == self.MARK:
            self.boots.append([])
        else:
            self.boots[-1].append(value)


def watched(machine, asm: Asm, *arguments: str, boots: int = 4) -> list[list[int]]:
    """Run it until it has booted so often; the reports of all boots but the last, which may not be complete."""
    vm = machine(asm.reset().kernel(), "-action", "reboot=reset", *arguments)
    reports = Reports()
    vm.vm.ports.claim(REPORT, 4, reports)
    vm.start()
    vm.run_until(lambda: len(reports.boots) >= boots)
    assert vm.vm.state == "running"
    return reports.boots[: boots - 1]


def begin() -> Asm:
    return Asm().out(REPORT, Reports.MARK, 4)


def report(asm: Asm) -> Asm:
    return asm.out_eax(REPORT, 4)


def test_device_registers(machine, tmp_path) -> None:
    asm = begin()
    for port in (0x21, 0xA1, 0x3F9, 0x3FA, 0x3FB, 0x3FC, 0x3FD, 0x3FE, 0x3FF):
        report(asm.mov(EAX, 0).in_eax(port))
    report(asm.in_eax(0x61).raw(0x25, b"\x03\0\0\0"))  # and eax, 3: the other bits change with time
    for command in (0x0A, 0x0B):  # the requests and the interrupts in service of both PICs
        for port in (0x20, 0xA0):
            report(asm.out(port, command).mov(EAX, 0).in_eax(port))
    report(asm.out(0x70, 0x0F).mov(EAX, 0).in_eax(0x71))
    for register in (0x20, 0x80, 0xD0, 0xE0, 0xF0, 0x100, 0x200, 0x280, 0x320, 0x350, 0x360, 0x370, 0x380, 0x3E0):
        report(asm.load_eax(LAPIC + register))
    for register in (0, *range(0x10, 0x40)):
        report(asm.store(IOAPIC, register).load_eax(IOAPIC + 0x10))
    for register in (0x008, 0x034, 0x044, 0x060, 0x070, 0x0FC):
        report(asm.load_eax(VIRTIO + register))
    # now spoil it all
    asm.pic().out(0x61, 3).out(0x43, 0x34).out(0x40, 1).out(0x40, 1)  # a fast timer: requests are pending
    asm.out(0x70, 0x0F).out(0x71, 0x5A).out(0x3FB, 0x80).out(0x3F9, 0x12).out(0x3FB, 0x1B).out(0x3FC, 0x1F).out(0x3FF, 0x77)
    for register, value in ((0x80, 0x30), (0xE0, 0), (0xF0, 0x1FF), (0x320, 0x2_0040), (0x350, 0x1_0000), (0x370, 0x44),
                            (0x3E0, 0xB), (0x380, 1000), (0x300, 0x0004_0041)):
        asm.store(LAPIC + register, value)
    for register in range(0x10, 0x40, 2):
        asm.store(IOAPIC, register).store(IOAPIC + 0x10, 0xA0 + register)
    for status in (1, 3):
        asm.store(VIRTIO + 0x70, status)
    boots = watched(machine, asm, *RNG, "-serial", f"file,path={tmp_path / 'console'}")
    assert len(boots[0]) > 70
    assert boots[1] == boots[0]
    assert boots[2] == boots[0]


def test_processor_registers(machine) -> None:
    """Control registers and MSRs that a kernel changes early and a boot loader never."""
    msrs = (0x1B, 0x174, 0x175, 0x176, 0x277, 0xC000_0080, 0xC000_0081, 0xC000_0082, 0xC000_0084, 0xC000_0100, 0xC000_0101,
            0xC000_0102)
    asm = begin()
    for modrm in (0xC0, 0xD0, 0xD8, 0xE0):  # mov eax, cr0, cr2, cr3, cr4
        report(asm.raw(0x0F, 0x20, modrm))
    for modrm in (0xC0, 0xF8):  # mov eax, dr0 and dr7
        report(asm.raw(0x0F, 0x21, modrm))
    for msr in msrs:
        report(asm.mov(ECX, msr).raw(0x0F, 0x32))  # rdmsr
    report(asm.set_stack().raw(0x9C, 0x58))  # pushf; pop eax
    report(asm.raw(0x8C, 0xD8))  # mov eax, ds
    report(asm.raw(0x89, 0xD8))  # mov eax, ebx: the start information
    # spoil
    asm.mov(EAX, 0x1000).raw(0x0F, 0x22, 0xD8).raw(0x0F, 0x22, 0xD0)  # cr3, cr2
    asm.mov(EAX, 0x30).raw(0x0F, 0x22, 0xE0)  # cr4: PAE, PSE
    asm.mov(EAX, 0x1234).raw(0x0F, 0x23, 0xC0)  # dr0
    for msr, value in ((0x174, 8), (0x175, 0x1000), (0x176, 0x2000), (0xC000_0080, 0x101), (0xC000_0081, 7),
                       (0xC000_0082, 0x55), (0xC000_0100, 0x66), (0xC000_0102, 0x77)):
        asm.mov(ECX, msr).mov(EAX, value).mov(EDX, 0).raw(0x0F, 0x30)  # wrmsr
    asm.mov(EBX, 0xDEAD)
    boots = watched(machine, asm)
    assert len(boots[0]) == 6 + len(msrs) + 3
    assert boots[1] == boots[0]
    assert boots[2] == boots[0]


@pytest.mark.parametrize("kind", KINDS)
def test_memory(machine, tmp_path: Path, kind: str) -> None:
    """Zero where it was zero, the kernel as it is in its file, the firmware's tables as they were."""
    places = (0x500, 0x6000, 0x7000, 0x2_0000, 0x9_FC00, 0xD_0000, 0xE_0000, 0xE_0024, 0x10_0000, DATA, 0x700_0000, 0x7FF_F000)
    asm = begin()
    for place in places:
        report(asm.load_eax(place))
    for place in places:
        if place != 0x10_0000:
            asm.store(place, 0x5555_5555)
    asm.store(0x10_0004, 0x9090_9090)
    report(asm.load_eax(0x10_0004))
    boots = watched(machine, asm, *arguments(kind, tmp_path))
    assert boots[0][-1] == 0x9090_9090
    assert boots[1] == boots[0]
    assert boots[2] == boots[0]


@pytest.mark.parametrize("cpus", [2, 8])
def test_all_processors_start_again(machine, cpus: int) -> None:
    """Those that ran wait for their start-up IPI again."""
    ap = Asm(0x8000).raw(0x31, 0xC0, 0x8E, 0xD8, 0xF0, 0x66, 0xFF, 0x06, b"\x00\x70", 0xF4, 0xEB, 0xFD).build()
    asm = begin()
    report(asm.load_eax(0x7000))
    for offset in range(0, len(ap), 4):
        asm.store(0x8000 + offset, int.from_bytes(ap[offset : offset + 4], "little"))
    asm.store(LAPIC + 0xF0, 0x1FF).store(LAPIC + 0x300, 0x000C_4500)
    asm.store(LAPIC + 0x300, 0x000C_4608).store(LAPIC + 0x300, 0x000C_4608)
    again = asm.label()
    asm.load_eax(0x7000).cmp_eax(cpus - 1).jnz(again)
    report(asm)
    boots = watched(machine, asm, "-smp", str(cpus), boots=6)
    assert boots == [[0, cpus - 1]] * 5
