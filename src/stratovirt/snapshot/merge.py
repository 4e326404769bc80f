"""A chain of incremental snapshots made one whole snapshot, which stands on nothing."""

from __future__ import annotations

import os

from stratovirt.snapshot import memory_file, state_file
from stratovirt.snapshot.chain import Chain, check_place
from stratovirt.snapshot.saved import SnapshotError

_STEP = 1 << 20


def merge(directory: str, into: str) -> int:
    """Write the snapshot in `directory` whole into `into`, which may be the same place; how many were merged.

    The id stays, since the content does: what stands on the snapshot stands on the merged one as well. In its own place it is a
    snapshot at every moment: a memory file that has more than its ranges serves the old state, too.
    Raises: SnapshotError, with everything as it was.
    """
    state = state_file.read(directory)
    chain = Chain(directory, state)
    try:
        same = os.path.exists(into) and os.path.samefile(directory, into)
        if not same:
            check_place(chain, into)
        writer = state_file.Writer(into)
        try:
            _copy(chain, writer.memory_fd)
            writer.commit({**state, "base": None}, replaces_itself=same)
        except BaseException:
            writer.abandon()
            raise
        return len(chain.links)
    finally:
        chain.close()


def _copy(chain: Chain, fd: int) -> None:
    buffer = memoryview(bytearray(_STEP))
    try:
        for start, end, link in chain.parts():
            position = start
            while position < end:
                position = _next_data(link.fd, position, end)
                part = buffer[: min(_STEP, end - position)]
                memory_file.read_into(link.fd, part, position)
                memory_file.write_part(fd, part, position)
                position += len(part)
        memory_file.finish(fd, chain.size, chain.links[0].id)
    except OSError as error:
        raise SnapshotError(f"writing the merged memory: {os.strerror(error.errno or 0)}") from error


def _next_data(fd: int, position: int, end: int) -> int:
    """Where there may be something else than zeroes, up to `end`."""
    try:
        return min(os.lseek(fd, position, os.SEEK_DATA), end)
    except OSError:
        return end  # a hole up to the end of the file; it never ends before `end`
