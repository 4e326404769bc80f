"""The memory file of a snapshot: guest RAM as it is, with holes where it is zero, and a last page that says whose it is.

Layout: the runs of RAM one after the other, each at the offset that the state file has for it; then a page that begins with
`stratovirt memory ID`, zero-filled. A file of another length, or with another id, does not belong to the state.

Of an incremental snapshot (`chain.py`) only ranges are there, at the same offsets, and the rest is holes.

It is mapped copy-on-write at a restore: nothing is read before the guest touches it, and machines of one snapshot share the
page cache. So it must not change while one of them lives. Where memory has a file of its own (`mem-share`, `-mem-path`) the
data is copied there instead, which the kernel does from file to file if others are to see it, and holes stay holes.
"""

from __future__ import annotations

import os
import stat

from stratovirt.errors import HostError
from stratovirt.hostmap import PAGE_SIZE, is_zero
from stratovirt.snapshot.saved import SnapshotError
from stratovirt.sparse import copy_range, data_runs, send_range

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.memory import RamRegion

_STEP = 1 << 20  # first look: is all of it zero?
_BLOCK = 64 << 10  # what is written or left out
_MARK = "stratovirt memory "


def _last_page(id: str) -> bytes:
    return (_MARK + id + "\n").encode().ljust(PAGE_SIZE, b"\0")


def write(fd: int, regions: list[RamRegion], id: str, ranges: list[tuple[int, int]] | None = None) -> list[int]:
    """Write RAM, or `ranges` (start, end) of the file, to the empty file `fd`; the offset of each region.

    Thread: main, while nothing of the guest runs. Raises: SnapshotError when the disk is full or fails.
    """
    offsets: list[int] = []
    end = 0
    try:
        for region in regions:
            offsets.append(end)
            if ranges is None:
                _write_run(fd, region, 0, region.size, end)
            else:
                for start, stop in ranges:
                    start, stop = max(start, end), min(stop, end + region.size)
                    if start < stop:
                        _write_run(fd, region, start - end, stop - end, start)
            end += region.size
        finish(fd, end, id)
    except OSError as error:
        raise SnapshotError(f"writing the memory of the guest: {os.strerror(error.errno or 0)}") from error
    return offsets


def finish(fd: int, size: int, id: str) -> None:
    """Write the last page. Raises: OSError."""
    _write(fd, memoryview(_last_page(id)), size)


def _write_run(fd: int, region: RamRegion, start: int, stop: int, at: int) -> None:
    """Write this part of `region` at `at`. Raises: OSError.

    In a file that others map a look at a hole would fill it: what is none is asked for.
    """
    if not region.shared:
        write_part(fd, region.u8[start:stop], at)
        return
    origin = region.fd_offset
    for first, last in data_runs(region.fd, origin + start, origin + stop):
        write_part(fd, region.u8[first - origin : last - origin], at + first - origin - start)


def write_part(fd: int, view: memoryview, start: int) -> None:
    """Write `view` at `start`, of the blocks that are not zero each run with one call. Raises: OSError."""
    size = len(view)
    run = -1
    for step in range(0, size, _STEP):
        end = min(step + _STEP, size)
        if is_zero(view[step:end]):
            if run >= 0:
                _write(fd, view[run:step], start + run)
                run = -1
            continue
        for block in range(step, end, _BLOCK):
            if is_zero(view[block : min(block + _BLOCK, end)]):
                if run >= 0:
                    _write(fd, view[run:block], start + run)
                    run = -1
            elif run < 0:
                run = block
    if run >= 0:
        _write(fd, view[run:], start + run)


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwritev(fd, [data], offset)
        data, offset = data[done:], offset + done


def open_file(path: str, size: int, id: str) -> int:
    """A descriptor of the memory file that belongs to the state `id`, of `size` bytes of RAM. Raises: SnapshotError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise SnapshotError("the file `memory` is missing") from None
    except OSError as error:
        raise SnapshotError(f"the file `memory`: {os.strerror(error.errno or 0)}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise SnapshotError("the file `memory` is not a regular file")
        if status.st_size != size + PAGE_SIZE:
            raise SnapshotError(f"the file `memory` has {status.st_size} bytes, and the state says {size + PAGE_SIZE}: "
                                "it is not whole, or not of this snapshot")
        page = bytearray(PAGE_SIZE)
        if os.preadv(fd, [page], size) != PAGE_SIZE or page != _last_page(id):
            raise SnapshotError("the file `memory` is of another snapshot than the file `state`")
    except OSError as error:
        os.close(fd)
        raise SnapshotError(f"the file `memory`: {os.strerror(error.errno or 0)}") from error
    except SnapshotError:
        os.close(fd)
        raise
    return fd


def load(fd: int, region: RamRegion, offset: int, mapped: bool) -> None:
    """Let `region` hold what the file has at `offset`: mapped copy-on-write, or else copied.

    Raises: SnapshotError when it cannot be read, HostError when it cannot be mapped.
    """
    if mapped and region.host.fd < 0:
        region.host.map_file(0, fd, offset, region.size)
        return
    if region.host.fd >= 0 and os.path.samestat(os.fstat(region.host.fd), os.fstat(fd)):
        raise SnapshotError("the file `memory` would be the memory of this machine, which changes it: take another one")
    position = offset
    try:
        for start, end in data_runs(fd, offset, offset + region.size):
            _clear(region, position - offset, start - offset)
            position = start
            if region.shared:
                shift = region.fd_offset - offset
                position = copy_range(fd, region.fd, start, end, start + shift)
                position = send_range(fd, region.fd, position, end, position + shift)
            read_into(fd, region.u8[position - offset : end - offset], position)
            position = end
        _clear(region, position - offset, region.size)
    except OSError as error:
        raise SnapshotError(f"copying the file `memory` into the guest's memory: {os.strerror(error.errno or 0)}") from error


def read_into(fd: int, view: memoryview, offset: int) -> None:
    """Fill `view` with what the file has at `offset`. Raises: SnapshotError, HostError."""
    try:
        while view:
            done = os.preadv(fd, [view], offset)
            if not done:
                raise HostError("the file `memory` became shorter while it was read")
            view, offset = view[done:], offset + done
    except OSError as error:
        raise SnapshotError(f"the file `memory`: {os.strerror(error.errno or 0)}") from error


def _clear(region: RamRegion, start: int, stop: int) -> None:
    """A file may have held something already. Raises: OSError."""
    if region.host.fd < 0:
        return
    zeroes, origin = bytes(min(stop - start, _STEP)), region.fd_offset
    for first, last in data_runs(region.fd, origin + start, origin + stop):
        for step in range(first - origin, last - origin, _STEP):
            part = region.u8[step : min(step + _STEP, last - origin)]
            if not is_zero(part):
                part[:] = zeroes[: len(part)]
