"""Pages that a machine is going to write to, copied while nobody waits for it.

After a fork the first write to a page copies it, in an exception that takes longer than the copy. Which pages a machine writes
to is mostly the same each time. So it is looked up once, when the launcher's first machines are at rest (`sample.py`), and from
then on a spare copies them when it has made ready what it can, before it waits for its request.

On a kernel before Linux 5.14, or without the right to look, pages are copied as they are written to.

Thread: main.
"""

from __future__ import annotations

import mmap
import os

from stratovirt import hostmap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

# Of /proc/PID/pagemap: the page is there; it is of a file; it is in this process only.
_PRESENT, _OF_FILE, _EXCLUSIVE = 1 << 63, 1 << 61, 1 << 56
_ENTRY = 8
_MOST_BYTES = 64 << 20  # of one area: what is larger is not the interpreter's


class Written:
    """None at first."""

    def __init__(self) -> None:
        self._runs = memoryview(b"").cast("Q")  # address, length, address, ...

    def learn(self, pid: int) -> int:
        """From a machine at rest, which was forked by this process. How many pages. Raises: OSError, ValueError.

        Another child is there that shares with it what it has not written to.
        """
        runs = _exclusive(str(pid), _common(list(_private_areas("self")), list(_private_areas(str(pid)))))
        if runs:
            # Outside of the heap: what is there would be copied by who reads it.
            self._runs = memoryview(mmap.mmap(-1, len(runs) * 2 * _ENTRY)).cast("Q")
            for at, (address, length) in enumerate(runs):
                self._runs[2 * at], self._runs[2 * at + 1] = address, length
        return sum(length for _, length in runs) // hostmap.PAGE_SIZE

    def copy(self) -> None:
        """In a child of the process that has learned it."""
        runs = self._runs
        for at in range(0, len(runs), 2):
            hostmap.copy_pages(runs[at], runs[at + 1])


def _private_areas(process: str) -> Iterator[tuple[int, int]]:
    """What a process can write to without others seeing it."""
    with open(f"/proc/{process}/maps", encoding="ascii", errors="replace") as maps:
        for line in maps:
            area, mode = line.split(maxsplit=2)[:2]
            start, end = (int(word, 16) for word in area.split("-"))
            if mode == "rw-p" and end - start <= _MOST_BYTES:
                yield start, end


def _common(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> list[tuple[int, int]]:
    both = ((max(start, begin), min(end, stop)) for start, end in one for begin, stop in other)
    return [(start, end) for start, end in both if start < end]


def _exclusive(process: str, areas: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Address and length of the pages there that no other process has."""
    runs: list[tuple[int, int]] = []
    page = hostmap.PAGE_SIZE
    with open(f"/proc/{process}/pagemap", "rb", 0) as pagemap:
        for start, end in areas:
            states = memoryview(os.pread(pagemap.fileno(), (end - start) // page * _ENTRY, start // page * _ENTRY)).cast("Q")
            for address, state in zip(range(start, end, page), states, strict=True):
                if not state & _PRESENT or state & _OF_FILE or not state & _EXCLUSIVE:
                    continue
                if runs and sum(runs[-1]) == address:
                    runs[-1] = runs[-1][0], runs[-1][1] + page
                else:
                    runs.append((address, page))
    return runs
