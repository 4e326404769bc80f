"""virtio-net (VIRTIO 1.2, 5.1) on vhost-user: frames are moved by another process, DPDK or Open vSwitch for example.

Queues and config space are those of `net.py`: 2n receive and 2n + 1 transmit of pair n, then the control queue, which is ours,
as are the address and the link. The back end gets every frame to the guest past the driver's receive filter, which VIRTIO 1.2,
5.1.6.5 lets it. Checksum and segmentation offloads are between the driver and the back end.

Without a back end, and while the cable is out, the link is down: what the driver sends is dropped, receive buffers stay where
they are. A back end returns buffers in the order in which they came (all that there are for networks do), so the next one goes
on after the last that was returned.
"""

from __future__ import annotations

from stratovirt.errors import HostError
from stratovirt.virtio.device import VirtioDevice
from stratovirt.virtio.net_filter import MAC_SIZE, MQ_PAIRS_SET, ReceiveFilter
from stratovirt.virtio.vhost_user import VhostUserDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from stratovirt.errors import StratoVirtError
    from stratovirt.loop import EventLoop
    from stratovirt.snapshot.saved import Saved
    from stratovirt.vhost.user import BackendSocket
    from stratovirt.virtio.net import VirtioNet
    from stratovirt.virtio.queue import Chain, Virtqueue

F_MRG_RXBUF = 15
F_CTRL_VLAN = 19
F_MQ = 22
# CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_ECN, GUEST_UFO, HOST_TSO4, HOST_TSO6, HOST_ECN, HOST_UFO
_OFFLOADS = (0, 1, 7, 8, 9, 10, 11, 12, 13, 14)
# What a driver then expects: CSUM, HOST_TSO4, HOST_TSO6, HOST_ECN, HOST_UFO, and buffers used as it lays them out.
_DUTIES = sum(1 << bit for bit in (0, 11, 12, 13, 14, F_MRG_RXBUF))
# MAC, STATUS, CTRL_VQ, CTRL_RX, CTRL_VLAN, CTRL_RX_EXTRA, CTRL_MAC_ADDR
_OURS = sum(1 << bit for bit in (5, 16, 17, 18, 19, 20, 23))

_CONTROL_WITHOUT_MQ = 2
_CONTROL_SIZE = 64
_LINK_UP = 1


class VhostUserNet(VhostUserDevice):
    """One interface of `pairs` queue pairs."""

    device_id = 1
    name = "vhost-user-net"
    usable_features = sum(1 << bit for bit in (*_OFFLOADS, F_MRG_RXBUF))

    def __init__(self, backend: BackendSocket, pairs: int, mac: bytes, loop: EventLoop, queue_size: int = 256,
                 on_error: Callable[[StratoVirtError], None] | None = None) -> None:
        self.needed_queues = pairs
        self.filter = ReceiveFilter(mac)
        self.pairs = pairs
        self.link_up = True
        self.pairs_in_use = 1
        super().__init__(backend, (*(queue_size,) * (2 * pairs), _CONTROL_SIZE), loop, on_error)
        self.features |= _OURS | (1 << F_MQ if pairs > 1 else 0)
        self._set_config()

    def activate(self, queues: list[Virtqueue | None]) -> None:
        if self.driver_features >> F_CTRL_VLAN & 1:
            self.filter.filter_vlans()
        super().activate(queues)

    # -- queues

    def _control_index(self) -> int:
        return 2 * self.pairs if self.driver_features >> F_MQ & 1 else _CONTROL_WITHOUT_MQ

    def is_backends(self, index: int) -> bool:
        return index < 2 * self.pairs and index != self._control_index()

    def is_enabled(self, index: int) -> bool:
        return index < 2 * self.pairs_in_use

    def backend_features(self) -> int:
        return self.driver_features & ~_OURS

    def take_over(self, index: int, queue: Virtqueue) -> None:
        if self.is_backends(index):
            queue.rewind()

    def process(self, index: int) -> None:
        if index != self._control_index():
            super().process(index)
            return
        VirtioDevice.process(self, index)
        if not self.active and self._served:
            with self._work:
                self._sync()  # the control queue is broken, and so is all of the device

    def ready(self, index: int) -> bool:
        if index == self._control_index():
            return not self._paused
        return super().ready(index) and index % 2 == 1

    def handle(self, index: int, queue: Virtqueue, chain: Chain) -> int:
        """A command; or a frame that nobody takes."""
        return self._command(chain) if index == self._control_index() else 0

    def check_driver(self, before: VirtioNet) -> None:
        """Let the driver of `before` go on with this interface: its filter and pairs are taken over. Raises: BackendError."""
        if before.active:
            self.check_features(before.driver_features, _DUTIES)
        mac, self.filter = self.filter.own_mac, before.filter
        self.filter.own_mac = mac
        if not before.active:
            self.filter.reset()
        self.pairs_in_use = before.pairs_in_use
        self._set_config()

    # -- link and config space

    @property
    def is_wired(self) -> bool:
        return self.link_up

    def _set_config(self) -> None:
        status = _LINK_UP if self.link_up and self._connection is not None else 0
        self.config = self.filter.mac + status.to_bytes(2, "little") + self.pairs.to_bytes(2, "little")

    def make_config(self, config: bytes) -> bytes:
        return self.config

    def connection_changed(self, connected: bool) -> None:
        self._set_config()
        if self.transport is not None:
            self.transport.notify_config()

    def set_link(self, up: bool) -> None:
        """Plug the cable in or out. Thread: the device's loop."""
        with self._work:
            if up == self.link_up:
                return
            self.link_up = up
            self.connection_changed(self._connection is not None)
            self._sync()
        self._tell_driver()

    def on_reset(self) -> None:
        super().on_reset()
        self.filter.reset()
        self.pairs_in_use = 1
        self._set_config()

    # -- snapshots

    def save(self) -> dict[str, object]:
        return {**super().save(), "cable": self.link_up, "pairs": self.pairs_in_use, "own_mac": self.filter.own_mac.hex(),
                "filter": self.filter.save()}

    def restore(self, state: Saved) -> None:
        """As with an interface of our own: the address is the command line's until a driver has read the one that it had."""
        super().restore(state)
        self.link_up, self.pairs_in_use = state.boolean("cable"), state.integer("pairs", 1, self.pairs)
        state.data("own_mac", MAC_SIZE)
        self.filter.restore(state.section("filter"))
        if not self.active:
            self.filter.mac = self.filter.own_mac
        self._set_config()

    # -- the control queue

    def _command(self, chain: Chain) -> int:
        written = self.filter.answer(self.name, chain, self._set_pairs)
        if self.config[:MAC_SIZE] != self.filter.mac:
            self._set_config()
        return written

    def _set_pairs(self, command: int, data: bytes) -> bool:
        """VIRTIO 1.2, 5.1.6.5.5: how many pairs the driver uses."""
        count = int.from_bytes(data, "little")
        if command != MQ_PAIRS_SET or len(data) != 2 or not self.driver_features >> F_MQ & 1 or not 1 <= count <= self.pairs:
            return False
        before, self.pairs_in_use = self.pairs_in_use, count
        connection = self._connection
        if connection is not None and self._served:
            try:
                for index in range(2 * min(before, count), 2 * max(before, count)):
                    if index in self._served:
                        connection.enable(index, index < 2 * count)
            except HostError as error:
                self._lose(error)
        return True
