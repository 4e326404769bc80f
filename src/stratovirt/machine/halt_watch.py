"""Power-off without ACPI: a machine whose processors have all stopped for good.

A kernel that knows no way to switch the machine off ends with every processor in HLT and interrupts disabled. Nothing
can wake it, and KVM, which handles HLT itself, tells nobody. What can be seen from outside is that the vCPU threads use
no processor time at all. So now and then that is looked at, which costs two system calls, and only when it holds
and was not looked into before are the vCPUs stopped for a moment and their state read.
"""

from __future__ import annotations

from stratovirt.errors import HostError
from stratovirt.hypervisor.kvm import _uapi as uapi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from stratovirt.hypervisor.kvm.vcpu import KvmVcpu
    from stratovirt.loop import EventLoop
    from stratovirt.machine.vcpus import VcpuThreads

INTERVAL_SECONDS = 2.0
_RFLAGS_IF = 1 << 9
_RFLAGS_OFFSET = 17 * 8


class HaltWatch:
    """Calls `on_dead` once when no vCPU can ever run again. Thread: the main loop's."""

    def __init__(self, loop: EventLoop, threads: VcpuThreads, is_running: Callable[[], bool],
                 on_dead: Callable[[], None]) -> None:
        self._loop = loop
        self._threads = threads
        self._is_running = is_running
        self._on_dead = on_dead
        self._seen = -1.0
        self._inspected = False
        loop.call_later(INTERVAL_SECONDS, self._tick)

    def _tick(self) -> None:
        if self._is_running():
            used = self._threads.cpu_seconds()
            if used != self._seen:
                self._seen = used
                self._inspected = False
            elif not self._inspected:
                if self._dead():
                    self._on_dead()
                    return
                self._seen = self._threads.cpu_seconds()  # looking took time of its own
                self._inspected = True
        self._loop.call_later(INTERVAL_SECONDS, self._tick)

    def _dead(self) -> bool:
        try:
            self._threads.pause()
        except HostError:
            return False  # a vCPU that does not come out of the guest is not halted
        dead = all(_is_dead(vcpu) for vcpu in self._threads.vcpus)
        self._threads.resume()
        return dead


def _is_dead(vcpu: KvmVcpu) -> bool:
    state = vcpu.get_mp_state()
    if state == uapi.KVM_MP_STATE_HALTED:
        flags = int.from_bytes(vcpu.get_regs()[_RFLAGS_OFFSET : _RFLAGS_OFFSET + 8], "little")
        return not flags & _RFLAGS_IF
    return state != uapi.KVM_MP_STATE_RUNNABLE  # waiting for a start-up IPI that nobody is left to send

