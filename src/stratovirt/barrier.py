"""Memory barriers for a weakly ordered processor: what orders this program's accesses to rings that a guest shares.

Python has none. Its loads and stores through a memoryview are plain ones, and so they may be seen in another order: stores
before stores, loads before loads. Its locks do not help: they acquire and release, and a store before the lock may be seen
after a load behind it. So the barrier is the instruction itself, in a page of machine code:

    dmb ish    every access before it is observed before every access behind it, by all processors that share memory
    ret

It comes out of a memfd, mapped readable and executable but never writable: what the kernel writes to a file and maps for
execution it has made coherent for the instruction cache. A call takes a fraction of a microsecond, of which the barrier is the
smallest part. Where a policy forbids such a page, membarrier(2) takes its place, which interrupts every processor that
runs a thread of this process, in the guest or outside: as good, and dearer. No system call filter allows it (`lockdown.py`).

x86_64 needs none of this: nothing here is imported there (`virtio/queue.py`).
Spec: Arm Architecture Reference Manual, DDI 0487, B2.3.12 (data memory barrier); VIRTIO 1.2, 2.7.13.3, 2.7.14.
"""

from __future__ import annotations

from stratovirt.hostmap import ARCHITECTURE, machine_code, syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

DMB_ISH, RET = 0xD5033BBF, 0xD65F03C0

_NR_MEMBARRIER = 324 if ARCHITECTURE == "x86_64" else 283
uses_system_call = False  # how a barrier was made

_PRIVATE_EXPEDITED, _REGISTER_PRIVATE_EXPEDITED = 8, 16


def create() -> Callable[[], object]:
    """A function that is a full barrier. Raises: OSError when there is none to be had."""
    if ARCHITECTURE == "aarch64":
        try:
            return machine_code(DMB_ISH.to_bytes(4, "little") + RET.to_bytes(4, "little"))
        except OSError:
            pass  # noexec memfds, or a policy against executable mappings: the other way
    return by_system_call()


def by_system_call() -> Callable[[], object]:
    """The same by membarrier(2). Raises: OSError."""
    global uses_system_call
    uses_system_call = True
    syscall(_NR_MEMBARRIER, _REGISTER_PRIVATE_EXPEDITED, 0)
    return lambda: syscall(_NR_MEMBARRIER, _PRIVATE_EXPEDITED, 0)
