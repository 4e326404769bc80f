"""vhost-net: one queue pair of a network interface, its frames moved between rings and tap by a thread of the kernel.

The frames carry a virtio_net_hdr of 12 bytes on both sides, so VHOST_NET_F_VIRTIO_NET_HDR stays off and the tap makes it.
Facts about the kernel's part: a ring runs while it has a backend (VHOST_NET_SET_BACKEND), and everything else about it can only
be changed while it has none; once the backend is taken away (-1) and the ring's base read, no buffer is touched any more.
"""

from __future__ import annotations

import os
import struct

from stratovirt.errors import ConfigError, HostError
from stratovirt.vhost import _uapi as uapi
from stratovirt.vhost.kernel import KernelVhost

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from stratovirt.memory import GuestMemory

    class Ring(Protocol):
        """A Virtqueue, of which the kernel is told the geometry and where to go on."""

        size: int
        descriptor_table: int
        avail_ring: int
        used_ring: int

        @property
        def position(self) -> int: ...

VHOST_NET = "/dev/vhost-net"
_RX_TX = 2
# VERSION_1, INDIRECT_DESC, EVENT_IDX, MRG_RXBUF: what concerns the rings, and so whoever serves them. The rest is between the
# driver, the tap and the control queue.
_RING_FEATURES = 1 << 32 | 1 << 28 | 1 << 29 | 1 << 15
_NO_BACKEND = -1


class VhostNet:
    """One open /dev/vhost-net with owner and memory. Raises: HostError from what the kernel refuses. Thread: one at a time."""

    __slots__ = ("_features", "running", "vhost")

    def __init__(self, vhost: KernelVhost) -> None:
        self.vhost = vhost
        self._features = vhost.features()
        self.running = False

    def usable(self, features: int) -> int:
        """Those of the device's `features` that are left when this serves its rings."""
        return features & (self._features | ~_RING_FEATURES)

    def start(self, features: int, rings: tuple[Ring, Ring], kick_fds: list[int], call_fd: int, error_fd: int,
              tap_fd: int) -> None:
        """Let the kernel serve both rings, receive and transmit, from where they stand."""
        vhost = self.vhost
        vhost.set_features(features & _RING_FEATURES)
        for index, ring in enumerate(rings):
            vhost.set_ring(index, ring.size, ring.descriptor_table, ring.avail_ring, ring.used_ring, kick_fds[index], call_fd,
                           error_fd, ring.position)
        self.running = True  # with only one of them it has to be stopped, too
        for index in range(_RX_TX):
            self._set_backend(index, tap_fd)

    def stop(self) -> tuple[int, int]:
        """The positions at which the rings stand. When this returns the kernel touches no ring and no buffer."""
        self.running = False
        for index in range(_RX_TX):
            self._set_backend(index, _NO_BACKEND)
        return self.vhost.ring_base(0), self.vhost.ring_base(1)

    def _set_backend(self, index: int, fd: int) -> None:
        # struct vhost_vring_file { u32 index; s32 fd; }
        self.vhost.call("VHOST_NET_SET_BACKEND", uapi.VHOST_NET_SET_BACKEND, struct.pack("<Ii", index, fd))

    def close(self) -> None:
        """Idempotent; stops what runs."""
        self.running = False
        self.vhost.close()


def open_vhost_net(fd: int | None, memory: GuestMemory, path: str = VHOST_NET) -> VhostNet:
    """A vhost-net for the next queue pair; `fd` is one that was opened by who started us, and stays theirs after an error.

    Raises: ConfigError, saying what to do.
    """
    inherited = fd is not None
    option, value = ("-netdev tap,vhostfd", str(fd)) if inherited else ("-netdev tap,vhost", "on")
    if fd is None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"cannot open {path}: {os.strerror(error.errno or 0)}", option=option, value=value,
                              accepted="a host with modprobe vhost_net done, and the right to open it; or vhost=off") from error
    vhost = KernelVhost(fd, path, memory)
    try:
        return _prepare(vhost, option, value, inherited)
    except ConfigError:
        if not inherited:
            vhost.close()
        raise


def _prepare(vhost: KernelVhost, option: str, value: str, inherited: bool) -> VhostNet:
    try:
        opened = VhostNet(vhost)  # it asks for the features: a descriptor that is something else is to be called so
    except HostError as error:
        raise ConfigError(f"not a vhost descriptor: {os.strerror(error.errno)}", option=option, value=value,
                          accepted="the number of an open /dev/vhost-net descriptor") from error
    try:
        vhost.set_owner()
        vhost.set_memory()
        opened._set_backend(0, _NO_BACKEND)  # of /dev/vhost-net alone
    except HostError as error:
        problem = "this is another kind of vhost" if "SET_BACKEND" in error.operation else str(error)
        raise ConfigError(problem, option=option, value=value,
                          accepted="a /dev/vhost-net descriptor that no other process uses") from error
    if inherited:
        os.set_inheritable(vhost.fd, False)
    return opened
