"""`rate`: machines a second, from requests in flight all the time until each guest has run and its process has ended.

The clients are this process, so what they cost is in it. QEMU and a start without launcher beside it, as many in flight.
"""

from __future__ import annotations

import os
import select
import tempfile
import time
from pathlib import Path

from benches import machines, tiny_guest
from benches.launchers import Launcher, WarmMachine
from benches.report import BenchError, Report

BAR = 250.0  # a second
MACHINES = 400
_IN_FLIGHT = 12
_ROUNDS = 3


def run(count: int) -> None:
    report = Report("rate")
    with tempfile.TemporaryDirectory(prefix="stratovirt-bench-") as name:
        folder = Path(name)
        guest = folder / "guest.elf"
        guest.write_bytes(tiny_guest.image())
        ours = machines.ours(guest, "128M", 1)
        qemu = machines.qemu(guest, "128M", 1, "-device", f"isa-debug-exit,iobase={tiny_guest.EXIT_PORT:#x}")
        warm, alone, theirs = [], [], []
        with Launcher(folder) as launcher:
            _launched(launcher, ours[1:], 20)
            for _ in range(_ROUNDS):
                warm.append(_launched(launcher, ours[1:], MACHINES))
                alone.append(_spawned(ours, 0, MACHINES // 8))
                theirs.append(_spawned(qemu, tiny_guest.QEMU_STATUS, MACHINES // 16))
        report.spread(f"launcher, {MACHINES} machines", warm, "1/s", machines.PEER, theirs)
        report.spread("standalone", alone, "1/s", machines.PEER, theirs)
        report.say(f"{max(warm):.0f} machines a second at best, on {os.cpu_count()} cores (bar: {BAR:.0f})")


def _launched(launcher: Launcher, words: list[str], count: int) -> float:
    """Machines a second. Raises: BenchError when one did not run its guest."""
    poller = select.poll()
    alive: dict[int, WarmMachine] = {}
    begun = done = 0
    start = time.monotonic()
    while done < count:
        while begun < count and len(alive) < _IN_FLIGHT:
            machine = WarmMachine(launcher, words)
            alive[machine.connection.fileno()] = machine
            poller.register(machine.connection.fileno(), select.POLLIN)
            begun += 1
        for fd, _events in poller.poll(10_000):
            machine = alive[fd]
            if not machine.pid:
                machine.await_process()
                continue
            poller.unregister(fd)
            del alive[fd]
            if machine.await_end() or not machine.first_write():
                raise BenchError("a machine did not run its guest")
            launcher.forget(machine.pid)
            done += 1
    return count / (time.monotonic() - start)


def _spawned(words: list[str], status: int, count: int) -> float:
    null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    begun = done = 0
    start = time.monotonic()
    while done < count:
        while begun < count and begun - done < _IN_FLIGHT:
            os.posix_spawnp(words[0], words, os.environ, file_actions=null)
            begun += 1
        _, ended = os.waitpid(-1, 0)
        if os.waitstatus_to_exitcode(ended) != status:
            raise BenchError(f"{words[0]} ended with {os.waitstatus_to_exitcode(ended)}")
        done += 1
    return count / (time.monotonic() - start)
