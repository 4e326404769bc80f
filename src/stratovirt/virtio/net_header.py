"""The header in front of every frame, and which of a driver's headers the host's kernel gets to see.

Layout, struct virtio_net_hdr_v1 (VIRTIO 1.2, 5.1.6), little-endian as both supported hosts are:
    0 flags (u8)   1 gso_type (u8)   2 hdr_len   4 gso_size   6 csum_start   8 csum_offset   10 num_buffers (u16 each)

A driver's header is copied out of guest RAM once; what is sent is made from the checked copy, so a guest that changes its
header meanwhile changes nothing.
"""

from __future__ import annotations

import struct

HEADER = struct.Struct("<BBHHHHH")
HEADER_SIZE = HEADER.size
assert HEADER_SIZE == 12
NUM_BUFFERS_AT = 10

NEEDS_CSUM = 1
GSO_NONE, GSO_TCPV4, GSO_UDP, GSO_TCPV6 = 0, 1, 3, 4

F_CSUM, F_HOST_TSO4, F_HOST_TSO6, F_HOST_UFO = 0, 11, 12, 14
_FEATURE_OF_GSO = {GSO_TCPV4: F_HOST_TSO4, GSO_TCPV6: F_HOST_TSO6, GSO_UDP: F_HOST_UFO}

ETHERNET_HEADER = 14
MAX_FRAME = ETHERNET_HEADER + 4 + 65535  # with a VLAN tag; what segmentation offload makes of it is the kernel's business
PLAIN = bytes(HEADER_SIZE)


class HeaderError(Exception):
    """The frame cannot be sent as its header wants it. It is dropped, as a network card would."""


def checked(header: bytes, frame_length: int, features: int) -> bytes:
    """The header to send in front of a frame of that length, given what the driver negotiated. Raises: HeaderError."""
    if not ETHERNET_HEADER <= frame_length <= MAX_FRAME:
        raise HeaderError(f"a frame of {frame_length} bytes")
    if header == PLAIN:
        return PLAIN
    flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, _ = HEADER.unpack(header)
    flags &= NEEDS_CSUM  # flags that the device does not know are ignored (5.1.6.2.2)
    if flags:
        if not features >> F_CSUM & 1:
            raise HeaderError("a partial checksum without VIRTIO_NET_F_CSUM")
        if csum_start + csum_offset + 2 > frame_length:
            raise HeaderError(f"a checksum at {csum_start} + {csum_offset} in a frame of {frame_length} bytes")
    else:
        csum_start = csum_offset = 0
    if gso_type == GSO_NONE:
        hdr_len = gso_size = 0
    else:
        feature = _FEATURE_OF_GSO.get(gso_type)
        if feature is None or not features >> feature & 1:
            raise HeaderError(f"gso_type {gso_type:#x} was not negotiated")
        if not flags:
            raise HeaderError("segmentation without a partial checksum")
        if gso_size == 0:
            raise HeaderError("segments of 0 bytes")
        if hdr_len > frame_length:
            raise HeaderError(f"hdr_len {hdr_len} in a frame of {frame_length} bytes")
    return HEADER.pack(flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, 0)
