"""Discard and zeroes on an image: what the guest does not need any more, and long runs of nothing.

Linux's fallocate(2) does both without moving data, on files and block devices, if the file system can. Where it cannot, a
discard is a hint and may be left undone; zeroes are written.
"""

from __future__ import annotations

import errno
import os

from stratovirt.backends.aio_syscalls import fallocate, pin
from stratovirt.errors import HostError
from stratovirt.hostmap import ioctl_address

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.backends.block import RawImage

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE = 0x01, 0x02, 0x10
BLKDISCARD = 0x1277  # linux/fs.h: _IO(0x12, 119), takes u64 start and length in bytes

# The file system or device cannot do this, here or at all; EINVAL: not at this alignment.
_CANNOT = (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EINVAL, errno.ENODEV)
_ZEROES = bytes(1 << 20)


def discard(image: RawImage, offset: int, length: int) -> None:
    """The range may lose its content and its space. Raises: HostError."""
    try:
        if image.is_device:
            values = bytearray(offset.to_bytes(8, "little") + length.to_bytes(8, "little"))
            address, _anchor = pin(values)
            ioctl_address(image.buffered_fd, BLKDISCARD, address)
        elif length:
            fallocate(image.buffered_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise HostError.from_os(f"discard of {length} bytes of {image.path} at {offset:#x}", error) from error


def write_zeroes(image: RawImage, offset: int, length: int, unmap: bool) -> None:
    """The range reads as zero afterwards; with `unmap` it need not have space any more. Raises: HostError."""
    modes = [FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE]
    if unmap:
        modes.insert(0, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)
    name = f"zeroing of {length} bytes of {image.path} at {offset:#x}"
    for mode in modes if length else ():
        try:
            fallocate(image.buffered_fd, mode, offset, length)
            return
        except OSError as error:
            if error.errno not in _CANNOT:
                raise HostError.from_os(name, error) from error
    try:
        while length:
            done = os.pwritev(image.buffered_fd, [memoryview(_ZEROES)[: min(length, len(_ZEROES))]], offset)
            offset += done
            length -= done
    except OSError as error:
        raise HostError.from_os(name, error) from error
