"""virtio-net (VIRTIO 1.2, 5.1): an Ethernet interface over a tap, one queue pair and a control queue.

Queues: 0 receive, 1 transmit, 2 control. Config space: mac (6 bytes), status (u16, bit 0: link up), max_virtqueue_pairs (u16).

Receiving: chains are popped until the largest frame fits, one `readv` puts header and frame straight into them, and as many
as were filled go back at once, after num_buffers was set in the first. The others wait for the next frame. The last buffer of
every `readv` is the device's own, so that a frame for which the driver had too little room is not cut off: it is held until
there is more room, or dropped if there can never be. While the driver has no buffers the tap is not watched, and frames stay
in its queue; the notification of a refill watches it again.

Sending: the header is copied out, checked, and sent in front of the driver's buffers with one `writev`. A full tap leaves the
chain where it is until the tap is writable.

A tap that is deleted on the host is a link that went down: the driver is told, what it sends is dropped.
"""

from __future__ import annotations

from stratovirt.backends.tap import TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_UFO, Tap, TapGoneError
from stratovirt.errors import GuestError, HostError
from stratovirt.loop import ERROR, HANGUP, READ, WRITE, EventLoop
from stratovirt.virtio.device import F_EVENT_IDX, F_INDIRECT_DESC, VirtioDevice
from stratovirt.virtio.net_filter import HEAD_SIZE, MAC_SIZE, MAX_COMMAND, ReceiveFilter
from stratovirt.virtio.net_header import (
    F_CSUM,
    F_HOST_TSO4,
    F_HOST_TSO6,
    F_HOST_UFO,
    HEADER_SIZE,
    MAX_FRAME,
    NUM_BUFFERS_AT,
    HeaderError,
    checked,
)
from stratovirt.virtio.queue import Chain, Virtqueue, split

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from stratovirt.errors import StratoVirtError
    from stratovirt.loop import Timer

F_GUEST_CSUM = 1
F_MAC = 5
F_GUEST_TSO4 = 7
F_GUEST_TSO6 = 8
F_GUEST_UFO = 10
F_MRG_RXBUF = 15
F_STATUS = 16
F_CTRL_VQ = 17
F_CTRL_RX = 18
F_CTRL_VLAN = 19
F_CTRL_RX_EXTRA = 20
F_CTRL_MAC_ADDR = 23

_FEATURES = (
    F_CSUM, F_GUEST_CSUM, F_MAC, F_GUEST_TSO4, F_GUEST_TSO6, F_HOST_TSO4, F_HOST_TSO6, F_MRG_RXBUF, F_STATUS, F_CTRL_VQ,
    F_CTRL_RX, F_CTRL_VLAN, F_CTRL_RX_EXTRA, F_CTRL_MAC_ADDR, F_INDIRECT_DESC, F_EVENT_IDX,
)
_OFFLOAD_OF_FEATURE = {F_GUEST_TSO4: TUN_F_TSO4, F_GUEST_TSO6: TUN_F_TSO6, F_GUEST_UFO: TUN_F_UFO}

RX, TX, CTRL = 0, 1, 2
LINK_UP = 1
ACK_OK, ACK_ERR = b"\x00", b"\x01"

# Frames in one turn. With segmentation offload a frame is up to 64 KiB, and others on the loop wait meanwhile.
RX_BATCH = 64
TX_BATCH = 64
_RETRY_SECONDS = 0.1  # after an error of the tap that should not be
_STALE_FRAMES = 1024  # a tap's queue holds 500 to 1000 by default
_CTRL_QUEUE_SIZE = 64
_SMALL_FRAME = HEADER_SIZE + 1514  # without segmentation offload; larger ones (jumbo frames) go over `_spill`
_LARGE_FRAME = HEADER_SIZE + MAX_FRAME
_SPILL_SIZE = 128 * 1024
_MAX_VIEWS = 1023  # of the guest's in one call: IOV_MAX is 1024, and one is ours


class VirtioNet(VirtioDevice):
    """One interface. `on_error` hears of the tap's errors and of frames that cannot be sent, for the log.

    With a NoTap it is an interface whose link is down; `replace_tap` changes what it is connected to at any time.
    """

    device_id = 1
    name = "virtio-net"

    def __init__(self, tap: Tap, mac: bytes, loop: EventLoop, queue_size: int = 256,
                 on_error: Callable[[StratoVirtError], None] | None = None) -> None:
        super().__init__()
        self.tap = tap
        self.filter = ReceiveFilter(mac)
        self.queue_sizes = (queue_size, queue_size, _CTRL_QUEUE_SIZE)
        for bit in _FEATURES:
            self.features |= 1 << bit
        if tap.ufo:
            self.features |= 1 << F_GUEST_UFO | 1 << F_HOST_UFO
        self._loop = loop
        self._on_error = on_error
        self._tap_gone = tap.fd < 0
        self._link_up = not self._tap_gone
        self._offload = 0
        self._set_config()
        self._rx_chains: list[Chain] = []  # popped and empty, but for a held frame
        self._rx_views: list[memoryview] = []  # theirs, in order
        self._rx_room = 0  # bytes in them
        self._rx_wanted = 0
        self._rx_mergeable = False
        self._direct = 0  # how much of the last frame's room was the driver's; what is beyond lies in _spill
        self._held = 0  # length of a frame, with its header, that waits for the driver to make more room
        self._spill = memoryview(bytearray(_SPILL_SIZE))
        self._retry: Timer | None = None
        self._tx_waiting: Chain | None = None
        self._watched = 0
        if not self._tap_gone:
            loop.add(tap.fd, 0, self._on_tap)

    # -- life cycle

    def activate(self, queues: list[Virtqueue | None]) -> None:
        features = self.driver_features
        self._rx_mergeable = bool(features >> F_MRG_RXBUF & 1)
        offload = 0
        if features >> F_GUEST_CSUM & 1:
            offload = TUN_F_CSUM
            for bit, flag in _OFFLOAD_OF_FEATURE.items():
                offload |= flag if features >> bit & 1 else 0
        self._set_offload(offload)
        self._rx_wanted = _LARGE_FRAME if offload & ~TUN_F_CSUM else _SMALL_FRAME
        if features >> F_CTRL_VLAN & 1:
            self.filter.filter_vlans()
        super().activate(queues)

    def on_reset(self) -> None:
        self._rx_chains, self._rx_views, self._rx_room, self._held = [], [], 0, 0
        self._tx_waiting = None
        self.filter.reset()
        self._set_config()
        if not self._tap_gone:
            self._set_offload(0)
            self._drop_stale_frames()

    def _set_offload(self, flags: int) -> None:
        self._offload = flags
        if self._tap_gone:
            return
        try:
            self.tap.set_offload(flags if self.tap.ufo else flags & ~TUN_F_UFO)
        except HostError as error:
            self._report(error)

    def _drop_stale_frames(self) -> None:
        """Frames for the last driver may be of a kind that the next one cannot take."""
        try:
            for _ in range(_STALE_FRAMES):
                if not self.tap.read([self._spill]):
                    return
        except HostError:
            return  # the loop will find it gone

    def close(self) -> None:
        """The device is unplugged, and reset. Thread: the device's loop."""
        if not self._tap_gone:
            self._tap_gone = True
            self._loop.remove(self.tap.fd)
        self.tap.close()

    def replace_tap(self, tap: Tap, mac: bytes | None = None) -> None:
        """Connect the interface to `tap`, or to a NoTap, and close what it was connected to. The driver is told of the link.

        A frame that is being received is lost. `mac` is for the next driver: the present one has read its address.
        Thread: the device's loop.
        """
        with self._work:
            if not self._tap_gone:
                self._loop.remove(self.tap.fd)
            self.tap.close()
            self.tap = tap
            self._tap_gone = tap.fd < 0
            self._link_up = not self._tap_gone
            self._watched = self._held = 0
            if not self._tap_gone:
                self._loop.add(tap.fd, 0, self._on_tap)
            self._set_offload(self._offload)
            if mac is not None:
                self.filter.own_mac = mac
                if not self.active:
                    self.filter.reset()
            self._set_config()
        if self.transport is not None:
            self.transport.notify_config()
            self.transport.requeue(RX)
            self.transport.requeue(TX)

    # -- link and config space

    def set_link(self, up: bool) -> None:
        """Plug the cable in or out. Thread: the device's loop."""
        if up == self._link_up or self._tap_gone:
            return
        self._link_up = up
        self._set_config()
        if self.transport is not None:
            self.transport.notify_config()
            self.transport.requeue(RX)

    def _set_config(self) -> None:
        status = LINK_UP if self._link_up else 0
        self.config = self.filter.mac + status.to_bytes(2, "little") + b"\1\0"

    def _lose_tap(self, error: HostError) -> None:
        self._tap_gone = True
        self._link_up = False
        self._loop.remove(self.tap.fd)
        self._report(TapGoneError(f"{error}: the device was deleted on the host, the link is down"))
        self._set_config()
        if self.transport is not None:
            self.transport.notify_config()

    def _report(self, error: StratoVirtError) -> None:
        if self._on_error is not None:
            self._on_error(error)

    # -- the tap's readiness, on the device's loop

    def _on_tap(self, events: int) -> None:
        if events & (ERROR | HANGUP):
            with self._work:
                if not self._tap_gone:
                    self._lose_tap(HostError(f"tap {self.tap.name}"))
            return
        queues = self.queues
        if not self.active or not self._link_up or len(queues) <= TX or queues[RX] is None:
            self._watch(0)  # nobody to read for: a notification of the receive queue watches it again
        if events & WRITE:
            self._watch(self._watched & ~WRITE)
            self.process(TX)
        if events & READ:
            self.process(RX)

    def _watch(self, events: int) -> None:
        if events != self._watched and not self._tap_gone:
            self._loop.modify(self.tap.fd, events)
            self._watched = events

    # -- queue work, with `_work` held

    def _drain(self, index: int, queue: Virtqueue) -> bool:
        if index == CTRL:
            return super()._drain(index, queue)
        try:
            return self._receive(queue) if index == RX else self._transmit(queue)
        except GuestError:
            if index == RX:
                queue.push_all([(chain.head, 0) for chain in self._rx_chains])
                self._rx_chains, self._rx_views, self._rx_room, self._held = [], [], 0, 0
            raise

    def handle(self, index: int, queue: Virtqueue, chain: Chain) -> int:
        """A command of the control queue."""
        if chain.readable_length < 2 or chain.writable_length < 1:
            raise GuestError(self.name, f"a command of {chain.readable_length} readable and {chain.writable_length} writable "
                             "bytes has no header or no ack", "VIRTIO 1.2, 5.1.6.5")
        done = False
        if chain.readable_length <= MAX_COMMAND:
            request = b"".join(chain.readable)
            done = self.filter.command(request[0], request[1], request[2:])
            if self.config[:MAC_SIZE] != self.filter.mac:
                self._set_config()
        ack, _ = split(chain.writable, 1)
        ack[0][:] = ACK_OK if done else ACK_ERR
        return 1

    # -- receiving

    def _receive(self, queue: Virtqueue) -> bool:
        """Frames from the tap to the driver. Never asks for another turn: the tap stays readable and says so itself."""
        if self._tap_gone or not self._link_up:
            self._watch(self._watched & ~READ)
            return False
        for _ in range(RX_BATCH):
            wanted = self._held or self._rx_wanted
            self._take_buffers(queue, wanted)
            length = self._held or self._read_frame()
            if length == 0:
                break
            self._take_buffers(queue, length)
            if length > self._rx_room and not self._is_hopeless(queue):
                self._held = length
                self._watch(self._watched & ~READ)
                return False
            self._held = 0
            if length <= self._rx_room:
                self._deliver(queue, length)
        if self._rx_room and self._retry is None:
            self._watch(self._watched | READ)
        else:
            self._watch(self._watched & ~READ)
        return False

    def _take_buffers(self, queue: Virtqueue, wanted: int) -> None:
        """Pop chains until there is room for `wanted` bytes; without mergeable buffers a frame has one chain and no more."""
        if self._rx_room >= wanted:
            return
        chains = self._rx_chains
        queue.disable_notifications()
        while self._rx_room < wanted and len(chains) < (queue.size if self._rx_mergeable else 1):
            chain = queue.pop()
            if chain is None:
                if not queue.enable_notifications():
                    return
                continue
            if chain.writable_length < HEADER_SIZE:
                queue.push(chain.head, 0)
                raise GuestError(self.name, f"a receive buffer of {chain.writable_length} bytes has no room for the header",
                                 "VIRTIO 1.2, 5.1.6.3.1")
            chains.append(chain)
            self._rx_views += chain.writable
            self._rx_room += chain.writable_length

    def _is_hopeless(self, queue: Virtqueue) -> bool:
        """The frame at hand is larger than what the driver can ever make available."""
        if self._rx_chains and (not self._rx_mergeable or len(self._rx_chains) >= queue.size):
            self._report(GuestError(self.name, "dropped a frame that is larger than the driver's buffers"))
            return True
        return False

    def _read_frame(self) -> int:
        """The next frame that the driver wants, into the buffers at hand; its length with the header, 0 without one."""
        views = self._rx_views
        if not views:
            return 0
        iov = [*views[:_MAX_VIEWS], self._spill]
        self._direct = self._rx_room if len(views) <= _MAX_VIEWS else sum(map(len, views[:_MAX_VIEWS]))
        try:
            for _ in range(RX_BATCH):
                length = self.tap.read(iov)
                if length <= HEADER_SIZE:
                    return 0
                if self.filter.accepts(_head(iov)):
                    return length
        except TapGoneError as error:
            self._lose_tap(error)
        except HostError as error:
            self._report(error)
            if self._retry is None:  # the tap may stay readable: look again when it may have recovered
                self._retry = self._loop.call_later(_RETRY_SECONDS, self._read_again)
        return 0

    def _read_again(self) -> None:
        self._retry = None
        if self.transport is not None:
            self.transport.requeue(RX)

    def _deliver(self, queue: Virtqueue, length: int) -> None:
        """Give the driver the frame that lies in its buffers, which have room for it."""
        views = self._rx_views
        if length > self._direct:
            _, rest = split(views, self._direct)
            _copy(self._spill[: length - self._direct], rest)
        used: list[tuple[int, int]] = []
        filled = 0
        for chain in self._rx_chains:
            part = min(length, chain.writable_length)
            used.append((chain.head, part))
            filled += len(chain.writable)
            self._rx_room -= chain.writable_length
            length -= part
            if not length:
                break
        count = len(used).to_bytes(2, "little")
        if len(views[0]) >= HEADER_SIZE:
            views[0][NUM_BUFFERS_AT:HEADER_SIZE] = count
        else:
            _copy(count, split(views, NUM_BUFFERS_AT)[1])
        del self._rx_chains[: len(used)]
        del views[:filled]
        queue.push_all(used)

    # -- sending

    def _transmit(self, queue: Virtqueue) -> bool:
        queue.disable_notifications()
        self._watch(self._watched & ~WRITE)
        for _ in range(TX_BATCH):
            chain = self._tx_waiting or queue.pop()
            if chain is None:
                if not queue.enable_notifications():
                    return False
                continue
            self._tx_waiting = None
            if chain.readable_length < HEADER_SIZE:
                queue.push(chain.head, 0)
                raise GuestError(self.name, f"a frame of {chain.readable_length} bytes has no header", "VIRTIO 1.2, 5.1.6.2")
            if not self._send(chain):
                self._tx_waiting = chain
                self._watch(self._watched | WRITE)
                return False
            queue.push(chain.head, 0)
        return True

    def _send(self, chain: Chain) -> bool:
        """Send one frame, or drop it if it cannot be sent. False: the tap is full."""
        if self._tap_gone or not self._link_up:
            return True
        header, frame = split(chain.readable, HEADER_SIZE)
        try:
            front = checked(b"".join(header), chain.readable_length - HEADER_SIZE, self.driver_features)
            if len(frame) > _MAX_VIEWS:
                return self.tap.write([front, b"".join(frame)])  # more pieces than one call takes; MAX_FRAME bounds it
            return self.tap.write([front, *frame])
        except HeaderError as error:
            self._report(GuestError(self.name, f"dropped what the driver sent: {error}"))
        except TapGoneError as error:
            self._lose_tap(error)
        except HostError as error:
            self._report(error)
        return True


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
