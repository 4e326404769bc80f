"""`phases`: where the time of a start goes, from exec to the end of the process; medians over the runs."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import stratovirt
from benches import machines, phases_probe, tiny_guest
from benches.report import BenchError, Report

_PROBE = Path(phases_probe.__file__)
_SOURCE = Path(stratovirt.__file__).parent.parent
LAST = "exit, until it is waited for"


def run(count: int) -> None:
    report = Report("phases")
    with tempfile.TemporaryDirectory(prefix="stratovirt-bench-") as folder:
        guest = Path(folder) / "guest.elf"
        guest.write_bytes(tiny_guest.image())
        command = probe_command(machines.ours(guest, "128M", 1)[1:])
        _observe(command)
        runs = [_observe(command) for _ in range(count)]
    for phase in runs[0]:
        report.line(phase, statistics.median(run[phase] for run in runs), "ms")
    report.line("all", statistics.median(sum(run.values()) for run in runs), "ms")


def probe_command(arguments: list[str], fd: int = 3) -> list[str]:
    """The command line that starts `stratovirt` with `arguments` and reports its phases to `fd`."""
    return [sys.executable, "-I", "-S", str(_PROBE), str(_SOURCE), str(fd), *arguments]


def durations(began: int, lines: str) -> dict[str, float]:
    """Milliseconds of each phase, from what the probe wrote."""
    result: dict[str, float] = {}
    for line in lines.splitlines():
        phase, _, at = line.rpartition("\t")
        result[phase] = (int(at) - began) / 1e6
        began = int(at)
    return result


def _observe(command: list[str]) -> dict[str, float]:
    read_end, write_end = os.pipe()
    null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1)]
    began = time.monotonic_ns()
    pid = os.posix_spawn(command[0], command, os.environ, file_actions=[*null, (os.POSIX_SPAWN_DUP2, write_end, 3)])
    _, status = os.waitpid(pid, 0)
    ended = time.monotonic_ns()
    os.close(write_end)
    with open(read_end, encoding="utf-8") as pipe:
        lines = pipe.read()
    if status:
        raise BenchError(f"the start under observation ended with status {os.waitstatus_to_exitcode(status)}")
    return durations(began, f"{lines}{LAST}\t{ended}\n")
