"""A raw disk image: a file or block device whose bytes are the disk's.

The format is never guessed: what the user calls raw is raw, whatever its first bytes say, because a guest writes those
bytes. Data moves between the file and views of guest RAM with `preadv` and `pwritev`, never through Python.

O_DIRECT wants addresses, lengths and offsets aligned to the device's block size. A guest need not align its buffers, so a
request that the kernel refuses with EINVAL is done over a second, buffered descriptor; the kernel keeps the two coherent.
"""

from __future__ import annotations

import errno
import os
import stat

from stratovirt.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.config.vm import DriveConfig

SECTOR_SIZE = 512
_IOV_MAX = 1024


class RawImage:
    """An open image.

    `size` in bytes, a multiple of 512. Thread: one at a time. Raises: ConfigError when it cannot be what -drive says.
    """

    def __init__(self, drive: DriveConfig) -> None:
        self.path = drive.file
        self.readonly = drive.readonly
        flags = (os.O_RDONLY if drive.readonly else os.O_RDWR) | os.O_CLOEXEC
        self._buffered_fd = self._open(flags)
        try:
            self.size = self._measure()
            self._fd = self._open_direct(flags, drive.direct)
        except BaseException:
            os.close(self._buffered_fd)
            raise

    def _open(self, flags: int) -> int:
        try:
            # O_NONBLOCK: opening a FIFO by mistake must not hang; it has no effect on files and disks
            return os.open(self.path, flags | os.O_NONBLOCK)
        except OSError as error:
            wish = "" if self.readonly or error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM) else \
                "; readonly=on would do for reading"
            raise ConfigError(f"{os.strerror(error.errno or 0)}{wish}", option="-drive file", value=self.path) from error

    def _measure(self) -> int:
        mode = os.fstat(self._buffered_fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise ConfigError("not a disk image", option="-drive file", value=self.path,
                              accepted="a regular file or a block device")
        size = os.lseek(self._buffered_fd, 0, os.SEEK_END) & -SECTOR_SIZE
        if size == 0:
            raise ConfigError("the image is smaller than one sector of 512 bytes", option="-drive file", value=self.path)
        return size

    def _open_direct(self, flags: int, direct: bool | None) -> int:
        """`direct` None: with O_DIRECT where the file system has it; True: or not at all."""
        if direct is False:
            return self._buffered_fd
        try:
            return os.open(self.path, flags | os.O_DIRECT)
        except OSError as error:
            if direct is None and error.errno == errno.EINVAL:
                return self._buffered_fd
            raise ConfigError(f"cannot be opened with O_DIRECT: {os.strerror(error.errno or 0)}",
                              option="-drive file", value=self.path, accepted="direct=off") from error

    @property
    def direct(self) -> bool:
        return self._fd != self._buffered_fd

    def read(self, views: list[memoryview], offset: int) -> None:
        """Fill `views` from `offset`. Raises: HostError, also when the file has shrunk and ends before that."""
        self._transfer("read", os.preadv, views, offset)

    def write(self, views: list[memoryview], offset: int) -> None:
        """Store `views` at `offset`. Raises: HostError."""
        self._transfer("write", os.pwritev, views, offset)

    def _transfer(self, name: str, call: _Call, views: list[memoryview], offset: int) -> None:
        fd = self._fd
        while views:
            try:
                done = call(fd, views[:_IOV_MAX], offset)
            except OSError as error:
                if error.errno == errno.EINVAL and fd != self._buffered_fd:
                    fd = self._buffered_fd
                    continue
                raise HostError.from_os(f"{name} of {self.path} at {offset:#x}", error) from error
            if done == 0:
                raise HostError(f"{name} of {self.path} at {offset:#x}: the file ends there")
            offset += done
            while views and done >= len(views[0]):
                done -= len(views[0])
                views = views[1:]
            if done:
                views = [views[0][done:], *views[1:]]

    def flush(self) -> None:
        """Everything written so far is on stable storage when this returns. Raises: HostError."""
        try:
            os.fdatasync(self._fd)
            if self.direct:
                os.fdatasync(self._buffered_fd)
        except OSError as error:
            raise HostError.from_os(f"fdatasync of {self.path}", error) from error

    def close(self) -> None:
        if self.direct:
            os.close(self._fd)
        os.close(self._buffered_fd)


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    _Call = Callable[[int, Sequence[memoryview], int], int]
