"""Starts processes one at a time and measures each from its start until it has ended and been waited for.

A program of its own, run by a bare interpreter, for two reasons. The peak resident memory that the kernel reports for a
process includes that of the process it was started from, up to its exec: the starter must be smaller than all it
measures. And a large starter takes longer to start anything.

Protocol: a line on stdin is a command, its words separated by NUL; the answer is a line of four numbers: wait status,
wall time in ns, processor time in us, peak resident memory in KiB.
"""

from __future__ import annotations

import os
import sys
import time


def serve() -> None:
    null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    environment = dict(os.environ)
    for line in sys.stdin:
        words = line[:-1].split("\0")
        begin = time.monotonic_ns()
        pid = os.posix_spawnp(words[0], words, environment, file_actions=null)
        _, status, usage = os.wait4(pid, 0)
        wall = time.monotonic_ns() - begin
        cpu = round((usage.ru_utime + usage.ru_stime) * 1_000_000)
        sys.stdout.write(f"{status} {wall} {cpu} {usage.ru_maxrss}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
