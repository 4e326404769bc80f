"""A raw disk image: a file or block device whose bytes are the disk's.

The format is never guessed: what the user calls raw is raw, whatever its first bytes say, because a guest writes those
bytes. Data moves between the file and views of guest RAM with `preadv` and `pwritev`, never through Python.

O_DIRECT wants addresses, lengths and offsets aligned to the device's block size. A guest need not align its buffers, so a
request that the kernel refuses with EINVAL is done over a second, buffered descriptor; the kernel keeps the two coherent.

What is to be done is a BlockRequest. `perform` carries one out on the calling thread; the engines of `aio.py` carry out many
at once. Neither they nor the code for holes is imported before a drive needs it.
"""

from __future__ import annotations

import errno
import os
import stat

from stratovirt import log
from stratovirt.backends.image_lock import lock_image
from stratovirt.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.config.vm import DriveConfig

SECTOR_SIZE = 512
KINDS = 5
READ, WRITE, FLUSH, DISCARD, WRITE_ZEROES = range(KINDS)

_IOV_MAX = 1024
_MAX_BLOCK_SIZE = 4096


class BlockRequest:
    """One thing to do to an image. Whoever carries it out keeps it, and so its views of guest RAM, until it is finished.

    `views` hold the data of READ and WRITE; `offset` and `length` are bytes on the disk. `durable`: a WRITE is finished only
    when it is on stable storage. `unmap`: WRITE_ZEROES may give the space back. `error` is set when it failed.
    """

    __slots__ = ("durable", "error", "kind", "length", "offset", "unmap", "views")

    def __init__(self, kind: int, views: list[memoryview], offset: int, length: int) -> None:
        self.kind = kind
        self.views = views
        self.offset = offset
        self.length = length
        self.durable = False
        self.unmap = False
        self.error: HostError | None = None


class RawImage:
    """An open image.

    `size` in bytes, a multiple of 512; `block_size` is what the file system likes requests to be a multiple of; `engine` is
    the name of what carries out requests: off, threads, native or io_uring.
    Thread: any, as every transfer names its position. Raises: ConfigError when it cannot be what -drive says.
    """

    def __init__(self, drive: DriveConfig) -> None:
        self.path = drive.file
        self.readonly = drive.readonly
        self.discards = drive.discard and not drive.readonly
        self.detect_zeroes = drive.detect_zeroes if not drive.readonly else "off"
        self.iops_limit = drive.iops_limit
        flags = (os.O_RDONLY if drive.readonly else os.O_RDWR) | os.O_CLOEXEC
        self._buffered_fd = self._open(flags)
        try:
            self.size = self._measure()
            lock_image(self._buffered_fd, self.path, self.readonly)
            self._fd = self._open_direct(flags, drive.direct)
        except BaseException:
            os.close(self._buffered_fd)
            raise
        try:
            self.engine = self._choose_engine(drive)
        except BaseException:
            self.close()
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
        status = os.fstat(self._buffered_fd)
        self.is_device = stat.S_ISBLK(status.st_mode)
        if not stat.S_ISREG(status.st_mode) and not self.is_device:
            raise ConfigError("not a disk image", option="-drive file", value=self.path,
                              accepted="a regular file or a block device")
        self.block_size = max(SECTOR_SIZE, min(status.st_blksize, _MAX_BLOCK_SIZE) & -SECTOR_SIZE)
        size = self.current_size()
        if size == 0:
            raise ConfigError("the image is smaller than one sector of 512 bytes", option="-drive file", value=self.path)
        return size

    def current_size(self) -> int:
        """Bytes in the image now, whole sectors: somebody may have made it larger, or smaller, since it was opened."""
        return os.lseek(self._buffered_fd, 0, os.SEEK_END) & -SECTOR_SIZE

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

    def _choose_engine(self, drive: DriveConfig) -> str:
        """The engine that was asked for, if it can work here; else the kernel's own with O_DIRECT, and none without.

        Without O_DIRECT the kernel's native engine would do every request at once, on the thread that submits it.
        """
        if drive.aio is None:
            return "native" if self.direct else "off"
        if drive.aio == "native" and not self.direct:
            problem = 'native aio type should be used with "direct" on' if drive.direct is False else \
                "the native engine needs O_DIRECT, which this file system does not have"
            raise ConfigError(problem, option="-drive aio", value=drive.aio, accepted="aio=threads, aio=io_uring, aio=off")
        if drive.aio == "off":
            if drive.direct:
                log.warn(f'{self.path}: low performance expected when use sync io with "direct" on')
            return "off"
        from stratovirt.backends.aio import probe

        probe(drive.aio)
        return drive.aio

    @property
    def direct(self) -> bool:
        return self._fd != self._buffered_fd

    @property
    def fd(self) -> int:
        """The descriptor for data: with O_DIRECT when `direct`."""
        return self._fd

    @property
    def buffered_fd(self) -> int:
        """The descriptor that takes any alignment."""
        return self._buffered_fd

    def perform(self, request: BlockRequest) -> None:
        """Carry out a request on this thread. Raises: HostError."""
        kind = request.kind
        if kind == READ:
            self._transfer("read", os.preadv, request.views, request.offset, request.length)
        elif kind == WRITE:
            self._transfer("write", os.pwritev, request.views, request.offset, request.length)
            if request.durable:
                self.flush()
        elif kind == FLUSH:
            self.flush()
        else:
            from stratovirt.backends import block_holes

            if kind == DISCARD:
                block_holes.discard(self, request.offset, request.length)
            else:
                block_holes.write_zeroes(self, request.offset, request.length, request.unmap)
                if request.durable:
                    self.flush()

    def read(self, views: list[memoryview], offset: int) -> None:
        """Fill `views` from `offset`. Raises: HostError, also when the file has shrunk and ends before that."""
        self._transfer("read", os.preadv, views, offset, sum(map(len, views)))

    def write(self, views: list[memoryview], offset: int) -> None:
        """Store `views` at `offset`. Raises: HostError."""
        self._transfer("write", os.pwritev, views, offset, sum(map(len, views)))

    def _transfer(self, name: str, call: _Call, views: list[memoryview], offset: int, length: int) -> None:
        fd = self._fd
        while length:
            try:
                done = call(fd, views if len(views) <= _IOV_MAX else views[:_IOV_MAX], offset)
            except OSError as error:
                if error.errno == errno.EINVAL and fd != self._buffered_fd:
                    fd = self._buffered_fd
                    continue
                raise HostError.from_os(f"{name} of {self.path} at {offset:#x}", error) from error
            if done == length:
                return
            if done == 0:
                raise HostError(f"{name} of {self.path} at {offset:#x}: the file ends there")
            offset += done
            length -= done
            while views and done >= len(views[0]):
                done -= len(views[0])
                views = views[1:]
            if done:
                views = [views[0][done:], *views[1:]]

    def flush(self) -> None:
        """Everything written so far is on stable storage when this returns. Raises: HostError."""
        try:
            os.fdatasync(self._fd)  # of the file: it does not matter which descriptor the data came through
        except OSError as error:
            raise HostError.from_os(f"fdatasync of {self.path}", error) from error

    def close(self) -> None:
        fds = {self._fd, self._buffered_fd}
        self._fd = self._buffered_fd = -1  # what still comes fails, and reaches no file that takes over the number
        for fd in fds:
            os.close(fd)


class NoImage(RawImage):
    """What is in a drive with nothing in it: no sectors, and the features that an image to come may need."""

    def __init__(self) -> None:
        self.path = "an empty drive"
        self.readonly = False
        self.discards = True
        self.detect_zeroes = "off"
        self.iops_limit = 0
        self.is_device = False
        self.block_size = SECTOR_SIZE
        self.size = 0
        self.engine = "off"
        self._fd = self._buffered_fd = -1

    def current_size(self) -> int:
        return 0

    def perform(self, request: BlockRequest) -> None:
        """Nothing is written, so a flush has nothing to do; nothing else gets here, as the drive has no sectors."""

    def close(self) -> None:
        """Nothing is open."""


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    _Call = Callable[[int, Sequence[memoryview], int], int]
