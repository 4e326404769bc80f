"""Whole processes as measured by `spawner.py`, and several commands measured in turns."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from benches.report import BenchError

_SPAWNER = Path(__file__).with_name("spawner.py")


class Run:
    """One process from start to end. Units: milliseconds, MiB."""

    def __init__(self, status: int, wall: float, cpu: float, peak: float) -> None:
        self.status = status
        self.wall = wall
        self.cpu = cpu
        self.peak = peak


class Command:
    """A command line and the exit status that says that it did what it is measured for."""

    def __init__(self, name: str, words: Sequence[str], status: int = 0) -> None:
        self.name = name
        self.words = list(words)
        self.status = status


class Spawner:
    """The measuring process. A context manager."""

    def __enter__(self) -> Spawner:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_SPAWNER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.communicate()

    def run(self, command: Command) -> Run:
        """Raises: BenchError when the command ends with another status than it should."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\0".join(command.words) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().split()
        if len(answer) != 4:
            raise BenchError(f"{command.name}: the measuring process ended")
        status = os.waitstatus_to_exitcode(int(answer[0]))
        if status != command.status:
            again = subprocess.run(command.words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
            said = (again.stdout + again.stderr).strip()
            raise BenchError(f"{command.name} ended with status {status}, not {command.status}: {said}")
        return Run(status, int(answer[1]) / 1e6, int(answer[2]) / 1e3, int(answer[3]) / 1024)


def in_turns(spawner: Spawner, commands: Sequence[Command], count: int, warm_up: int = 2) -> list[list[Run]]:
    """`count` runs of each, A B A B …, so that what else the machine does meets all of them alike."""
    runs: list[list[Run]] = [[] for _ in commands]
    for number in range(-warm_up, count):
        for command, own in zip(commands, runs, strict=True):
            run = spawner.run(command)
            if number >= 0:
                own.append(run)
    return runs
