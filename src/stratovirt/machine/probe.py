"""Can this KVM run a Linux kernel? A tiny guest finds out.

Not every /dev/kvm stands on hardware virtualization. Without it KVM runs a guest's ring 0 in its instruction emulator,
which knows only some instructions and ends with KVM_EXIT_INTERNAL_ERROR at the first other one; CPU flags do not tell. So the
probe does in long mode, with paging on, what every kernel does early in its boot: save and restore the FPU, use the x87,
swap 16 bytes, switch extended state.

Before each step the guest writes its number to a port, and halts after the last. Not on the way to a running guest.
"""

from __future__ import annotations

import errno
import fcntl
import struct
import time

from stratovirt.arch.x86_64 import layout, registers
from stratovirt.errors import HostError
from stratovirt.hostmap import HostMapping
from stratovirt.hypervisor.kvm import _uapi as uapi
from stratovirt.hypervisor.kvm.system import CPUID_ENTRY_SIZE, KvmSystem
from stratovirt.hypervisor.kvm.vcpu import KvmVcpu
from stratovirt.hypervisor.kvm.vm import KvmVm
from stratovirt.memory import GuestMemory, RamRegion

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
else:
    import _signal  # see process.py

SECONDS = 2.0  # the probe takes a millisecond; a KVM that is not done by then is not usable

_RAM_SIZE = 2 << 20
_CODE, _DATA, _XSAVE_AREA = 0x1_0000, 0x2_0000, 0x2_1000
_PORT = 0xF4
_PRESENT_WRITABLE, _LARGE_PAGE = 0x3, 0x80
_CR4_OFFSET = 248  # in struct kvm_sregs
_CR4_OSFXSR, _CR4_OSXMMEXCPT, _CR4_OSXSAVE = 1 << 9, 1 << 10, 1 << 18
_CPUID_1_ECX_XSAVE = 1 << 26
_ONE = 0x3FF0000000000000  # 1.0 as a double

START, FPU_STATE, X87, SWAP_16_BYTES, EXTENDED_STATE = range(1, 6)
STEPS = {
    START: "64-bit code with paging on",
    FPU_STATE: "fxsave and fxrstor",
    X87: "x87 arithmetic",
    SWAP_16_BYTES: "cmpxchg16b",
    EXTENDED_STATE: "xsave and xrstor",
}


class Verdict:
    """`reason` is a sentence; `step` is where the guest was when it ended."""

    __slots__ = ("can_run_linux", "reason", "step")

    def __init__(self, can_run_linux: bool, reason: str, step: int = 0) -> None:
        self.can_run_linux = can_run_linux
        self.reason = reason
        self.step = step


def program(with_xsave: bool) -> bytes:
    """The guest's code."""

    def at(address: int) -> bytes:
        return b"\x25" + struct.pack("<I", address)  # SIB byte and disp32: an absolute address

    def step(number: int) -> bytes:
        return bytes((0xB0, number, 0xE6, _PORT))  # mov al, number; out _PORT, al

    code = step(START)
    code += step(FPU_STATE) + b"\x0f\xae\x04" + at(_DATA) + b"\x0f\xae\x0c" + at(_DATA)
    code += step(X87) + b"\xdb\xe3\xd9\xe8\xdd\x1c" + at(_DATA + 0x200)  # fninit; fld1; fstp qword
    code += step(SWAP_16_BYTES) + b"\x31\xc0\x31\xd2"  # expect rdx:rax = 0
    code += b"\xbb" + struct.pack("<I", 1) + b"\xb9" + struct.pack("<I", 2)  # store rcx:rbx = 2:1
    code += b"\xf0\x48\x0f\xc7\x0c" + at(_DATA + 0x400)
    if with_xsave:
        x87_and_sse = b"\xb8\x03\x00\x00\x00\x31\xd2"  # edx:eax = 3
        code += step(EXTENDED_STATE) + x87_and_sse + b"\x31\xc9\x0f\x01\xd1"  # xsetbv XCR0
        code += x87_and_sse + b"\x0f\xae\x24" + at(_XSAVE_AREA) + b"\x0f\xae\x2c" + at(_XSAVE_AREA)
    return code + b"\xf4"  # hlt


def probe(system: KvmSystem) -> Verdict:
    """Run the guest. Thread: main, for it borrows SIGALRM. Raises: HostError when KVM cannot even make a machine."""
    vm = KvmVm(system)
    try:
        host = HostMapping(_RAM_SIZE)
        memory = GuestMemory([RamRegion(0, host)])
        vm.add_memory(RamRegion(0, host))
        vcpu = KvmVcpu(vm, 0, system.vcpu_mmap_size())
        try:
            _set_up(system, vcpu, memory)
            return _run(vcpu, memory)
        finally:
            vcpu.close()
    finally:
        vm.close()


def _set_up(system: KvmSystem, vcpu: KvmVcpu, memory: GuestMemory) -> None:
    cpuid = system.supported_cpuid()
    with_xsave = _has_xsave(cpuid)
    memory.write(layout.PML4, struct.pack("<Q", layout.PDPT | _PRESENT_WRITABLE))
    memory.write(layout.PDPT, struct.pack("<Q", layout.PAGE_DIRECTORY | _PRESENT_WRITABLE))
    memory.write(layout.PAGE_DIRECTORY, struct.pack("<Q", _PRESENT_WRITABLE | _LARGE_PAGE))
    memory.write(_CODE, program(with_xsave))
    vcpu.set_cpuid(cpuid)
    sregs = registers.long_mode_sregs(vcpu.get_sregs())
    (cr4,) = struct.unpack_from("<Q", sregs, _CR4_OFFSET)
    cr4 |= _CR4_OSFXSR | _CR4_OSXMMEXCPT | (_CR4_OSXSAVE if with_xsave else 0)
    struct.pack_into("<Q", sregs, _CR4_OFFSET, cr4)
    vcpu.set_sregs(sregs)
    vcpu.set_regs(registers.linux64_regs(_CODE, 0))


def _has_xsave(cpuid: bytes) -> bool:
    # struct kvm_cpuid_entry2 { u32 function, index, flags, eax, ebx, ecx, edx, padding[3]; }
    for start in range(0, len(cpuid), CPUID_ENTRY_SIZE):
        function, _, _, _, _, ecx = struct.unpack_from("<6I", cpuid, start)
        if function == 1:
            return bool(ecx & _CPUID_1_ECX_XSAVE)
    return False


def _run(vcpu: KvmVcpu, memory: GuestMemory) -> Verdict:
    before = _signal.signal(_signal.SIGALRM, lambda *_: None)  # its arrival alone takes the vCPU out of KVM_RUN
    _signal.setitimer(_signal.ITIMER_REAL, SECONDS, SECONDS / 4)
    try:
        return _until_halt(vcpu, memory, time.monotonic() + SECONDS)
    finally:
        _signal.setitimer(_signal.ITIMER_REAL, 0)
        _signal.signal(_signal.SIGALRM, before)


def _until_halt(vcpu: KvmVcpu, memory: GuestMemory, deadline: float) -> Verdict:
    step = 0
    while True:
        try:
            fcntl.ioctl(vcpu.fd, uapi.KVM_RUN, 0)
        except OSError as error:
            if error.errno not in (errno.EINTR, errno.EAGAIN):
                raise HostError.from_os("KVM_RUN of the probe guest", error) from error
            if time.monotonic() >= deadline:
                return Verdict(False, f"the probe guest did not get past {_name(step)} in {SECONDS:g} s", step)
            continue
        reason = vcpu.page32[2]
        if reason == uapi.KVM_EXIT_IO and vcpu.page16[17] == _PORT:
            step = vcpu.page[vcpu.page64[5]]
        elif reason == uapi.KVM_EXIT_HLT:
            return _judge(memory, step)
        elif reason == uapi.KVM_EXIT_INTERNAL_ERROR:
            return Verdict(False, f"KVM emulates the guest's kernel code and does not know {_name(step)} "
                                  f"(KVM_EXIT_INTERNAL_ERROR, suberror {vcpu.page32[8]})", step)
        else:
            exit_name = uapi.EXIT_NAMES.get(reason, f"exit reason {reason}")
            return Verdict(False, f"the probe guest ended at {_name(step)} with {exit_name}", step)


def _name(step: int) -> str:
    return STEPS.get(step, "its first instruction")


def _judge(memory: GuestMemory, step: int) -> Verdict:
    """The guest has come to its end: are the results right?"""
    if memory.load_u64(_DATA + 0x200) != _ONE:
        return Verdict(False, f"{STEPS[X87]} gives a wrong result", X87)
    if (memory.load_u64(_DATA + 0x400), memory.load_u64(_DATA + 0x408)) != (1, 2):
        return Verdict(False, f"{STEPS[SWAP_16_BYTES]} gives a wrong result", SWAP_16_BYTES)
    return Verdict(True, "the probe guest ran to its end", step)
