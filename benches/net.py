"""`net`: iperf3 both ways between a guest and its host, in the lab, where the clock counts instructions.

Ours on the main loop, on an iothread and with vhost, beside QEMU's microvm on its main loop and with vhost: the same kernel,
the same iperf3. Then where the work is done, thread by thread, the guest's exits, and our main loop function by function.
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
from benches import kvm_trace
from benches.net_inside import DOWN, IOTHREAD, MAIN, OURS, PEER, UP, VHOST, WAYS
from benches.report import BenchError, Report

_TREE = Path(__file__).resolve().parent.parent
_RUNS = 3
_DEADLINE = 1200
_PEERS_WAY = {MAIN: MAIN, IOTHREAD: MAIN, VHOST: VHOST}  # QEMU has no iothreads for a network interface
_FUNCTIONS = 14

Record = dict[str, object]


def run(_count: int) -> None:
    """Few runs: the clock counts instructions, and the lines "spread of the runs" say how far they are apart."""
    report = Report("net")
    report.say("guest kernel and initramfs (the kernel is built the first time)")
    assets = _output([sys.executable, "-m", "guest.assets", "microvm-elf", "microvm-initramfs"]).split()
    compileall.compile_dir(Path(stratovirt.__file__).parent, quiet=1)  # the lab sees this machine's files read-only
    report.say("transferring in the lab")
    inside = f"python -m benches.net_inside {' '.join(assets)} {_RUNS} /mnt/share"
    with tempfile.TemporaryDirectory(prefix="stratovirt-bench-") as folder:
        lab = [sys.executable, "-m", "lab.run", "--icount", "--share", folder, "--deadline", str(_DEADLINE), "--", inside]
        records: list[Record] = [json.loads(line) for line in _output(lab).splitlines()]
        for direction in (UP, DOWN):
            for way in WAYS[OURS]:
                _compare(report, direction, way, records, Path(folder))
            _tell_profile(report, direction, records, Path(folder))


def _output(command: list[str]) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False, cwd=_TREE)
    if done.returncode:
        raise BenchError(f"{' '.join(command[1:4])} ended with status {done.returncode}")
    return done.stdout


def _compare(report: Report, direction: str, way: str, records: list[Record], folder: Path) -> None:
    """One of our ways beside QEMU's. Work is in instructions for a byte, so that less is better; throughput the other way."""
    ways = {OURS: way, PEER: _PEERS_WAY[way]}
    case, peer = f"{direction}, {way}", f"{PEER}, {ways[PEER]}"
    runs = {name: _select(records, "transfer", name, ways[name], direction) for name in (OURS, PEER)}
    rates = {name: [_number(run["bytes"]) * 8e3 / _number(run["nanoseconds"]) for run in runs[name]] for name in runs}
    report.line(case, statistics.median(rates[OURS]), "Mbit/s", peer, statistics.median(rates[PEER]))
    report.line(f"{case}, spread of the runs", max(rates[OURS]) - min(rates[OURS]), "Mbit/s",
                peer, max(rates[PEER]) - min(rates[PEER]))
    work = {name: _work(runs[name]) for name in runs}
    for thread in sorted(work[OURS].keys() | work[PEER].keys()):
        report.line(f"{case}, {thread}", work[OURS].get(thread, 0), "ns/KiB", peer, work[PEER].get(thread, 0))
    exits = {}
    size = {name: statistics.median(_number(run["bytes"]) for run in runs[name]) / 1024 for name in runs}
    for name in (OURS, PEER):
        (trace,) = _select(records, "trace", name, ways[name], direction)
        exits[name] = kvm_trace.user_space_exits(kvm_trace.read(folder / str(trace["file"])))
    for label in sorted(exits[OURS].keys() | exits[PEER].keys(), key=lambda label: -exits[OURS].get(label, (0, 0))[1]):
        mine, theirs = (exits[name].get(label, (0, 0)) for name in (OURS, PEER))
        if max(mine[0], theirs[0]) >= 10:
            report.line(f"{case}, exits, {label}", mine[0] * 1024 / size[OURS], "exits/MiB",
                        peer, theirs[0] * 1024 / size[PEER])
            report.line(f"{case}, exits, {label}", mine[1] / size[OURS], "ns/KiB", peer, theirs[1] / size[PEER])
    report.say(f"{case}: {statistics.median(rates[OURS]) / statistics.median(rates[PEER]):.3f} of {peer}")


def _work(runs: list[Record]) -> dict[str, float]:
    """ns for a KiB, by thread; the medians of the runs."""
    totals: dict[str, list[float]] = {}
    for run in runs:
        work = run["work"]
        if not isinstance(work, dict):
            raise BenchError(f"{work!r} is not a table")
        for thread, nanoseconds in work.items():
            totals.setdefault(str(thread), []).append(_number(nanoseconds) * 1024 / _number(run["bytes"]))
    return {thread: statistics.median(values) for thread, values in totals.items()}


def _tell_profile(report: Report, direction: str, records: list[Record], folder: Path) -> None:
    """Shares of the main loop's time; functions without a share worth a line are one line together."""
    (profile,) = [record for record in records if record["kind"] == "profile" and record["direction"] == direction]
    lines = [line.split("\t", 2) for line in (folder / str(profile["file"])).read_text().splitlines()]
    entries = sorted(((int(time), int(calls), name) for calls, time, name in lines), reverse=True)
    entries = [entry for entry in entries if "poll' of 'select" not in entry[2]]  # waiting
    total = sum(time for time, _, _ in entries)
    for time, calls, name in entries[:_FUNCTIONS]:
        report.line(f"{direction}, main loop, profiled: {name}", 100 * time / total, "%", calls=calls)
    rest = sum(time for time, _, _ in entries[_FUNCTIONS:])
    report.line(f"{direction}, main loop, profiled: everything else", 100 * rest / total, "%")


def _select(records: list[Record], kind: str, monitor: str, way: str, direction: str) -> list[Record]:
    wanted = {"kind": kind, "monitor": monitor, "way": way, "direction": direction}
    return [record for record in records if wanted.items() <= record.items()]


def _number(value: object) -> float:
    if not isinstance(value, (int, float)):
        raise BenchError(f"{value!r} is not a number")
    return value
