"""vhost in the kernel: a device's rings are served by a kernel thread that reads and writes guest RAM through this process.

A vhost descriptor is told, in this order: who owns it (the process whose memory it may touch), which of that memory is
guest RAM, which features the driver chose, and for each ring its size, addresses and eventfds. Ring addresses are this
process's own, so this module and `hostmap` are the two that handle raw addresses.

Facts about vhost that the callers rest on:
- Everything but SET_OWNER and the features is refused (EPERM) to a process that is not the owner.
- The kick eventfd is only watched, never read: it may be signalled by KVM's ioeventfd and by this process alike.
- The call eventfd is signalled when the driver wants an interrupt; event index and flags are looked at by the kernel.
- The error eventfd is signalled when a ring breaks the rules; the kernel then stops working on that ring.
"""

from __future__ import annotations

import fcntl
import os
import struct

from stratovirt.errors import HostError
from stratovirt.vhost import _uapi as uapi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from stratovirt.memory import GuestMemory

    Ioctl = Callable[[int, int, bytes | bytearray | int], object]


_F_LOG_ALL = 1 << 26


def _ioctl(fd: int, request: int, argument: bytes | bytearray | int) -> object:
    return fcntl.ioctl(fd, request, argument)


class KernelVhost:
    """One open vhost descriptor; `close` gives it back, which stops whatever runs on it.

    `name` is for messages (`/dev/vhost-vsock`). Raises: HostError from every call that the kernel refuses.
    """

    __slots__ = ("_ioctl", "fd", "memory", "name")

    def __init__(self, fd: int, name: str, memory: GuestMemory, ioctl: Ioctl | None = None) -> None:
        self.fd = fd
        self.name = name
        self.memory = memory
        self._ioctl: Ioctl = ioctl or _ioctl

    def call(self, operation: str, request: int, argument: bytes | bytearray | int = 0) -> None:
        """One ioctl. `operation` is its name, for the error."""
        try:
            self._ioctl(self.fd, request, argument)
        except OSError as error:
            raise HostError.from_os(f"{operation} on {self.name}", error) from error

    # -- once

    def set_owner(self) -> None:
        """This process's memory is the one that rings and buffers lie in."""
        self.call("VHOST_SET_OWNER", uapi.VHOST_SET_OWNER)

    def features(self) -> int:
        """Every feature bit that the kernel can do."""
        argument = bytearray(8)
        self.call("VHOST_GET_FEATURES", uapi.VHOST_GET_FEATURES, argument)
        return int.from_bytes(argument, "little")

    def set_memory(self) -> None:
        """Tell all of guest RAM.

        Layout: struct vhost_memory { u32 nregions, padding; struct { u64 guest_phys_addr, memory_size, userspace_addr,
        flags_padding; } regions[]; }
        """
        regions = self.memory.regions
        table = struct.pack("<II", len(regions), 0) + b"".join(
            struct.pack("<QQQQ", region.base, region.size, region.host.address, 0) for region in regions)
        self.call("VHOST_SET_MEM_TABLE", uapi.VHOST_SET_MEM_TABLE, table)

    # -- at every activation

    def set_features(self, features: int) -> None:
        """What the driver chose. Where writes are counted the kernel keeps its log of them: of buffers, as it does; used rings
        are counted by whoever makes a queue.
        """
        tracker = self.memory.tracker
        if tracker is not None:
            self.call("VHOST_SET_LOG_BASE", uapi.VHOST_SET_LOG_BASE, struct.pack("<Q", tracker.vhost_log))
            features |= _F_LOG_ALL
        self.call("VHOST_SET_FEATURES", uapi.VHOST_SET_FEATURES, struct.pack("<Q", features))

    def set_ring(self, index: int, size: int, descriptor_table: int, avail_ring: int, used_ring: int, kick_fd: int,
                 call_fd: int, error_fd: int, base: int = 0) -> None:
        """Describe the ring `index`, in guest-physical addresses; `base` is the first index of the available ring to serve.

        Raises: GuestError when a part of it is not in RAM.
        """
        # struct vhost_vring_state { u32 index, num; }
        self.call("VHOST_SET_VRING_NUM", uapi.VHOST_SET_VRING_NUM, struct.pack("<II", index, size))
        self.call("VHOST_SET_VRING_BASE", uapi.VHOST_SET_VRING_BASE, struct.pack("<II", index, base))
        # struct vhost_vring_addr { u32 index, flags; u64 desc_user_addr, used_user_addr, avail_user_addr, log_guest_addr; }
        self.call("VHOST_SET_VRING_ADDR", uapi.VHOST_SET_VRING_ADDR, struct.pack(
            "<IIQQQQ", index, 0, self._translate(descriptor_table, 16 * size), self._translate(used_ring, 6 + 8 * size),
            self._translate(avail_ring, 6 + 2 * size), 0))
        # struct vhost_vring_file { u32 index; s32 fd; }
        self.call("VHOST_SET_VRING_ERR", uapi.VHOST_SET_VRING_ERR, struct.pack("<Ii", index, error_fd))
        self.call("VHOST_SET_VRING_CALL", uapi.VHOST_SET_VRING_CALL, struct.pack("<Ii", index, call_fd))
        self.call("VHOST_SET_VRING_KICK", uapi.VHOST_SET_VRING_KICK, struct.pack("<Ii", index, kick_fd))

    def ring_base(self, index: int) -> int:
        """The index of the available ring that a stopped ring would serve next."""
        argument = bytearray(struct.pack("<II", index, 0))
        self.call("VHOST_GET_VRING_BASE", uapi.VHOST_GET_VRING_BASE, argument)
        return int(struct.unpack("<II", argument)[1]) & 0xFFFF

    def _translate(self, address: int, length: int) -> int:
        region = self.memory.region(address, length)
        return region.host.address + (address - region.base)

    def close(self) -> None:
        """Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
