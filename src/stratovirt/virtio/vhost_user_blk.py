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
    from stratovirt.vhost.user import BackendSocket
    from stratovirt.virtio.block import VirtioBlock
    from stratovirt.virtio.queue import Chain

_SIZE_MAX, _SEG_MAX, _BLK_SIZE, _NUM_QUEUES = slice(8, 12), slice(12, 16), slice(20, 24), slice(34, 36)
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

    def check_driver(self, before: VirtioBlock) -> None:
        """Can the driver of `before`, which has read that one's config space, go on with this disk? Raises: BackendError."""
        if not before.active:
            return
        self.check_features(before.driver_features, 1 << F_FLUSH)
        theirs, told = self._back_ends_config, before.config
        limits = (("segments in a request", F_SEG_MAX, _SEG_MAX), ("bytes in a segment", F_SIZE_MAX, _SIZE_MAX))
        for what, feature, place in limits:
            most = int.from_bytes(theirs[place], "little") if self.features >> feature & 1 else 0
            allowed = int.from_bytes(told[place], "little") if before.driver_features >> feature & 1 else _NO_LIMIT
            if most and allowed > most:
                raise BackendError(f"the back end takes {most} {what}, and the guest's driver knows of no such limit")
        block = int.from_bytes(theirs[_BLK_SIZE], "little") if self.features >> F_BLK_SIZE & 1 else SECTOR_SIZE
        if block > SECTOR_SIZE:
            raise BackendError(f"the back end has blocks of {block} bytes, and the guest's driver has seen {SECTOR_SIZE}")

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
