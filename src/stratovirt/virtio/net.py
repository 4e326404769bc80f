"""virtio-net (VIRTIO 1.2, 5.1): an Ethernet interface over a tap, with one or more queue pairs and a control queue.

Queues: 2n receive and 2n + 1 transmit of pair n, the control queue last; for a driver that does not negotiate MQ it is queue 2.
Config space: mac (6 bytes), status (u16, bit 0: link up), max_virtqueue_pairs (u16).

Each pair has a queue of the tap, and is served by this process (`net_receive.py`, `net_send.py`) or, with vhost, by a thread of
the kernel (`vhost/net.py`), between which a plugged tap decides. Which pairs are in use the driver says (VQ_PAIRS_SET); the
tap's queues of the others are detached, so that the kernel steers no frame there. A kernel thread knows no receive filter: with
vhost the driver gets every frame of the tap and drops what it does not want, as VIRTIO 1.2, 5.1.6.5 lets a device do.

A tap that is deleted on the host is a link that went down: the driver is told, what it sends is dropped.
"""

from __future__ import annotations

import os
from _thread import allocate_lock

from stratovirt.backends.tap import TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_UFO, Tap, TapGoneError
from stratovirt.errors import GuestError, HostError
from stratovirt.loop import READ, EventLoop
from stratovirt.virtio.device import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, VirtioDevice
from stratovirt.virtio.net_filter import CLASS_MQ, MAC_SIZE, MAX_COMMAND, MQ_PAIRS_SET, ReceiveFilter
from stratovirt.virtio.net_header import F_CSUM, F_HOST_TSO4, F_HOST_TSO6, F_HOST_UFO
from stratovirt.virtio.net_receive import LARGE_FRAME, SMALL_FRAME, Receiver
from stratovirt.virtio.net_send import Sender
from stratovirt.virtio.queue import Chain, Virtqueue, split

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from stratovirt.errors import StratoVirtError
    from stratovirt.vhost.net import VhostNet
    from stratovirt.virtio.device import Lock

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
F_MQ = 22
F_CTRL_MAC_ADDR = 23

_FEATURES = (
    F_CSUM, F_GUEST_CSUM, F_MAC, F_GUEST_TSO4, F_GUEST_TSO6, F_HOST_TSO4, F_HOST_TSO6, F_MRG_RXBUF, F_STATUS, F_CTRL_VQ,
    F_CTRL_RX, F_CTRL_VLAN, F_CTRL_RX_EXTRA, F_CTRL_MAC_ADDR, F_INDIRECT_DESC, F_EVENT_IDX,
)
_OFFLOAD_OF_FEATURE = {F_GUEST_TSO4: TUN_F_TSO4, F_GUEST_TSO6: TUN_F_TSO6, F_GUEST_UFO: TUN_F_UFO}
# What concerns the rings, and so whoever serves them; the rest is between the driver, the tap and the control queue.
_RING_FEATURES = 1 << F_VERSION_1 | 1 << F_INDIRECT_DESC | 1 << F_EVENT_IDX | 1 << F_MRG_RXBUF

RX, TX, CTRL = 0, 1, 2  # with one pair
LINK_UP = 1
ACK_OK, ACK_ERR = b"\x00", b"\x01"
_CTRL_QUEUE_SIZE = 64


class _Locks:
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

    def __init__(self, receiver: Receiver, sender: Sender, tap: Tap, vhost: VhostNet | None, enabled: bool) -> None:
        self.receiver = receiver
        self.sender = sender
        self.halves: tuple[Receiver | Sender, ...] = (receiver, sender)
        self.tap = tap
        self.vhost = vhost
        self.enabled = enabled  # its queue of the tap is attached


class VirtioNet(VirtioDevice):
    """One interface. `on_error` hears of the tap's errors and of frames that cannot be sent, for the log.

    `taps` are the queues of one tap, one for each pair, and `vhosts` as many, or none. With a NoTap it is an interface whose
    link is down; `replace_taps` changes what it is connected to at any time. Receive queues can be on a loop of their own, and
    transmit queues too; everything else is on `loop`.
    """

    device_id = 1
    name = "virtio-net"

    def __init__(self, taps: Tap | Sequence[Tap], mac: bytes, loop: EventLoop, queue_size: int = 256,
                 on_error: Callable[[StratoVirtError], None] | None = None, vhosts: Sequence[VhostNet] = (),
                 rx_loop: EventLoop | None = None, tx_loop: EventLoop | None = None) -> None:
        super().__init__()
        taps = [taps] if isinstance(taps, Tap) else list(taps)
        self.filter = ReceiveFilter(mac)
        self.queue_sizes = (*(queue_size,) * (2 * len(taps)), _CTRL_QUEUE_SIZE)
        self.link_up = taps[0].fd >= 0
        self._loop = loop
        self._on_error = on_error
        self._tap_gone = not self.link_up
        self._link_lock = allocate_lock()
        self._paused = False
        self._offload = 0
        self._call_fd = self._error_fd = -1
        self.pairs = [
            Pair(Receiver(self, 2 * number, rx_loop or loop), Sender(self, 2 * number + 1, tx_loop or loop, tap), tap,
                 vhosts[number] if vhosts else None, number > 0)
            for number, tap in enumerate(taps)]
        self._work = _Locks([half.lock for pair in self.pairs for half in pair.halves])
        self._offer(taps[0], vhosts)
        self._set_config()
        if vhosts:
            # Queue 2 is the control queue of a driver that does not know MQ.
            self.external_queues = frozenset(range(2 * len(taps))) - {CTRL}
            self._open_eventfds()
        self._set_enabled(1)

    def _offer(self, tap: Tap, vhosts: Sequence[VhostNet]) -> None:
        for bit in _FEATURES:
            self.features |= 1 << bit
        if tap.ufo:
            self.features |= 1 << F_GUEST_UFO | 1 << F_HOST_UFO
        if len(self.pairs) > 1:
            self.features |= 1 << F_MQ
        for vhost in vhosts:
            self.features &= vhost.features | ~_RING_FEATURES

    @property
    def tap(self) -> Tap:
        """The first pair's."""
        return self.pairs[0].tap

    # -- life cycle

    def activate(self, queues: list[Virtqueue | None]) -> None:
        features = self.driver_features
        offload = 0
        if features >> F_GUEST_CSUM & 1:
            offload = TUN_F_CSUM
            for bit, flag in _OFFLOAD_OF_FEATURE.items():
                offload |= flag if features >> bit & 1 else 0
        self._set_offload(offload)
        wanted = LARGE_FRAME if offload & ~TUN_F_CSUM else SMALL_FRAME
        for pair in self.pairs:
            pair.receiver.activate(bool(features >> F_MRG_RXBUF & 1), wanted)
        if features >> F_CTRL_VLAN & 1:
            self.filter.filter_vlans()
        super().activate(queues)
        with self._work:
            broken = not self._sync()
        if broken:
            self._break("the host cannot serve its rings")

    def on_reset(self) -> None:
        self._sync()
        for pair in self.pairs:
            pair.receiver.forget()
            pair.sender.forget()
        self.filter.reset()
        self._set_enabled(1)
        self._set_config()
        if not self._tap_gone:
            self._set_offload(0)
            for pair in self.pairs:
                pair.receiver.drop_stale_frames()

    def pause(self) -> None:
        with self._work:
            self._paused = True
            self._sync()

    def resume(self) -> None:
        with self._work:
            self._paused = False
            broken = not self._sync()
            active = self.active
        if broken:
            self._break("the host cannot serve its rings")
        elif active:
            self._requeue_all()

    def _break(self, why: str) -> None:
        with self._work:
            self.active = False
            self._sync()
        if self.transport is not None:
            self.transport.needs_reset(GuestError(self.name, why))

    def _requeue_all(self) -> None:
        if self.transport is not None:
            for index in range(len(self.queue_sizes)):
                self.transport.requeue(index)

    def _set_offload(self, flags: int) -> None:
        self._offload = flags
        if self._tap_gone:
            return
        try:
            self.tap.set_offload(flags if self.tap.ufo else flags & ~TUN_F_UFO)
        except HostError as error:
            self.report(error)

    def close(self) -> None:
        """The device is unplugged, and reset. Thread: the device's loop."""
        self._release()

    # -- what it is connected to

    def replace_tap(self, tap: Tap, mac: bytes | None = None) -> None:
        self.replace_taps([tap], mac)

    def replace_taps(self, taps: Sequence[Tap], mac: bytes | None = None, vhosts: Sequence[VhostNet] = ()) -> None:
        """Connect the interface to the queues of a tap, or to a NoTap, and close what it was connected to. The driver is told.

        Frames that are being received are lost. `mac` is for the next driver: the present one has read its address. With fewer
        queues than pairs the last pairs send through the first queue and receive nothing.
        Thread: the device's loop. Raises: HostError when `vhosts` cannot do what the driver has negotiated; nothing is changed.
        """
        for vhost in vhosts:
            if self.active and self.driver_features & _RING_FEATURES & ~vhost.features:
                raise HostError(f"{vhost.vhost.name} lacks what the guest's driver has negotiated")
        with self._work:
            self._release()
            for number, pair in enumerate(self.pairs):
                pair.tap = taps[number] if number < len(taps) else taps[0]
                pair.vhost = vhosts[number] if number < len(vhosts) else None
                pair.enabled = 0 < number < len(taps)
            self._tap_gone = taps[0].fd < 0
            self.link_up = not self._tap_gone
            if vhosts:
                self._open_eventfds()
            self._watch_queues(not vhosts)
            self._set_enabled(self._wanted_pairs)
            self._set_offload(self._offload)
            if mac is not None:
                self.filter.own_mac = mac
                if not self.active:
                    self.filter.reset()
            self._set_config()
            broken = not self._sync()
        if broken:
            self._break("the host cannot serve its rings")
        if self.transport is not None:
            self.transport.notify_config()
        self._requeue_all()

    def _release(self) -> None:
        """Let go of taps and vhosts. Called with `_work` held, or without a driver."""
        self._tap_gone = True
        self._sync()
        for pair in self.pairs:
            pair.receiver.detach()
            pair.sender.forget()
        closed: list[Tap] = []
        for pair in self.pairs:
            if pair.tap not in closed:
                closed.append(pair.tap)
                pair.tap.close()
            if pair.vhost is not None:
                pair.vhost.close()
                pair.vhost = None

    def _watch_queues(self, watched: bool) -> None:
        """Hear of the data queues' notifications, or leave them to the kernel, which watches them itself."""
        transport = self.transport
        external = frozenset() if watched else frozenset(range(2 * len(self.pairs))) - {CTRL}
        changed, self.external_queues = external ^ self.external_queues, external
        if transport is None:
            return
        for index in changed:
            fd, loop = transport.notify_fds[index], self.loop_of(index) or self._loop
            if index in external:
                loop.remove(fd)
            else:
                loop.add(fd, READ, lambda _events, index=index: transport.on_notify(index))  # type: ignore[misc]

    # -- pairs, with `_work` held

    _wanted_pairs = 1

    def _set_enabled(self, count: int) -> bool:
        """Let the first `count` pairs be in use."""
        self._wanted_pairs = count
        done = True
        for number, pair in enumerate(self.pairs):
            wanted = number < count and (number == 0 or pair.tap is not self.tap)
            if wanted != pair.enabled:
                done = self._enable(number, pair, wanted) and done
            elif not wanted and number:
                pair.sender.attach(self.tap)
        return done

    def _enable(self, number: int, pair: Pair, wanted: bool) -> bool:
        if not wanted:
            pair.enabled = False
            self._sync()
            self._give_back(pair)
            pair.receiver.detach()
            pair.sender.attach(self.tap)
        if number and not self._tap_gone:
            try:
                pair.tap.enable(wanted)
            except HostError as error:
                self.report(error)
                return False
        if wanted:
            pair.enabled = True
            pair.receiver.attach(pair.tap)
            pair.sender.attach(pair.tap)
        return True

    def _give_back(self, pair: Pair) -> None:
        """What was popped and not returned is available again, for whoever serves the queues next."""
        for half in pair.halves:
            half.forget()
            queue = self.queues[half.index] if self.active and half.index < len(self.queues) else None
            if queue is not None:
                queue.seek(queue.position)

    def serves(self, index: int) -> bool:
        """May the queue be worked on by this process?"""
        pair = self.pairs[index // 2]
        ready = self.active and index < len(self.queues) and self.queues[index] is not None and self.link_up
        return ready and not self._paused and pair.vhost is None and pair.enabled

    # -- vhost, with `_work` held

    def _sync(self) -> bool:
        """Let the kernel's threads run or rest as it should be. False: the kernel refuses, and the log has it."""
        up = self.active and self.link_up and not self._paused and not self._tap_gone
        done = True
        for pair in self.pairs:
            vhost = pair.vhost
            if vhost is not None and vhost.running != (up and pair.enabled):
                done = (self._stop(pair, vhost) if vhost.running else self._start(pair, vhost)) and done
        return done

    def _start(self, pair: Pair, vhost: VhostNet) -> bool:
        rx, tx = self.queues[pair.receiver.index], self.queues[pair.sender.index]
        if rx is None or tx is None or self.transport is None:
            return True  # a driver without its queues: there is nothing to serve
        self._give_back(pair)
        kick_fds = [self.transport.notify_fds[half.index] for half in pair.halves]
        try:
            vhost.start(self.driver_features & _RING_FEATURES, (rx, tx), kick_fds, self._call_fd, self._error_fd, pair.tap.fd)
        except HostError as error:
            self.report(error)
            self._stop(pair, vhost)
            return False
        return True

    def _stop(self, pair: Pair, vhost: VhostNet) -> bool:
        if not vhost.running:
            return True
        try:
            positions = vhost.stop()
        except HostError as error:
            self.report(error)
            return False
        for half, position in zip(pair.halves, positions, strict=True):
            queue = self.queues[half.index] if half.index < len(self.queues) else None
            if queue is not None:
                queue.seek(position)
        return True

    def _open_eventfds(self) -> None:
        if self._call_fd < 0:
            self._call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._error_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._loop.add(self._call_fd, READ, self._on_call)
            self._loop.add(self._error_fd, READ, self._on_broken_ring)

    def _on_call(self, _events: int) -> None:
        os.eventfd_read(self._call_fd)
        if self.transport is not None:
            self.transport.notify_used()

    def _on_broken_ring(self, _events: int) -> None:
        os.eventfd_read(self._error_fd)
        if self.active:
            self._break("a ring that the kernel cannot follow")

    # -- link and config space

    def set_link(self, up: bool) -> None:
        """Plug the cable in or out. Thread: the device's loop."""
        with self._work:
            if up == self.link_up or self._tap_gone:
                return
            self.link_up = up
            self._set_config()
            broken = not self._sync()
        if broken:
            self._break("the host cannot serve its rings")
        if self.transport is not None:
            self.transport.notify_config()
        self._requeue_all()

    def _set_config(self) -> None:
        status = LINK_UP if self.link_up else 0
        self.config = self.filter.mac + status.to_bytes(2, "little") + len(self.pairs).to_bytes(2, "little")

    def lose_tap(self, error: HostError) -> None:
        """The device was deleted on the host. Thread: any loop of the device; a queue's lock may be held."""
        with self._link_lock:
            if self._tap_gone:
                return
            self._tap_gone = True
            self.link_up = False
            self._set_config()
        self.report(TapGoneError(f"{error}: the device was deleted on the host, the link is down"))
        if self.transport is not None:
            self.transport.notify_config()
        if any(pair.vhost is not None for pair in self.pairs):
            self._loop.call_soon(self._rest)  # its locks may be held here

    def _rest(self) -> None:
        with self._work:
            self._sync()

    def report(self, error: StratoVirtError) -> None:
        if self._on_error is not None:
            self._on_error(error)

    # -- queue work

    def _control_index(self) -> int:
        return 2 * len(self.pairs) if self.driver_features >> F_MQ & 1 else CTRL

    def lock_of(self, index: int) -> Lock:
        if index == self._control_index() or index >= 2 * len(self.pairs):
            return self._work
        pair = self.pairs[index // 2]
        return pair.sender.lock if index & 1 else pair.receiver.lock

    def loop_of(self, index: int) -> EventLoop | None:
        if index >= 2 * len(self.pairs):
            return self._loop
        pair = self.pairs[index // 2]
        return pair.sender.loop if index & 1 else pair.receiver.loop

    def process(self, index: int) -> None:
        super().process(index)
        if not self.active and any(pair.vhost is not None and pair.vhost.running for pair in self.pairs):
            self._rest()  # the control queue is broken, and so is all of the device

    def _drain(self, index: int, queue: Virtqueue) -> bool:
        if index == self._control_index():
            return super()._drain(index, queue)
        pair = self.pairs[index // 2] if index < 2 * len(self.pairs) else None
        if pair is None or self._paused or pair.vhost is not None:
            return False
        if index & 1:
            return pair.sender.transmit(queue)
        if not pair.enabled:
            return False
        try:
            pair.receiver.receive(queue)
        except GuestError:
            queue.push_all([(chain.head, 0) for chain in pair.receiver.chains])
            pair.receiver.forget()
            raise
        return False

    def ready(self, index: int) -> bool:
        return not self._paused

    def handle(self, index: int, queue: Virtqueue, chain: Chain) -> int:
        """A command of the control queue."""
        if chain.readable_length < 2 or chain.writable_length < 1:
            raise GuestError(self.name, f"a command of {chain.readable_length} readable and {chain.writable_length} writable "
                             "bytes has no header or no ack", "VIRTIO 1.2, 5.1.6.5")
        done = False
        if chain.readable_length <= MAX_COMMAND:
            request = b"".join(chain.readable)
            if request[0] == CLASS_MQ:
                done = self._set_pairs(request[1], request[2:])
            else:
                done = self.filter.command(request[0], request[1], request[2:])
            if self.config[:MAC_SIZE] != self.filter.mac:
                self._set_config()
        ack, _ = split(chain.writable, 1)
        ack[0][:] = ACK_OK if done else ACK_ERR
        return 1

    def _set_pairs(self, command: int, data: bytes) -> bool:
        """VIRTIO 1.2, 5.1.6.5.5: how many pairs the driver uses."""
        count = int.from_bytes(data, "little")
        if command != MQ_PAIRS_SET or len(data) != 2 or not self.driver_features >> F_MQ & 1:
            return False
        if not 1 <= count <= len(self.pairs):
            return False
        done = self._set_enabled(count) and self._sync()
        self._requeue_all()
        return done
