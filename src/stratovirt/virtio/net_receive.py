"""Receiving: from a tap into a receive queue, one `readv` a frame, straight into the driver's buffers.

Chains are popped until the largest frame fits, one `readv` puts header and frame there, and as many as were filled go back at
once, after num_buffers was set in the first. The others wait for the next frame. The last buffer of every `readv` is the
device's own, so that a frame for which the driver had too little room is not cut off: it is held until there is more room, or
dropped if there can never be. While the driver has no buffers the tap is not watched, and frames stay in its queue; the
notification of a refill watches it again.
"""

from __future__ import annotations

from _thread import allocate_lock

from stratovirt.backends.tap import TapGoneError
from stratovirt.errors import GuestError, HostError
from stratovirt.loop import ERROR, HANGUP, READ, EventLoop
from stratovirt.native import HOPELESS, ODD, SHORT
from stratovirt.virtio.net_filter import HEAD_SIZE
from stratovirt.virtio.net_header import HEADER_SIZE, MAX_FRAME, NUM_BUFFERS_AT
from stratovirt.virtio.queue import Chain, Virtqueue, split

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.backends.tap import Tap
    from stratovirt.loop import Timer
    from stratovirt.native._native import Ring
    from stratovirt.virtio.net import VirtioNet

# Frames in one turn. With segmentation offload a frame is up to 64 KiB, and others on the loop wait meanwhile.
RX_BATCH = 64
SMALL_FRAME = HEADER_SIZE + 1514  # without segmentation offload; larger ones (jumbo frames) go over `_spill`
LARGE_FRAME = HEADER_SIZE + MAX_FRAME
_RETRY_SECONDS = 0.1  # after an error of the tap that should not be
_STALE_FRAMES = 1024  # a tap's queue holds 500 to 1000 by default
_SPILL_SIZE = 128 * 1024
_MAX_VIEWS = 1023  # of the guest's in one call: IOV_MAX is 1024, and one is ours


class Receiver:
    """The receive queue `index` of an interface. `lock` is held for all work on it, and by whoever changes its tap.

    Thread: the loop's, or any with `lock` held.
    """

    def __init__(self, device: VirtioNet, index: int, loop: EventLoop) -> None:
        self.lock = allocate_lock()
        self.index = index
        self.loop = loop
        self.chains: list[Chain] = []  # popped and empty, but for a held frame
        self._device = device
        self._tap: Tap | None = None  # the one that is watched, and read
        self._views: list[memoryview] = []  # the chains', in order
        self._room = 0  # bytes in them
        self._wanted = SMALL_FRAME
        self._mergeable = False
        self._direct = 0  # how much of the last frame's room was the driver's; what is beyond lies in _spill
        self._held = 0  # length of a frame, with its header, that waits for the driver to make more room
        self._spill = memoryview(bytearray(_SPILL_SIZE))
        self._retry: Timer | None = None
        self._watched = 0

    # -- what it reads from

    def attach(self, tap: Tap) -> None:
        """Read from `tap` from now on, and hear of its end."""
        self.detach()
        if tap.fd >= 0:
            self._tap = tap
            self.loop.add(tap.fd, 0, self._on_tap)

    def detach(self) -> None:
        """Idempotent. A frame that is being received is lost."""
        if self._tap is not None:
            self.loop.remove(self._tap.fd)
        self._tap = None
        self._watched = self._held = 0

    def activate(self, mergeable: bool, wanted: int) -> None:
        self._mergeable = mergeable
        self._wanted = wanted

    def forget(self) -> None:
        """The chains at hand are the driver's again, or nobody's after a reset."""
        self.chains, self._views, self._room, self._held = [], [], 0, 0

    def drop_stale_frames(self) -> None:
        """Frames for the last driver may be of a kind that the next one cannot take."""
        if self._tap is None:
            return
        try:
            for _ in range(_STALE_FRAMES):
                if not self._tap.read([self._spill]):
                    return
        except HostError:
            return  # the loop will find it gone

    # -- readiness

    def _on_tap(self, events: int) -> None:
        device = self._device
        if events & (ERROR | HANGUP):
            with self.lock:
                tap = self._tap
                self.detach()
            if tap is not None:
                device.lose_tap(HostError(f"tap {tap.name}"))
            return
        with self.lock:
            served = device.serves(self.index)
            if not served:
                self._watch(False)  # nobody to read for: a notification of the receive queue watches it again
        if served:
            device.process(self.index)

    def _watch(self, wanted: bool) -> None:
        events = READ if wanted else 0
        if events != self._watched and self._tap is not None:
            self.loop.modify(self._tap.fd, events)
            self._watched = events

    # -- queue work, with `lock` held

    def receive(self, queue: Virtqueue) -> None:
        """Frames from the tap to the driver. There is no need for another turn: the tap stays readable and says so itself.

        It is watched unless the driver has no buffers, and then a refill is notified. A turn that ends before that is known,
        with the last buffer at hand just filled, has the tap watched as well.
        """
        if self._tap is None or not self._device.link_up:
            self._watch(False)
            return
        ring = queue.ring
        if ring is not None and self._put_back(queue):
            why = self._receive_compiled(ring, queue, self._tap)
            if why != ODD:
                self._watch(why != SHORT and self._retry is None)
                return
        go_on = True
        for _ in range(RX_BATCH):
            self._take_buffers(queue, self._held or self._wanted)
            length = self._held or self._read_frame()
            if length == 0:
                go_on = bool(self._room)
                break
            self._take_buffers(queue, length)
            if length > self._room and not self._is_hopeless(queue):
                self._held = length
                self._watch(False)
                return
            self._held = 0
            if length <= self._room:
                self._deliver(queue, length)
        self._watch(go_on and self._retry is None)

    def _put_back(self, queue: Virtqueue) -> bool:
        """Leave the chains at hand to compiled code, which has none from one turn to the next; not with a frame in them."""
        if self._held and self.chains:
            return False
        queue.unpop(len(self.chains))
        self.chains, self._views, self._room = [], [], 0
        return True

    def _receive_compiled(self, ring: Ring, queue: Virtqueue, tap: Tap) -> int:
        """Have compiled code receive frames; why it ended. A frame that it holds is in `_spill`, all of it."""
        receive_filter = self._device.filter
        queue.disable_notifications()
        left = RX_BATCH
        while True:
            used, self._held, left, why = ring.receive_frames(
                tap.fd, *queue.positions, self._mergeable, self._wanted, self._spill, self._held, receive_filter.plain_mac,
                receive_filter.accepts, left)
            queue.advance(used)
            self._direct = 0
            if why != HOPELESS:
                return why
            self._report_too_large()

    def _take_buffers(self, queue: Virtqueue, wanted: int) -> None:
        """Pop chains until there is room for `wanted` bytes; without mergeable buffers a frame has one chain and no more."""
        if self._room >= wanted:
            return
        chains = self.chains
        queue.disable_notifications()
        while self._room < wanted and len(chains) < (queue.size if self._mergeable else 1):
            chain = queue.pop()
            if chain is None:
                if not queue.enable_notifications():
                    return
                continue
            if chain.writable_length < HEADER_SIZE:
                queue.push(chain.head, 0)
                raise GuestError(self._device.name, f"a receive buffer of {chain.writable_length} bytes has no room for the "
                                 "header", "VIRTIO 1.2, 5.1.6.3.1")
            chains.append(chain)
            self._views += chain.writable
            self._room += chain.writable_length

    def _is_hopeless(self, queue: Virtqueue) -> bool:
        """The frame at hand is larger than what the driver can ever make available."""
        if self.chains and (not self._mergeable or len(self.chains) >= queue.size):
            self._report_too_large()
            return True
        return False

    def _report_too_large(self) -> None:
        self._device.report(GuestError(self._device.name, "dropped a frame that is larger than the driver's buffers"))

    def _read_frame(self) -> int:
        """The next frame that the driver wants, into the buffers at hand; its length with the header, 0 without one."""
        views, tap = self._views, self._tap
        if not views or tap is None:
            return 0
        iov = [*views[:_MAX_VIEWS], self._spill]
        self._direct = self._room if len(views) <= _MAX_VIEWS else sum(map(len, views[:_MAX_VIEWS]))
        accepts = self._device.filter.accepts
        try:
            for _ in range(RX_BATCH):
                length = tap.read(iov)
                if length <= HEADER_SIZE:
                    return 0
                if accepts(_head(iov)):
                    return length
        except TapGoneError as error:
            self.detach()
            self._device.lose_tap(error)
        except HostError as error:
            self._device.report(error)
            if self._retry is None:  # the tap may stay readable: look again when it may have recovered
                self._retry = self.loop.call_later(_RETRY_SECONDS, self._read_again)
        return 0

    def _read_again(self) -> None:
        self._retry = None
        if self._device.transport is not None:
            self._device.transport.requeue(self.index)

    def _deliver(self, queue: Virtqueue, length: int) -> None:
        """Give the driver the frame that lies in its buffers, which have room for it."""
        views = self._views
        if length > self._direct:
            _, rest = split(views, self._direct)
            _copy(self._spill[: length - self._direct], rest)
        used: list[tuple[int, int]] = []
        filled = 0
        for chain in self.chains:
            part = min(length, chain.writable_length)
            used.append((chain.head, part))
            filled += len(chain.writable)
            self._room -= chain.writable_length
            length -= part
            if not length:
                break
        count = len(used).to_bytes(2, "little")
        if len(views[0]) >= HEADER_SIZE:
            views[0][NUM_BUFFERS_AT:HEADER_SIZE] = count
        else:
            _copy(count, split(views, NUM_BUFFERS_AT)[1])
        del self.chains[: len(used)]
        del views[:filled]
        queue.push_all(used)


def _head(views: list[memoryview]) -> bytes:
    """The first bytes of a frame behind its header, for the filter."""
    end = HEADER_SIZE + HEAD_SIZE
    if len(views[0]) >= end:
        return bytes(views[0][HEADER_SIZE:end])
    return b"".join(split(views, end)[0])[HEADER_SIZE:]


def _copy(data: bytes | memoryview, views: list[memoryview]) -> None:
    """Store `data` at the beginning of `views`, which are large enough."""
    for view in views:
        part, data = data[: len(view)], data[len(view) :]
        view[: len(part)] = part
        if not data:
            return
