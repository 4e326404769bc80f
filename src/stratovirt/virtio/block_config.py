"""virtio-blk as the driver finds it: feature bits and config space (VIRTIO 1.2, 5.2.3 and 5.2.4)."""

from __future__ import annotations

import struct

from stratovirt.backends.block import SECTOR_SIZE, RawImage
from stratovirt.virtio.device import F_EVENT_IDX, F_INDIRECT_DESC

F_SIZE_MAX = 1
F_SEG_MAX = 2
F_RO = 5
F_BLK_SIZE = 6
F_FLUSH = 9
F_TOPOLOGY = 10
F_MQ = 12
F_DISCARD = 13
F_WRITE_ZEROES = 14

# What every back end takes that may come into a drive later: qemu-storage-daemon has just these.
MODEST_SEGMENTS, MODEST_SEGMENT_SIZE = 126, 65536

MAX_RANGE_SECTORS = 0x7F_FFFF  # of one discard or write-zeroes request, which has one range

# struct virtio_blk_config: 0 capacity (u64, in 512-byte sectors), 8 size_max, 12 seg_max, 16 geometry (u16, u8, u8),
# 20 blk_size, 24 topology (u8 physical_block_exp, u8 alignment_offset, u16 min_io_size, u32 opt_io_size, in blocks),
# 32 writeback (u8), 34 num_queues (u16), 36 max_discard_sectors, 40 max_discard_seg, 44 discard_sector_alignment,
# 48 max_write_zeroes_sectors, 52 max_write_zeroes_seg, 56 write_zeroes_may_unmap (u8)
_CONFIG = struct.Struct("<QII4xIBBHIBxHIIIIIB3x")
CONFIG_SIZE = _CONFIG.size
assert CONFIG_SIZE == 60


def features_of(image: RawImage, queues: int, modest: bool = False) -> int:
    """What a driver may use. A drive with nothing in it offers all that a disk could have that comes into it later."""
    features = 1 << F_INDIRECT_DESC | 1 << F_EVENT_IDX | 1 << F_FLUSH | 1 << F_SEG_MAX | 1 << F_BLK_SIZE | 1 << F_TOPOLOGY
    if queues > 1:
        features |= 1 << F_MQ
    if modest:
        features |= 1 << F_SIZE_MAX
    if image.readonly:
        features |= 1 << F_RO
    empty = image.size == 0
    if empty or image.discards:
        features |= 1 << F_DISCARD
    if empty or image.discards or image.detect_zeroes != "off":
        features |= 1 << F_WRITE_ZEROES
    return features


def config_of(image: RawImage, queues: int, queue_size: int, modest: bool = False) -> bytes:
    """Any sector can be read and written; the topology tells in which units the host does that best.

    `modest`: requests are to be such that a vhost-user back end can take the drive over.
    """
    segments = max(queue_size - 2, 1)  # two descriptors of every request are header and status
    block = image.block_size // SECTOR_SIZE
    discard = image.size == 0 or image.discards
    zeroes = discard or image.detect_zeroes != "off"
    return _CONFIG.pack(
        image.size // SECTOR_SIZE,
        MODEST_SEGMENT_SIZE if modest else 0,
        min(segments, MODEST_SEGMENTS) if modest else segments,
        SECTOR_SIZE,
        block.bit_length() - 1, 0, block, 0,
        0,
        queues,
        MAX_RANGE_SECTORS if discard else 0, int(discard), block if discard else 0,
        MAX_RANGE_SECTORS if zeroes else 0, int(zeroes), int(discard),
    )
