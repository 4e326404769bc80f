"""Finds a guest that goes round in the lab, by what KVM counts, so that its run can be ended and done again.

The lab's emulator (QEMU 7.2) keeps the vector of an interrupt that KVM has injected as if it were an exception still to be
raised, until the guest leaves next. When a timer of the emulator's own is due before that, it delivers the vector once more,
also where the guest has interrupts disabled: the second handler then waits for a lock that the first one holds. Any monitor's
guest may end like this. No clock of the lab helps: at each PAUSE of that loop the emulator leaves its fast path, and a second
of the lab takes minutes.
"""

from __future__ import annotations

from pathlib import Path

_KVM = Path("/sys/kernel/debug/kvm")
_WORK = 100_000_000  # ns of the lab, each an instruction; a guest that is alive leaves for its timer every 4 ms


class Spinning:
    """Watches the one vCPU of the process `pid`. Needs root, and debugfs."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._left: int | None = None
        self._worked = 0

    def look(self) -> bool:
        """True when the vCPU has worked since an earlier look, and has left the guest for nothing but the host's interrupts."""
        try:
            (folder,) = _KVM.glob(f"{self._pid}-*")
            vcpu = (folder / "vcpu0/pid").read_text().strip()
            left = int((folder / "exits").read_text()) - int((folder / "irq_exits").read_text())
            worked = int(Path(f"/proc/{self._pid}/task/{vcpu}/schedstat").read_text().split()[0])
        except (ValueError, FileNotFoundError):
            return False  # it has no vCPU yet, or has gone
        if left != self._left:
            self._left, self._worked = left, worked
            return False
        return worked - self._worked > _WORK
