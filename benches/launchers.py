"""A launcher for the benches, and machines of it that are asked for over its socket, without the `stratovirt` command."""

from __future__ import annotations

import _socket
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import stratovirt
from benches import launcher_probe
from benches.report import BenchError
from stratovirt.launcher import client, wire

DEADLINE = 60.0
_PROBE = Path(launcher_probe.__file__)
_SOURCE = Path(stratovirt.__file__).parent.parent


class WarmMachine:
    """A machine from its request on. Times are of CLOCK_MONOTONIC, in ns."""

    def __init__(self, launcher: Launcher, words: list[str], kind: bytes = b"run") -> None:
        self._launcher = launcher
        self.asked = time.monotonic_ns()
        self.connection = client.connect(launcher.path)
        client.request(self.connection, words, kind)
        self.pid = 0
        self._status = -1
        self._pidfd = -1

    def await_process(self) -> None:
        """Wait until there is a process."""
        self._launcher.forget(0)
        data, ancillary, _, _ = self.connection.recvmsg(wire.MAX_ANSWER, _socket.CMSG_SPACE(4))
        kind, _, text = data.partition(b" ")
        while kind in (b"status", b"clone", b"running"):
            if kind == b"status":
                self._status = int(text) << 8
            data, ancillary, _, _ = self.connection.recvmsg(wire.MAX_ANSWER, _socket.CMSG_SPACE(4))
            kind, _, text = data.partition(b" ")
        if kind != b"pid":
            raise BenchError(f"the launcher answers {data!r}")
        self.pid = int(text)
        self._pidfd = int.from_bytes(ancillary[0][2][:4], sys.byteorder)

    def await_end(self) -> int:
        """The exit status."""
        status = client.await_end(self.connection, self._status)
        self.close()
        return os.waitstatus_to_exitcode(status)

    def first_write(self) -> int:
        """When the guest first wrote to a port; 0 if it has not yet."""
        return self._launcher.times[self.pid % launcher_probe.SLOTS]

    def kill(self) -> None:
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        self.connection.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


class Launcher:
    """`stratovirt launcher` with the probe, in `folder`. A context manager."""

    def __init__(self, folder: Path) -> None:
        self.path = bytes(folder / "launcher.sock")
        self._file = folder / "times"
        self._file.write_bytes(bytes(launcher_probe.SLOTS * 8))

    def __enter__(self) -> Launcher:
        with open(self._file, "r+b") as file:
            self.times = memoryview(mmap.mmap(file.fileno(), launcher_probe.SLOTS * 8)).cast("Q")
        command = [sys.executable, "-I", "-S", str(_PROBE), str(_SOURCE), str(self._file), "--socket", os.fsdecode(self.path)]
        self._log = open(self._file.with_name("launcher.log"), "w+b")
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._log)
        deadline = time.monotonic() + DEADLINE
        while b"listening at" not in self._file.with_name("launcher.log").read_bytes():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"the launcher does not serve: {self._file.with_name('launcher.log').read_text()}")
            time.sleep(0.01)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.terminate()
        self.process.wait(DEADLINE)
        self._log.close()

    def forget(self, pid: int) -> None:
        """Clear a slot for the next machine with that process id; 0 is nobody's."""
        self.times[pid % launcher_probe.SLOTS] = 0

    def machine(self, words: list[str], kind: bytes = b"run") -> WarmMachine:
        """Ask for one and wait until it has a process."""
        made = WarmMachine(self, words, kind)
        made.await_process()
        return made

    def start_and_end(self, words: list[str], kind: bytes = b"run") -> float:
        """Run a machine to its end: ms from the request to its guest's first port write."""
        machine = self.machine(words, kind)
        status = machine.await_end()
        at = machine.first_write()
        self.forget(machine.pid)
        if status or not at:
            raise BenchError(f"the machine ended with status {status}, the guest's first write is at {at}")
        return (at - machine.asked) / 1e6
