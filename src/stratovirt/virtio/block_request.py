"""Requests of a disk: what the driver asks for, where its answer goes, and neighbours made into one transfer.

A request is one chain: a 16-byte header (u32 type, u32 reserved, u64 sector), the data, one status byte at the very end.
Header and status are found by counting bytes, not descriptors: the driver may split a request anywhere (2.7.4.2).
"""

from __future__ import annotations

import struct

from stratovirt.backends.block import BlockRequest
from stratovirt.errors import GuestError
from stratovirt.virtio.queue import Chain, Virtqueue, split

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeAlias

    Transfer: TypeAlias = "DiskRequest | MergedRequest"

HEADER_SIZE = 16
MAX_MERGED, MAX_VECTORS = 32, 1024  # of one transfer

_HEADER = struct.Struct("<IIQ")  # struct virtio_blk_req { le32 type; le32 reserved; le64 sector; ... }


class DiskRequest(BlockRequest):
    """A request, and where its answer goes. `written`: bytes that the driver gets when it succeeds, but for the status."""

    __slots__ = ("head", "index", "queue", "status", "written")

    def __init__(self, kind: int, views: list[memoryview], offset: int, length: int, written: int, head: int,
                 status: memoryview, index: int, queue: Virtqueue) -> None:
        # What the base's would do: a call less for each request.
        self.kind = kind
        self.views = views
        self.offset = offset
        self.length = length
        self.durable = self.unmap = False
        self.error = None
        self.written = written
        self.head = head
        self.status = status
        self.index = index
        self.queue = queue


class MergedRequest(BlockRequest):
    """Requests of one kind and one queue whose data lie side by side on the disk, as one transfer."""

    __slots__ = ("parts",)

    def __init__(self, parts: list[DiskRequest], length: int) -> None:
        first = parts[0]
        super().__init__(first.kind, [view for part in parts for view in part.views], first.offset, length)
        self.durable = first.durable
        self.parts = parts


def parse(name: str, chain: Chain) -> tuple[int, int, list[memoryview], list[memoryview], memoryview]:
    """Type, sector, the data for the driver, the data from the driver, and the status; of the device `name`. The chain's lists
    are taken apart. Raises: GuestError when there is no header or no status.
    """
    if chain.readable_length < HEADER_SIZE or chain.writable_length < 1:
        raise GuestError(name, f"a request of {chain.readable_length} readable and {chain.writable_length} writable bytes "
                         "has no header or no status", "VIRTIO 1.2, 5.2.6")
    readable, writable = chain.readable, chain.writable
    if len(readable[0]) == HEADER_SIZE and len(writable[-1]) == 1:  # a descriptor each, as drivers lay them out
        kind, _, sector = _HEADER.unpack(readable[0])
        del readable[0]
        status = writable.pop()
        return kind, sector, writable, readable, status
    header, data_out = split(readable, HEADER_SIZE)
    data_in, rest = split(writable, chain.writable_length - 1)
    kind, _, sector = _HEADER.unpack(b"".join(header))
    return kind, sector, data_in, data_out, rest[0]


def _offset(request: BlockRequest) -> int:
    return request.offset


def merge(requests: list[DiskRequest]) -> list[Transfer]:
    """Reads, or writes, of one batch: in the order of the disk, and neighbours as one. At most MAX_MERGED of them.

    A driver that has several requests on the way leaves their order to the device (5.2.6.2); those that overlap are not merged.
    """
    requests.sort(key=_offset)
    result: list[Transfer] = []
    parts: list[DiskRequest] = []
    end, vectors = -1, 0
    for request in requests:
        if request.offset == end and vectors + len(request.views) <= MAX_VECTORS:
            parts.append(request)
        else:
            if parts:
                result.append(parts[0] if len(parts) == 1 else MergedRequest(parts, end - parts[0].offset))
            parts, vectors = [request], 0
        vectors += len(request.views)
        end = request.offset + request.length
    if parts:
        result.append(parts[0] if len(parts) == 1 else MergedRequest(parts, end - parts[0].offset))
    return result
