"""virtio-vsock (VIRTIO 1.2, 5.10): sockets between host and guest, their packets moved by the kernel's vhost.

    queue 0  rx      to the guest      served by the kernel
    queue 1  tx      from the guest    served by the kernel
    queue 2  event   transport events  ours: it says that connections are gone, after a restored snapshot

Config space: u64 guest_cid. Interrupts go from vhost to KVM's irqfd, without this process.
"""

from __future__ import annotations

import os
import struct

from stratovirt.errors import ConfigError, GuestError, HostError
from stratovirt.loop import READ
from stratovirt.vhost import _uapi as uapi
from stratovirt.vhost.kernel import KernelVhost
from stratovirt.virtio.device import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from stratovirt.loop import EventLoop
    from stratovirt.memory import GuestMemory
    from stratovirt.snapshot.saved import Saved
    from stratovirt.virtio.queue import Chain, Virtqueue

VHOST_VSOCK = "/dev/vhost-vsock"
F_SEQPACKET = 1
RX, TX, EVENT = 0, 1, 2

_OPTION = "-device vhost-vsock-device"
_OURS = 1 << F_VERSION_1 | 1 << F_INDIRECT_DESC | 1 << F_EVENT_IDX | 1 << F_SEQPACKET
_EBUSY, _EADDRINUSE = 16, 98


_TRANSPORT_RESET = bytes(4)  # struct virtio_vsock_event { le32 id; }, and the only id there is


class VhostVsock(VirtioDevice):
    """`backend` comes from `open_backend`. Loop: the main one, for broken rings."""

    device_id = 19
    name = "vhost-vsock"
    queue_sizes = (256, 256, 256)
    external_queues = frozenset((RX, TX))
    interrupted_by_kernel = True

    def __init__(self, backend: KernelVhost, guest_cid: int, loop: EventLoop,
                 on_error: Callable[[HostError], None] | None = None) -> None:
        super().__init__()
        self.features = backend.features() & _OURS
        self.config = struct.pack("<Q", guest_cid)
        self._backend = backend
        self._on_error = on_error
        self._running = False
        self._paused = False
        self._reset_due = False  # the driver has to hear that all connections are gone
        self._error_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        loop.add(self._error_fd, READ, self._on_broken_ring)

    # -- life cycle

    def activate(self, queues: list[Virtqueue | None]) -> None:
        super().activate(queues)
        with self._work:
            try:
                self._start(queues)
                return
            except HostError as error:
                self._report(error)
                self._stop()
                self.active = False
        if self.transport is not None:
            self.transport.needs_reset(GuestError(self.name, "the host cannot serve its rings"))

    def _start(self, queues: list[Virtqueue | None]) -> None:
        transport, backend = self.transport, self._backend
        rings = (queues[RX], queues[TX])
        if transport is None or None in rings or self._paused:
            return  # a driver without its queues: there is nothing to serve
        backend.set_features(self.driver_features)
        for index, queue in enumerate(rings):
            if queue is not None:
                backend.set_ring(index, queue.size, queue.descriptor_table, queue.avail_ring, queue.used_ring,
                                 transport.notify_fds[index], transport.interrupt_fd, self._error_fd, queue.position)
        self.let_others_interrupt(True)
        self._set_running(True)

    def _set_running(self, running: bool) -> None:
        self._backend.call("VHOST_VSOCK_SET_RUNNING", uapi.VHOST_VSOCK_SET_RUNNING, struct.pack("<i", running))
        self._running = running

    def _stop(self) -> None:
        """When it returns the kernel touches no ring and no buffer. Called with `_work` held."""
        if self._running:
            try:
                self._set_running(False)
            except HostError as error:
                self._report(error)
        self.let_others_interrupt(False)

    def on_reset(self) -> None:
        if self._running:
            self._lose()
        self._stop()
        self._reset_due = False

    def pause(self) -> None:
        """The kernel rests, and the queues know how far it has come."""
        with self._work:
            self._paused = True
            if not self._running:
                return
            self._stop()
            try:
                for index in (RX, TX):
                    queue, position = self.queues[index], self._backend.ring_base(index)
                    if queue is not None:
                        if position != queue.position:
                            self._lose()  # no packet comes that is not answered: one position would come round to where it was
                        queue.seek(position)
            except HostError as error:
                self._report(error)

    def _lose(self) -> None:
        """The kernel has written packets into guest RAM, and keeps no log of that."""
        tracker = self._backend.memory.tracker
        if tracker is not None:
            tracker.lose(f"{self.name} has received packets")

    def resume(self) -> None:
        with self._work:
            was_paused, self._paused = self._paused, False
            if not was_paused or not self.active:
                return
            try:
                self._start(self.queues)
                return
            except HostError as error:
                self._report(error)
                self._stop()
                self.active = False
        if self.transport is not None:
            self.transport.needs_reset(GuestError(self.name, "the host cannot serve its rings"))

    def save(self) -> dict[str, object]:
        return {"reset_due": self._reset_due}

    def restore(self, state: Saved) -> None:
        """No connection outlives its machine. The driver hears so, and reads the guest's CID anew, which may be another."""
        state.boolean("reset_due")
        self._reset_due = self.active

    def _report(self, error: HostError) -> None:
        if self._on_error is not None:
            self._on_error(error)

    # -- what the kernel tells, on the loop

    def _on_broken_ring(self, _events: int) -> None:
        os.eventfd_read(self._error_fd)
        with self._work:
            broken = self.active
            self.active = False
            self._lose()
            self._stop()
        if broken and self.transport is not None:
            self.transport.needs_reset(GuestError(self.name, "a ring that the kernel cannot follow", "VIRTIO 1.2, 2.7"))

    # -- the event queue

    def ready(self, index: int) -> bool:
        return index == EVENT and self._reset_due  # buffers stay in its queue until there is an event

    def handle(self, index: int, queue: Virtqueue, chain: Chain) -> int:
        if chain.writable_length < len(_TRANSPORT_RESET):
            raise GuestError(self.name, f"an event buffer of {chain.writable_length} bytes", "VIRTIO 1.2, 5.10.6.7")
        rest = _TRANSPORT_RESET
        for view in chain.writable:
            part, rest = rest[: len(view)], rest[len(view) :]
            view[: len(part)] = part
        self._reset_due = False
        return len(_TRANSPORT_RESET)


def open_backend(guest_cid: int, fd: int | None, memory: GuestMemory, path: str = VHOST_VSOCK) -> KernelVhost:
    """A vhost-vsock descriptor with owner, memory and guest CID; `fd` is one that was opened by who started us.

    Such a descriptor may have had its CID reserved already, and the kernel then calls the address taken.
    Raises: ConfigError, saying what to do.
    """
    if fd is not None:
        return _prepare(KernelVhost(fd, path, memory), guest_cid, f"{_OPTION},vhostfd", str(fd), inherited=True)
    value = f"guest-cid={guest_cid}"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"cannot open {path}: {os.strerror(error.errno or 0)}", option=_OPTION, value=value,
                          accepted="a host with modprobe vhost_vsock done, and the right to open it") from error
    backend = KernelVhost(fd, path, memory)
    try:
        return _prepare(backend, guest_cid, _OPTION, value, inherited=False)
    except ConfigError:
        backend.close()
        raise


def _prepare(backend: KernelVhost, guest_cid: int, option: str, value: str, inherited: bool) -> KernelVhost:
    try:
        backend.features()  # first, because a descriptor that is something else is to be called so
    except HostError as error:
        raise ConfigError(f"not a vhost descriptor: {os.strerror(error.errno)}", option=option, value=value,
                          accepted="the number of an open /dev/vhost-vsock descriptor") from error
    try:
        _tolerate(inherited, _EBUSY, backend.set_owner)
        backend.set_memory()
    except HostError as error:
        raise ConfigError(str(error), option=option, value=value,
                          accepted="a /dev/vhost-vsock descriptor that no other process uses") from error

    def set_cid() -> None:
        backend.call("VHOST_VSOCK_SET_GUEST_CID", uapi.VHOST_VSOCK_SET_GUEST_CID, struct.pack("<Q", guest_cid))

    try:
        _tolerate(inherited, _EADDRINUSE, set_cid)
    except HostError as error:
        problem = "another guest on this host has this CID" if error.errno == _EADDRINUSE else str(error)
        raise ConfigError(problem, option=f"{_OPTION},guest-cid", value=str(guest_cid),
                          accepted="a number from 3 to 4294967294 that no other guest has") from error
    return backend


def _tolerate(tolerated: bool, errno: int, step: Callable[[], None]) -> None:
    try:
        step()
    except HostError as error:
        if not tolerated or error.errno != errno:
            raise
