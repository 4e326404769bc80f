"""Sending: from a transmit queue to a tap.

The header is copied out, checked, and sent in front of the driver's buffers with one `writev`. A full tap leaves the chain
where it is until the tap is writable, which a second descriptor of the same tap tells: an epoll instance knows each number
once, and the first one may be the receiver's in the same loop or in another.
"""

from __future__ import annotations

import os
from _thread import allocate_lock

from stratovirt.backends.tap import TapGoneError
from stratovirt.errors import GuestError, HostError
from stratovirt.loop import WRITE, EventLoop
from stratovirt.native import FULL
from stratovirt.virtio.net_header import HEADER_SIZE, HeaderError, checked
from stratovirt.virtio.queue import Chain, Virtqueue, split

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.backends.tap import Tap
    from stratovirt.virtio.net import VirtioNet

TX_BATCH = 64  # frames in one turn
_MAX_VIEWS = 1023  # of the guest's in one call: IOV_MAX is 1024, and one is ours


class Sender:
    """The transmit queue `index` of an interface, over `tap`. `lock` as with Receiver; thread: the loop's, or with `lock`."""

    def __init__(self, device: VirtioNet, index: int, loop: EventLoop, tap: Tap) -> None:
        self.lock = allocate_lock()
        self.index = index
        self.loop = loop
        self.tap = tap
        self._device = device
        self._waiting: Chain | None = None
        self._watch_fd = -1

    def attach(self, tap: Tap) -> None:
        self._unwatch()
        self.tap = tap

    def forget(self) -> None:
        """The chain at hand is the driver's again, or nobody's after a reset."""
        self._waiting = None
        self._unwatch()

    def _watch(self) -> None:
        if self._watch_fd < 0:
            self._watch_fd = os.dup(self.tap.fd)
            self.loop.add(self._watch_fd, WRITE, self._on_writable)

    def _unwatch(self) -> None:
        fd, self._watch_fd = self._watch_fd, -1
        if fd >= 0:
            self.loop.remove(fd)
            os.close(fd)

    def _on_writable(self, _events: int) -> None:
        with self.lock:
            self._unwatch()
        self._device.process(self.index)

    # -- queue work, with `lock` held

    def transmit(self, queue: Virtqueue) -> bool:
        """True: chains may be left, come again."""
        queue.disable_notifications()
        self._unwatch()
        left = TX_BATCH
        while left > 0:
            left -= 1
            ring = queue.ring if self._waiting is None and self._device.link_up else None
            if ring is not None:
                sent, why = ring.send_frames(self.tap.fd, *queue.positions, self._device.driver_features, left + 1)
                queue.advance(sent)
                left -= sent
                if why == FULL:
                    self._watch()
                    return False
                if left < 0:
                    return True
            chain = self._waiting or queue.pop()
            if chain is None:
                if not queue.enable_notifications():
                    return False
                continue
            self._waiting = None
            if chain.readable_length < HEADER_SIZE:
                queue.push(chain.head, 0)
                raise GuestError(self._device.name, f"a frame of {chain.readable_length} bytes has no header",
                                 "VIRTIO 1.2, 5.1.6.2")
            if not self._send(chain):
                self._waiting = chain
                self._watch()
                return False
            queue.push(chain.head, 0)
        return True

    def _send(self, chain: Chain) -> bool:
        """Send one frame, or drop it if it cannot be sent. False: the tap is full."""
        device = self._device
        if not device.link_up:
            return True
        header, frame = split(chain.readable, HEADER_SIZE)
        try:
            front = checked(b"".join(header), chain.readable_length - HEADER_SIZE, device.driver_features)
            if len(frame) > _MAX_VIEWS:
                return self.tap.write([front, b"".join(frame)])  # more pieces than one call takes; MAX_FRAME bounds it
            return self.tap.write([front, *frame])
        except HeaderError as error:
            device.report(GuestError(device.name, f"dropped what the driver sent: {error}"))
        except TapGoneError as error:
            device.lose_tap(error)
        except HostError as error:
            device.report(error)
        return True
