"""The registers of an arm64 vCPU that cannot go on, in words. Imported only when that happens."""

from __future__ import annotations

from stratovirt.errors import HostError
from stratovirt.hypervisor.kvm.arm64 import Arm64Vcpu

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.hypervisor.kvm.vcpu import KvmVcpu

# As in stratovirt.arch.aarch64.registers, which this layer does not know: KVM's numbers of 64-bit core and system registers.
_CORE, _SYSTEM = 0x6030_0000_0010_0000, 0x6030_0000_0013_0000
_NAMES = {
    **{f"x{number}": _CORE | 2 * number for number in range(31)},
    "sp": _CORE | 62, "pc": _CORE | 64, "pstate": _CORE | 66, "sp_el1": _CORE | 68, "elr_el1": _CORE | 70,
    "sctlr": _SYSTEM | 0xC080, "esr_el1": _SYSTEM | 0xC290, "far_el1": _SYSTEM | 0xC300, "vbar": _SYSTEM | 0xC600,
}


def registers(vcpu: KvmVcpu) -> list[str]:
    """Four to a line. Thread: the vCPU's own."""
    if not isinstance(vcpu, Arm64Vcpu):
        return []
    try:
        rows = [f"{name:>7} {vcpu.get_register(number):016x}" for name, number in _NAMES.items()]
    except HostError as error:
        return [f"  registers are not available: {error}"]
    return ["  " + " ".join(rows[start : start + 4]) for start in range(0, len(rows), 4)]
