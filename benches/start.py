"""`start`: from the start of the process to the guest's first port write and the end of the process."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benches import machines, tiny_guest
from benches.processes import Command, Run, Spawner, in_turns
from benches.report import BenchError, Report

BAR = 0.35  # of QEMU's wall time, for the first case
_CASES = (("128 MiB, 1 vCPU", "128M", 1), ("1 GiB, 1 vCPU", "1G", 1), ("128 MiB, 4 vCPUs", "128M", 4))


def run(count: int) -> None:
    report = Report("start")
    with tempfile.TemporaryDirectory(prefix="stratovirt-bench-") as folder:
        guest = Path(folder) / "guest.elf"
        guest.write_bytes(tiny_guest.image())
        _verify(guest, Path(folder))
        report.say("both monitors run the guest; measuring")
        with Spawner() as spawner:
            for name, memory, cpus in _CASES:
                pair = [_ours(guest, memory, cpus), _qemu(guest, memory, cpus)]
                ours, theirs = in_turns(spawner, pair, count)
                _compare(report, name, ours, theirs)
                ratio = statistics.median(run.wall for run in ours) / statistics.median(run.wall for run in theirs)
                report.say(f"{name}: {ratio:.3f} of QEMU's wall time (bar for the first case: {BAR})")
            _floors(report, spawner, guest, count)


def _compare(report: Report, name: str, ours: list[Run], theirs: list[Run]) -> None:
    for what, unit in (("wall", "ms"), ("cpu", "ms"), ("peak", "MiB")):
        values = [getattr(run, what) for run in ours]
        others = [getattr(run, what) for run in theirs]
        label = {"wall": "wall time", "cpu": "processor time", "peak": "peak resident memory"}[what]
        report.spread(f"{name}, {label}", values, unit, machines.PEER, others)


def _floors(report: Report, spawner: Spawner, guest: Path, count: int) -> None:
    """What no start of ours can be below, and what the way the program is started adds."""
    words = machines.ours(guest, "128M", 1)[1:]
    commands = [
        Command("interpreter alone", [sys.executable, "-I", "-S", "-c", "import os; os._exit(0)"]),
        Command("as python -m stratovirt", [sys.executable, "-I", "-m", "stratovirt", *words]),
    ]
    for command, runs in zip(commands, in_turns(spawner, commands, count), strict=True):
        report.spread(f"{command.name}, wall time", [run.wall for run in runs], "ms")
        report.spread(f"{command.name}, peak resident memory", [run.peak for run in runs], "MiB")


def _ours(guest: Path, memory: str, cpus: int, *more: str) -> Command:
    return Command("stratovirt", machines.ours(guest, memory, cpus, *more))


def _qemu(guest: Path, memory: str, cpus: int, *more: str, serial: bool = False) -> Command:
    end = ["-device", f"isa-debug-exit,iobase={tiny_guest.EXIT_PORT:#x}"]
    return Command(machines.PEER, machines.qemu(guest, memory, cpus, *end, *more, serial=serial), tiny_guest.QEMU_STATUS)


def _verify(guest: Path, folder: Path) -> None:
    """Both must have executed the guest: its letter is on the serial port. Raises: BenchError."""
    for number, command in enumerate((
        _ours(guest, "128M", 1, "-serial", f"file,path={folder / 'serial.0'}"),
        _qemu(guest, "128M", 1, "-serial", f"file:{folder / 'serial.1'}", serial=True),
    )):
        done = subprocess.run(command.words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60)
        said = (done.stdout + done.stderr).strip()
        if done.returncode != command.status:
            raise BenchError(f"{command.name} ended with status {done.returncode}, not {command.status}: {said}")
        if (folder / f"serial.{number}").read_bytes() != tiny_guest.LETTER:
            raise BenchError(f"{command.name}: the guest's letter is not on the serial port: {said}")
