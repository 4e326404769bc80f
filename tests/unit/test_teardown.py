"""What is handed to the kernel at the end of a process is closed: not before that end, and not never."""

from __future__ import annotations

import os
import select
import subprocess
import sys

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
