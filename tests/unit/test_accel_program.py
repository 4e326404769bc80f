"""The program with the test accelerator: its exit status, QMP beside the driving socket, and no /dev/kvm anywhere."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stratovirt.arch.x86_64 import layout

SOURCE = Path(__file__).resolve().parents[2] / "src"
DEADLINE = 60.0


class Program:
    """The program, the socket that drives it and a QMP client."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "mod-test.sock"))
            listener.listen(1)
            listener.settimeout(DEADLINE)
            self.process = subprocess.Popen(
                [sys.executable, "-m", "stratovirt", "-machine", "microvm,accel=test", "-mod-test",
                 str(folder / "mod-test.sock"), "-qmp", f"unix:{folder / 'qmp.sock'},server,nowait", *arguments],
                env={**os.environ, "PYTHONPATH": str(SOURCE)}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE)
            self.peer, _ = listener.accept()
        self.peer.settimeout(DEADLINE)
        self._replies = self.peer.makefile("rb")
        assert self.ask("clock_step") == "OK 0"  # it serves: it has started
        self.qmp_socket = socket.socket(socket.AF_UNIX)
        self.qmp_socket.settimeout(DEADLINE)
        self.qmp_socket.connect(str(folder / "qmp.sock"))
        self._qmp = self.qmp_socket.makefile("rb")
        self.events: list[str] = []
        assert "QMP" in json.loads(self._qmp.readline())
        assert self.qmp("qmp_capabilities") == {}

    def ask(self, command: str) -> str:
        self.peer.sendall(command.encode() + b"\n")
        return self._replies.readline().decode().removesuffix("\n")

    def qmp(self, command: str, **arguments: object) -> object:
        self.qmp_socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = json.loads(self._qmp.readline())
            if "event" not in answer:
                return answer["return"]
            self.events.append(answer["event"])

    def finish(self) -> tuple[int, str]:
        _, error = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, error.decode()

    def close(self) -> None:
        for one in (self._replies, self.peer, self._qmp, self.qmp_socket):
            one.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    made: list[Program] = []

    def start(*arguments: str) -> Program:
        made.append(Program(tmp_path, *arguments))
        return made[-1]

    yield start
    for program in made:
        program.close()


def test_hanging_up_ends_the_process_with_status_0(launch: Callable[..., Program]) -> None:
    program = launch()
    program.peer.shutdown(socket.SHUT_RDWR)
    status, error = program.finish()
    assert status == 0
    assert "Traceback" not in error


def test_qmp_works_beside_it(launch: Callable[..., Program], tmp_path: Path) -> None:
    program = launch("-serial", f"file,path={tmp_path / 'out'}", "-smp", "2")
    assert program.qmp("query-status") == {"running": True, "singlestep": False, "status": "running"}
    assert program.qmp("stop") == {}
    assert program.qmp("query-status") == {"running": False, "singlestep": False, "status": "paused"}
    assert program.ask("writel 1000 7") == "OK"
    assert program.qmp("cont") == {}
    assert program.ask("readl 1000") == "OK 0x0000000000000007"
    assert program.qmp("system_reset") == {}
    assert program.ask("readl 1000") == "OK 0x0000000000000000"
    assert program.qmp("query-cpus") == []
    for command in program.qmp("query-commands"):  # type: ignore[attr-defined]
        name = command["name"]
        if name.startswith("query-"):
            program.qmp_socket.sendall(json.dumps({"execute": name}).encode() + b"\n")
            answer = json.loads(program._qmp.readline())
            assert answer.keys() & {"return", "error"}, (name, answer)
    assert program.events == ["STOP", "RESUME", "RESET"]
    assert program.qmp("quit") == {}
    assert program.finish()[0] == 0


def test_the_rate_limit_of_qmp_is_in_the_time_of_the_host(launch: Callable[..., Program]) -> None:
    program = launch()

    def refused() -> bool:
        program.qmp_socket.sendall(b'{"execute":"query-status"}\n')
        return "error" in json.loads(program._qmp.readline())

    deadline = time.monotonic() + DEADLINE
    while not refused():
        assert time.monotonic() < deadline
    while refused():
        assert time.monotonic() < deadline
    assert program.ask("clock_step") == "OK 0"


def test_a_disk_is_plugged_in_while_it_is_driven(launch: Callable[..., Program], tmp_path: Path) -> None:
    program = launch()
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(512 * 40))
    base = layout.slot(0).base
    assert program.ask(f"readq {base + 0x100:x}") == f"OK 0x{0:016x}"
    program.qmp("blockdev-add", **{"node-name": "n", "file": {"filename": str(image), "driver": "file"}, "driver": "raw"})
    program.qmp("device_add", id="n", driver="virtio-blk-mmio", drive="n", addr="0x0")
    assert program.ask(f"readq {base + 0x100:x}") == f"OK 0x{40:016x}"


def test_a_signal_ends_it(launch: Callable[..., Program]) -> None:
    program = launch()
    program.process.send_signal(signal.SIGTERM)
    assert program.finish()[0] == 0


def test_errors_are_one_line(tmp_path: Path) -> None:
    for arguments, words in (
        (["-kernel", "/vmlinux", "-mod-test", "/s"], "MST can only use test accel!"),
        (["-accel", "test", "-mod-test", str(tmp_path / "missing")], "No such file or directory"),
        (["-accel", "test"], "-mod-test PATH"),
    ):
        done = subprocess.run([sys.executable, "-m", "stratovirt", *arguments], env={**os.environ, "PYTHONPATH": str(SOURCE)},
                              capture_output=True, text=True, timeout=DEADLINE, check=False)
        assert done.returncode == 1
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
