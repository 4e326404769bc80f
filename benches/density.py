"""`density`: a thousand machines alive at once, each answering QMP, and one more; then all end, and nothing is left."""

from __future__ import annotations

import json
import os
import resource
import socket
import statistics
import tempfile
import time
from pathlib import Path

from benches import machines, tiny_guest
from benches.launchers import Launcher, WarmMachine
from benches.report import BenchError, Report, p99

MACHINES = 1000
_DEADLINE = 60.0


def run(count: int) -> None:
    report = Report("density")
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory(prefix="stratovirt-bench-") as name, Launcher(Path(name)) as launcher:
        _measure(report, launcher, Path(name))


def _measure(report: Report, launcher: Launcher, folder: Path) -> None:
    idle, brief = folder / "idle.elf", folder / "brief.elf"
    idle.write_bytes(tiny_guest.idle())
    brief.write_bytes(tiny_guest.image())
    short = machines.ours(brief, "128M", 1)[1:]
    launcher.start_and_end(short)
    time.sleep(0.2)
    descriptors = _descriptors(launcher)
    began = time.monotonic()
    alive: list[WarmMachine] = []
    try:
        for number in range(MACHINES):
            qmp = ["-qmp", f"unix:{folder}/{number}.qmp,server,nowait"]
            alive.append(launcher.machine([*machines.ours(idle, "128M", 1)[1:], *qmp]))
        answers = [_ask(folder / f"{number}.qmp", "query-status", "running") for number in range(MACHINES)]
        report.line(f"{MACHINES} machines, until each has answered QMP", time.monotonic() - began, "s")
        report.line("an answer to query-status, median", statistics.median(answers), "ms")
        report.line("an answer to query-status, p99", p99(answers), "ms")
        report.line("one more, request to first port write", launcher.start_and_end(short), "ms")
        for verb, state in (("stop", "paused"), ("cont", "running")):
            _ask(folder / "0.qmp", verb, "")
            _ask(folder / "0.qmp", "query-status", state)
        began = time.monotonic()
        for number in range(MACHINES):
            _ask(folder / f"{number}.qmp", "quit", "")
        for machine in alive:
            if machine.await_end():
                raise BenchError("a machine did not end with status 0")
        report.line("all of them ended by quit", time.monotonic() - began, "s")
    except BaseException:
        for machine in alive:
            machine.close()
        raise
    deadline = time.monotonic() + _DEADLINE
    while (left := _left(launcher, folder, descriptors)) and time.monotonic() < deadline:
        time.sleep(0.1)
    report.line("left of them: processes, sockets and descriptors", left, "things")
    if left:
        raise BenchError(f"{left} things are left")


def _ask(path: Path, command: str, expected: str) -> float:
    """Connect, ask, check: ms. Raises: BenchError."""
    began = time.monotonic()
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(_DEADLINE)
        while True:
            try:
                client.connect(str(path))
                break
            except FileNotFoundError:  # it has a process, and not got that far
                if time.monotonic() - began > _DEADLINE:
                    raise BenchError(f"{path} does not appear") from None
                time.sleep(0.001)
        stream = client.makefile("rw")
        stream.readline()
        for name in ("qmp_capabilities", command):
            stream.write(json.dumps({"execute": name}) + "\n")
            stream.flush()
            answer = json.loads(stream.readline())
            while "event" in answer:
                answer = json.loads(stream.readline())
    if "error" in answer or (expected and answer["return"]["status"] != expected):
        raise BenchError(f"{command}: {answer}")
    return (time.monotonic() - began) * 1000


def _descriptors(launcher: Launcher) -> int:
    return len(os.listdir(f"/proc/{launcher.process.pid}/fd"))


def _left(launcher: Launcher, folder: Path, descriptors: int) -> int:
    pid = launcher.process.pid
    children = len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return abs(children - 1) + len(list(folder.glob("*.qmp"))) + abs(_descriptors(launcher) - descriptors)
