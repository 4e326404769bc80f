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

_FICLONE = 0x40049409
_STEP = 1 << 20
_MOST = 1 << 30  # bytes in one copy_file_range
_CANNOT = (errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENOTTY, errno.EBADF, errno.EISDIR, errno.EPERM,
           errno.ETXTBSY)


def unnamed_file(directory: str) -> int:
    """A new file in the file system of `directory` that has no name: it goes when nobody has it open. Raises: OSError."""
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT) or not os.path.isdir(directory):
            raise
    while True:  # NFS, some FUSE
        path = os.path.join(directory, f".overlay-{os.urandom(8).hex()}")
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            continue
        os.unlink(path)
        return fd


def copy(source: int, target: int) -> None:
    """Make the empty file `target` have the content of `source`, a file or block device."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
        return
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    size = os.lseek(source, 0, os.SEEK_END)
    os.ftruncate(target, size)
    position = 0
    while position < size:
        start, end = _data(source, position, size)
        if start < end:
            _copy_range(source, target, start, end)
        position = end


def _data(fd: int, position: int, size: int) -> tuple[int, int]:
    """The next run of data at or behind `position`; empty at the end when there is none."""
    try:
        start = os.lseek(fd, position, os.SEEK_DATA)
        return start, min(os.lseek(fd, start, os.SEEK_HOLE), size)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size, size
        if error.errno in _CANNOT:
            return position, size
        raise


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    while start < end:
        try:
            done = os.copy_file_range(source, target, min(end - start, _MOST), start, start)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            break
        if not done:
            break  # some file systems say 0 where they cannot
        start += done
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
