"""KVM's log of what a guest has written: one bit for each page of a memory slot.

While a slot is logged, KVM protects its pages and hears of the first write to each; what the kernel itself writes for the
guest (clocks, steal time) is in the log as well. What this process writes, or the kernel for it, is not.

Where KVM can (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2), reading a log and clearing it are two steps, so that nothing has to be
protected anew when what was read comes to nothing. Elsewhere reading clears, and whoever reads has to keep it.
"""

from __future__ import annotations

from stratovirt.hostmap import PAGE_SIZE
from stratovirt.hypervisor.kvm import _uapi as uapi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.hypervisor.kvm.vm import KvmVm


class DirtyLog:
    """Of all memory slots of `vm`. Thread: main. Raises: HostError from every call that KVM refuses."""

    def __init__(self, vm: KvmVm) -> None:
        self._vm = vm
        self._read: dict[int, bytearray] = {}  # by slot: what is to be cleared
        self._manual = bool(vm.system.check_extension(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)
                            & uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
        if self._manual:
            vm.enable_capability(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)

    def start(self) -> None:
        """Log from here on: all pages are clean."""
        self._read.clear()
        self._vm.log_writes(True)

    def stop(self) -> None:
        self._read.clear()
        self._vm.log_writes(False)

    def read(self, slot: int) -> bytearray:
        """A bit for each page of PAGE_SIZE in the slot: was it written since `start` or `clear`? Lowest bit first."""
        pages = self._vm.slots[slot].size // PAGE_SIZE
        bitmap = bytearray(-(-pages // 64) * 8)
        self._vm.read_log(slot, bitmap)
        if self._manual:
            self._read[slot] = bitmap
        return bitmap

    def clear(self) -> None:
        """What was read is clean again. Nothing of the guest may have run since."""
        for slot, bitmap in self._read.items():
            self._vm.clear_log(slot, self._vm.slots[slot].size // PAGE_SIZE, bitmap)
        self._read.clear()
