"""`boot` on arm64: from the start of the process to the end of the guest's init, in the arm64 lab, where the clock counts
instructions.

One kernel, one initramfs, one kernel command line, the same memory, ours and QEMU's `virt`, which has a PCI bus and firmware
tables beside what a microVM has. The guest's init ends at once, and the panic that the kernel says is the mark: both have it
on their serial port.
"""

from __future__ import annotations

import compileall
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import stratovirt
from benches.boot_arm64_inside import CASES, OURS, PEER
from benches.report import BenchError, Report

_TREE = Path(__file__).resolve().parent.parent
_RUNS = 3
_DEADLINE = 900


def run(_count: int) -> None:
    """Few runs, as on x86_64: the clock counts instructions."""
    report = Report("boot")
    report.say("guest kernel and initramfs (the kernel is built the first time)")
    names = ["microvm-image", "microvm-initramfs"]
    assets = _output([sys.executable, "-m", "guest.assets", "--arch=aarch64", *names]).split()
    compileall.compile_dir(Path(stratovirt.__file__).parent, quiet=1)  # the lab sees this machine's files read-only
    report.say("booting in the arm64 lab")
    inside = f"python -m benches.boot_arm64_inside {' '.join(assets)} {_RUNS}"
    with tempfile.TemporaryDirectory(prefix="stratovirt-bench-") as folder:
        lab = [sys.executable, "-m", "lab.run", "--arch", "aarch64", "--icount", "--share", folder]
        records = [json.loads(line) for line in _output([*lab, "--deadline", str(_DEADLINE), "--", inside]).splitlines()]
    for case in CASES:
        times: dict[str, list[float]] = {OURS: [], PEER: []}
        for record in records:
            if record["case"] == case:
                times[record["monitor"]].append(record["nanoseconds"] / 1e6)
        if not times[OURS] or not times[PEER]:
            raise BenchError(f"the lab has reported no boots of {case!r}")
        mine, theirs = statistics.median(times[OURS]), statistics.median(times[PEER])
        report.line(f"{case}, process start to init's end", mine, "ms", PEER, theirs)
        spreads = [max(times[name]) - min(times[name]) for name in (OURS, PEER)]
        report.line(f"{case}, spread of the runs", spreads[0], "ms", PEER, spreads[1])
        report.say(f"{case}: {mine / theirs:.3f} of QEMU's instructions")


def _output(command: list[str]) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False, cwd=_TREE)
    if done.returncode:
        raise BenchError(f"{' '.join(command[1:4])} ended with status {done.returncode}")
    return done.stdout
