"""A launcher in a process of its own, its clients, and what there is of it. No KVM needed."""

from __future__ import annotations

import _socket
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from stratovirt.launcher import client, wire

DEADLINE = 20.0
PROGRAM = Path(__file__).with_name("launcher_program.py")
SOURCE = Path(__file__).resolve().parents[2] / "src"


class LauncherProcess:
    """A launcher that listens at `path`; `constants` are NAME=NUMBER for its module."""

    def __init__(self, path: Path, *constants: str, idle: float = 0.0) -> None:
        self.path = bytes(path)
        command = [sys.executable, "-IS", str(PROGRAM), str(SOURCE), str(path), str(idle), *constants]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self.pid = self.process.pid
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"serving\n"
        self.process.stdout.close()

    def connect(self) -> _socket.socket:
        connection = client.connect(self.path)
        connection.settimeout(DEADLINE)
        return connection

    def exchange(self, message: bytes, fds: list[int]) -> bytes:
        """Send a request as it is: the first answer."""
        connection = self.connect()
        rights = struct.pack(f"{len(fds)}i", *fds)
        connection.sendmsg([message], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)] if fds else [])
        answer = connection.recv(wire.MAX_ANSWER)
        connection.close()
        return answer

    def close(self) -> int:
        """End it: its exit status."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(DEADLINE)

    # -- what there is of it

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def machines(self) -> int:
        """One child is the spare."""
        return len(Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()) - 1

    def resident_kib(self) -> int:
        """Memory of its own, shared with its spare child or not; counted page by page, which RssAnon is not."""
        rollup = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        return int(rollup.partition("\nAnonymous:")[2].split()[0])


class Client:
    """One machine as seen from its client; its stdin and stdout are pipes."""

    def __init__(self, launcher: LauncherProcess, *words: str) -> None:
        self.connection = launcher.connect()
        read_end, self.input = os.pipe()
        self.output, write_end = os.pipe()
        kept = os.dup(0), os.dup(1)
        os.dup2(read_end, 0)
        os.dup2(write_end, 1)
        try:
            client.request(self.connection, list(words))
        finally:
            for number, fd in enumerate(kept):
                os.dup2(fd, number)
            for fd in (*kept, read_end, write_end):
                os.close(fd)
        self.pidfd, self.announced = client.await_machine(self.connection)
        self.connection.settimeout(DEADLINE)

    def read(self, size: int = 1 << 16) -> bytes:
        assert select.select([self.output], [], [], DEADLINE)[0], "no output came"
        return os.read(self.output, size)

    def end(self) -> int:
        """The wait status."""
        status = client.await_end(self.connection, self.announced)
        self.close()
        return status

    def close(self) -> None:
        self.connection.close()
        for fd in (self.input, self.output, self.pidfd):
            os.close(fd)


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)
