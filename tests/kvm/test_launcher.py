"""Machines through the launcher: the command behaves as it does without, and nobody's end is anybody else's."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvm.conftest import DEADLINE, SOURCE, Program
from kvm.guests import Asm, hello
from kvm.test_program import busy, idle, is_alive, wait_for_end
from kvm.test_seccomp import connect, status_of

COMMAND = [sys.executable, "-IS", "-c",
           f"import sys; sys.path.insert(0, {str(SOURCE)!r}); from stratovirt.__main__ import main; sys.exit(main())"]


class Warm:
    """`stratovirt launcher` at a path of its own."""

    def __init__(self, path: Path, command: list[str] = COMMAND) -> None:
        self.path = path
        self.process = subprocess.Popen([*command, "launcher", "--socket", str(path)], stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self.pid = self.process.pid
        assert self.process.stderr is not None
        assert b"listening at" in self.process.stderr.readline()
        until(lambda: self.children() != [])

    @property
    def prefix(self) -> tuple[str, ...]:
        """Has a program use it."""
        return "env", f"STRATOVIRT_LAUNCHER={self.path}"

    def children(self) -> list[int]:
        """Machines, and the spare child, which there is from the first moment that this launcher serves."""
        return [int(word) for word in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def machines(self) -> list[int]:
        """Those that have vCPUs: the spare child has none."""
        return [pid for pid in self.children() if len(os.listdir(f"/proc/{pid}/task")) > 1]

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.communicate(timeout=DEADLINE)


@pytest.fixture
def warm(tmp_path: Path) -> Iterator[Warm]:
    launcher = Warm(tmp_path / "launcher.sock")
    yield launcher
    launcher.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def echo() -> bytes:
    """Sends back what it receives; a Q, and it resets the machine."""
    asm = Asm()
    again = asm.label()
    asm.raw(0x66, 0xBA, 0xFD, 0x03, 0xEC, 0xA8, 1)  # mov dx, 3FD; in al, dx; test al, 1
    asm.raw(0x74, (again_offset(asm, again)) & 0xFF)  # jz again
    asm.raw(0x66, 0xBA, 0xF8, 0x03, 0xEC, 0xEE)  # mov dx, 3F8; in al, dx; out dx, al
    asm.raw(0x3C, ord("Q"))  # cmp al, 'Q'
    asm.raw(0x75, (again_offset(asm, again)) & 0xFF)  # jne again
    return asm.raw(0xB0, 0xFE, 0xE6, 0x64).halt_forever().kernel()


def again_offset(asm: Asm, label: str) -> int:
    return asm._labels[label] - (asm.origin + len(asm.code) + 2)


@pytest.mark.parametrize("arguments", [
    (), ("-foo",), ("-initrd", "/nowhere"), ("-smp", "0"), ("-h",), ("-device", "help"), ("-serial", "pty,x"),
    ("-qmp", "unix:/nowhere/at/all,server,nowait"),
])
def test_the_command_does_the_same_with_a_launcher(launch, warm, arguments) -> None:
    alone = launch(hello(), *arguments).finish()
    through = launch(hello(), *arguments, prefix=warm.prefix).finish()
    assert through == alone
    assert through[0] in (0, 1)


def test_input_reaches_the_guest(kernel, warm) -> None:
    program = Program(["-machine", "microvm", "-m", "128", "-kernel", kernel(echo()), "-serial", "stdio"], warm.prefix,
                      stdin=subprocess.PIPE)
    assert program.process.stdin is not None
    program.process.stdin.write(b"hello")
    program.process.stdin.flush()
    assert program.wait_for("hello") == "hello"
    program.process.stdin.write(b"Q")
    program.process.stdin.flush()
    assert program.finish()[:2] == (0, "Q")


def test_a_terminal_is_raw_while_the_machine_runs_and_restored_after_it(kernel, warm) -> None:
    import termios

    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    words = ["-machine", "microvm", "-m", "128", "-kernel", kernel(echo()), "-serial", "stdio"]
    process = subprocess.Popen([*warm.prefix, *COMMAND, *words], stdin=slave, stdout=slave, stderr=slave)
    until(lambda: not termios.tcgetattr(slave)[3] & termios.ICANON)
    os.write(master, b"\x03Q")  # Ctrl-C is the guest's
    assert process.wait(DEADLINE) == 0
    assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("guest", [busy, idle])
def test_a_signal_ends_the_machine_cleanly(launch, warm, tmp_path: Path, number: int, guest) -> None:
    qmp, pid = tmp_path / "qmp", tmp_path / "pid"
    program = launch(guest(), "-qmp", f"unix:{qmp},server,nowait", "-pidfile", str(pid), prefix=warm.prefix)
    program.wait_for("running\n")
    assert [int(pid.read_text())] == warm.machines()
    program.process.send_signal(number)
    status, _, error = program.finish()
    assert status == 0
    assert f"received signal {int(number)}" in error
    assert not qmp.exists()
    assert not pid.exists()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGQUIT])
def test_a_signal_that_kills_the_machine_kills_the_command(launch, warm, number) -> None:
    program = launch(idle(), prefix=warm.prefix)
    program.wait_for("running\n")
    program.process.send_signal(number)
    assert program.finish()[0] == -number


def test_stopping_the_command_stops_the_machine(launch, warm) -> None:
    program = launch(busy(), prefix=warm.prefix)
    program.wait_for("running\n")
    (machine,) = warm.machines()

    def state(pid: int) -> str:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]

    program.process.send_signal(signal.SIGTSTP)
    until(lambda: state(machine) == "T" and state(program.process.pid) == "T")
    program.process.send_signal(signal.SIGCONT)
    until(lambda: state(machine) != "T" and state(program.process.pid) != "T")
    program.process.terminate()
    assert program.finish()[0] == 0


def test_kills(launch, warm) -> None:
    """A machine, a client and in the end the launcher are killed: the others go on."""
    programs: list[Program] = []
    machines: list[int] = []
    for _ in range(3):
        programs.append(launch(idle(), prefix=warm.prefix))
        programs[-1].wait_for("running\n")
        machines.append(next(pid for pid in warm.machines() if pid not in machines))
    one, other, third = programs
    os.kill(machines[0], signal.SIGKILL)
    assert one.finish()[0] == -signal.SIGKILL
    other.process.kill()
    until(lambda: warm.machines() == machines[2:])
    assert launch(hello(), prefix=warm.prefix).finish()[:2] == (0, "hello\n")

    warm.process.kill()
    warm.process.wait()
    time.sleep(0.1)
    assert is_alive(machines[2])
    third.process.terminate()
    assert third.finish()[0] == 0
    # a path that was insisted on, and a launcher that is "used if there"
    status, _, error = launch(hello(), prefix=warm.prefix).finish()
    assert (status, error) == (1, f"stratovirt: the launcher at {warm.path}: Connection refused\n")


def test_a_daemon_outlives_its_command(launch, warm, tmp_path: Path) -> None:
    pid, qmp = tmp_path / "pid", tmp_path / "qmp"
    program = launch(idle(), "-daemonize", "-pidfile", str(pid), "-qmp", f"unix:{qmp},server,nowait", serial="",
                     prefix=warm.prefix)
    assert program.finish() == (0, "", "")
    daemon = int(pid.read_text())
    assert warm.machines() == []
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(DEADLINE)
    client.connect(str(qmp))
    assert b"QMP" in client.recv(1000)
    client.close()
    os.kill(daemon, signal.SIGTERM)
    wait_for_end(daemon)


def test_a_descriptor_that_an_option_names_reaches_the_machine(kernel, warm) -> None:
    """It is no tap, and that can be said only of a descriptor that has arrived."""
    read_end, write_end = os.pipe()
    words = ["-machine", "microvm", "-m", "128", "-kernel", kernel(hello()), "-netdev", f"tap,id=n,fd={read_end}",
             "-device", "virtio-net-device,id=net,netdev=n"]
    results = []
    for prefix in ((), warm.prefix):
        done = subprocess.run([*prefix, *COMMAND, *words], pass_fds=[read_end], capture_output=True, text=True,
                              timeout=DEADLINE, check=False, stdin=subprocess.DEVNULL)
        results.append((done.returncode, done.stderr))
    assert results[0] == results[1]
    assert "Bad file descriptor" not in results[0][1]
    os.close(read_end)
    os.close(write_end)


def run_with(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], env={**os.environ, **environment}, capture_output=True, text=True,
                          timeout=DEADLINE, check=False, stdin=subprocess.DEVNULL)


def test_the_first_use_starts_a_launcher(kernel, tmp_path: Path) -> None:
    words = ("-machine", "microvm", "-m", "128", "-kernel", kernel(hello()), "-serial", "stdio")
    private = tmp_path / "run"
    private.mkdir(mode=0o700)
    environment = {"XDG_RUNTIME_DIR": str(private)}
    path = private / "stratovirt-launcher.sock"
    # "on" uses one that is there, and starts none
    done = run_with({**environment, "STRATOVIRT_LAUNCHER": "on"}, *words)
    assert (done.returncode, done.stdout, path.exists()) == (0, "hello\n", False)
    for _ in range(2):
        done = run_with(environment, "--warm", *words)
        assert (done.returncode, done.stdout, done.stderr) == (0, "hello\n", "")
    owner = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    owner.connect(str(path))
    pid = int.from_bytes(owner.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder)
    owner.close()
    try:
        until(lambda: len(os.listdir(f"/proc/{pid}/fd")) == 11)  # 3, lock, socket, epoll, eventfd, a pipe, the spare
        assert {os.readlink(f"/proc/{pid}/fd/{number}") for number in (0, 1, 2)} == {os.devnull}
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_for_end(pid)
    assert not path.exists()


@pytest.mark.parametrize(("environment", "words", "problem"), [
    ({"STRATOVIRT_LAUNCHER": "maybe"}, ("-h",), "STRATOVIRT_LAUNCHER 'maybe': neither a switch nor a path"),
    ({}, ("--warm", "doctor"), "--warm 'doctor': not an option of a machine"),
    ({"STRATOVIRT_LAUNCHER": "/nowhere"}, ("-h",), "the launcher at /nowhere: No such file or directory"),
])
def test_wishes_that_cannot_be_met(environment, words, problem) -> None:
    done = run_with(environment, *words)
    assert done.returncode == 1
    assert problem in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_launcher_can_be_switched_off(kernel) -> None:
    words = ("-machine", "microvm", "-m", "128", "-kernel", kernel(hello()), "-serial", "stdio")
    assert run_with({"STRATOVIRT_LAUNCHER": "off"}, *words).stdout == "hello\n"


def test_machines_at_once_and_in_a_row_leave_nothing(kernel, warm) -> None:
    before = warm.descriptors()
    words = ["-machine", "microvm", "-m", "128", "-kernel", kernel(hello()), "-serial", "stdio"]
    for _ in range(3):
        programs = [Program(words, warm.prefix) for _ in range(8)]
        for program in programs:
            assert program.finish()[:2] == (0, "hello\n")
    until(lambda: warm.machines() == [])
    until(lambda: warm.descriptors() == before)


def test_what_a_machine_costs(launch, warm, tmp_path: Path) -> None:
    """Of the launcher's pages nearly all stay shared; the bench `memory` has the figures."""
    qmp = tmp_path / "qmp"
    program = launch(idle(), "-qmp", f"unix:{qmp},server,nowait", prefix=warm.prefix)
    program.wait_for("running\n")
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(DEADLINE)
    client.connect(str(qmp))
    stream = client.makefile("rw")
    assert "QMP" in json.loads(stream.readline())
    (machine,) = warm.machines()
    rollup = Path(f"/proc/{machine}/smaps_rollup").read_text()
    private = sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_"))
    assert private < 6 << 10, rollup
    client.close()
    program.process.terminate()
    assert program.finish()[0] == 0


def shown(pid: int) -> tuple[str, list[bytes]]:
    """What `ps` has of it: the name, and the command line."""
    return Path(f"/proc/{pid}/comm").read_text().rstrip(), Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]


def test_filters_that_were_ready_before_it_was_known_whether_there_are_any(launch, warm, tmp_path: Path) -> None:
    for number, (words, filters, privileges) in enumerate((((), {2}, {1}), (("-disable-seccomp",), {0}, {0}), ((), {2}, {1}))):
        qmp = tmp_path / f"qmp{number}"
        program = launch(idle(), *words, "-qmp", f"unix:{qmp},server,nowait", prefix=warm.prefix)
        program.wait_for("running\n")
        client = connect(qmp)
        (machine,) = warm.machines()
        assert status_of(machine, "Seccomp") == filters
        assert status_of(machine, "NoNewPrivs") == privileges
        client.ask("quit")
        client.close()
        assert program.finish()[0] == 0
        until(lambda: warm.machines() == [])


def test_ps_shows_the_machines_own_command_line(launch, warm, tmp_path: Path) -> None:
    before = shown(warm.pid)
    environment = Path(f"/proc/{warm.pid}/environ").read_bytes()
    long = "x" * 200
    program = launch(idle(), "-name", long, "-append", "quiet \u00e9", prefix=warm.prefix)
    program.wait_for("running\n")
    (machine,) = warm.machines()
    until(lambda: shown(machine)[0] == "stratovirt")
    words = shown(machine)[1]
    assert words[0] == b"stratovirt"
    assert long.encode() in words
    assert "quiet \u00e9".encode() in words
    assert Path(f"/proc/{machine}/environ").read_bytes() == environment
    assert shown(warm.pid) == before
    program.process.terminate()
    assert program.finish()[0] == 0


def test_ps_shows_a_daemons_own_command_line(launch, warm, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    program = launch(idle(), "-daemonize", "-pidfile", str(pid), serial=f"file,path={tmp_path}/serial", prefix=warm.prefix)
    assert program.finish()[0] == 0
    machine = int(pid.read_text())
    try:
        assert b"-daemonize" in shown(machine)[1]
    finally:
        os.kill(machine, signal.SIGTERM)
        until(lambda: not pid.exists())
