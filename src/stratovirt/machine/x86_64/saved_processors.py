"""The processors of an x86_64 machine in a snapshot: what is asked of KVM, in which order, and how it is given back.

Facts about KVM that the order rests on:
- KVM_GET_MP_STATE delivers INIT and SIPI that are pending, and so comes before everything else of a vCPU.
- The segment registers carry the local APIC's base and mode, and so are set before it.
- A local APIC that is set drops what the IOAPIC has sent it, so the chips come after all vCPUs.
- MSR_IA32_TSC_DEADLINE counts in the mode of the APIC's timer and against the TSC: it is the last MSR.
- TSCs that are written within a second of each other, and fit, are taken for synchronized.

A restore has two steps. `prepare` sets what stands still, and may be long before the guest runs; `Prepared.finish` sets what
moves on by itself from then on: clocks, time stamp counters, timers, and the chips that timers send interrupts to.

The guest's clocks go on where they stood: TSC and kvmclock as saved, timers with what was left of them. KVM_KVMCLOCK_CTRL tells
the guest's watchdogs. The time of day is the CMOS clock's, and that is the host's.
"""

from __future__ import annotations

import struct

from stratovirt.hypervisor.kvm import _uapi as uapi
from stratovirt.snapshot.saved import SnapshotError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.hypervisor.kvm.system import KvmSystem
    from stratovirt.hypervisor.kvm.vcpu import KvmVcpu
    from stratovirt.hypervisor.kvm.vm import KvmVm
    from stratovirt.snapshot.saved import Saved

_REGISTERS = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
              "rip", "rflags")
_REGS = struct.Struct("<18Q")
_REST = {  # what `KvmVcpu.get_rest` gives, by the names that it has in the file
    "debug_registers": (uapi.KVM_SET_DEBUGREGS, uapi.SIZEOF_DEBUGREGS), "xcrs": (uapi.KVM_SET_XCRS, uapi.SIZEOF_XCRS),
    "fpu": (uapi.KVM_SET_FPU, uapi.SIZEOF_FPU), "xsave": (uapi.KVM_SET_XSAVE, None),
    "events": (uapi.KVM_SET_VCPU_EVENTS, uapi.SIZEOF_VCPU_EVENTS),
}
_CHIPS = {"pic_master": uapi.KVM_IRQCHIP_PIC_MASTER, "pic_slave": uapi.KVM_IRQCHIP_PIC_SLAVE, "ioapic": uapi.KVM_IRQCHIP_IOAPIC}
_MSR_TSC, _MSR_TSC_DEADLINE = 0x10, 0x6E0
# MTRRs: KVM keeps them, but for long did not name them in its list.
_MTRRS = (0x2FF, 0x250, 0x258, 0x259, *range(0x268, 0x270), *range(0x200, 0x210))
_CR4, _EFER = 248, 264  # in struct kvm_sregs: 8 segments of 24 bytes, 2 tables of 16, cr0, cr2, cr3, cr4, cr8, efer
_CR4_VMXE, _EFER_SVME = 1 << 13, 1 << 12

_CPUID_ENTRY = struct.Struct("<7I12x")
_VENDOR_LEAF = 0
# Leaves of feature bits: (function, index) -> registers that hold some, with the bits that `arch/x86_64/cpuid.py` sets.
_FEATURES = {
    (1, 0): {"ecx": 1 << 31 | 1 << 24, "edx": 1 << 28}, (7, 0): {"ebx": 0, "ecx": 0, "edx": 0}, (7, 1): {"eax": 0},
    (0xD, 0): {"eax": 0}, (0xD, 1): {"eax": 0}, (0x80000001, 0): {"ecx": 0, "edx": 0}, (0x80000008, 0): {"ebx": 0},
}
_REGISTER_NUMBER = {"eax": 3, "ebx": 4, "ecx": 5, "edx": 6}


def _xsave_size(system: KvmSystem) -> int:
    return max(system.check_extension(uapi.KVM_CAP_XSAVE2), uapi.SIZEOF_XSAVE)


def save(system: KvmSystem, vm: KvmVm, vcpus: list[KvmVcpu]) -> dict[str, object]:
    """Raises: SnapshotError, HostError."""
    clock = vm.get_clock()
    xsave_size = _xsave_size(system)
    indices = system.msr_indices()
    indices += [index for index in _MTRRS if index not in indices]
    saved = [_save_vcpu(vcpu, indices, xsave_size) for vcpu in vcpus]
    chips = {name: bytes(vm.get_interrupt_chip(chip)).hex() for name, chip in _CHIPS.items()}
    return {"clock": clock, "vcpus": saved, **chips, "timer": bytes(vm.get_timer()).hex()}


def _save_vcpu(vcpu: KvmVcpu, indices: list[int], xsave_size: int) -> dict[str, object]:
    mp_state = vcpu.get_mp_state()
    sregs = vcpu.get_sregs()
    if int.from_bytes(sregs[_CR4 : _CR4 + 8], "little") & _CR4_VMXE or (
            int.from_bytes(sregs[_EFER : _EFER + 8], "little") & _EFER_SVME):
        raise SnapshotError("the guest runs virtual machines of its own, whose state cannot be saved yet")
    regs = _REGS.unpack(vcpu.get_regs())
    lapic = vcpu.get_lapic()
    msrs = vcpu.get_msrs(indices)
    rest = vcpu.get_rest(xsave_size)
    return {
        "id": vcpu.id, "mp_state": mp_state, "tsc_khz": vcpu.tsc_khz(),
        "registers": {name: f"{value:016x}" for name, value in zip(_REGISTERS, regs, strict=True)},
        "sregs": bytes(sregs).hex(), "lapic": bytes(lapic).hex(),
        **{name: bytes(rest[request]).hex() if request in rest else "" for name, (request, _) in _REST.items()},
        "msrs": {f"{index:08x}": f"{value:016x}" for index, value in sorted(msrs)},
        "cpuid": vcpu.cpuid.hex(),
    }


class Prepared:
    """Processors that are restored but for what moves on by itself. `vcpus` has local APIC, last MSRs and events of each."""

    __slots__ = ("chips", "clock", "timer", "vcpus")

    def __init__(self, clock: int, chips: list[bytearray], timer: bytearray,
                 vcpus: list[tuple[KvmVcpu, Saved, bytes, list[tuple[int, int]], bytes]]) -> None:
        self.clock = clock
        self.chips = chips
        self.timer = timer
        self.vcpus = vcpus

    def finish(self, vm: KvmVm) -> None:
        """Right before the guest goes on. Raises: SnapshotError, HostError."""
        vm.set_clock(self.clock)
        for vcpu, section, lapic, msrs, events in self.vcpus:
            vcpu.set_lapic(lapic)
            _set_msrs(vcpu, section, msrs)
            vcpu.set_rest({uapi.KVM_SET_VCPU_EVENTS: events})
        for value in self.chips:
            vm.set_interrupt_chip(value)
        vm.set_timer(self.timer)
        for vcpu, *_ in self.vcpus:
            vcpu.tell_paused()


def prepare(system: KvmSystem, vcpus: list[KvmVcpu], state: Saved) -> Prepared:
    """Raises: SnapshotError when the state is not one, or of processors that this host has not; HostError."""
    clock = state.integer("clock", 0, (1 << 63) - 1)
    saved = state.sections("vcpus")
    if len(saved) != len(vcpus):
        raise state.error("vcpus", f"{len(saved)} of them, and the machine has {len(vcpus)}")
    chips = {name: bytearray(state.data(name, uapi.SIZEOF_IRQCHIP)) for name in _CHIPS}
    timer = state.data("timer", uapi.SIZEOF_PIT2)
    state.end()
    for name, chip in _CHIPS.items():
        if int.from_bytes(chips[name][:4], "little") != chip:
            raise state.error(name, f"the state of another chip than {chip}")
    host = _features(system.supported_cpuid())
    xsave_size = _xsave_size(system)
    tsc_control = system.check_extension(uapi.KVM_CAP_TSC_CONTROL) > 0
    prepared = [(vcpu, section, *_prepare_vcpu(vcpu, section, host, xsave_size, tsc_control))
                for vcpu, section in zip(vcpus, saved, strict=True)]
    return Prepared(clock, list(chips.values()), bytearray(timer), prepared)


def _prepare_vcpu(vcpu: KvmVcpu, state: Saved, host: dict[tuple[int, int, str], int], xsave_size: int,
                  tsc_control: bool) -> tuple[bytes, list[tuple[int, int]], bytes]:
    """What is left to be set: local APIC, MSRs, events."""
    if state.integer("id", 0, 0xFFFF_FFFF) != vcpu.id:
        raise state.error("id", f"this processor of the machine is number {vcpu.id}")
    mp_state = state.integer("mp_state", 0, 15)
    tsc_khz = state.integer("tsc_khz", 0, 0xFFFF_FFFF)
    registers = state.section("registers")
    regs = _REGS.pack(*(int.from_bytes(registers.data(name, 8), "big") for name in _REGISTERS))
    registers.end()
    sregs = state.data("sregs", uapi.SIZEOF_SREGS)
    lapic = state.data("lapic", uapi.SIZEOF_LAPIC)
    rest: dict[int, bytes] = {}
    for name, (request, size) in _REST.items():
        value = state.data(name)
        if value:
            rest[request] = value
        if name == "xsave" and len(value) > xsave_size:
            raise state.error(name, f"{len(value)} bytes of extended state, and this host's processors have {xsave_size}")
        if len(value) < uapi.SIZEOF_XSAVE if size is None else len(value) not in ((0, size) if name == "xcrs" else (size,)):
            raise state.error(name, f"{len(value)} bytes, not {size or uapi.SIZEOF_XSAVE}")
    first, msrs, last = _msrs_of(state.section("msrs"))
    cpuid = state.data("cpuid")
    if len(cpuid) % _CPUID_ENTRY.size or not cpuid:
        raise state.error("cpuid", f"not entries of {_CPUID_ENTRY.size} bytes")
    state.end()
    _check_cpuid(state, cpuid, host)

    vcpu.set_cpuid(cpuid)
    if tsc_khz and tsc_khz != vcpu.tsc_khz():
        if not tsc_control:
            raise state.error("tsc_khz", f"the guest's TSC counts {tsc_khz} kHz and this host's {vcpu.tsc_khz()}, "
                              "which its processor cannot scale")
        vcpu.set_tsc_khz(tsc_khz)
    vcpu.set_mp_state(mp_state)
    vcpu.set_regs(regs)
    vcpu.set_sregs(sregs)
    xsave = rest.get(uapi.KVM_SET_XSAVE, b"")
    rest[uapi.KVM_SET_XSAVE] = xsave.ljust(xsave_size, b"\0")  # KVM reads as much as this host's processors have
    events = rest.pop(uapi.KVM_SET_VCPU_EVENTS)
    vcpu.set_rest(rest)
    _set_msrs(vcpu, state, msrs)
    return lapic, first + last, events


def _set_msrs(vcpu: KvmVcpu, state: Saved, msrs: list[tuple[int, int]]) -> None:
    refused = vcpu.set_msrs(msrs)
    if refused:
        now, wanted = dict(vcpu.get_msrs(refused)), dict(msrs)
        for index in refused:
            if now.get(index, 0) != wanted[index]:
                raise state.error(f"msrs.{index:08x}", f"this host's KVM does not take {wanted[index]:#x}")


def _msrs_of(state: Saved) -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[tuple[int, int]]]:
    """The TSC, those that stand still, and what counts against the TSC."""
    values: dict[int, int] = {}
    for name in state.names():
        value = int.from_bytes(state.data(name, 8), "big")
        try:
            index = int(name, 16) if len(name) == 8 else -1
        except ValueError:
            index = -1
        if index < 0:
            raise state.error(name, "not the number of an MSR, 8 hexadecimal digits")
        values[index] = value
    first = [(index, values.pop(index)) for index in (_MSR_TSC,) if index in values]
    last = [(index, values.pop(index)) for index in (_MSR_TSC_DEADLINE,) if index in values]
    return first, sorted(values.items()), last


def _features(table: bytes) -> dict[tuple[int, int, str], int]:
    found: dict[tuple[int, int, str], int] = {}
    for entry in _CPUID_ENTRY.iter_unpack(table):
        for register, own in _FEATURES.get((entry[0], entry[1]), {}).items():
            found[entry[0], entry[1], register] = entry[_REGISTER_NUMBER[register]] & ~own
        if entry[0] == _VENDOR_LEAF:
            for register in ("ebx", "ecx", "edx"):
                found[entry[0], 0, register] = entry[_REGISTER_NUMBER[register]]
    return found


def _check_cpuid(state: Saved, cpuid: bytes, host: dict[tuple[int, int, str], int]) -> None:
    """The host's processors are of the same make and have all features that the guest knows of."""
    wanted = _features(cpuid)
    vendors = [b"".join(features.get((0, 0, register), 0).to_bytes(4, "little") for register in ("ebx", "edx", "ecx"))
               for features in (wanted, host)]
    if vendors[0] != vendors[1]:
        shown = [ascii(vendor.decode("latin-1")) for vendor in vendors]
        raise state.error("cpuid", f"a processor of {shown[0]}, and this host's is of {shown[1]}")
    for key, bits in wanted.items():
        function, index, register = key
        missing = bits & ~host.get(key, 0)
        if function != _VENDOR_LEAF and missing:
            raise state.error("cpuid", f"leaf {function:#x}.{index}, {register}: the guest's processor has features "
                              f"{missing:#x}, and this host's has not")
