"""virtio-blk (VIRTIO 1.2, 5.2): a disk over a raw image.

A request is one chain: a 16-byte header (u32 type, u32 reserved, u64 sector), the data, one status byte at the very end.
Header and status are found by counting bytes, not descriptors: the driver may split a request anywhere (2.7.4.2).

Config space, struct virtio_blk_config: 0 capacity (u64, 512-byte sectors), 8 size_max (u32), 12 seg_max (u32),
16 geometry, 20 blk_size (u32), 24 topology, 32 writeback (u8), 34 num_queues (u16), 36-59 discard and write zeroes.
"""

from __future__ import annotations

import struct

from stratovirt.backends.block import SECTOR_SIZE, RawImage
from stratovirt.errors import GuestError, HostError
from stratovirt.virtio.device import F_EVENT_IDX, F_INDIRECT_DESC, VirtioDevice
from stratovirt.virtio.queue import Chain, Virtqueue, split

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

F_SEG_MAX = 2
F_RO = 5
F_FLUSH = 9

T_IN, T_OUT, T_FLUSH, T_GET_ID = 0, 1, 4, 8
S_OK, S_IOERR, S_UNSUPP = b"\x00", b"\x01", b"\x02"

_HEADER = struct.Struct("<IIQ")  # struct virtio_blk_req { le32 type; le32 reserved; le64 sector; ... }
_CONFIG = struct.Struct("<QII4xI8xBxH24x")
assert _CONFIG.size == 60
SERIAL_SIZE = 20
CONFIG_SIZE = _CONFIG.size


class _RequestError(Exception):
    """The request cannot be done; the driver is told with S_IOERR and both sides go on."""


class VirtioBlock(VirtioDevice):
    """One disk with one request queue. `on_error` hears of I/O errors of the image, for the log.

    Without an image it is a drive with nothing in it, of capacity 0; `replace_image` changes what is in it at any time.
    """

    device_id = 2
    name = "virtio-blk"

    def __init__(self, image: RawImage | None, queue_size: int = 256, serial: str = "",
                 on_error: Callable[[HostError], None] | None = None) -> None:
        super().__init__()
        self.queue_sizes = (queue_size,)
        self._on_error = on_error
        self.features |= 1 << F_INDIRECT_DESC | 1 << F_EVENT_IDX | 1 << F_FLUSH | 1 << F_SEG_MAX
        self._insert(image, serial)

    def _insert(self, image: RawImage | None, serial: str) -> None:
        self.image = image
        self.serial = serial.encode("ascii", "replace")[:SERIAL_SIZE].ljust(SERIAL_SIZE, b"\0")
        self.sectors = image.size // SECTOR_SIZE if image is not None else 0
        # A driver that has negotiated already does not see this bit change: its writes to a read-only image fail.
        self.features = self.features & ~(1 << F_RO) | (1 << F_RO if image is not None and image.readonly else 0)
        # two descriptors of every request are header and status
        self.config = _CONFIG.pack(self.sectors, 0, max(self.queue_sizes[0] - 2, 1), SECTOR_SIZE, 0, 1)

    def replace_image(self, image: RawImage | None, serial: str = "") -> RawImage | None:
        """Change what is in the drive; returns what was. Requests in flight are finished, and the driver is told.

        The image that is returned is no longer used, and the caller's to close. Thread: the main loop's.
        """
        with self._work:
            old = self.image
            self._insert(image, serial)
        if self.transport is not None:
            self.transport.notify_config()
        return old

    def handle(self, index: int, queue: Virtqueue, chain: Chain) -> int:
        if chain.readable_length < _HEADER.size or chain.writable_length < 1:
            raise GuestError(self.name, f"a request of {chain.readable_length} readable and {chain.writable_length} writable "
                             "bytes has no header or no status", "VIRTIO 1.2, 5.2.6")
        header, data_out = split(chain.readable, _HEADER.size)
        data_in, status = split(chain.writable, chain.writable_length - 1)
        kind, _, sector = _HEADER.unpack(b"".join(header))
        image = self.image
        written = 0
        try:
            if image is None and kind in (T_IN, T_OUT, T_FLUSH):
                raise _RequestError
            if kind == T_IN and image is not None:
                length = chain.writable_length - 1
                image.read(data_in, self._position(sector, length))
                written = length
            elif kind == T_OUT and image is not None:
                if image.readonly:
                    raise _RequestError
                image.write(data_out, self._position(sector, chain.readable_length - _HEADER.size))
                if not self.driver_features >> F_FLUSH & 1:
                    image.flush()  # a driver that cannot flush expects a write-through disk (5.2.6.2)
            elif kind == T_FLUSH and image is not None:
                if not image.readonly:
                    image.flush()
            elif kind == T_GET_ID:
                written = self._get_id(data_in)
            else:
                status[0][:] = S_UNSUPP
                return 1
            status[0][:] = S_OK
        except HostError as error:
            if self._on_error is not None:
                self._on_error(error)
            status[0][:] = S_IOERR
        except _RequestError:
            status[0][:] = S_IOERR
        return written + 1

    def _position(self, sector: int, length: int) -> int:
        """Byte offset of a request on the disk. Raises _RequestError unless all of it lies there."""
        if length % SECTOR_SIZE or sector + length // SECTOR_SIZE > self.sectors:
            raise _RequestError
        return sector * SECTOR_SIZE

    def _get_id(self, data_in: list[memoryview]) -> int:
        rest = self.serial
        for view in data_in:
            part, rest = rest[: len(view)], rest[len(view) :]
            view[: len(part)] = part
        return SERIAL_SIZE - len(rest)
