"""Back ends of devices on vhost-user: processes that tests start and kill."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from linux_guest import DEADLINE

Backend = subprocess.Popen[bytes]


@pytest.fixture
def backend(place: Path) -> Iterator[Callable[..., Backend]]:
    """Starts a back end and waits for its socket: `backend(socket, *command)`. What still runs after the test is killed."""
    running: list[tuple[Backend, Path]] = []  # their output is in `place`, which stays until they are killed

    def start(socket: Path, *command: str) -> Backend:
        socket.unlink(missing_ok=True)
        output = socket.with_suffix(f".{len(running)}.log")
        with open(output, "wb") as file:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        running.append((process, output))
        until = time.monotonic() + DEADLINE
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"{command[0]} does not listen: {output.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
        return process

    yield start
    for process, output in running:
        process.kill()
        process.wait()
        print(f"--- {output.name}", output.read_text(errors="replace")[-2000:])


@pytest.fixture
def place() -> Iterator[Path]:
    """Of the host, for a guest; a short way from the root, as sockets lie in it."""
    path = Path(f"/tmp/vhost-user-{os.getpid()}")
    path.mkdir()
    yield path
    shutil.rmtree(path)
