"""`exits`: the round trip of a port write that nobody has claimed, beside a minimal loop in C; both run in turns.

Of ours, whole processes with few and with many writes are measured; the difference has no start in it.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

from benches import machines, tiny_guest
from benches.processes import Command, Spawner
from benches.report import BenchError, Report

BAR = 1.35  # of the loop's
_FEW, _MANY = 1000, 21_000
_LOOP = Path(__file__).with_name("exit_loop.c")


def run(count: int) -> None:
    report = Report("exits")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise BenchError("no C compiler: apt-get install gcc")
    with tempfile.TemporaryDirectory(prefix="stratovirt-bench-") as name:
        folder = Path(name)
        loop = folder / "exit_loop"
        done = subprocess.run([compiler, "-O2", "-o", str(loop), str(_LOOP)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchError(f"the loop in C does not compile: {done.stderr}")
        commands = []
        for writes in (_FEW, _MANY):
            guest = folder / f"{writes}.elf"
            guest.write_bytes(tiny_guest.writing(writes))
            commands.append(Command("stratovirt", machines.ours(guest, "128M", 1)))
        ours, theirs = [], []
        with Spawner() as spawner:
            for number in range(-1, count):
                few, many = (spawner.run(command).wall for command in commands)
                least = _loop(loop)
                if number >= 0:
                    ours.append((many - few) * 1000 / (_MANY - _FEW))
                    theirs.append(least)
    report.spread("port write", ours, "us", "loop in C", theirs)
    report.say(f"{statistics.median(ours) / statistics.median(theirs):.3f} of the loop's round trip (bar: {BAR})")


def _loop(path: Path) -> float:
    done = subprocess.run([str(path), str(_MANY)], capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise BenchError(f"the loop in C ended with status {done.returncode}: {done.stderr}")
    return float(done.stdout) / 1000
