"""vCPU threads and their gate, with a processor that only counts.

The fake processor keeps to what KVM_RUN promises: it comes back at once with EINTR while `immediate_exit` is set. The signal
that ends a KVM_RUN early is not needed, because it never sleeps.
"""

from __future__ import annotations

import sys
import threading
import time
from _thread import stack_size
from collections.abc import Callable, Iterator

import pytest

from stratovirt.address_map import AddressMap
from stratovirt.errors import HostError
from stratovirt.hypervisor.kvm.run_loop import FATAL, STOPPED, TRIPLE_FAULT
from stratovirt.machine import vcpus as vcpus_module
from stratovirt.machine.vcpus import VcpuThreads


class FakeVcpu:
    def __init__(self, id: int) -> None:
        self.id = id
        self.page = bytearray(8)
        self.count = 0  # instructions
        self.end: tuple[str, int] | None = None  # what the run loop ends with
        self.stuck = False  # in a system call that no signal ends

    def run(self) -> tuple[str, int] | None:
        while not self.page[1] or self.stuck:
            self.count += 1
            if self.end is not None:
                return self.end
            time.sleep(0)
        return None


def fake_run_loop(vcpu: FakeVcpu, _ports: AddressMap, _mmio: AddressMap, gate: VcpuThreads) -> tuple[str, int]:
    while True:
        end = vcpu.run()
        if end is not None:
            if end[0] == "raise":
                raise ZeroDivisionError("a defect of ours")
            return end
        vcpu.page[1] = 0
        if not gate.enter(vcpu.id):
            return STOPPED, 0


class Machine:
    def __init__(self, ids: list[int]) -> None:
        self.vcpus = [FakeVcpu(id) for id in ids]
        self.exits: list[tuple[int, str, int]] = []
        self.threads = VcpuThreads(self.vcpus, AddressMap(), AddressMap(), self.on_exit)  # type: ignore[arg-type]

    def on_exit(self, vcpu: FakeVcpu, why: str, errno: int) -> None:
        self.exits.append((vcpu.id, why, errno))

    def counts(self) -> list[int]:
        return [vcpu.count for vcpu in self.vcpus]


@pytest.fixture(autouse=True)
def fake_kvm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(vcpus_module, "run_loop", fake_run_loop)
    monkeypatch.setattr(vcpus_module, "STOP_SECONDS", 10.0)
    interval, stack = sys.getswitchinterval(), stack_size()
    yield
    sys.setswitchinterval(interval)
    stack_size(stack)


@pytest.fixture
def make() -> Iterator[Callable[..., Machine]]:
    made: list[Machine] = []

    def factory(count: int = 3, paused: bool = False, ids: list[int] | None = None) -> Machine:
        machine = Machine(ids or list(range(count)))
        made.append(machine)
        machine.threads.start(paused)
        return machine

    yield factory
    for machine in made:
        for vcpu in machine.vcpus:
            vcpu.stuck = False
        machine.threads.stop()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def all_move(machine: Machine) -> None:
    before = machine.counts()
    wait_until(lambda: all(now > then for now, then in zip(machine.counts(), before, strict=True)))


def none_moves(machine: Machine) -> None:
    before = machine.counts()
    for _ in range(20):
        time.sleep(0.0005)
    assert machine.counts() == before


def test_threads_run_until_they_are_stopped(make: Callable[..., Machine]) -> None:
    machine = make()
    all_move(machine)
    machine.threads.stop()
    none_moves(machine)
    assert machine.exits == []
    assert len(set(machine.threads.native_ids())) == 3


def test_started_paused_no_instruction_is_run(make: Callable[..., Machine]) -> None:
    machine = make(paused=True)
    none_moves(machine)
    assert machine.counts() == [0, 0, 0]
    machine.threads.resume()
    all_move(machine)


def test_pause_and_resume_are_idempotent(make: Callable[..., Machine]) -> None:
    machine = make()
    for _ in range(2):
        machine.threads.pause()
    none_moves(machine)
    for _ in range(2):
        machine.threads.resume()
    all_move(machine)


def test_pause_and_resume_many_times(make: Callable[..., Machine]) -> None:
    machine = make(4)
    for _ in range(300):
        machine.threads.pause()
        before = machine.counts()
        assert machine.counts() == before
        machine.threads.resume()
    all_move(machine)


def test_apic_ids_may_have_gaps(make: Callable[..., Machine]) -> None:
    machine = make(ids=[0, 1, 4, 5, 250])
    machine.threads.pause()
    none_moves(machine)
    machine.threads.resume()
    all_move(machine)


def test_stop_ends_paused_threads(make: Callable[..., Machine]) -> None:
    before = threading.active_count()
    machine = make(paused=True)
    machine.threads.stop()
    assert machine.counts() == [0, 0, 0]
    assert threading.active_count() == before


def test_stop_twice(make: Callable[..., Machine]) -> None:
    machine = make()
    machine.threads.stop()
    machine.threads.stop()


def test_the_end_of_a_run_loop_is_told_once(make: Callable[..., Machine]) -> None:
    machine = make()
    machine.vcpus[1].end = (TRIPLE_FAULT, 0)
    wait_until(lambda: machine.exits == [(1, TRIPLE_FAULT, 0)])
    machine.threads.pause()
    none_moves(machine)
    machine.threads.resume()
    assert machine.exits == [(1, TRIPLE_FAULT, 0)]


def test_a_defect_in_the_run_loop_ends_the_machine_and_leaves_its_traceback(make: Callable[..., Machine],
                                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(vcpus_module.log.LOG, "write", lambda _level, line, _depth: lines.append(line))
    machine = make()
    machine.vcpus[0].end = ("raise", 0)
    wait_until(lambda: machine.exits == [(0, FATAL, 0)])
    assert any("ZeroDivisionError" in line for line in lines)


def test_an_ended_vcpu_lives_again_after_a_reset(make: Callable[..., Machine]) -> None:
    machine = make()
    for round_ in range(3):
        for vcpu in machine.vcpus[:2]:
            vcpu.end = (TRIPLE_FAULT, 0)
        wait_until(lambda round_=round_: len(machine.exits) == 2 * (round_ + 1))
        machine.threads.pause()
        for vcpu in machine.vcpus:
            vcpu.end = None
        machine.threads.revive()
        none_moves(machine)
        machine.threads.resume()
        all_move(machine)


def test_a_vcpu_that_does_not_stop_is_an_error_and_the_others_run_on(make: Callable[..., Machine],
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    machine = make()
    monkeypatch.setattr(vcpus_module, "STOP_SECONDS", 0.05)
    for stuck in (0, 1, 2):
        machine.vcpus[stuck].stuck = True
        with pytest.raises(HostError, match=f"vCPU {stuck} did not stop"):
            machine.threads.pause()
        machine.vcpus[stuck].stuck = False
        all_move(machine)
    monkeypatch.setattr(vcpus_module, "STOP_SECONDS", 10.0)
    machine.threads.pause()
    none_moves(machine)
    machine.threads.resume()
    all_move(machine)


def test_processor_time_is_counted_for_threads_that_live(make: Callable[..., Machine]) -> None:
    machine = make(2)
    first = machine.threads.cpu_seconds()
    wait_until(lambda: machine.threads.cpu_seconds() > first)
    machine.threads.pause()
    still = machine.threads.cpu_seconds()
    assert machine.threads.cpu_seconds() == still
    machine.threads.resume()


def test_thread_ids_are_known_as_soon_as_somebody_asks(make: Callable[..., Machine]) -> None:
    machine = make(50)
    assert len(set(machine.threads.native_ids()) - {0}) == 50
