"""The life of a machine with a real vCPU: how guests end, start again, pause, and what is left behind."""

from __future__ import annotations

import gc
import os
import time

from kvm.guests import DATA, RESET_PORT, Asm, hello
from stratovirt.machine.halt_watch import INTERVAL_SECONDS
from unit.images import Load


def counting(port: int = 0x510) -> Asm:
    """Writes 0, 1, 2, … to a port for ever."""
    asm = Asm().mov(0, 0)
    again = asm.label()
    return asm.out_eax(port, 4).raw(0x40).jmp(again)  # inc eax


class Counter:
    """Checks that the numbers come one after the other, none lost and none twice."""

    def __init__(self) -> None:
        self.next = 0
        self.wrong: list[tuple[int, int]] = []

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if value != self.next and value != 0:
            self.wrong.append((self.next, value))
        self.next = value + 1


# -- ends


def test_power_off_ends_the_process_with_0(launch) -> None:
    assert launch(Asm().power_off().kernel()).finish()[0] == 0


def test_a_reboot_ends_the_process_with_0(launch) -> None:
    assert launch(Asm().text("x").reset().kernel()).finish()[:2] == (0, "x")


def test_a_triple_fault_ends_the_process_with_0(launch) -> None:
    asm = Asm().text("x").store(DATA, 0, 4).raw(b"\x0f\x01\x1d", DATA.to_bytes(4, "little"))  # lidt of an empty table
    assert launch(asm.raw(0x0F, 0x0B).halt_forever().kernel()).finish()[:2] == (0, "x")  # ud2


def test_halting_with_interrupts_off_is_a_power_off(launch) -> None:
    assert launch(Asm().text("bye").cli().halt_forever().kernel()).finish()[:2] == (0, "bye")


def test_halting_with_interrupts_on_is_not(machine) -> None:
    vm = machine(Asm().set_stack().store(DATA, 1).sti().halt_forever().kernel()).start()
    vm.run_until(lambda: vm.word(DATA) == 1)
    until = time.monotonic() + 3.2 * INTERVAL_SECONDS
    vm.run_until(lambda: time.monotonic() > until)
    assert vm.vm.state == "running"


def test_an_instruction_that_cannot_be_emulated_is_reported(launch) -> None:
    """On a KVM without hardware virtualization; elsewhere the guest runs on and says so."""
    asm = Asm().mov(3, 0x1234_5678).raw(0xDB, 0xE3)  # fninit
    status, out, error = launch(asm.text("fine").power_off().kernel()).finish()
    if out == "fine":
        assert status == 0
        return
    assert status == 1
    assert "KVM_EXIT_INTERNAL_ERROR, suberror 1" in error
    assert "instruction bytes at rip: db e3" in error
    assert "rbx 0000000012345678" in error
    assert "stratovirt doctor" in error
    assert "Traceback" not in error


# -- starts again


def restarting() -> bytes:
    """Adds up what a fresh memory must hold, tells the sum, spoils the memory, and resets."""
    asm = Asm().set_stack().load_eax(DATA).raw(b"\x03\x05", (DATA + 4).to_bytes(4, "little"))  # add eax, [DATA + 4]
    asm.out_eax(0x510, 4).store(DATA, 0x1111).store(DATA + 4, 0x2222).store(DATA + 0x10_0000, 1)
    return asm.load_eax(DATA + 0x10_0000).reset().kernel(Load((40).to_bytes(4, "little"), DATA))


class Starts:
    def __init__(self) -> None:
        self.sums: list[int] = []

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.sums.append(value)


def resident_kib() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4


def test_fifty_reboots_in_place_leave_no_trace(machine) -> None:
    vm = machine(restarting(), "-action", "reboot=reset")
    starts = Starts()
    vm.vm.ports.claim(0x510, 4, starts)
    vm.start()
    vm.run_until(lambda: len(starts.sums) >= 6)
    gc.collect()  # what earlier tests left to the collector is not to vanish meanwhile
    files, memory = len(os.listdir("/proc/self/fd")), resident_kib()
    vm.run_until(lambda: len(starts.sums) >= 56)
    vm.vm.pause()
    assert set(starts.sums) == {40}
    assert len(os.listdir("/proc/self/fd")) == files
    assert resident_kib() - memory < 2048
    resets = [event for event in vm.told if event[0] == "RESET"]
    assert len(resets) >= 55
    assert all(event == ("RESET", {"guest": True}) for event in resets)


def test_a_triple_fault_reboots_in_place(machine) -> None:
    asm = Asm().out(0x510, 7, 4).store(DATA, 0).raw(b"\x0f\x01\x1d", DATA.to_bytes(4, "little"), 0x0F, 0x0B)
    vm = machine(asm.halt_forever().kernel(), "-action", "reboot=reset")
    starts = Starts()
    vm.vm.ports.claim(0x510, 4, starts)
    vm.start()
    vm.run_until(lambda: len(starts.sums) >= 5)
    assert vm.vm.state == "running"


def test_a_guest_that_asks_for_resets_without_end_fills_no_queue(machine) -> None:
    """A loop of reset commands: one reset for all that came before it, and the queue of the main loop stays short."""
    asm = Asm().mov(0, 0xFE).mov(2, RESET_PORT)
    again = asm.label()
    vm = machine(asm.raw(0xEE).jmp(again).kernel(), "-action", "reboot=reset").start()
    time.sleep(0.2)  # the main loop is busy elsewhere
    assert len(vm.loop._calls) <= 2
    for _ in range(20):
        vm.loop.run_once(0.05)
        assert len(vm.loop._calls) <= 2


def test_a_reset_from_outside_starts_the_guest_again(machine) -> None:
    vm = machine(counting().kernel())
    starts = Starts()
    vm.vm.ports.claim(0x510, 4, starts)
    vm.start()
    for round_ in range(1, 6):
        vm.run_until(lambda: len(starts.sums) > 100)
        vm.vm.reset(guest=False)
        vm.run_until(lambda round_=round_: starts.sums.count(0) == round_ + 1)
    assert [event for event in vm.told if event[0] == "RESET"] == [("RESET", {"guest": False})] * 5


def test_a_paused_machine_stays_paused_over_a_reset(machine) -> None:
    vm = machine(counting().kernel())
    counter = Starts()
    vm.vm.ports.claim(0x510, 4, counter)
    vm.start()
    vm.run_until(lambda: bool(counter.sums))
    vm.vm.pause()
    vm.vm.reset(guest=False)
    seen = len(counter.sums)
    for _ in range(5):
        vm.loop.run_once(0.01)
    assert len(counter.sums) == seen
    vm.vm.resume()
    vm.run_until(lambda: len(counter.sums) > seen)
    assert counter.sums[seen] == 0


# -- pause


def test_pause_and_resume_a_thousand_times_lose_nothing(machine) -> None:
    vm = machine(counting().kernel())
    counter = Counter()
    vm.vm.ports.claim(0x510, 4, counter)
    vm.start()
    at = 0
    for round_ in range(1000):
        vm.vm.pause()
        at = counter.next
        if round_ % 100 == 0:
            time.sleep(0.005)
        assert counter.next == at
        vm.vm.resume()
        if round_ % 2:  # otherwise at once again, maybe before the vCPU is in the guest
            vm.run_until(lambda at=at: counter.next > at)
    vm.vm.pause()
    assert counter.next > 500
    assert counter.wrong == []


def test_a_guest_started_paused_runs_nothing_before_cont(machine) -> None:
    vm = machine(counting().kernel(), "-S")
    counter = Counter()
    vm.vm.ports.claim(0x510, 4, counter)
    vm.start()
    assert vm.vm.state == "paused"
    for _ in range(5):
        vm.loop.run_once(0.01)
    assert counter.next == 0
    vm.vm.resume()
    vm.run_until(lambda: counter.next > 10)


# -- many processors


def starting_all_processors(cpus: int) -> bytes:
    """The first processor sends INIT and two start-up IPIs to all others; each adds one to a word and halts."""
    ap = Asm(0x8000)
    # real mode: cs = 0x800, ds = 0. A 32-bit address needs the 67 prefix. lock inc dword [DATA] is beyond the limit of a
    # real-mode segment, so the count is kept in low memory.
    ap.raw(0x31, 0xC0, 0x8E, 0xD8, 0xF0, 0x66, 0xFF, 0x06, (0x7000).to_bytes(2, "little"), 0xFA, 0xF4, 0xEB, 0xFD)
    asm = Asm().store(0x7000, 0)
    code = ap.build()
    for offset in range(0, len(code), 4):
        asm.store(0x8000 + offset, int.from_bytes(code[offset : offset + 4], "little"))
    asm.store(0xFEE0_00F0, 0x1FF)  # the local APIC on
    asm.store(0xFEE0_0300, 0x000C_4500)  # INIT, all but self
    asm.store(0xFEE0_0300, 0x000C_4608).store(0xFEE0_0300, 0x000C_4608)  # SIPI to 0x8000
    again = asm.label()
    asm.load_eax(0x7000).cmp_eax(cpus - 1).jnz(again)
    return asm.store(DATA, cpus).power_off().kernel()


def test_four_processors_start(machine) -> None:
    vm = machine(starting_all_processors(4), "-smp", "4").run()
    assert vm.word(DATA) == 4


def test_254_processors_start_pause_resume_reset_and_stop(machine) -> None:
    vm = machine(counting().kernel(), "-smp", "254")
    counter = Counter()
    vm.vm.ports.claim(0x510, 4, counter)
    vm.start()
    assert len(set(vm.vm.vcpu_thread_ids())) == 254
    for _ in range(3):
        vm.run_until(lambda: counter.next > 100)
        vm.vm.pause()
        at = counter.next
        for _ in range(3):
            vm.loop.run_once(0.005)
        assert counter.next == at
        vm.vm.reset(guest=False)
        vm.vm.resume()
        vm.run_until(lambda at=at: counter.next < at or counter.next > at + 1000)
    assert counter.wrong == []
    vm.vm.shutdown(False, "test")


def test_254_processors_all_run(machine) -> None:
    vm = machine(starting_all_processors(254), "-smp", "254").run()
    assert vm.word(DATA) == 254


def test_254_processors_in_a_process_of_their_own(launch) -> None:
    assert launch(hello(), "-smp", "254").finish()[:2] == (0, "hello\n")
