"""virtio-blk (VIRTIO 1.2, 5.2) on vhost-user: a disk that another process keeps, qemu-storage-daemon or SPDK for example.

The config space is the back end's, but for the number of queues, which is ours, and seg_max, which must fit into a queue.
It is read when the connection is made: a change of the disk's size afterwards is not noticed until it is connected to again.
"""

from __future__ import annotations

from stratovirt.backends.block import SECTOR_SIZE
from stratovirt.errors import GuestError
from stratovirt.vhost.user import BackendError
from stratovirt.virtio.block_config import (
    CONFIG_SIZE,
    F_BLK_SIZE,
    F_DISCARD,
    F_FLUSH,
    F_MQ,
    F_RO,
    F_SEG_MAX,
    F_SIZE_MAX,
    F_TOPOLOGY,
    F_WRITE_ZEROES,
)
from stratovirt.virtio.vhost_user import VhostUserDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from stratovirt.errors import StratoVirtError
    from stratovirt.loop import EventLoop
    from stratovirt.snapshot.saved import Saved
    from stratovirt.vhost.user import BackendSocket
    from stratovirt.virtio.block import VirtioBlock
    from stratovirt.virtio.queue import Chain

_CAPACITY, _SIZE_MAX, _SEG_MAX, _BLK_SIZE, _NUM_QUEUES = slice(8), slice(8, 12), slice(12, 16), slice(20, 24), slice(34, 36)
_NO_LIMIT = 1 << 32
_HEADER_AND_STATUS = 2
_S_IOERR = 1


class VhostUserBlk(VhostUserDevice):
    device_id = 2
    name = "vhost-user-blk"
    needed_config = CONFIG_SIZE
    usable_features = sum(1 << bit for bit in (
        F_SIZE_MAX, F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH, F_TOPOLOGY, F_MQ, F_DISCARD, F_WRITE_ZEROES))

    def __init__(self, backend: BackendSocket, queues: int, queue_size: int, loop: EventLoop,
                 on_error: Callable[[StratoVirtError], None] | None = None) -> None:
        self.needed_queues = queues
        super().__init__(backend, (queue_size,) * queues, loop, on_error)
        if queues == 1:
            self.features &= ~(1 << F_MQ)
        # What the driver has read: another device's, if this one took its place.
        self._known = _limits(self.features, self.config)

    def check_driver(self, before: VirtioBlock) -> None:
        """Can the driver of `before`, which has read that one's config space, go on with this disk? Raises: BackendError."""
        if not before.active:
            return
        self.check_features(before.driver_features, 1 << F_FLUSH)
        known = _limits(before.driver_features, before.config)
        problem = self._exceeds(known)
        if problem:
            raise BackendError(f"the back end {problem}")
        self._known = known

    def _exceeds(self, known: tuple[int, int, int]) -> str:
        """What a driver that knows such limits may ask for, and the back end cannot do; "" for nothing."""
        segments, size, block = _limits(self.features, self._back_ends_config)
        for what, most, allowed in (("segments in a request", segments, known[0]), ("bytes in a segment", size, known[1])):
            if most and (allowed or _NO_LIMIT) > most:
                return f"takes {most} {what}, and the guest's driver knows of no such limit"
        return f"has blocks of {block} bytes, and the guest's driver has seen {known[2]}" if block > known[2] else ""

    # -- snapshots

    def save(self) -> dict[str, object]:
        return {**super().save(), "sectors": self._sectors, "readonly": self._is_readonly, "limits": list(self._known)}

    def restore(self, state: Saved) -> None:
        """The disk is the back end's that the command line names: as large as it was, and with no limits that are new."""
        super().restore(state)
        sectors, limits = state.integer("sectors"), state.integers("limits", 0, _NO_LIMIT - 1, 3)
        if len(limits) != 3:
            raise state.error("limits", "not 3 numbers")
        if sectors != self._sectors:
            raise state.error("sectors", f"the disk had {sectors} sectors, and {self.provider} has {self._sectors}: it has "
                              "changed, or is another")
        if state.boolean("readonly") != self._is_readonly:
            raise state.error("readonly", f"the disk was {'' if self._is_readonly else 'not '}writable")
        if self.active:
            self._known = limits[0], limits[1], limits[2]
            problem = self._exceeds(self._known)
            if problem:
                raise state.error("limits", f"{self.provider} {problem}")

    @property
    def _sectors(self) -> int:
        return int.from_bytes(self.config[_CAPACITY], "little")

    @property
    def _is_readonly(self) -> bool:
        return bool(self.features >> F_RO & 1)

    def on_reset(self) -> None:
        super().on_reset()
        self._known = _limits(self.features, self.config)

    def make_config(self, config: bytes) -> bytes:
        self._back_ends_config = config
        changed = bytearray(config)
        segments = int.from_bytes(config[_SEG_MAX], "little")
        largest = max(self.queue_sizes[0] - _HEADER_AND_STATUS, 1)
        changed[_SEG_MAX] = max(1, min(segments, largest)).to_bytes(4, "little")
        changed[_NUM_QUEUES] = len(self.queue_sizes).to_bytes(2, "little")
        return bytes(changed)

    def fail(self, index: int, chain: Chain) -> int:
        """The last byte of a request is its status."""
        if not chain.writable:
            raise GuestError(self.name, "a request without a status", "VIRTIO 1.2, 5.2.6")
        chain.writable[-1][-1] = _S_IOERR
        return chain.writable_length


def _limits(features: int, config: bytes) -> tuple[int, int, int]:
    """Segments in a request, bytes in a segment, 0 for any number of them; bytes in a block."""
    segments, size, block = (
        int.from_bytes(config[place], "little") if features >> bit & 1 else 0
        for bit, place in ((F_SEG_MAX, _SEG_MAX), (F_SIZE_MAX, _SIZE_MAX), (F_BLK_SIZE, _BLK_SIZE)))
    return segments, size, block or SECTOR_SIZE
