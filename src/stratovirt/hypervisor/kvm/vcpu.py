"""A KVM vCPU: its file descriptor, its shared run page, and the ioctls that read and write its state.

Every ioctl but KVM_RUN waits for KVM_RUN to return, so state is touched only before the vCPU's thread starts, on that
thread, or while the machine is paused.
"""

from __future__ import annotations

import fcntl
import posix
import struct

from stratovirt.errors import HostError
from stratovirt.hostmap import SharedPages
from stratovirt.hypervisor.kvm import _uapi as uapi
from stratovirt.hypervisor.kvm.vm import KvmVm

MSR_ENTRY = struct.Struct("<IIQ")  # struct kvm_msr_entry { u32 index, reserved; u64 data; }


class KvmVcpu:
    """One virtual processor.

    Layout of the run page (struct kvm_run) as far as it is used: 1 immediate_exit (u8), 8 exit_reason (u32), 32 the union
    that belongs to the exit reason.
    """

    __slots__ = ("_shared", "cpuid", "fd", "id", "page", "page16", "page32", "page64", "vm")

    def __init__(self, vm: KvmVm, vcpu_id: int, mmap_size: int) -> None:
        self.vm = vm
        self.id = vcpu_id
        self.cpuid = b""  # the table that it was given; what KVM reports is not always that
        self.fd = vm.create_vcpu(vcpu_id)
        self._shared = SharedPages(self.fd, mmap_size, 0)
        self.page = page = self._shared.view
        self.page16 = page.cast("H")
        self.page32 = page.cast("I")
        self.page64 = page.cast("Q")

    def _get(self, name: str, request: int, size: int) -> bytearray:
        state = bytearray(size)
        try:
            fcntl.ioctl(self.fd, request, state, True)
        except OSError as error:
            raise HostError.from_os(f"{name} of vCPU {self.id}", error) from error
        return state

    def _set(self, name: str, request: int, state: bytes | bytearray) -> int:
        try:
            # fcntl copies immutable arguments into a 1 KiB buffer; a bytearray is passed as it is, of any size
            return int(fcntl.ioctl(self.fd, request, bytearray(state), True))
        except OSError as error:
            raise HostError.from_os(f"{name} of vCPU {self.id}", error) from error

    def set_cpuid(self, entries: bytes) -> None:
        """The CPUID table the guest reads: struct kvm_cpuid_entry2 after kvm_cpuid_entry2."""
        self.cpuid = entries
        self._set("KVM_SET_CPUID2", uapi.KVM_SET_CPUID2, struct.pack("<II", len(entries) // 40, 0) + entries)

    def tsc_khz(self) -> int:
        """0: this KVM does not say."""
        try:
            return fcntl.ioctl(self.fd, uapi.KVM_GET_TSC_KHZ, 0)
        except OSError:
            return 0

    def set_tsc_khz(self, khz: int) -> None:
        try:
            fcntl.ioctl(self.fd, uapi.KVM_SET_TSC_KHZ, khz)
        except OSError as error:
            raise HostError.from_os(f"KVM_SET_TSC_KHZ of vCPU {self.id}", error) from error

    def tell_paused(self) -> bool:
        """Mark in the guest's kvmclock that it stood still, so that its watchdogs do not bark. False: it uses none."""
        try:
            fcntl.ioctl(self.fd, uapi.KVM_KVMCLOCK_CTRL, 0)
        except OSError:
            return False
        return True

    def set_msrs(self, values: list[tuple[int, int]]) -> list[int]:
        """Write MSRs; returns the indices that KVM refused."""
        refused: list[int] = []
        rest = values
        while rest:
            packed = b"".join(MSR_ENTRY.pack(index, 0, value) for index, value in rest)
            done = self._set("KVM_SET_MSRS", uapi.KVM_SET_MSRS, struct.pack("<II", len(rest), 0) + packed)
            if done < len(rest):  # KVM stops at the first it does not take
                refused.append(rest[done][0])
                done += 1
            rest = rest[done:]
        return refused

    def get_msrs(self, indices: list[int]) -> list[tuple[int, int]]:
        """Read MSRs, leaving out those that KVM refuses."""
        values: list[tuple[int, int]] = []
        rest = indices
        while rest:
            buffer = bytearray(struct.pack("<II", len(rest), 0) + b"".join(MSR_ENTRY.pack(index, 0, 0) for index in rest))
            try:
                done = fcntl.ioctl(self.fd, uapi.KVM_GET_MSRS, buffer, True)
            except OSError as error:
                raise HostError.from_os(f"KVM_GET_MSRS of vCPU {self.id}", error) from error
            for number in range(done):
                index, _, value = MSR_ENTRY.unpack_from(buffer, 8 + number * MSR_ENTRY.size)
                values.append((index, value))
            rest = rest[done + 1 :]
        return values

    def get_regs(self) -> bytearray:
        return self._get("KVM_GET_REGS", uapi.KVM_GET_REGS, uapi.SIZEOF_REGS)

    def set_regs(self, state: bytes | bytearray) -> None:
        self._set("KVM_SET_REGS", uapi.KVM_SET_REGS, state)

    def get_sregs(self) -> bytearray:
        return self._get("KVM_GET_SREGS", uapi.KVM_GET_SREGS, uapi.SIZEOF_SREGS)

    def set_sregs(self, state: bytes | bytearray) -> None:
        self._set("KVM_SET_SREGS", uapi.KVM_SET_SREGS, state)

    def get_lapic(self) -> bytearray:
        return self._get("KVM_GET_LAPIC", uapi.KVM_GET_LAPIC, uapi.SIZEOF_LAPIC)

    def set_lapic(self, state: bytes | bytearray) -> None:
        self._set("KVM_SET_LAPIC", uapi.KVM_SET_LAPIC, state)

    def get_mp_state(self) -> int:
        return int.from_bytes(self._get("KVM_GET_MP_STATE", uapi.KVM_GET_MP_STATE, 4), "little")

    def set_mp_state(self, state: int) -> None:
        self._set("KVM_SET_MP_STATE", uapi.KVM_SET_MP_STATE, struct.pack("<I", state))

    def get_rest(self, xsave_size: int = uapi.SIZEOF_XSAVE) -> dict[int, bytearray]:
        """FPU, extended state, debug registers and pending events, keyed by the ioctl that sets each of them.

        `xsave_size` is what KVM_CAP_XSAVE2 says, where the processor has more extended state than the 4096 bytes of old.
        """
        get_xsave = uapi.KVM_GET_XSAVE if xsave_size <= uapi.SIZEOF_XSAVE else uapi.KVM_GET_XSAVE2
        state = {
            uapi.KVM_SET_FPU: self._get("KVM_GET_FPU", uapi.KVM_GET_FPU, uapi.SIZEOF_FPU),
            uapi.KVM_SET_XCRS: self._get("KVM_GET_XCRS", uapi.KVM_GET_XCRS, uapi.SIZEOF_XCRS),
            uapi.KVM_SET_XSAVE: self._get("KVM_GET_XSAVE", get_xsave, max(xsave_size, uapi.SIZEOF_XSAVE)),
            uapi.KVM_SET_DEBUGREGS: self._get("KVM_GET_DEBUGREGS", uapi.KVM_GET_DEBUGREGS, uapi.SIZEOF_DEBUGREGS),
            uapi.KVM_SET_VCPU_EVENTS: self._get("KVM_GET_VCPU_EVENTS", uapi.KVM_GET_VCPU_EVENTS, uapi.SIZEOF_VCPU_EVENTS),
        }
        if not any(state[uapi.KVM_SET_XCRS][:4]):  # nr_xcrs: a processor without XSAVE has none, and then none can be set
            del state[uapi.KVM_SET_XCRS]
        return state

    def set_rest(self, state: dict[int, bytearray] | dict[int, bytes]) -> None:
        for request, value in state.items():
            self._set(f"ioctl {request:#x}", request, value)

    def translate(self, linear_address: int) -> int | None:
        """Guest-physical address of a linear one through the vCPU's page tables; None when it is not mapped."""
        # struct kvm_translation { u64 linear_address, physical_address; u8 valid, writeable, usermode; u8 pad[5]; }
        argument = bytearray(struct.pack("<Q16x", linear_address))
        try:
            fcntl.ioctl(self.fd, uapi.KVM_TRANSLATE, argument, True)
        except OSError:
            return None  # this KVM cannot tell (nested state, no page tables yet)
        _, physical, valid = struct.unpack_from("<QQB", argument)
        return physical if valid else None

    def close(self) -> None:
        for view in (self.page16, self.page32, self.page64):
            view.release()
        self._shared.close()
        posix.close(self.fd)
