"""A launcher whose machines note when their guest first writes to a port: where the bench cannot look from outside.

Arguments: the source directory, a file, then those of `stratovirt launcher`. The file is mapped and shared; the time
(CLOCK_MONOTONIC, ns) goes to the slot of the machine's process id, without a system call, for the thread may be confined.
"""

from __future__ import annotations

import mmap
import os
import sys
import time

SLOTS = 1 << 16


def note_first_writes(path: str) -> None:
    """Have each child note it once; the launcher's own machines, before it serves, do not count.

    A vCPU's run loop looks `write` up once and calls what it has found for every port write, so the first one has to be told
    from those that follow.
    """
    from stratovirt.address_map import AddressMap
    from stratovirt.launcher import practice

    fd = os.open(path, os.O_RDWR)
    times = memoryview(mmap.mmap(fd, SLOTS * 8)).cast("Q")
    os.close(fd)
    write = AddressMap.write
    waiting = [True]  # each child has its own

    def first(self: AddressMap, address: int, size: int, value: int) -> None:
        now = time.monotonic_ns()
        write(self, address, size, value)
        if waiting:
            waiting.clear()
            times[os.getpid() % SLOTS] = now

    fill_gaps = practice.fill_gaps

    def after_practice() -> list[object]:
        AddressMap.write = first  # type: ignore[method-assign]
        return fill_gaps()

    practice.fill_gaps = after_practice


def main() -> int:
    source, path = sys.argv[1], sys.argv[2]
    sys.path.insert(0, source)
    note_first_writes(path)
    from stratovirt.launcher import command

    return command.main(sys.argv[3:])


if __name__ == "__main__":
    sys.exit(main())
