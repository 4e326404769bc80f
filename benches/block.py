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
from pathlib import Path

import stratovirt
from benches.block_inside import CASES, OURS, PEER, PROFILED
from benches.report import BenchError, Report

_TREE = Path(__file__).resolve().parent.parent
_RUNS = 1
_DEADLINE = 1800
_FUNCTIONS = 24

Record = dict[str, object]


def run(_count: int) -> None:
    """One run each: the clock counts instructions."""
    report = Report("block")
    report.say("guest kernel and initramfs (the kernel is built the first time)")
    assets = _output([sys.executable, "-m", "guest.assets", "microvm-elf", "microvm-initramfs"]).split()
    compileall.compile_dir(Path(stratovirt.__file__).parent, quiet=1)  # the lab sees this machine's files read-only
    report.say("in the lab: a boot for each monitor and place, then one for each profile")
    inside = f"python -m benches.block_inside {' '.join(assets)} {_RUNS}"
    lab = [sys.executable, "-m", "lab.run", "--icount", "--deadline", str(_DEADLINE), "--", inside]
    records: list[Record] = [json.loads(line) for line in _output(lab).splitlines()]
    for case in CASES:
        for place in ("main loop", "iothread"):
            _tell(report, f"{case.name}, {place}", [record for record in records if record["case"] == case.name
                                                   and record["place"] == place and record["kind"] == "result"])
    for name in PROFILED:
        (profile,) = [record for record in records if record["kind"] == "profile" and record["case"] == name]
        _tell_profile(report, name, profile)


def _output(command: list[str]) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False, cwd=_TREE)
    if done.returncode:
        raise BenchError(f"{' '.join(command[1:4])} ended with status {done.returncode}")
    return done.stdout


def _tell(report: Report, case: str, records: list[Record]) -> None:
    mine = [record for record in records if record["monitor"] == OURS]
    theirs = [record for record in records if record["monitor"] == PEER]

    def side_by_side(what: str, key: str, unit: str) -> None:
        values, others = ([_number(record[key]) for record in side] for side in (mine, theirs))
        report.line(f"{case}, {what}", statistics.median(values), unit, PEER, statistics.median(others))

    side_by_side("throughput", "mibs", "MiB/s")
    side_by_side("requests", "iops", "a second")
    side_by_side("a request as the guest sees it", "latency_us", "us")
    side_by_side("the thread of the disk, a request", "device_us", "us")
    side_by_side("exits, a request", "exits", "exits")
    side_by_side("exits to user space, a request", "user_exits", "exits")
    ratio = statistics.median(_number(record["iops"]) for record in mine) / statistics.median(
        _number(record["iops"]) for record in theirs)
    report.say(f"{case}: {ratio:.3f} of QEMU's requests a second")


def _tell_profile(report: Report, case: str, profile: Record) -> None:
    """The functions in which the main loop spends its time. The profiler takes time of its own, for each call."""
    functions = profile["functions"]
    if not isinstance(functions, list):
        raise BenchError(f"{functions!r} is not a table")
    requests = _number(profile["requests"])
    total = sum(_number(entry["seconds"]) for entry in functions)
    for entry in functions[:_FUNCTIONS]:
        seconds = _number(entry["seconds"])
        calls = _number(entry["calls"]) / requests
        report.line(f"{case}, our loop: {entry['function']}", 100 * seconds / total, "%",
                    us_a_request=round(1e6 * seconds / requests, 3), calls_a_request=round(calls, 3))


def _number(value: object) -> float:
    if not isinstance(value, int | float):
        raise BenchError(f"{value!r} is not a number")
    return value
