"""`block`: what a disk costs, with fio in one and the same guest under ours and under QEMU's microvm, in the lab.

The disk is the kernel's null block device, opened with O_DIRECT by both: its requests end at once, so what is left is the way
there and back, the monitor's above all. The lab's clock counts instructions, so "us" are thousands of instructions that the one
processor executed, in guest, KVM and monitor.
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
from benches.block_inside import CASES, OURS, PEER, PLACES
from benches.report import BenchError, Report

_TREE = Path(__file__).resolve().parent.parent
_RUNS = 3
_DEADLINE = 1500
_FUNCTIONS = 24
_FIGURES = (
    ("throughput", "mibs", "MiB/s"),
    ("requests", "iops", "a second"),
    ("a request as the guest sees it", "latency_us", "us"),
    ("the thread of the disk, a request", "device_us", "us"),
    ("exits, a request", "exits", "exits"),
    ("exits to user space, a request", "user_exits", "exits"),
)

Record = dict[str, object]


def run(_count: int) -> None:
    """Few runs: the clock counts instructions, and `spread` says how far they are apart."""
    report = Report("block")
    report.say("guest kernel and initramfs (the kernel is built the first time)")
    assets = _output([sys.executable, "-m", "guest.assets", "microvm-elf", "microvm-initramfs"]).split()
    compileall.compile_dir(Path(stratovirt.__file__).parent, quiet=1)  # the lab sees this machine's files read-only
    report.say("in the lab: some boots for each monitor and place, then one with a profiler")
    inside = f"python -m benches.block_inside {' '.join(assets)} {_RUNS} /mnt/share"
    with tempfile.TemporaryDirectory(prefix="stratovirt-bench-") as folder:
        lab = [sys.executable, "-m", "lab.run", "--icount", "--share", folder, "--deadline", str(_DEADLINE), "--", inside]
        records: list[Record] = [json.loads(line) for line in _output(lab).splitlines()]
        for number, case in enumerate(CASES):
            for place in PLACES:
                _tell(report, f"{case.name}, {place}", [record for record in records if record["case"] == case.name
                                                       and record["place"] == place])
            _tell_profile(report, case.name, case.requests, Path(folder) / f"profile.{number}")


def _output(command: list[str]) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False, cwd=_TREE)
    if done.returncode:
        raise BenchError(f"{' '.join(command[1:4])} ended with status {done.returncode}")
    return done.stdout


def _tell(report: Report, case: str, records: list[Record]) -> None:
    mine = [record for record in records if record["monitor"] == OURS]
    theirs = [record for record in records if record["monitor"] == PEER]
    for what, key, unit in _FIGURES:
        values, others = ([_number(record[key]) for record in side] for side in (mine, theirs))
        report.line(f"{case}, {what}", statistics.median(values), unit, PEER, statistics.median(others),
                    spread=round(max(values) - min(values), 3), peer_spread=round(max(others) - min(others), 3))
    ratio = statistics.median(_number(record["iops"]) for record in mine) / statistics.median(
        _number(record["iops"]) for record in theirs)
    report.say(f"{case}: {ratio:.3f} of QEMU's requests a second")


def _tell_profile(report: Report, case: str, requests: int, file: Path) -> None:
    """The functions in which the main loop spends its time. The profiler takes time of its own, for each call."""
    entries = []
    for line in file.read_text().splitlines():
        times, time, function = line.split("\t", 2)
        if "poll' of 'select" not in function:  # waiting for events is no work
            entries.append((int(time), int(times), function))
    total = sum(nanoseconds for nanoseconds, _, _ in entries)
    for nanoseconds, calls, name in sorted(entries, reverse=True)[:_FUNCTIONS]:
        report.line(f"{case}, main loop, profiled: {name}", 100 * nanoseconds / total, "%",
                    us_a_request=round(nanoseconds / 1000 / requests, 3), calls_a_request=round(calls / requests, 3))


def _number(value: object) -> float:
    if not isinstance(value, int | float):
        raise BenchError(f"{value!r} is not a number")
    return value
