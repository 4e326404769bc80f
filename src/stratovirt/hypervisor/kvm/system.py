"""/dev/kvm itself: open it, ask what it can do, make a virtual machine."""

from __future__ import annotations

import errno
import fcntl
import posix
import struct

from stratovirt.errors import HostError
from stratovirt.hypervisor.kvm import _uapi as uapi

DEVICE_PATH = "/dev/kvm"
CPUID_ENTRY_SIZE = 40
_MAX_CPUID_ENTRIES = 256


class KvmSystem:
    """An open /dev/kvm.

    Raises: HostError when it is missing, closed to this user, or not the stable API.
    """

    def __init__(self, path: str = DEVICE_PATH) -> None:
        try:
            self.fd = posix.open(path, posix.O_RDWR | posix.O_CLOEXEC)
        except OSError as error:
            raise HostError.from_os(f"cannot open {path}", error, _open_hint(error.errno)) from error
        try:
            version = fcntl.ioctl(self.fd, uapi.KVM_GET_API_VERSION, 0)
        except OSError as error:
            posix.close(self.fd)
            raise HostError.from_os(f"{path} is not a KVM device", error) from error
        if version != uapi.API_VERSION:
            posix.close(self.fd)
            raise HostError(f"{path} speaks KVM API {version}, not {uapi.API_VERSION}")
        self._supported_cpuid = b""

    def check_extension(self, capability: int) -> int:
        """0 when the capability is missing, else a positive number whose meaning depends on it."""
        return fcntl.ioctl(self.fd, uapi.KVM_CHECK_EXTENSION, capability)

    def create_vm(self, kind: int = 0) -> int:
        """A file descriptor for a new virtual machine. `kind` is 0, or on arm64 the bits of its physical addresses."""
        while True:
            try:
                return fcntl.ioctl(self.fd, uapi.KVM_CREATE_VM, kind)
            except InterruptedError:
                continue  # KVM_CREATE_VM gives up when a signal arrives while it waits for its locks
            except OSError as error:
                raise HostError.from_os("KVM_CREATE_VM", error) from error

    def vcpu_mmap_size(self) -> int:
        return fcntl.ioctl(self.fd, uapi.KVM_GET_VCPU_MMAP_SIZE, 0)

    def supported_cpuid(self) -> bytes:
        """The CPUID entries that KVM can give a guest: struct kvm_cpuid_entry2 after kvm_cpuid_entry2, 40 bytes each.

        KVM takes longer over it than over most things, and always says the same: it is asked once.
        """
        if self._supported_cpuid:
            return self._supported_cpuid
        buffer = bytearray(8 + _MAX_CPUID_ENTRIES * CPUID_ENTRY_SIZE)
        struct.pack_into("<I", buffer, 0, _MAX_CPUID_ENTRIES)
        try:
            fcntl.ioctl(self.fd, uapi.KVM_GET_SUPPORTED_CPUID, buffer, True)
        except OSError as error:
            raise HostError.from_os("KVM_GET_SUPPORTED_CPUID", error) from error
        (count,) = struct.unpack_from("<I", buffer)
        self._supported_cpuid = bytes(buffer[8 : 8 + count * CPUID_ENTRY_SIZE])
        return self._supported_cpuid

    def msr_indices(self) -> list[int]:
        """The MSRs that KVM saves and restores."""
        room = 4096  # more than any KVM has: the call fails with E2BIG when the list does not fit
        buffer = bytearray(4 + 4 * room)
        struct.pack_into("<I", buffer, 0, room)
        try:
            fcntl.ioctl(self.fd, uapi.KVM_GET_MSR_INDEX_LIST, buffer, True)
        except OSError as error:
            raise HostError.from_os("KVM_GET_MSR_INDEX_LIST", error) from error
        (count,) = struct.unpack_from("<I", buffer)
        return list(struct.unpack_from(f"<{count}I", buffer, 4))

    def close(self) -> None:
        posix.close(self.fd)


def _open_hint(error: int | None) -> str:
    if error == errno.ENOENT:
        return "load the kvm-intel or kvm-amd module, or run `stratovirt doctor` to see what this machine can do"
    if error in (errno.EACCES, errno.EPERM):
        return "run as root or join the group that owns it (usually kvm)"
    if error == errno.ENODEV:
        return "the processor's virtualization is off: enable it in the firmware set-up"
    return ""
