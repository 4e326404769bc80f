"""The vCPU run loop: enter the guest, and send each exit to who answers it.

A port access goes to the port map, an MMIO access to the MMIO map, and both come back with the value in the run page;
KVM completes the instruction on the next entry. That is also why a vCPU is only ever stopped by EINTR from KVM_RUN: then
no instruction is half done and its registers can be saved.
"""

from __future__ import annotations

import errno
import fcntl

from stratovirt.hypervisor.kvm import _uapi as uapi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from stratovirt.address_map import AddressMap
    from stratovirt.hypervisor.kvm.vcpu import KvmVcpu

    class Gate(Protocol):
        def enter(self, vcpu_id: int) -> bool:
            """Wait while the machine is paused. False: leave the run loop for good."""


# Why the loop ended.
STOPPED = "stopped"  # the gate said so
TRIPLE_FAULT = "triple-fault"  # KVM_EXIT_SHUTDOWN: the guest's way to reset when nothing else works
SYSTEM_SHUTDOWN = "system-shutdown"
SYSTEM_RESET = "system-reset"
FATAL = "fatal"  # the vCPU cannot go on; `exits.describe` says why

_KVM_SYSTEM_EVENT_SHUTDOWN = 1
_KVM_SYSTEM_EVENT_RESET = 2


def run_loop(vcpu: KvmVcpu, ports: AddressMap, mmio: AddressMap, gate: Gate) -> tuple[str, int]:
    """Run the guest on this thread until something ends it: (why, errno of KVM_RUN or 0)."""
    page, page16, page32, page64 = vcpu.page, vcpu.page16, vcpu.page32, vcpu.page64
    fd, ioctl = vcpu.fd, fcntl.ioctl
    run, exit_io, exit_mmio, out = uapi.KVM_RUN, uapi.KVM_EXIT_IO, uapi.KVM_EXIT_MMIO, uapi.KVM_EXIT_IO_OUT
    read_port, write_port = ports.read, ports.write
    while True:
        try:
            ioctl(fd, run, 0)
        except OSError as error:
            if error.errno in (errno.EINTR, errno.EAGAIN):
                page[1] = 0  # immediate_exit; cleared before the gate is read, so that a later kick is not lost
                if gate.enter(vcpu.id):
                    continue
                return STOPPED, 0
            return FATAL, error.errno or 0

        reason = page32[2]
        if reason == exit_io:
            # struct { u8 direction, size; u16 port; u32 count; u64 data_offset; } io, at 32
            size = page[33]
            port = page16[17]
            start = page64[5]
            if size == 1 and page32[9] == 1:  # nearly all of them
                if page[32] == out:
                    write_port(port, 1, page[start])
                else:
                    page[start] = read_port(port, 1)
                continue
            for offset in range(start, start + size * page32[9], size):
                if page[32] == out:
                    write_port(port, size, int.from_bytes(page[offset : offset + size], "little"))
                else:
                    page[offset : offset + size] = read_port(port, size).to_bytes(size, "little")
        elif reason == exit_mmio:
            # struct { u64 phys_addr; u8 data[8]; u32 len; u8 is_write; } mmio, at 32
            size = page32[12]
            if page[52]:
                mmio.write(page64[4], size, int.from_bytes(page[40 : 40 + size], "little"))
            else:
                page[40 : 40 + size] = mmio.read(page64[4], size).to_bytes(size, "little")
        elif reason == uapi.KVM_EXIT_SHUTDOWN:
            return TRIPLE_FAULT, 0
        elif reason in (uapi.KVM_EXIT_INTR, uapi.KVM_EXIT_IRQ_WINDOW_OPEN):
            continue  # nothing to do: a signal or an interrupt window, and the guest goes on
        elif reason == uapi.KVM_EXIT_SYSTEM_EVENT:
            event = page32[8]
            if event == _KVM_SYSTEM_EVENT_SHUTDOWN:
                return SYSTEM_SHUTDOWN, 0
            if event == _KVM_SYSTEM_EVENT_RESET:
                return SYSTEM_RESET, 0
            return FATAL, 0
        else:
            return FATAL, 0
