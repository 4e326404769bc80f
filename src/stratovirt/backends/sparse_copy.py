"""A private copy of a disk image: shared blocks where the file system has them, and no more than its data elsewhere.

    FICLONE          one call; blocks are shared until one side writes (btrfs, XFS, bcachefs)
    copy_file_range  data only, holes stay holes, and the file system may share blocks here, too
    read and write   where neither works: block devices, other file systems

Thread: any. Raises: OSError, ENOSPC among them; the copy is then not to be used.
"""

from __future__ import annotations

import errno
import fcntl
import os

from stratovirt.sparse import CANNOT, copy_range, data_runs

_FICLONE = 0x40049409
_STEP = 1 << 20


def copy(source: int, target: int) -> None:
    """Make the empty file `target` have the content of `source`, a file or block device."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
        return
    except OSError as error:
        if error.errno not in CANNOT:
            raise
    size = os.lseek(source, 0, os.SEEK_END)
    os.ftruncate(target, size)
    for start, end in data_runs(source, 0, size):
        _copy(source, target, start, end)


def _copy(source: int, target: int, start: int, end: int) -> None:
    start = copy_range(source, target, start, end, start)
    while start < end:
        data = os.pread(source, min(end - start, _STEP), start)
        if not data:
            raise OSError(errno.EIO, "the image became shorter while it was copied")
        if data.count(0) != len(data):
            rest = memoryview(data)
            while rest:
                written = os.pwrite(target, rest, start + len(data) - len(rest))
                rest = rest[written:]
        start += len(data)
