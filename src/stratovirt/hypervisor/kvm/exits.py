"""What an exit that the run loop cannot answer means, in words, with the evidence. Imported only when one happens."""

from __future__ import annotations

import os
import struct

from stratovirt.errors import GuestError, HostError
from stratovirt.hostmap import ARCHITECTURE
from stratovirt.hypervisor.kvm import _uapi as uapi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.hypervisor.kvm.vcpu import KvmVcpu
    from stratovirt.memory import GuestMemory

_REGS = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
         "rip", "rflags")
_EMULATION_FAILURE = 1
_FLAG_INSTRUCTION_BYTES = 1

_MEANING = {
    uapi.KVM_EXIT_UNKNOWN: "the processor left the guest for a reason this KVM does not know",
    uapi.KVM_EXIT_EXCEPTION: "the guest raised an exception that KVM handed back",
    uapi.KVM_EXIT_HYPERCALL: "the guest made a hypercall that only user space could answer, and none was offered to it",
    uapi.KVM_EXIT_DEBUG: "a guest breakpoint was hit without a debugger attached",
    uapi.KVM_EXIT_HLT: "the guest halted and KVM has no interrupt controller to wake it",
    uapi.KVM_EXIT_FAIL_ENTRY: "the processor refused to enter the guest: its registers do not form a valid state",
    uapi.KVM_EXIT_SET_TPR: "the guest changed a task priority register that lives in the kernel",
    uapi.KVM_EXIT_TPR_ACCESS: "the guest touched a task priority register that lives in the kernel",
    uapi.KVM_EXIT_NMI: "KVM handed back a non-maskable interrupt of the host",
    uapi.KVM_EXIT_OSI: "KVM met a hypercall of an interface that this machine does not offer",
    uapi.KVM_EXIT_SYSTEM_EVENT: "KVM reported a system event that this machine does not know (a guest crash, perhaps)",
    uapi.KVM_EXIT_IOAPIC_EOI: "KVM reported the end of an interrupt of an IOAPIC that lives in the kernel",
    uapi.KVM_EXIT_HYPERV: "the guest used a Hyper-V interface that this machine does not offer",
    uapi.KVM_EXIT_ARM_NISV: "the guest touched a device's registers with an instruction that KVM cannot take apart",
    uapi.KVM_EXIT_X86_RDMSR: "the guest read an MSR that KVM leaves to user space",
    uapi.KVM_EXIT_X86_WRMSR: "the guest wrote an MSR that KVM leaves to user space",
    uapi.KVM_EXIT_DIRTY_RING_FULL: "the ring of dirty pages is full although none was asked for",
    uapi.KVM_EXIT_X86_BUS_LOCK: "the guest held the memory bus although KVM was not asked to report it",
    uapi.KVM_EXIT_NOTIFY: "the guest kept the processor from taking events for too long",
    uapi.KVM_EXIT_MEMORY_FAULT: "the guest touched memory that the host could not provide",
}
_SUBERROR = {
    1: "KVM could not emulate a guest instruction",
    2: "the guest caused an exception while another was delivered, in a way the processor does not define",
    3: "an event could not be delivered to the guest",
    4: "the processor left the guest for a reason this KVM does not expect",
}


def describe(vcpu: KvmVcpu, memory: GuestMemory, errno: int) -> str:
    """Several lines: the exit and what it means, the instruction, the registers. Thread: the vCPU's own."""
    lines = [_headline(vcpu, errno)]
    if ARCHITECTURE == "aarch64":
        from stratovirt.hypervisor.kvm.exits_arm64 import registers

        return "\n".join([*lines, *registers(vcpu)])
    instruction = _instruction(vcpu, memory)
    if instruction:
        lines.append(f"  instruction bytes at rip: {instruction}")
    lines.extend(_registers(vcpu))
    return "\n".join(lines)


def _headline(vcpu: KvmVcpu, errno: int) -> str:
    if errno:
        return f"vCPU {vcpu.id}: KVM_RUN failed: {os.strerror(errno)}: the guest cannot go on"
    reason = vcpu.page32[2]
    name = uapi.EXIT_NAMES.get(reason, f"exit reason {reason}")
    if reason == uapi.KVM_EXIT_INTERNAL_ERROR:
        suberror = vcpu.page32[8]
        text = f"vCPU {vcpu.id}: {name}, suberror {suberror}: {_SUBERROR.get(suberror, 'an error inside KVM')}"
        if suberror == _EMULATION_FAILURE:
            text += "; this KVM cannot run this guest: see `stratovirt doctor`"
        return text
    if reason == uapi.KVM_EXIT_FAIL_ENTRY:
        return f"vCPU {vcpu.id}: {name}, hardware reason {vcpu.page64[4]:#x}: {_MEANING[reason]}"
    return f"vCPU {vcpu.id}: {name}: {_MEANING.get(reason, 'an exit reason that this version does not know')}"


def _instruction(vcpu: KvmVcpu, memory: GuestMemory) -> str:
    page = vcpu.page
    if vcpu.page32[2] == uapi.KVM_EXIT_INTERNAL_ERROR and vcpu.page32[8] == _EMULATION_FAILURE:
        # struct { u32 suberror, ndata; u64 flags; u8 insn_size; u8 insn_bytes[15]; } emulation_failure, at 32
        size = page[48]
        if vcpu.page32[9] >= 3 and vcpu.page64[5] & _FLAG_INSTRUCTION_BYTES and 0 < size <= 15:
            return bytes(page[49 : 49 + size]).hex(" ")
    try:
        (rip,) = struct.unpack_from("<Q", vcpu.get_regs(), 16 * 8)
        (cs_base,) = struct.unpack_from("<Q", vcpu.get_sregs(), 0)
        physical = vcpu.translate((cs_base + rip) & ((1 << 64) - 1))
        return memory.read(physical, 15).hex(" ") if physical is not None else ""
    except (HostError, GuestError):
        return ""  # no instruction to show: rip is not in RAM, or KVM will not say


def _registers(vcpu: KvmVcpu) -> list[str]:
    try:
        regs = struct.unpack("<18Q", vcpu.get_regs())
        sregs = vcpu.get_sregs()
    except HostError as error:
        return [f"  registers are not available: {error}"]
    rows = [f"{name:>6} {value:016x}" for name, value in zip(_REGS, regs, strict=True)]
    lines = ["  " + " ".join(rows[start : start + 4]) for start in range(0, len(rows), 4)]
    for start, name in enumerate(("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")):
        base, limit, selector = struct.unpack_from("<QIH", sregs, start * 24)
        lines.append(f"  {name:>6} selector {selector:04x} base {base:016x} limit {limit:08x}")
    cr0, cr2, cr3, cr4 = struct.unpack_from("<4Q", sregs, 224)
    (efer,) = struct.unpack_from("<Q", sregs, 264)
    lines.append(f"     cr0 {cr0:016x}    cr2 {cr2:016x}    cr3 {cr3:016x}    cr4 {cr4:016x}   efer {efer:016x}")
    return lines
