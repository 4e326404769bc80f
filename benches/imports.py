"""`imports`: what is imported before the guest's first instruction, and what each module costs.

Python's own account of it (`-X importtime`), medians over the runs. "Self" is a module without what it imports in turn,
"cumulative" with it, if it was the first to do so. Each line that Python prints costs time of its own, so the total is more
than the imports of an unobserved start take; `phases` has that.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import stratovirt
from benches import imports_probe, machines, tiny_guest
from benches.report import BenchError, Report

_PROBE = Path(imports_probe.__file__)
_SOURCE = Path(stratovirt.__file__).parent.parent
_PREFIX = "import time:"


def run(count: int) -> None:
    report = Report("imports")
    with tempfile.TemporaryDirectory(prefix="stratovirt-bench-") as folder:
        guest = Path(folder) / "guest.elf"
        guest.write_bytes(tiny_guest.image())
        words = machines.ours(guest, "128M", 1)[1:]
        command = [sys.executable, "-I", "-S", "-X", "importtime", str(_PROBE), str(_SOURCE), *words]
        _account(command)  # the first run may compile
        runs = [_account(command) for _ in range(count)]
    modules = runs[0][1]
    for name in modules:
        own = statistics.median(run[1][name][0] for run in runs)
        cumulative = statistics.median(run[1][name][1] for run in runs)
        report.line(name, own, "us", cumulative=cumulative)
    report.line("the interpreter's own, before ours", statistics.median(run[0] for run in runs), "us")
    report.line("modules", len(modules), "modules")
    report.line("all modules", statistics.median(sum(own for own, _ in run[1].values()) for run in runs), "us")


def _account(command: list[str]) -> tuple[int, dict[str, tuple[int, int]]]:
    """What the interpreter imports for itself, in us, and (self, cumulative) of each module up to the first KVM_RUN."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60)
    before, begin, rest = done.stderr.partition(imports_probe.BEGIN + "\n")
    ours, first_run, _ = rest.partition(imports_probe.FIRST_RUN + "\n")
    if done.returncode or not begin or not first_run:
        raise BenchError(f"the start under observation ended with status {done.returncode}: {done.stderr[-500:]}")
    interpreter = sum(own for own, _ in _table(before).values())
    return interpreter, _table(ours)


def _table(text: str) -> dict[str, tuple[int, int]]:
    table: dict[str, tuple[int, int]] = {}
    for line in text.splitlines():
        if line.startswith(_PREFIX):
            own, cumulative, name = line.removeprefix(_PREFIX).split("|")
            if own.strip().isdigit():  # not the heading
                table[name.strip()] = int(own), int(cumulative)
    return table
