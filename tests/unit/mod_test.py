"""The other side of the test accelerator: a machine in this process, and a client that drives it over its
socket and serves the machine's loop whenever it waits."""

from __future__ import annotations

import os
import shlex
import socket
import time
from collections.abc import Callable
from pathlib import Path

from stratovirt.cli.command import parse
from stratovirt.loop import EventLoop
from stratovirt.machine.microvm import MicroVm

DEADLINE = 30.0


class MachineUnderTest:
    """`arguments` beyond `-accel test -mod-test`; built and started. Its events are in `told`."""

    def __init__(self, folder: Path, arguments: str = "") -> None:
        path = str(folder / "mod-test.sock")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(path)
            listener.listen(1)
            self.loop = EventLoop()
            config = parse(["-accel", "test", "-mod-test", path, *shlex.split(arguments)])
            self.vm = MicroVm(config, self.loop, time.monotonic())
            self.told: list[tuple[str, dict[str, object]]] = []
            self.vm.events.subscribe(lambda name, data, _seconds, _microseconds: self.told.append((name, data)))
            self.vm.build()
            self.peer, _ = listener.accept()
        self.peer.setblocking(False)
        self.received = b""
        self.vm.start()

    def close(self) -> None:
        self.peer.close()
        self.vm.close()
        for iothread in self.vm.iothreads.values():
            iothread.loop.close()
        for occupied in self.vm.slots:
            for fd in occupied.transport.notify_fds:
                os.close(fd)
        for line in self.vm.vm.lines._lines.values():  # type: ignore[attr-defined]
            os.close(line.fd)
        self.loop.close()

    def until(self, condition: Callable[[], bool], what: str = "it did not come") -> None:
        """Serve the loop until `condition` holds."""
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < deadline, what
            self.loop.run_once(0.001)

    # -- the protocol

    def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self.peer.send(view) :]
            except BlockingIOError:
                self._receive()
                self.loop.run_once(0.001)

    def _receive(self) -> bool:
        """Take what there is; True when there was something. Fails when the machine has hung up."""
        try:
            data = self.peer.recv(1 << 20)
        except BlockingIOError:
            return False
        assert data, "the machine has hung up"
        self.received += data
        return True

    def reply(self) -> str:
        while b"\n" not in self.received:
            self.until(self._receive, "no reply")
        line, _, self.received = self.received.partition(b"\n")
        return line.decode()

    def ask(self, command: str) -> str:
        self.send(command.encode() + b"\n")
        return self.reply()

    def do(self, command: str) -> str:
        """What stands behind OK."""
        answer = self.ask(command)
        assert answer == "OK" or answer.startswith("OK "), f"{command}: {answer}"
        return answer[3:]

    # -- memory, registers, time

    def load(self, address: int, size: int = 4) -> int:
        text = self.do(f"read{' bw l   q'[size]} {address:#x}")
        assert len(text) == 18
        return int(text, 16)

    def store(self, address: int, value: int, size: int = 4) -> None:
        self.do(f"write{' bw l   q'[size]} {address:x} {value:x}")

    def read(self, address: int, length: int) -> bytes:
        return bytes.fromhex(self.do(f"read {address:x} {length:x}")[2:])

    def write(self, address: int, data: bytes) -> None:
        self.do(f"write {address:x} {len(data):x} 0x{data.hex()}")

    def port_in(self, port: int, size: int = 1) -> int:
        return int(self.do(f"in{' bw l'[size]} {port:x}"), 16)

    def port_out(self, port: int, value: int, size: int = 1) -> None:
        self.do(f"out{' bw l'[size]} {port:x} {value:x}")

    def step(self, nanoseconds: int | None = None) -> int:
        return int(self.do("clock_step" if nanoseconds is None else f"clock_step {nanoseconds}"))

    def is_raised(self, irq: int) -> bool:
        return self.do(f"query_intx {irq}") == "TRUE"
