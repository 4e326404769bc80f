"""virtio-net (VIRTIO 1.2, 5.1): an Ethernet interface over a tap, with one or more queue pairs and a control queue.

Queues: 2n receive and 2n + 1 transmit of pair n, the control queue last; for a driver that does not negotiate MQ it is queue 2.
Config space: mac (6 bytes), status (u16, bit 0: link up), max_virtqueue_pairs (u16).

Each pair has a queue of the tap, and is served by this process (`net_receive.py`, `net_send.py`) or, with vhost, by a thread of
the kernel (`vhost/net.py`); `net_pairs.py` keeps them. Which pairs are in use the driver says (VQ_PAIRS_SET). A kernel thread
knows no receive filter: with vhost the driver gets every frame of the tap and drops what it does not want, as VIRTIO 1.2,
5.1.6.5 lets a device do.

A tap that is deleted on the host is a link that went down: the driver is told, what it sends is dropped. While the link is down
no thread of the kernel runs, and this process takes what the driver sends.
"""

from __future__ import annotations

from _thread import allocate_lock

from stratovirt.backends.tap import TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_UFO, Tap, TapGoneError
from stratovirt.errors import GuestError, HostError
from stratovirt.loop import EventLoop
from stratovirt.virtio.device import F_EVENT_IDX, F_INDIRECT_DESC, VirtioDevice
from stratovirt.virtio.net_filter import MAC_SIZE, MQ_PAIRS_SET, ReceiveFilter
from stratovirt.virtio.net_header import F_CSUM, F_HOST_TSO4, F_HOST_TSO6, F_HOST_UFO
from stratovirt.virtio.net_pairs import Pair, Pairs
from stratovirt.virtio.net_receive import LARGE_FRAME, SMALL_FRAME, Receiver
from stratovirt.virtio.net_send import Sender
from stratovirt.virtio.queue import Chain, Virtqueue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stratovirt.errors import StratoVirtError
    from stratovirt.snapshot.saved import Saved
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

RX, TX, CTRL = 0, 1, 2  # with one pair
LINK_UP = 1
_CTRL_QUEUE_SIZE = 64


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
        self.pairs = [
            Pair(Receiver(self, 2 * number, rx_loop or loop), Sender(self, 2 * number + 1, tx_loop or loop, tap), tap)
            for number, tap in enumerate(taps)]
        self._pairs = Pairs(self, self.pairs, loop)
        self._work = self._pairs.locks
        self.interrupted_by_kernel = bool(vhosts)
        self._offer(taps[0], vhosts)
        self._set_config()
        self._pairs.connect(taps, vhosts)

    def _offer(self, tap: Tap, vhosts: Sequence[VhostNet]) -> None:
        for bit in _FEATURES:
            self.features |= 1 << bit
        if tap.ufo:
            self.features |= 1 << F_GUEST_UFO | 1 << F_HOST_UFO
        if len(self.pairs) > 1:
            self.features |= 1 << F_MQ
        for vhost in vhosts:
            self.features = vhost.usable(self.features)

    @property
    def taps(self) -> list[Tap]:
        return [pair.tap for pair in self.pairs]

    @property
    def vhosts(self) -> list[VhostNet]:
        return [pair.vhost for pair in self.pairs if pair.vhost is not None]

    @property
    def pairs_in_use(self) -> int:
        return self._pairs.wanted

    def go_on_from(self, filter: ReceiveFilter, pairs: int) -> None:
        """The driver has told this to the device whose place this one takes."""
        self.filter = filter
        self._pairs.enable(pairs)
        self._set_config()

    # -- for its pairs

    @property
    def has_tap(self) -> bool:
        return not self._tap_gone

    @property
    def is_moving(self) -> bool:
        """Frames go in and out."""
        return self.active and self.link_up and not self._paused and not self._tap_gone

    def queue(self, index: int) -> Virtqueue | None:
        return self.queues[index] if self.active and index < len(self.queues) else None

    def serves(self, index: int) -> bool:
        """May frames for the queue be taken from the tap?"""
        pair = self.pairs[index // 2]
        return self.is_moving and self.queue(index) is not None and pair.vhost is None and pair.enabled

    def break_down(self, error: GuestError) -> None:
        """The driver has to reset it. Thread: any that holds no lock of ours."""
        with self._work:
            self.active = False
            self._sync()
        if self.transport is not None:
            self.transport.needs_reset(error)

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
            done = self._sync()
        if not done:
            self._give_up()

    def on_reset(self) -> None:
        self._sync()
        for pair in self.pairs:
            pair.receiver.forget()
            pair.sender.forget()
        self.filter.reset()
        self._pairs.enable(1)
        self._set_config()
        if not self._tap_gone:
            self._set_offload(0)
            for pair in self.pairs:
                pair.receiver.drop_stale_frames()

    def outstanding(self) -> list[memoryview]:
        """Buffers for frames to come, which receivers keep at hand."""
        with self._work:
            return [view for pair in self._pairs.all for chain in pair.receiver.chains for view in chain.writable]

    def pause(self) -> None:
        with self._work:
            self._paused = True
            self._sync()

    def resume(self) -> None:
        with self._work:
            self._paused = False
            done, active = self._sync(), self.active
        if not done:
            self._give_up()
        elif active:
            self._requeue_all()

    def _sync(self) -> bool:
        """Let the kernel's threads run or rest as it should be, and watch the queues that none serves. With `_work` held.

        False: the kernel refuses, and the log has it.
        """
        done = self._pairs.sync()
        self.give_away(self._pairs.in_kernel - {self._control_index()}, self._loop)
        return done

    def _give_up(self) -> None:
        self.break_down(GuestError(self.name, "the host cannot serve its rings"))

    def _requeue_all(self) -> None:
        if self.transport is not None:
            for index in range(len(self.queue_sizes)):
                self.transport.requeue(index)

    def _set_offload(self, flags: int) -> None:
        self._offload = flags
        if self._tap_gone:
            return
        try:
            self._tell_tap(flags)
        except HostError as error:
            self.report(error)

    def _tell_tap(self, offload: int) -> None:
        tap = self.pairs[0].tap  # for all queues of the device
        tap.set_offload(offload if tap.ufo else offload & ~TUN_F_UFO)

    def close(self) -> None:
        """The device is unplugged, and reset. Thread: the device's loop."""
        self._tap_gone = True
        self._sync()
        self._pairs.disconnect()

    def on_leave(self) -> None:
        self.close()
        self._pairs.give_back()

    def save(self) -> dict[str, object]:
        # `cable`: whether the host has plugged it in, which a tap that is gone says nothing about
        return {"cable": self.link_up or self._tap_gone, "pairs": self._pairs.wanted, "own_mac": self.filter.own_mac.hex(),
                "filter": self.filter.save()}

    def restore(self, state: Saved) -> None:
        """The tap is the command line's. A frame that was being received is lost, as frames may be."""
        cable, wanted = state.boolean("cable"), state.integer("pairs", 1, len(self.pairs))
        state.data("own_mac", MAC_SIZE)
        with self._work:
            self.filter.restore(state.section("filter"))
            if not self.active:  # no driver has read the address that it had, and this machine may be a clone
                self.filter.mac = self.filter.own_mac
            self._pairs.enable(wanted)
            if not cable and not self._tap_gone:
                self.link_up = False
            self._set_config()
            done = self._sync()
        if not done:
            self._give_up()

    # -- what it is connected to

    def replace_taps(self, taps: Sequence[Tap], mac: bytes | None = None, vhosts: Sequence[VhostNet] = ()) -> None:
        """Connect the interface to the queues of a tap, or to a NoTap, and close what it was connected to. The driver is told.

        Frames that are being received are lost. `mac` is for the next driver: the present one has read its address. With fewer
        queues than pairs the last pairs send through the first queue and receive nothing.
        Thread: the device's loop. Raises: HostError when `vhosts` cannot do what the driver has negotiated; nothing is changed.
        """
        for vhost in vhosts:
            if self.active and vhost.usable(self.driver_features) != self.driver_features:
                raise HostError(f"{vhost.vhost.name} lacks what the guest's driver has negotiated")
        with self._work:
            self.close()
            self._tap_gone = taps[0].fd < 0
            self.link_up = not self._tap_gone
            self._pairs.connect(taps, vhosts)
            self._set_offload(self._offload)
            if mac is not None:
                self.filter.own_mac = mac
                if not self.active:
                    self.filter.reset()
            self._set_config()
            done = self._sync()
        self._tell(done)

    def _tell(self, done: bool) -> None:
        """The link has changed; `done`: and can be served."""
        if not done:
            self._give_up()
        if self.transport is not None:
            self.transport.notify_config()
        self._requeue_all()

    # -- link and config space

    def set_link(self, up: bool) -> None:
        """Plug the cable in or out. Thread: the device's loop."""
        with self._work:
            if up == self.link_up or self._tap_gone:
                return
            self.link_up = up
            self._set_config()
            done = self._sync()
        self._tell(done)

    def _set_config(self) -> None:
        status = LINK_UP if self.link_up else 0
        self.config = self.filter.mac + status.to_bytes(2, "little") + len(self.pairs).to_bytes(2, "little")

    def find_tap_gone(self) -> bool:
        """Whether it is: vhost calls it a broken ring when a tap takes no frames any more, the deleted one included."""
        if not self._tap_gone:
            try:
                self._tell_tap(self._offload)
            except TapGoneError as error:
                self.lose_tap(error)
            except HostError as error:
                self.report(error)
        return self._tap_gone

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
        if self.vhosts:
            self._loop.call_soon(self._rest)  # locks may be held here

    def _rest(self) -> None:
        with self._work:
            self._sync()
        self._requeue_all()

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

    def loop_of(self, index: int) -> EventLoop:
        if index >= 2 * len(self.pairs):
            return self._loop
        pair = self.pairs[index // 2]
        return pair.sender.loop if index & 1 else pair.receiver.loop

    def process(self, index: int) -> None:
        super().process(index)
        if not self.active and self.external_queues:
            self._rest()  # the control queue is broken, and so is all of the device

    def _drain(self, index: int, queue: Virtqueue) -> bool:
        if index == self._control_index():
            return super()._drain(index, queue)
        pair = self.pairs[index // 2] if index < 2 * len(self.pairs) else None
        if pair is None or self._paused or (pair.vhost is not None and pair.vhost.running):
            return False
        if index & 1:
            return pair.sender.transmit(queue)
        if not pair.enabled or pair.vhost is not None:
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
        written = self.filter.answer(self.name, chain, self._set_pairs)
        if self.config[:MAC_SIZE] != self.filter.mac:
            self._set_config()
        return written

    def _set_pairs(self, command: int, data: bytes) -> bool:
        """VIRTIO 1.2, 5.1.6.5.5: how many pairs the driver uses."""
        count = int.from_bytes(data, "little")
        if command != MQ_PAIRS_SET or len(data) != 2 or not self.driver_features >> F_MQ & 1:
            return False
        if not 1 <= count <= len(self.pairs):
            return False
        done = self._pairs.enable(count)
        done = self._sync() and done
        self._requeue_all()
        return done
