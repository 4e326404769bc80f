"""What a driver's request means for a disk: its kind, and whether it may be done (VIRTIO 1.2, 5.2.6).

A request that cannot be done is answered with IOERR, one that is not known or was not negotiated with UNSUPP, and both sides go
on. Only one without a header or a status breaks the device.
"""

from __future__ import annotations

import struct

from stratovirt.backends.block import DISCARD, FLUSH, READ, SECTOR_SIZE, WRITE, WRITE_ZEROES
from stratovirt.virtio.block_config import F_DISCARD, F_FLUSH, F_WRITE_ZEROES, MAX_RANGE_SECTORS
from stratovirt.virtio.block_request import HEADER_SIZE, DiskRequest, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.virtio.block import VirtioBlock
    from stratovirt.virtio.queue import Chain, Virtqueue

T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES = 0, 1, 4, 8, 11, 13
S_OK, S_IOERR, S_UNSUPP = 0, 1, 2

_RANGE = struct.Struct("<QII")  # struct virtio_blk_discard_write_zeroes { le64 sector; le32 num_sectors; le32 flags; }
_FLAG_UNMAP = 1
SERIAL_SIZE = 20


class _Refused(Exception):
    """The request is not to be done; the driver is told this status and both sides go on."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def request_of(disk: VirtioBlock, index: int, queue: Virtqueue, chain: Chain,
               answers: list[tuple[int, int]]) -> DiskRequest | None:
    """What the driver asks of the image; None when that has its answer already, among `answers`. Raises: GuestError."""
    kind, sector, data_in, data_out, status = parse(disk.name, chain)
    if kind == T_IN:
        length = chain.writable_length - 1
        if not length % SECTOR_SIZE and sector + length // SECTOR_SIZE <= disk.sectors:
            return DiskRequest(READ, data_in, sector * SECTOR_SIZE, length, length, chain.head, status, index, queue)
    elif kind == T_GET_ID:
        status[0] = S_OK
        answers.append((chain.head, _get_id(disk.serial, data_in) + 1))
        return None
    else:
        length = chain.readable_length - HEADER_SIZE
        request = DiskRequest(WRITE, data_out, 0, length, 0, chain.head, status, index, queue)
        try:
            _change(disk, request, kind, sector)
        except _Refused as refusal:
            status[0] = refusal.status
        else:
            return request
        answers.append((chain.head, 1))
        return None
    status[0] = S_IOERR
    answers.append((chain.head, 1))
    return None


def _change(disk: VirtioBlock, request: DiskRequest, kind: int, sector: int) -> None:
    """Make a request, of which the data are known, a request of this type. Raises: _Refused."""
    image = disk.image
    if kind == T_OUT:
        if image.readonly:
            raise _Refused(S_IOERR)
        request.offset = _position(disk, sector, request.length)
        if image.detect_zeroes != "off" and request.length:
            from stratovirt.backends.aio_syscalls import is_zero

            if is_zero(request.views):
                request.kind, request.views = WRITE_ZEROES, []
                request.unmap = image.detect_zeroes == "unmap"
        # a driver that cannot flush expects a write-through disk (5.2.6.2)
        request.durable = not disk.driver_features >> F_FLUSH & 1
        return
    if kind == T_FLUSH:
        request.kind, request.views, request.length = FLUSH, [], 0
        return
    feature = F_DISCARD if kind == T_DISCARD else F_WRITE_ZEROES if kind == T_WRITE_ZEROES else None
    if feature is None or not disk.driver_features >> feature & 1 or (kind == T_DISCARD and not image.discards):
        raise _Refused(S_UNSUPP)
    if image.readonly:
        raise _Refused(S_IOERR)
    _change_range(disk, request, kind)


def _change_range(disk: VirtioBlock, request: DiskRequest, kind: int) -> None:
    if request.length != _RANGE.size:  # max_discard_seg and max_write_zeroes_seg are 1
        raise _Refused(S_IOERR)
    sector, sectors, flags = _RANGE.unpack(b"".join(request.views))
    if flags & ~_FLAG_UNMAP or (flags and kind == T_DISCARD):
        raise _Refused(S_UNSUPP)
    if sectors > MAX_RANGE_SECTORS:
        raise _Refused(S_IOERR)
    request.kind, request.views = (DISCARD if kind == T_DISCARD else WRITE_ZEROES), []
    request.length = sectors * SECTOR_SIZE
    request.offset = _position(disk, sector, request.length)
    request.unmap = flags == _FLAG_UNMAP and disk.image.discards
    request.durable = kind == T_WRITE_ZEROES and not disk.driver_features >> F_FLUSH & 1


def _position(disk: VirtioBlock, sector: int, length: int) -> int:
    """Byte offset of a request on the disk. Raises _Refused unless all of it lies there."""
    if length % SECTOR_SIZE or sector + length // SECTOR_SIZE > disk.sectors:
        raise _Refused(S_IOERR)
    return sector * SECTOR_SIZE


def _get_id(serial: bytes, data_in: list[memoryview]) -> int:
    rest = serial
    for view in data_in:
        part, rest = rest[: len(view)], rest[len(view) :]
        view[: len(part)] = part
    return SERIAL_SIZE - len(rest)
