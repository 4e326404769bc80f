"""Files with holes, and files without names.

Thread: any. Raises: OSError, from everything.
"""

from __future__ import annotations

import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_MOST = 1 << 30  # bytes in one call
CANNOT = (errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENOTTY, errno.EBADF, errno.EISDIR, errno.EPERM,
          errno.ETXTBSY)
"""What a call answers that is not made for these files."""


def unnamed_file(directory: str) -> int:
    """A new file in the file system of `directory` that has no name: it goes when nobody has it open."""
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT) or not os.path.isdir(directory):
            raise
    while True:  # NFS, some FUSE
        path = os.path.join(directory, f".stratovirt-{os.urandom(8).hex()}")
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            continue
        os.unlink(path)
        return fd


def data_runs(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each run of data in this part of a file, in order: all of it where nobody knows of holes."""
    while start < end:
        first, last = _next_run(fd, start, end)
        if first < last:
            yield first, last
        start = last


def _next_run(fd: int, position: int, end: int) -> tuple[int, int]:
    """The next run of data at or behind `position`; empty at the end when there is none."""
    try:
        start = min(os.lseek(fd, position, os.SEEK_DATA), end)
        return start, min(os.lseek(fd, start, os.SEEK_HOLE), end) if start < end else end
    except OSError as error:
        if error.errno == errno.ENXIO:
            return end, end
        if error.errno in CANNOT:
            return position, end
        raise


def copy_range(source: int, target: int, start: int, end: int, at: int) -> int:
    """Copy this part of `source` to `at` in `target`, where they are in one file system that can: up to where it is done.

    Some share the blocks then.
    """
    while start < end:
        try:
            done = os.copy_file_range(source, target, min(end - start, _MOST), start, at)
        except OSError as error:
            if error.errno not in CANNOT:
                raise
            break
        if not done:
            break  # some file systems say 0 where they cannot
        start, at = start + done, at + done
    return start


def send_range(source: int, target: int, start: int, end: int, at: int) -> int:
    """The same from one page cache to another, whatever file systems they are of. Moves the position of `target`."""
    try:
        os.lseek(target, at, os.SEEK_SET)
        while start < end and (done := os.sendfile(target, source, start, min(end - start, _MOST))):
            start += done
    except OSError as error:
        if error.errno not in CANNOT:
            raise
    return start
