"""What tests with tiny guests share: the program as a subprocess, a machine inside the test, and the reason to skip."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from _thread import stack_size
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stratovirt.cli.command import parse
from stratovirt.loop import EventLoop
from stratovirt.machine.kvm import KvmAccelerator, KvmAhead
from stratovirt.machine.microvm import MicroVm

SOURCE = Path(__file__).resolve().parents[2] / "src"
DEADLINE = 60.0

# Tests send these to programs that they start. A shell ignores them for what it starts in the background, and so would they.
for _number in (signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        return
    reason = "no right to open /dev/kvm" if os.path.exists("/dev/kvm") else "this machine has no /dev/kvm"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


class Program:
    """One run of `stratovirt` as a process of its own."""

    def __init__(self, arguments: list[str], prefix: tuple[str, ...] = (), stdin: int = subprocess.DEVNULL) -> None:
        code = f"import sys; sys.path.insert(0, {str(SOURCE)!r}); from stratovirt.__main__ import main; sys.exit(main())"
        self.process = subprocess.Popen([*prefix, sys.executable, "-IS", "-c", code, *arguments], stdin=stdin,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def finish(self) -> tuple[int, str, str]:
        """Wait for the end: (exit status, stdout, stderr)."""
        try:
            out, error = self.process.communicate(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, error = self.process.communicate()
            raise AssertionError(f"no end after {DEADLINE} s: {out!r} {error!r}") from None
        assert b"[seccomp]" not in error, error
        return self.process.returncode, out.decode(), error.decode()

    def wait_for(self, text: str) -> str:
        """Read stdout up to `text`."""
        assert self.process.stdout is not None
        seen = b""
        while not seen.endswith(text.encode()):
            byte = os.read(self.process.stdout.fileno(), 1)
            assert byte, f"the output ends with {seen!r}"
            seen += byte
        return seen.decode()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        _out, error = self.process.communicate()
        assert b"[seccomp]" not in error, error  # whatever else a test is about: no system call was refused


@pytest.fixture
def kernel(tmp_path: Path) -> Callable[[bytes], str]:
    def write(image: bytes, name: str = "kernel") -> str:
        path = tmp_path / name
        path.write_bytes(image)
        return str(path)

    return write


@pytest.fixture
def launch(kernel: Callable[[bytes], str]) -> Iterator[Callable[..., Program]]:
    """Start the program with a kernel image: `launch(image, *arguments)`."""
    made: list[Program] = []

    def start(image: bytes | None, *arguments: str, serial: str = "stdio", prefix: tuple[str, ...] = ()) -> Program:
        words = ["-m", "128", *([] if "-machine" in arguments else ["-machine", "microvm"])]
        if image is not None:
            words += ["-kernel", kernel(image)]
        if serial:
            words += ["-serial", serial]
        program = Program([*words, *arguments], prefix)
        made.append(program)
        return program

    yield start
    for program in made:
        program.close()


class Machine:
    """A MicroVm in this process, made from a command line; its events, and its main loop in the test's hand."""

    def __init__(self, arguments: list[str], ahead: KvmAhead | None = None) -> None:
        self.loop = EventLoop()
        self.vm = MicroVm(parse(arguments), self.loop, time.monotonic(), ahead)
        self.told: list[tuple[str, dict[str, object]]] = []
        self.vm.events.subscribe(lambda name, data, _seconds, _microseconds: self.told.append((name, data)))
        self.vm.build()
        self.memory = self.vm.memory

    def start(self) -> Machine:
        self.vm.start()
        return self

    def run(self) -> Machine:
        """Start it if need be, and serve the loop until the machine ends."""
        if self.vm.state == "created":
            self.vm.start()
        self.run_until(lambda: self.vm.state == "shutdown")
        return self

    def run_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < deadline, "the guest did not get there"
            self.loop.run_once(0.001)

    def word(self, address: int) -> int:
        return self.memory.load_u32(address)

    def close(self) -> None:
        self.vm.close()
        kvm = self.vm.accelerator
        assert isinstance(kvm, KvmAccelerator)
        for vcpu in kvm.vcpus:
            vcpu.close()
        kvm.vm.close()
        kvm.system.close()
        self.loop.close()


@pytest.fixture
def machine(kernel: Callable[[bytes], str]) -> Iterator[Callable[..., Machine]]:
    """Make a machine: `machine(image, *arguments)`. It is not started yet."""
    made: list[Machine] = []
    interval, stack, handler = sys.getswitchinterval(), stack_size(), signal.getsignal(34)

    def build(image: bytes, *arguments: str, ahead: KvmAhead | None = None) -> Machine:
        model = [] if "-machine" in arguments else ["-machine", "microvm"]
        built = Machine([*model, "-m", "128", "-kernel", kernel(image), *arguments], ahead)
        made.append(built)
        return built

    yield build
    for built in made:
        built.close()
    sys.setswitchinterval(interval)
    stack_size(stack)
    signal.signal(34, handler or signal.SIG_DFL)


