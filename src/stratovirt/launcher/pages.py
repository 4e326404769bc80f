"""Pages of memory that a machine's process has copied and that are equal to the launcher's again: it gives them back.

An interpreter writes where it only reads, counts of references above all. After a fork each first write copies a page, and
when the counts have come back to what they were a third of the copies are for nothing. Here is how they end:

    launcher   keep_arenas     first of all: from now on the interpreter's arenas stay where they are
               Sharing         once warm: arenas become a private mapping of a file in memory; children inherit it. The file
                               gets pages as a first machine has them at rest (`sample.py`), and is sealed
    machine    GiveBack        once at rest, then at growing intervals: pages of its own that equal the file's are dropped,
                               and what is read there next is the file's page, which all share

Arenas only, since whoever writes there holds the interpreter's lock (`native/pages.c` has the exception, which is the kernel).
The C library's heap and the interpreter's own data have equal pages too, a fifth of all, but are written without it.

Without the compiled module, with an interpreter that has no lock or not these arenas, or with an old kernel, all is as it
would be without: pages stay copied.

Thread: main.
"""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import sys

from stratovirt import hostmap, log
from stratovirt.errors import HostError
from stratovirt.native import compiled

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from stratovirt.loop import EventLoop

FIRST_SECONDS = 0.001  # after a machine's start, when what was written to once is equal again
NEXT_SECONDS = 0.02  # when it is at rest; then twice as long each time
LONGEST_SECONDS = 60.0
_SLICE_SECONDS = 0.0005
_SLICE = 256  # pages, some 200 us, and 800 when all are given back

_ARENA, _POOL = 1 << 20, 1 << 14  # of an interpreter for 64 bits, 3.10 and later
_SMALL = 512  # what is larger is not in an arena
_LAST_VERSION = (3, 13)  # later ones have locks in objects, which are written without the interpreter's
_F_ADD_SEALS, _SEALS = 1033, 0x1 | 0x2 | 0x4 | 0x8  # seal, shrink, grow, write

_early: list[tuple[int, int]] = []  # what may have arenas in it that were made before `keep_arenas`
_shared: list[tuple[int, int, int]] = []  # address, length, address of the file's pages: what is shared
_sealed = False


def keep_arenas() -> bool:
    """Before there has ever been a second thread. False: nothing can be shared."""
    if compiled is None or not sys.version_info[:2] <= _LAST_VERSION or not getattr(sys, "_is_gil_enabled", lambda: True)():
        return False
    _early[:] = _anonymous()
    compiled.keep_arenas()
    return True


def _anonymous() -> list[tuple[int, int]]:
    """Memory without a name that is large enough for an arena. Not the .bss of the interpreter, which has objects too."""
    found: list[tuple[int, int]] = []
    data_end, interpreter = 0, ""
    with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
        for line in maps:
            fields = line.split(maxsplit=5)
            start, end = (int(word, 16) for word in fields[0].split("-"))
            name = fields[5] if len(fields) > 5 else ""
            if start <= id(None) < end:
                interpreter = name
            if name:
                data_end = end if name == interpreter else 0
            elif fields[1] == "rw-p" and end - start >= _ARENA and start != data_end:
                found.append((start, end))
    return found


def find() -> list[tuple[int, int]]:
    """Address and length of what `share` can share. Before `gc.freeze`, behind which objects are not found."""
    made = compiled.kept_arenas() if _early and compiled is not None else []
    if not made:
        return []  # or an interpreter with another allocator: nothing is in arenas
    pools = {address for arena in made for address in range(-(-arena // _POOL) * _POOL, arena + _ARENA - _POOL + 1, _POOL)}
    return _runs(pools | _early_pools())


class Copies:
    """Pages of a process: `places` in the file and in memory, `content` one after the other.

    Outside of the heap, where it would leave a hole of a size that machines have to do with.
    """

    def __init__(self, places: list[tuple[int, int]]) -> None:
        self.places = places
        self._memory = mmap.mmap(-1, max(1, len(places)) * hostmap.PAGE_SIZE)
        self.content = memoryview(self._memory)

    def close(self) -> None:
        self.content.release()
        self._memory.close()


class Sharing:
    """Lets memory be shared with children for good: from `share` on as this process has it. Once, with one thread.

    Nothing is written to a page of it that this process has not copied first, as after a fork. Children whose pages the file is
    to have are looked at and end before `take_over`; all others come after `seal`.
    """

    def __init__(self, runs: list[tuple[int, int]]) -> None:
        self._runs = runs
        self._fd = -1

    def share(self) -> None:
        """As much of it as can be: without the compiled module nothing."""
        if compiled is None or not self._runs or len(os.listdir("/proc/self/task")) > 1:
            return
        offset = 0
        try:
            self._fd = os.memfd_create("stratovirt-launcher", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            length = sum(length for _, length in self._runs)
            os.ftruncate(self._fd, length)
            view = hostmap.map_readable(self._fd, length)
            for address, size in self._runs:
                compiled.lay_file_over(self._fd, address, size, offset)
                _shared.append((address, size, view + offset))
                offset += size
        except (OSError, HostError) as error:
            log.debug(f"memory is shared by fork only, but for {offset >> 10} KiB: {error}")

    def look(self, pid: int) -> Copies:
        """Pages of a child that have been copied. Raises: OSError."""
        page, offset = hostmap.PAGE_SIZE, 0
        places: list[tuple[int, int]] = []
        with open(f"/proc/{pid}/pagemap", "rb", 0) as pagemap, open(f"/proc/{pid}/mem", "rb", 0) as memory:
            for address, length, _ in _shared:
                states = memoryview(os.pread(pagemap.fileno(), length // page * 8, address // page * 8)).cast("Q")
                places += [(offset + at, address + at) for at, state in zip(range(0, length, page), states, strict=True)
                           if state >> 63 and not state >> 61 & 1]
                offset += length
            copies = Copies(places)
            for at, (_, address) in enumerate(places):
                os.preadv(memory.fileno(), [copies.content[at * page : at * page + page]], address)
        return copies

    def take_over(self, copies: Copies) -> int:
        """Let the file have these pages; how many differ. No child may be there, as it would see that. Raises: OSError."""
        page, changed = hostmap.PAGE_SIZE, 0
        for at, (offset, address) in enumerate(copies.places):
            content = copies.content[at * page : at * page + page]
            if os.pread(self._fd, page, offset) != content:
                compiled.set_file_page(self._fd, offset, address, content)  # type: ignore[union-attr]  # `share` has looked
                changed += 1
        return changed

    def seal(self) -> None:
        """The file stays as it is. Machines that are forked from now on give pages back."""
        global _sealed
        if self._fd < 0:
            return
        _sealed = True
        fcntl.fcntl(self._fd, _F_ADD_SEALS, _SEALS)  # nobody who finds a way to the file can change what all read
        os.close(self._fd)
        self._fd = -1
        for _, length, view in _shared:
            hostmap.touch(view, length)  # or a page that only one machine reads would be counted as that machine's alone


def _early_pools() -> set[int]:
    """Pools of arenas that are not known, but by the objects in them: what is as small as they are is nowhere else."""
    found: set[int] = set()
    for objects in (gc.get_objects(), gc.get_referents(*gc.get_objects())):
        for one in objects:
            address = id(one)
            if (address & -_POOL not in found and any(start <= address < end for start, end in _early)
                    and not issubclass(type(one), type)  # which may be in the .bss of an extension
                    and sys.getsizeof(one, _SMALL) < _SMALL):
                found.add(address & -_POOL)
    return {pool for pool in found if any(start <= pool and pool + _POOL <= end for start, end in _early)}


def _runs(pools: Iterable[int]) -> list[tuple[int, int]]:
    """Address and length of what lies together, in whole pages of the host."""
    runs: list[tuple[int, int]] = []
    for pool in sorted(pools):
        if runs and sum(runs[-1]) == pool:
            runs[-1] = runs[-1][0], runs[-1][1] + _POOL
        else:
            runs.append((pool, _POOL))
    page = hostmap.PAGE_SIZE
    whole = ((-(-start // page) * page, (start + length) // page * page) for start, length in runs)
    return [(start, end - start) for start, end in whole if start < end]


class GiveBack:
    """In a machine's process: drops pages that equal the launcher's, now and again. It never keeps the loop for long."""

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._wait = FIRST_SECONDS
        self._given = 0
        if _sealed:
            loop.call_later(self._wait, self._begin)

    def _begin(self) -> None:
        try:
            pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            log.debug(f"/proc/self/pagemap: {error.strerror}; copied pages stay")
            return
        size = _SLICE * hostmap.PAGE_SIZE
        self._given = 0
        self._go_on(pagemap, [(address + at, file + at, min(size, length - at) // hostmap.PAGE_SIZE)
                              for address, length, file in _shared for at in range(0, length, size)])

    def _go_on(self, pagemap: int, parts: list[tuple[int, int, int]]) -> None:
        if parts:
            try:
                self._given += compiled.give_back_equal(pagemap, *parts.pop())  # type: ignore[union-attr]  # something is shared
            except OSError as error:
                os.close(pagemap)
                log.debug(f"copied pages stay: {error.strerror}")
                return
            # Others have their turn in between: with the lock held, a vCPU's exit waits.
            self._loop.call_later(_SLICE_SECONDS, lambda: self._go_on(pagemap, parts))
            return
        os.close(pagemap)
        log.debug(f"gave back {self._given} pages that equal the launcher's")
        self._wait = min(max(2 * self._wait, NEXT_SECONDS), LONGEST_SECONDS)
        self._loop.call_later(self._wait, self._begin)
