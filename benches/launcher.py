"""`launcher`: from the request to the guest's first port write through the launcher, beside a start of QEMU's microvm.

Runs alternate. QEMU's figure is that of `start`, the wall time of the process, and beside it the time until the guest's letter
has come out of its serial port, which is the same moment that is taken of ours. Between two runs there is a pause, in which the
launcher gets its next child ready; `rate` has the figures without.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

from benches import machines, tiny_guest
from benches.launchers import Launcher
from benches.processes import Command, Spawner
from benches.report import BenchError, Report

BAR = 0.07  # of QEMU's wall time
_PAUSE = 0.03
_CASES = (("128 MiB, 1 vCPU", "128M", 1), ("1 GiB, 1 vCPU", "1G", 1), ("128 MiB, 4 vCPUs", "128M", 4))


def run(count: int) -> None:
    report = Report("launcher")
    with tempfile.TemporaryDirectory(prefix="stratovirt-bench-") as name:
        folder = Path(name)
        guest = folder / "guest.elf"
        guest.write_bytes(tiny_guest.image())
        with Launcher(folder) as launcher, Spawner() as spawner:
            for case, memory, cpus in _CASES:
                _case(report, launcher, spawner, guest, case, memory, cpus, count)


def _case(report: Report, launcher: Launcher, spawner: Spawner, guest: Path, case: str, memory: str, cpus: int,
          count: int) -> None:
    words = machines.ours(guest, memory, cpus)[1:]
    end = ["-device", f"isa-debug-exit,iobase={tiny_guest.EXIT_PORT:#x}"]
    qemu = Command(machines.PEER, machines.qemu(guest, memory, cpus, *end), tiny_guest.QEMU_STATUS)
    letters = machines.qemu(guest, memory, cpus, *end, "-serial", "stdio", serial=True)
    warm = Command("stratovirt --warm", [machines.STRATOVIRT, "--warm", *words])
    ours, walls, firsts, commands = [], [], [], []
    os.environ["STRATOVIRT_LAUNCHER"] = os.fsdecode(launcher.path)
    with Spawner() as with_launcher:  # its environment is what it begins with
        for number in range(-2, count):
            time.sleep(_PAUSE)
            one = launcher.start_and_end(words)
            wall = spawner.run(qemu).wall
            first = _first_letter(letters)
            time.sleep(_PAUSE)
            whole = with_launcher.run(warm).wall
            if number >= 0:
                ours.append(one)
                walls.append(wall)
                firsts.append(first)
                commands.append(whole)
    del os.environ["STRATOVIRT_LAUNCHER"]
    report.spread(f"{case}, request to first port write", ours, "ms", f"{machines.PEER}, wall time", walls)
    report.spread(f"{case}, request to first port write", ours, "ms", f"{machines.PEER}, exec to first port write", firsts)
    report.spread(f"{case}, the command's wall time", commands, "ms", f"{machines.PEER}, wall time", walls)
    ratio = statistics.median(ours) / statistics.median(walls)
    report.say(f"{case}: {ratio:.3f} of QEMU's wall time (bar for the first case: {BAR})")


def _first_letter(words: list[str]) -> float:
    """Milliseconds from the start of QEMU until the letter is here."""
    read_end, write_end = os.pipe()
    actions = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0), (os.POSIX_SPAWN_DUP2, write_end, 1),
               (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_RDWR, 0)]
    began = time.monotonic_ns()
    pid = os.posix_spawnp(words[0], words, os.environ, file_actions=actions)
    os.close(write_end)
    letter = os.read(read_end, 1)
    at = time.monotonic_ns()
    os.waitpid(pid, 0)
    os.close(read_end)
    if letter != tiny_guest.LETTER:
        raise BenchError(f"{machines.PEER}: {letter!r} came out of the serial port")
    return (at - began) / 1e6
