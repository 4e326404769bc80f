"""What is handed to the kernel at the end of a process is closed: not before that end, and not never."""

from __future__ import annotations

import _socket
import os
import select
import subprocess
import sys

from stratovirt.hypervisor.kvm.teardown import let_go

_CHILD = """
import os, sys
from stratovirt.hypervisor.kvm.teardown import close_behind
fd = int(sys.argv[1])
close_behind(fd)
os.close(fd)
print("handed over", flush=True)
sys.stdin.read()
os._exit(0)
"""


def test_the_last_reference_goes_with_the_process() -> None:
    read_end, write_end = os.pipe()
    command = [sys.executable, "-c", _CHILD, str(write_end)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[write_end], env=environment)
    os.close(write_end)
    try:
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.readline() == b"handed over\n"
        assert select.select([read_end], [], [], 0) == ([], [], []), "closed although the process lives"
        child.stdin.close()
        assert child.wait(timeout=60) == 0
        assert select.select([read_end], [], [], 60) == ([read_end], [], []), "never closed"
        assert os.read(read_end, 1) == b""
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
        os.close(read_end)


def test_what_is_let_go_is_closed_while_the_process_goes_on() -> None:
    read_end, write_end = os.pipe()
    before = len(os.listdir("/proc/self/fd"))
    let_go(write_end)
    try:
        assert len(os.listdir("/proc/self/fd")) == before - 1
        assert select.select([read_end], [], [], 60) == ([read_end], [], []), "never closed"
        assert os.read(read_end, 1) == b""
    finally:
        os.close(read_end)


def test_without_a_socket_to_spare_it_is_closed_all_the_same(monkeypatch) -> None:
    def none_left(*_arguments: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(_socket, "socketpair", none_left)
    read_end, write_end = os.pipe()
    let_go(write_end)
    assert os.read(read_end, 1) == b""
    os.close(read_end)
