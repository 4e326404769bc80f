"""Power-off without ACPI: which machines count as dead."""

from __future__ import annotations

import pytest

from stratovirt.errors import HostError
from stratovirt.hypervisor.kvm import _uapi as uapi
from stratovirt.loop import EventLoop
from stratovirt.machine.halt_watch import INTERVAL_SECONDS, HaltWatch

RUNNABLE, WAITING, HALTED = uapi.KVM_MP_STATE_RUNNABLE, uapi.KVM_MP_STATE_UNINITIALIZED, uapi.KVM_MP_STATE_HALTED
IF = 1 << 9


class Vcpu:
    def __init__(self, state: int, flags: int = 0) -> None:
        self.state, self.flags = state, flags

    def get_mp_state(self) -> int:
        return self.state

    def get_regs(self) -> bytearray:
        return bytearray(17 * 8) + self.flags.to_bytes(8, "little")


class Threads:
    def __init__(self, *vcpus: Vcpu) -> None:
        self.vcpus = vcpus
        self.used = 1.0
        self.pauses = self.resumes = 0
        self.stuck = False

    def cpu_seconds(self) -> float:
        return self.used

    def pause(self) -> None:
        self.pauses += 1
        self.used += 0.001
        if self.stuck:
            raise HostError("vCPU 0 did not stop")

    def resume(self) -> None:
        self.resumes += 1


class Watched:
    def __init__(self, *vcpus: Vcpu) -> None:
        self.now = 0.0
        self.loop = EventLoop(lambda: self.now)
        self.threads = Threads(*vcpus)
        self.running = True
        self.deaths = 0
        HaltWatch(self.loop, self.threads, lambda: self.running, self.die)  # type: ignore[arg-type]

    def die(self) -> None:
        self.deaths += 1

    def intervals(self, count: int) -> None:
        for _ in range(count):
            self.now += INTERVAL_SECONDS
            self.loop.run_once(0)


@pytest.mark.parametrize("vcpus", [
    (Vcpu(HALTED),),
    (Vcpu(HALTED), Vcpu(HALTED)),
    (Vcpu(HALTED), Vcpu(WAITING)),  # nobody is left who could start it
])
def test_all_halted_with_interrupts_off_is_dead(vcpus: tuple[Vcpu, ...]) -> None:
    watched = Watched(*vcpus)
    watched.intervals(10)
    assert watched.deaths == 1
    assert watched.threads.pauses == watched.threads.resumes == 1


@pytest.mark.parametrize("vcpus", [
    (Vcpu(HALTED, IF),),
    (Vcpu(RUNNABLE),),
    (Vcpu(HALTED), Vcpu(HALTED, IF)),
    (Vcpu(HALTED), Vcpu(RUNNABLE)),
])
def test_one_that_may_wake_up_is_a_life(vcpus: tuple[Vcpu, ...]) -> None:
    watched = Watched(*vcpus)
    watched.intervals(10)
    assert watched.deaths == 0
    assert watched.threads.pauses == 1  # looked at once, not every time


def test_a_busy_machine_is_not_stopped_to_look() -> None:
    watched = Watched(Vcpu(HALTED))
    for _ in range(10):
        watched.threads.used += 0.5
        watched.intervals(1)
    assert watched.threads.pauses == 0


def test_a_machine_that_halts_after_a_life_is_looked_at_again() -> None:
    vcpu = Vcpu(HALTED, IF)
    watched = Watched(vcpu)
    watched.intervals(5)
    vcpu.flags = 0
    watched.threads.used += 0.1
    watched.intervals(5)
    assert watched.deaths == 1


def test_a_paused_machine_is_left_alone() -> None:
    watched = Watched(Vcpu(HALTED))
    watched.running = False
    watched.intervals(5)
    assert watched.threads.pauses == 0
    watched.running = True
    watched.intervals(2)
    assert watched.deaths == 1


def test_a_vcpu_that_does_not_stop_is_not_dead() -> None:
    watched = Watched(Vcpu(HALTED))
    watched.threads.stuck = True
    watched.intervals(3)
    assert watched.deaths == 0
