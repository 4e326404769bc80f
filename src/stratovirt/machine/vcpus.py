"""The vCPU threads: start them, stop them all at an instruction's edge, let them go on, end them.

How a vCPU is stopped: the gate is closed, `immediate_exit` is set in its run page and a signal is sent to its thread.
Whichever the thread was doing, its next KVM_RUN completes the pending instruction and returns EINTR, and the thread waits at
the gate. `immediate_exit` covers the moment before the thread enters KVM_RUN, the signal the time inside it.
"""

from __future__ import annotations

import sys
import time
from _thread import allocate_lock, get_native_id, stack_size, start_new_thread

from stratovirt import log
from stratovirt.errors import HostError
from stratovirt.hypervisor.kvm.run_loop import FATAL, STOPPED, run_loop
from stratovirt.sandbox import VCPU, unconfined

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable

    from stratovirt.address_map import AddressMap
    from stratovirt.hypervisor.kvm.vcpu import KvmVcpu
else:
    import _signal  # see process.py

KICK_SIGNAL = 34  # SIGRTMIN of glibc: the first that it leaves to programs
_STACK_SIZE = 256 * 1024
_SWITCH_INTERVAL = 0.0005
STOP_SECONDS = 2.0  # how long a vCPU may take to come out of the guest


class VcpuThreads:
    """All vCPUs of a machine and the gate they wait at.

    `on_exit(vcpu, why, errno)` is called on a vCPU's thread when its run loop ends for any reason but `stop`; the thread
    then waits for `revive` or the end. `confine` is called on every thread before it enters the guest.
    Thread: the main loop's, but for `enter`.
    """

    def __init__(self, vcpus: list[KvmVcpu], ports: AddressMap, mmio: AddressMap,
                 on_exit: Callable[[KvmVcpu, str, int], None], confine: Callable[[int], None] = unconfined) -> None:
        self.vcpus = vcpus
        self.thread_ids = [0] * len(vcpus)
        self._ports = ports
        self._mmio = mmio
        self._on_exit = on_exit
        self._confine = confine
        self._closed = False
        self._begun = 0
        self._all_begun = allocate_lock()  # taken = "not yet", as below
        self._all_begun.acquire()
        self._first_enters = allocate_lock()
        self._first_enters.acquire()
        self._gate = allocate_lock()  # over _closed and _waiting: nobody comes to wait at a gate that is being opened
        self._ending = False
        self._idents = [0] * len(vcpus)
        self._ended = [False] * len(vcpus)
        self._waiting = [False] * len(vcpus)
        self._index = {vcpu.id: number for number, vcpu in enumerate(vcpus)}
        # A lock of each kind for each vCPU, used as a binary semaphore: taken = "not yet".
        self._arrived = [allocate_lock() for _ in vcpus]
        self._may_go = [allocate_lock() for _ in vcpus]
        self._revived = [allocate_lock() for _ in vcpus]
        for lock in (*self._arrived, *self._may_go, *self._revived):
            lock.acquire()

    def start(self, paused: bool) -> None:
        """Create the threads; with `paused` they wait at the gate before the guest's first instruction.

        A new thread has to wait until this one lets go of the interpreter. So this one waits itself, until the first vCPU is
        about to enter the guest: what comes now can be done while the guest runs.
        """
        _signal.signal(KICK_SIGNAL, _on_kick)
        sys.setswitchinterval(_SWITCH_INTERVAL)  # a busy thread may keep an exit waiting for that long, not for 5 ms
        stack_size(_STACK_SIZE)
        self._closed = paused
        for number, vcpu in enumerate(self.vcpus):
            if paused:
                vcpu.page[1] = 1
            self._idents[number] = start_new_thread(self._thread, (number,))
            if number == 0 and not paused:
                self._first_enters.acquire(timeout=STOP_SECONDS)
        if paused:
            self._await_arrival()

    def _thread(self, number: int) -> None:
        vcpu = self.vcpus[number]
        self.thread_ids[number] = get_native_id()
        with self._gate:
            self._begun += 1
            if self._begun == len(self.vcpus):
                self._all_begun.release()
        confined = False
        while True:
            try:
                if not confined:
                    self._confine(VCPU)
                    confined = True
                    self._note_entry(number)
                why, errno = run_loop(vcpu, self._ports, self._mmio, self)
            except Exception:  # noqa: BLE001  # our own defect: the machine ends with its place in the log, it does not hang
                why, errno = FATAL, 0
                log.defect()
            self._note_entry(number)  # also when it came to nothing
            self._ended[number] = True
            self._arrived[number].release()  # whoever waits for this vCPU need not any more
            if why == STOPPED:
                return
            self._on_exit(vcpu, why, errno)
            if self._ending or not self._revived[number].acquire() or self._ending:
                return

    def _note_entry(self, number: int) -> None:
        if number == 0 and self._first_enters.locked():
            self._first_enters.release()

    def native_ids(self) -> list[int]:
        """Kernel thread ids, in the order of the vCPUs. Waits for threads that were created but have not begun yet.

        Raises: HostError when they do not.
        """
        if 0 in self.thread_ids:
            if not self._all_begun.acquire(timeout=STOP_SECONDS):
                raise HostError(f"a vCPU thread did not begin within {STOP_SECONDS:g} s")
            self._all_begun.release()
        return list(self.thread_ids)

    def revive(self) -> None:
        """Let vCPUs whose run loop has ended run again. Call it while paused, with their registers set anew."""
        for number, ended in enumerate(self._ended):
            if ended:
                self._ended[number] = False
                self._arrived[number].acquire(blocking=False)
                self.vcpus[number].page[1] = 1
                self._revived[number].release()
                self._await_arrival([number])

    # -- the gate

    def enter(self, vcpu_id: int) -> bool:
        """On a vCPU's thread, between two KVM_RUNs: wait while the gate is closed. False: end the thread."""
        number = self._index[vcpu_id]
        while not self._ending:
            with self._gate:
                if not self._closed:
                    break
                self._waiting[number] = True
                self._arrived[number].release()
            self._may_go[number].acquire()
        return not self._ending

    def pause(self) -> None:
        """No vCPU is in the guest, nor in a device, when this returns. Raises: HostError when one does not come out."""
        if self._closed:
            return
        self._closed = True
        self._kick_all()
        try:
            self._await_arrival()
        except HostError:
            self.resume()
            raise

    def resume(self) -> None:
        if not self._closed:
            return
        self._open_gate()

    def stop(self) -> None:
        """End every thread. Nothing of the guest runs when this returns. Raises: HostError as `pause` does."""
        self._ending = True
        for number, ended in enumerate(self._ended):
            if ended:
                self._revived[number].acquire(blocking=False)  # a second `stop`
                self._revived[number].release()
        self._open_gate()
        self._kick_all()
        self._await_arrival()

    def cpu_seconds(self) -> float:
        """Processor time that the threads have used, in the guest and outside."""
        return sum(time.clock_gettime(time.pthread_getcpuclockid(ident))
                   for ident, ended in zip(self._idents, self._ended, strict=True) if not ended)

    def _open_gate(self) -> None:
        with self._gate:
            self._closed = False
            for number, lock in enumerate(self._may_go):
                if self._waiting[number]:
                    self._waiting[number] = False
                    self._arrived[number].acquire(blocking=False)  # left over when a pause gave up on another vCPU
                    lock.release()

    def _kick_all(self) -> None:
        for number, vcpu in enumerate(self.vcpus):
            if not self._ended[number]:
                vcpu.page[1] = 1
                try:
                    _signal.pthread_kill(self._idents[number], KICK_SIGNAL)
                except ProcessLookupError:
                    continue  # the thread has ended just now

    def _await_arrival(self, numbers: list[int] | None = None) -> None:
        deadline = time.monotonic() + STOP_SECONDS
        for number in range(len(self.vcpus)) if numbers is None else numbers:
            if self._ended[number]:
                continue
            if not self._arrived[number].acquire(timeout=max(0.001, deadline - time.monotonic())):
                raise HostError(f"vCPU {number} did not stop within {STOP_SECONDS:g} s")


def _on_kick(_signum: int, _frame: object) -> None:
    """Nothing to do: that the signal interrupted KVM_RUN is all that it is for."""
