"""Incremental snapshots: what the memory of one stands on, down to a whole one, and which file has which part of it.

The state of an incremental snapshot names its base; its memory file has the ranges that differ from that, at the same offsets
as in a whole file, and holes elsewhere:

    base.id         of the snapshot that it stands on: 128 random bits that name a content, whatever directory it is in
    base.directory  where that is, as seen from the directory of this one, or absolute
    base.ranges     start, length, start, length, … in bytes of the memory file, ascending, whole pages

A hole inside a range is memory that is zero. Nothing below the memory of a base matters: devices and processors are those of
the newest state. A chain is refused when a link is missing, is another snapshot than the one that was there, is of another
machine, or when it comes round to where it has been.
"""

from __future__ import annotations

import os

from stratovirt.snapshot import memory_file, state_file
from stratovirt.snapshot.saved import Saved, SnapshotError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from stratovirt.memory import RamRegion

    Ranges = list[tuple[int, int]]

MAX_LINKS = 64
PAGE = 4096  # what ranges are multiples of, on every host
MAX_RANGES = 1 << 16
_MAX_MAPPED = 2048  # each splits a mapping in two more: the kernel allows 65530 of them
_WORTH_MAPPING = 64 << 10


class Link:
    """One snapshot of a chain. `ranges` (start, end) are what its memory file has; None: all."""

    __slots__ = ("directory", "fd", "id", "ranges")

    def __init__(self, directory: str, id: str, fd: int, ranges: Ranges | None) -> None:
        self.directory = directory
        self.id = id
        self.fd = fd
        self.ranges = ranges


class Chain:
    """The memory of the snapshot in `directory`, of which `state` is the state. `close` it. Raises: SnapshotError.

    `links` are newest first; `size` is the bytes of RAM in each file.
    """

    def __init__(self, directory: str, state: dict[str, Any]) -> None:
        self.links: list[Link] = []
        self.size = _memory_size(Saved(state))
        try:
            self._open(directory, state)
        except BaseException:
            self.close()
            raise

    def _open(self, directory: str, state: dict[str, Any]) -> None:
        first, where = state, ""
        while True:
            head = Saved(state)
            id = head.data("id", state_file.ID_SIZE).hex()
            base = head.optional_section("base")
            ranges = _read_ranges(base, self.size) if base is not None else None
            try:
                fd = memory_file.open_file(os.path.join(directory, state_file.MEMORY), self.size, id)
            except SnapshotError as error:
                raise SnapshotError(f"{where}{error}") from error
            self.links.append(Link(directory, id, fd, ranges))
            if base is None:
                return
            directory, state, where = self._next(directory, base, first)

    def _next(self, directory: str, base: Saved, first: dict[str, Any]) -> tuple[str, dict[str, Any], str]:
        """The snapshot that `base`, a section of the state in `directory`, is about."""
        wanted = base.data("id", state_file.ID_SIZE).hex()
        below = os.path.join(directory, base.text("directory", 4096))
        base.end()
        where = f"the base {below}: "
        if any(link.id == wanted for link in self.links):
            raise SnapshotError(f"{where}it stands on itself")
        if len(self.links) == MAX_LINKS:
            raise SnapshotError(f"{where}more than {MAX_LINKS} snapshots stand on each other")
        try:
            state = state_file.read(below)
            saved = Saved(state)
            found = saved.data("id", state_file.ID_SIZE).hex()
            if found != wanted:
                raise SnapshotError(f"this is another snapshot ({found}) than the one that was there ({wanted})")
            for name in ("architecture", "machine", "memory"):
                if state.get(name) != first.get(name):
                    raise SnapshotError(f"it is of another machine: the two differ in `{name}`")
        except SnapshotError as error:
            raise SnapshotError(f"{where}{error}") from error
        return below, state, where

    @property
    def ids(self) -> list[str]:
        return [link.id for link in self.links]

    def parts(self) -> list[tuple[int, int, Link]]:
        """(start, end, where it is) for all of the memory, in order: for every byte the newest link that has it."""
        found: list[tuple[int, int, Link]] = []
        left: Ranges = [(0, self.size)]
        for link in self.links:
            if link.ranges is None:
                found += [(start, end, link) for start, end in left]
                break
            taken, left = _cut(left, link.ranges)
            found += [(start, end, link) for start, end in taken]
        found.sort(key=lambda part: part[0])
        return found

    def load(self, region: RamRegion, offset: int, mapped: bool) -> None:
        """Let `region` hold what the files have at `offset`: mapped copy-on-write, or else read.

        The whole file is laid below, and on top of it what the others have: large parts mapped, small ones read.
        Raises: SnapshotError, HostError.
        """
        memory_file.load(self.links[-1].fd, region, offset, mapped)
        end = offset + region.size
        above = [(max(start, offset), min(stop, end), link) for start, stop, link in self.parts()
                 if link is not self.links[-1] and start < end and stop > offset]
        large: set[int] = set()
        if mapped and region.host.fd < 0:
            by_size = sorted((stop - start, start) for start, stop, _ in above if stop - start >= _WORTH_MAPPING)
            large = {start for _, start in by_size[-_MAX_MAPPED:]}
        for start, stop, link in above:
            if start in large and not (start | stop) % region.host.page_size:
                region.host.map_file(start - offset, link.fd, start, stop - start)
            else:
                memory_file.read_into(link.fd, region.u8[start - offset : stop - offset], start)

    def close(self) -> None:
        """Mappings stay. Idempotent."""
        for link in self.links:
            if link.fd >= 0:
                os.close(link.fd)
                link.fd = -1


class Reader:
    """Reads the memory of a chain from the beginning to the end, piece by piece."""

    def __init__(self, chain: Chain) -> None:
        self._parts = chain.parts()
        self._at = 0

    def read(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the memory at `offset`, which never goes back. Raises: SnapshotError."""
        end = offset + len(view)
        while self._parts[self._at][1] <= offset:
            self._at += 1
        for number in range(self._at, len(self._parts)):
            start, stop, link = self._parts[number]
            if start >= end:
                return
            start, stop = max(start, offset), min(stop, end)
            memory_file.read_into(link.fd, view[start - offset : stop - offset], start)


def _memory_size(state: Saved) -> int:
    """Bytes in the memory file, as the state has its runs one behind the other."""
    end = 0
    for section in state.sections("memory", 16):
        section.integer("base")
        size = section.integer("size", PAGE, 1 << 52)
        if section.integer("offset") != end:
            raise section.error("offset", f"not {end}, where the run before it ends")
        end += size
        section.end()
    return end


def _read_ranges(base: Saved, size: int) -> Ranges:
    numbers = base.integers("ranges", 0, size, 2 * MAX_RANGES)
    if len(numbers) % 2:
        raise base.error("ranges", "a start without a length")
    ranges: Ranges = []
    end = 0
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        if start < end or not length or (start | length) % PAGE:
            raise base.error("ranges", f"{start}, {length}: not whole pages, or not behind the one before")
        end = start + length
        if end > size:
            raise base.error("ranges", f"{start}, {length}: beyond the {size} bytes of memory")
        ranges.append((start, end))
    return ranges


def _cut(whole: Ranges, ranges: Ranges) -> tuple[Ranges, Ranges]:
    """What of `whole` lies in `ranges`, and what does not. All ascending."""
    inside: Ranges = []
    outside: Ranges = []
    number = 0
    for start, end in whole:
        while number < len(ranges) and ranges[number][1] <= start:
            number += 1
        at = number
        while start < end:
            if at == len(ranges) or ranges[at][0] >= end:
                outside.append((start, end))
                break
            low, high = ranges[at]
            if low > start:
                outside.append((start, low))
                start = low
            inside.append((start, min(high, end)))
            start = min(high, end)
            at += 1
    return inside, outside


def describe_base(chain: Chain, directory: str, ranges: Ranges) -> dict[str, object]:
    """The section `base` of a snapshot in `directory`, which is there, that stands on `chain`. Raises: SnapshotError."""
    numbers: list[int] = []
    for start, end in ranges:
        numbers += (start, end - start)
    return {"id": chain.links[0].id, "directory": _way(directory, chain.links[0].directory), "ranges": numbers}


def _way(directory: str, base: str) -> str:
    """From `directory` to `base`, so that both may move together; absolute where the text of a path leads astray.

    Without a look at the working directory or at symbolic links, which the main thread's filter has no calls for.
    """
    rooted = [path if os.path.isabs(path) else f"/{path}" for path in (base, directory)]
    way = os.path.relpath(*rooted)
    try:
        if os.path.samefile(os.path.join(directory, way), base):
            return way
    except OSError:
        pass  # it leads nowhere
    if not os.path.isabs(base):
        raise SnapshotError(f"the base {base}: give its absolute path, the way there from {directory} is not to be seen")
    return base


def check_place(chain: Chain, directory: str) -> None:
    """May a snapshot that stands on `chain` be written into `directory`? Raises: SnapshotError."""
    try:
        place = os.stat(directory)
    except (OSError, ValueError):
        return  # whoever makes it will hear
    for link in chain.links:
        if os.path.samestat(place, os.stat(link.directory)):
            raise SnapshotError(f"{directory}: the new snapshot would stand on this one, and cannot take its place")


def coarsen(ranges: Ranges, limit: int = MAX_RANGES) -> Ranges:
    """The same ranges, or fewer that hold them: what lies between some is taken along."""
    gap = PAGE
    while len(ranges) > limit:
        fewer = ranges[:1]
        for start, end in ranges[1:]:
            if start - fewer[-1][1] <= gap:
                fewer[-1] = (fewer[-1][0], end)
            else:
                fewer.append((start, end))
        ranges, gap = fewer, gap * 2
    return ranges
