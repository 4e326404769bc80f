"""The queue pairs of a network interface: which are in use, what is behind each, and who serves it, this process or vhost.

A driver uses one pair until it asks for more. The tap's queues of the others are detached, so that the kernel steers no frame
there; what a driver sends through such a pair nevertheless goes out by the first.

Rings change hands at a point where every chain that was taken has been returned: `Virtqueue.position` on our side, the ring
base on the kernel's. The kernel's threads interrupt the driver by themselves: what they signal is KVM's irqfd.
"""

from __future__ import annotations

import os

from stratovirt.errors import GuestError, HostError
from stratovirt.loop import READ

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from stratovirt.backends.tap import Tap
    from stratovirt.loop import EventLoop
    from stratovirt.vhost.net import VhostNet
    from stratovirt.virtio.device import Lock
    from stratovirt.virtio.net import VirtioNet
    from stratovirt.virtio.net_receive import Receiver
    from stratovirt.virtio.net_send import Sender


class Locks:
    """Several locks that are taken together, always in the same order."""

    def __init__(self, locks: list[Lock]) -> None:
        self._locks = locks

    def __enter__(self) -> bool:
        for lock in self._locks:
            lock.__enter__()
        return True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for lock in reversed(self._locks):
            lock.__exit__(kind, error, trace)


class Pair:
    """A receive and a transmit queue, over a queue of the tap. `vhost` is who serves them, None: this process."""

    __slots__ = ("enabled", "halves", "receiver", "sender", "tap", "vhost")

    def __init__(self, receiver: Receiver, sender: Sender, tap: Tap) -> None:
        self.receiver = receiver
        self.sender = sender
        self.halves: tuple[Receiver | Sender, ...] = (receiver, sender)
        self.tap = tap
        self.vhost: VhostNet | None = None
        self.enabled = False  # its queue of the tap is attached


class Pairs:
    """All of an interface's. Thread: any that holds the locks of all halves, but for what the loop calls."""

    def __init__(self, device: VirtioNet, pairs: list[Pair], loop: EventLoop) -> None:
        self.all = pairs
        self.locks = Locks([half.lock for pair in pairs for half in pair.halves])
        self._device = device
        self._loop = loop
        self._wanted = 1
        self._error_fd = -1  # what the kernel's threads signal when a ring is broken

    # -- what they are connected to

    def connect(self, taps: Sequence[Tap], vhosts: Sequence[VhostNet]) -> None:
        """Use these from now on; with fewer queues than pairs the last ones receive nothing."""
        for number, pair in enumerate(self.all):
            pair.tap = taps[number] if number < len(taps) else taps[0]
            pair.vhost = vhosts[number] if number < len(vhosts) else None
            pair.enabled = number < len(taps)  # a queue is attached when it is opened
            if pair.enabled:
                pair.receiver.attach(pair.tap)
            pair.sender.attach(pair.tap)
        if vhosts and self._error_fd < 0:
            self._error_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._loop.add(self._error_fd, READ, self._on_broken_ring)
        self.enable(self._wanted)

    def disconnect(self) -> None:
        """Close taps and vhosts, none of which runs any more."""
        for pair in self.all:
            pair.receiver.detach()
            pair.sender.forget()
        closed: list[Tap] = []
        for pair in self.all:
            if pair.tap not in closed:
                closed.append(pair.tap)
                pair.tap.close()
            if pair.vhost is not None:
                pair.vhost.close()
                pair.vhost = None

    # -- which are in use

    @property
    def wanted(self) -> int:
        """How many the driver uses."""
        return self._wanted

    def enable(self, count: int) -> bool:
        """Let the first `count` be in use; `sync` comes after. False: the tap refuses, and the log has it."""
        self._wanted = count
        first = self.all[0].tap
        done = True
        for number, pair in enumerate(self.all):
            wanted = number < count and (number == 0 or pair.tap is not first)
            if wanted != pair.enabled:
                done = self._enable(number, pair, wanted) and done
            elif not wanted:
                pair.sender.attach(first)
        return done

    def _enable(self, number: int, pair: Pair, wanted: bool) -> bool:
        if not wanted:
            pair.enabled = False
            self.sync()
            self._give_back(pair)
            pair.receiver.detach()
            pair.sender.attach(self.all[0].tap)
        if number and self._device.has_tap:
            try:
                pair.tap.enable(wanted)
            except HostError as error:
                self._device.report(error)
                return False
        if wanted:
            pair.enabled = True
            pair.receiver.attach(pair.tap)
            pair.sender.attach(pair.tap)
        return True

    def give_back(self) -> None:
        """Nothing that was popped is kept by any pair."""
        for pair in self.all:
            self._give_back(pair)

    def _give_back(self, pair: Pair) -> None:
        """What was popped and not returned is available again, for whoever serves the queues next."""
        for half in pair.halves:
            half.forget()
            queue = self._device.queue(half.index)
            if queue is not None:
                queue.seek(queue.position)

    # -- vhost

    @property
    def in_kernel(self) -> frozenset[int]:
        """The queues that its threads serve at the moment."""
        return frozenset(half.index for pair in self.all if pair.vhost is not None and pair.vhost.running
                         for half in pair.halves)

    def sync(self) -> bool:
        """Let the kernel's threads run or rest as it should be. False: the kernel refuses, and the log has it."""
        up = self._device.is_moving
        done = True
        for pair in self.all:
            vhost = pair.vhost
            if vhost is not None and vhost.running != (up and pair.enabled):
                done = (self._stop(pair, vhost) if vhost.running else self._start(pair, vhost)) and done
        self._device.let_others_interrupt(bool(self.in_kernel))
        return done

    def _start(self, pair: Pair, vhost: VhostNet) -> bool:
        device = self._device
        rx, tx = device.queue(pair.receiver.index), device.queue(pair.sender.index)
        if rx is None or tx is None or device.transport is None:
            return True  # a driver without its queues: there is nothing to serve
        self._give_back(pair)
        kick_fds = [device.transport.notify_fds[half.index] for half in pair.halves]
        device.let_others_interrupt(True)
        try:
            vhost.start(device.driver_features, (rx, tx), kick_fds, device.transport.interrupt_fd, self._error_fd, pair.tap.fd)
        except HostError as error:
            device.report(error)
            self._stop(pair, vhost)
            return False
        return True

    def _stop(self, pair: Pair, vhost: VhostNet) -> bool:
        if not vhost.running:
            return True
        try:
            positions = vhost.stop()
        except HostError as error:
            self._device.report(error)
            return False
        for half, position in zip(pair.halves, positions, strict=True):
            queue = self._device.queue(half.index)
            if queue is not None:
                queue.seek(position)
        return True

    # -- what the kernel tells. Thread: the device's loop

    def _on_broken_ring(self, _events: int) -> None:
        os.eventfd_read(self._error_fd)
        if self._device.active and not self._device.find_tap_gone():
            self._device.break_down(GuestError(self._device.name, "a ring that the kernel cannot follow", "VIRTIO 1.2, 2.7"))
