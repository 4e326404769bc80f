"""`boot`: from the start of the process to the guest's init, in the lab, where the clock counts instructions.

One kernel, one initramfs, one kernel command line, the same memory, ours and QEMU's microvm. The lab's processor executes
one instruction a nanosecond, whatever the machine below it does meanwhile, so "ms" are millions of instructions.
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
from benches.boot_inside import OURS, PEER
from benches.phases import durations
from benches.report import BenchError, Report

_TREE = Path(__file__).resolve().parent.parent
_RUNS = 5
_DEADLINE = 400
_GUEST = "to the guest's init"

Record = dict[str, object]


def run(_count: int) -> None:
    """Few runs: the clock counts instructions, and the lines "spread of the runs" say how far they are apart."""
    report = Report("boot")
    report.say("guest kernel and initramfs (the kernel is built the first time)")
    names = ["microvm-elf", "microvm-initramfs"]
    assets = _output([sys.executable, "-m", "guest.assets", *names]).split()
    compileall.compile_dir(Path(stratovirt.__file__).parent, quiet=1)  # the lab sees this machine's files read-only
    report.say("booting in the lab")
    inside = f"python -m benches.boot_inside {' '.join(assets)} {_RUNS} /mnt/share"
    with tempfile.TemporaryDirectory(prefix="stratovirt-bench-") as folder:
        lab = [sys.executable, "-m", "lab.run", "--icount", "--share", folder, "--deadline", str(_DEADLINE), "--", inside]
        records: list[Record] = [json.loads(line) for line in _output(lab).splitlines()]
        for case in dict.fromkeys(str(record["case"]) for record in records):
            _tell(report, case, [record for record in records if record["case"] == case], Path(folder))


def _output(command: list[str]) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False, cwd=_TREE)
    if done.returncode:
        raise BenchError(f"{' '.join(command[1:4])} ended with status {done.returncode}")
    return done.stdout


def _tell(report: Report, case: str, records: list[Record], folder: Path) -> None:
    runs = {name: _select(records, "time", name) for name in (OURS, PEER)}
    times = {name: [_ms(run["nanoseconds"]) for run in runs[name]] for name in runs}
    busy = {name: [_ms(run["busy"]) for run in runs[name]] for name in runs}
    for name in runs:
        each = (f"{work:.1f} of {time:.1f}" for time, work in zip(times[name], busy[name], strict=True))
        report.say(f"{case}, {name}: work {', '.join(each)} ms")
    report.line(f"{case}, process start to init", statistics.median(busy[OURS]), "ms", PEER, statistics.median(busy[PEER]))
    report.line(f"{case}, with waits", statistics.median(times[OURS]), "ms", PEER, statistics.median(times[PEER]))
    report.line(f"{case}, spread of the runs", max(busy[OURS]) - min(busy[OURS]), "ms",
                PEER, max(busy[PEER]) - min(busy[PEER]))
    (phases,) = _select(records, "phases", OURS)
    table = durations(_integer(phases["began"]), f"{phases['report']}{_GUEST}\t{phases['ended']}\n")
    for phase, milliseconds in table.items():
        report.line(f"{case}, phase: {phase}", milliseconds, "ms")
    traces = {name: _select(records, "trace", name)[0] for name in (OURS, PEER)}
    events = {name: kvm_trace.read(folder / str(traces[name]["file"])) for name in (OURS, PEER)}
    exits = {name: kvm_trace.user_space_exits(events[name]) for name in (OURS, PEER)}
    for label in sorted(exits[OURS].keys() | exits[PEER].keys(), key=lambda label: -exits[OURS].get(label, (0, 0))[1]):
        mine, theirs = (exits[name].get(label, (0, 0)) for name in (OURS, PEER))
        report.line(f"{case}, exits, {label}", mine[0], "exits", PEER, theirs[0])
        report.line(f"{case}, exits, {label}", mine[1] / 1e6, "ms", PEER, theirs[1] / 1e6)
    all_exits = [sum(times for times, _ in exits[name].values()) for name in (OURS, PEER)]
    all_time = [sum(nanoseconds for _, nanoseconds in exits[name].values()) / 1e6 for name in (OURS, PEER)]
    entries = [kvm_trace.count(events[name], "kvm_entry") for name in (OURS, PEER)]
    report.line(f"{case}, exits to user space, all", all_exits[0], "exits", PEER, all_exits[1])
    report.line(f"{case}, exits to user space, all", all_time[0], "ms", PEER, all_time[1])
    answered = {name: kvm_trace.kernel_port_accesses(events[name]) for name in (OURS, PEER)}
    _side_by_side(report, f"{case}, exits to KVM", answered)
    _side_by_side(report, f"{case}, the processor's exits", {name: _counts(traces[name]["reasons"]) for name in (OURS, PEER)})
    report.line(f"{case}, entries into the guest", entries[0], "entries", PEER, entries[1])
    report.say(f"{case}: {statistics.median(busy[OURS]) / statistics.median(busy[PEER]):.3f} of QEMU's instructions")


def _side_by_side(report: Report, case: str, counts: dict[str, dict[str, int]]) -> None:
    mine, theirs = counts[OURS], counts[PEER]
    for label in sorted(mine.keys() | theirs.keys(), key=lambda label: -mine.get(label, 0)):
        report.line(f"{case}, {label}", mine.get(label, 0), "exits", PEER, theirs.get(label, 0))


def _counts(value: object) -> dict[str, int]:
    if not isinstance(value, dict):
        raise BenchError(f"{value!r} is not a table")
    return {str(label): _integer(times) for label, times in value.items()}


def _select(records: list[Record], kind: str, monitor: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind and record["monitor"] == monitor]


def _integer(value: object) -> int:
    if not isinstance(value, int):
        raise BenchError(f"{value!r} is not a number")
    return value


def _ms(value: object) -> float:
    return _integer(value) / 1e6
