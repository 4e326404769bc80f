"""Can this KVM run an arm64 guest? A guest of three instructions finds out: it asks PSCI to be switched off.

KVM on arm64 always stands on the processor's own virtualization (EL2), so there is nothing that a kernel's instructions could
fail at. What can fail is everything before: making the machine, its processor and its memory.
"""

from __future__ import annotations

import errno
import fcntl
import struct
import time

from stratovirt.arch.aarch64 import layout, registers
from stratovirt.errors import HostError
from stratovirt.hostmap import HostMapping
from stratovirt.hypervisor.kvm import _uapi as common
from stratovirt.hypervisor.kvm import _uapi_arm64 as uapi
from stratovirt.hypervisor.kvm.arm64 import Arm64Vcpu, Arm64Vm
from stratovirt.hypervisor.kvm.system import KvmSystem
from stratovirt.machine.probe import SECONDS, Verdict
from stratovirt.memory import GuestMemory, RamRegion

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
else:
    import _signal  # see process.py

_RAM_SIZE = 2 << 20
_SYSTEM_EVENT_SHUTDOWN = 1
PROGRAM = struct.pack(
    "<4I",
    0x52B08000,  # movz w0, #0x8400, lsl #16
    0x72800100,  # movk w0, #8            PSCI SYSTEM_OFF
    0xD4000002,  # hvc #0
    0x14000000,  # b .                    it does not come back
)


def probe(system: KvmSystem) -> Verdict:
    """Run the guest. Thread: main, for it borrows SIGALRM. Raises: HostError when KVM cannot even make a machine."""
    vm = Arm64Vm(system, layout.address_bits(1, _RAM_SIZE))
    try:
        region = RamRegion(layout.RAM, HostMapping(_RAM_SIZE))
        vm.add_memory(region)
        GuestMemory([region]).write(layout.RAM, PROGRAM)
        vcpu = Arm64Vcpu(vm, 0, system.vcpu_mmap_size())
        try:
            vcpu.init(vm.preferred_target(), 1 << uapi.KVM_ARM_VCPU_PSCI_0_2)
            for register, value in registers.entry_state(layout.RAM, 0):
                vcpu.set_register(register, value)
            return _run(vcpu)
        finally:
            vcpu.close()
    finally:
        vm.close()


def _run(vcpu: Arm64Vcpu) -> Verdict:
    before = _signal.signal(_signal.SIGALRM, lambda *_: None)  # its arrival alone takes the vCPU out of KVM_RUN
    _signal.setitimer(_signal.ITIMER_REAL, SECONDS, SECONDS / 4)
    deadline = time.monotonic() + SECONDS
    try:
        while True:
            try:
                fcntl.ioctl(vcpu.fd, common.KVM_RUN, 0)
            except OSError as error:
                if error.errno not in (errno.EINTR, errno.EAGAIN):
                    raise HostError.from_os("KVM_RUN of the probe guest", error) from error
                if time.monotonic() >= deadline:
                    return Verdict(False, f"the probe guest did not come to its end in {SECONDS:g} s")
                continue
            return _judge(vcpu)
    finally:
        _signal.setitimer(_signal.ITIMER_REAL, 0)
        _signal.signal(_signal.SIGALRM, before)


def _judge(vcpu: Arm64Vcpu) -> Verdict:
    reason = vcpu.page32[2]
    if reason == common.KVM_EXIT_SYSTEM_EVENT and vcpu.page32[8] == _SYSTEM_EVENT_SHUTDOWN:
        return Verdict(True, "the probe guest ran to its end")
    return Verdict(False, f"the probe guest ended with {common.EXIT_NAMES.get(reason, f'exit reason {reason}')}")
