"""`memory`: what a machine costs beyond its guest's RAM, with many alive: private, proportional and resident memory.

Guest RAM is the mapping of its size; everything else of the process counts. Of proportional memory each process has its share
of what it shares, the launcher's pages above all, so the launcher itself is in the sum of its children's by that much.
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benches import machines, tiny_guest
from benches.launchers import Launcher
from benches.report import BenchError, Report

MACHINES = 100
PRIVATE_BAR, PROPORTIONAL_BAR = 2.0, 2.5  # MiB
_RAM = 128 << 10  # KiB
_DEADLINE = 60.0
_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")


class Usage:
    """Memory of one process beyond guest RAM, in MiB."""

    def __init__(self, pid: int) -> None:
        self.private = self.proportional = self.resident = 0.0
        is_ram = False
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            head = _HEAD.match(line)
            if head:
                size = (int(head[2], 16) - int(head[1], 16)) >> 10
                is_ram = _RAM <= size < _RAM + 4096
            elif not is_ram:
                name, _, value = line.partition(":")
                if name in ("Private_Clean", "Private_Dirty"):
                    self.private += int(value.split()[0]) / 1024
                elif name == "Pss":
                    self.proportional += int(value.split()[0]) / 1024
                elif name == "Rss":
                    self.resident += int(value.split()[0]) / 1024


def run(count: int) -> None:
    report = Report("memory")
    with tempfile.TemporaryDirectory(prefix="stratovirt-bench-") as name:
        folder = Path(name)
        guest = folder / "guest.elf"
        guest.write_bytes(tiny_guest.idle())
        peer = _spawned(lambda number: machines.qemu(guest, "128M", 1))
        report.say(f"{MACHINES} of QEMU: measured")

        def qmp(number: int) -> list[str]:
            return ["-qmp", f"unix:{folder}/{number}.qmp,server,nowait"]

        for case, usages in (
            ("standalone", _spawned(lambda number: machines.ours(guest, "128M", 1))),
            ("launcher", _launched(folder, guest, lambda number: [])),
            ("launcher, with QMP", _launched(folder, guest, qmp)),
        ):
            for what in ("private", "proportional", "resident"):
                values = [getattr(usage, what) for usage in usages]
                theirs = [getattr(usage, what) for usage in peer]
                report.spread(f"{case}, {what}", values, "MiB", machines.PEER, theirs)
            private = statistics.median(usage.private for usage in usages)
            proportional = statistics.median(usage.proportional for usage in usages)
            report.say(f"{case}: {private:.2f} MiB private, {proportional:.2f} MiB proportional"
                       + (f" (bars: {PRIVATE_BAR} and {PROPORTIONAL_BAR})" if case == "launcher" else ""))


def _spawned(words: Callable[[int], list[str]]) -> list[Usage]:
    """The usage of so many processes, all alive."""
    null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    pids: list[int] = []
    try:
        for number in range(MACHINES):
            line = words(number)
            pids.append(os.posix_spawnp(line[0], line, os.environ, file_actions=null))
        _until_quiet(pids)
        return [Usage(pid) for pid in pids]
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)


def _launched(folder: Path, guest: Path, more: Callable[[int], list[str]]) -> list[Usage]:
    with Launcher(folder) as launcher:
        alive = [launcher.machine([*machines.ours(guest, "128M", 1)[1:], *more(number)]) for number in range(MACHINES)]
        try:
            _until_quiet([machine.pid for machine in alive])
            return [Usage(machine.pid) for machine in alive]
        finally:
            for machine in alive:
                machine.kill()
                machine.close()


def _until_quiet(pids: list[int]) -> None:
    """Wait until all have vCPUs and hardly any processor time is used any more. Raises: BenchError."""
    deadline = time.monotonic() + _DEADLINE
    before = 0
    while time.monotonic() < deadline:
        time.sleep(0.5)
        used = sum(_processor_time(pid) for pid in pids)
        if used - before <= len(pids) // 4 and all(len(os.listdir(f"/proc/{pid}/task")) > 1 for pid in pids):
            return
        before = used
    raise BenchError("the machines do not come to rest")


def _processor_time(pid: int) -> int:
    """Clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return int(fields[11]) + int(fields[12])
