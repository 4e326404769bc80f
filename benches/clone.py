"""`clone`: from the request for a machine that is restored from a snapshot to the first port write of its guest, through the
launcher and without, beside a start of QEMU's microvm.

The snapshot is of a guest that waits for its generation ID to change; what it does then is what the guest of `start` does.
Runs alternate.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from benches import machines, tiny_guest
from benches.launchers import Launcher
from benches.processes import Command, Spawner
from benches.report import BenchError, Report

BAR = 0.05  # of QEMU's wall time
_PAUSE = 0.03
_DEADLINE = 30.0


def run(count: int) -> None:
    report = Report("clone")
    with tempfile.TemporaryDirectory(prefix="stratovirt-bench-") as name:
        folder = Path(name)
        guest, plain = folder / "clone.elf", folder / "guest.elf"
        guest.write_bytes(tiny_guest.cloned())
        plain.write_bytes(tiny_guest.image())
        words = machines.ours(guest, "128M", 1)
        report.line("128 MiB, to save it", take(words, folder), "ms")
        words += ["-incoming", f"file:{folder / 'template'}"]
        alone = Command("stratovirt -incoming", words)
        qemu = Command(machines.PEER, machines.qemu(plain, "128M", 1, "-device",
                                                    f"isa-debug-exit,iobase={tiny_guest.EXIT_PORT:#x}"), tiny_guest.QEMU_STATUS)
        warm, whole, walls = [], [], []
        with Launcher(folder) as launcher, Spawner() as spawner:
            for number in range(-2, count):
                time.sleep(_PAUSE)
                one = launcher.start_and_end(words[1:])
                theirs, own = spawner.run(qemu).wall, spawner.run(alone).wall
                if number >= 0:
                    warm.append(one)
                    walls.append(theirs)
                    whole.append(own)
    report.spread("128 MiB, launcher, request to first port write", warm, "ms", f"{machines.PEER}, wall time", walls)
    report.spread("128 MiB, standalone, wall time", whole, "ms", f"{machines.PEER}, wall time", walls)
    report.say(f"{statistics.median(warm) / statistics.median(walls):.3f} of QEMU's wall time (bar: {BAR})")


def take(words: list[str], folder: Path) -> float:
    """Make the snapshot `template` in `folder`; how many ms the request took."""
    path = folder / "qmp"
    process = subprocess.Popen([*words, "-qmp", f"unix:{path},server,nowait"], stdin=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + _DEADLINE
        while not path.exists():
            if time.monotonic() > until or process.poll() is not None:
                raise BenchError("the machine to be saved does not serve QMP")
            time.sleep(0.01)
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(_DEADLINE)
            client.connect(os.fsdecode(path))
            answers = client.makefile("rb")
            answers.readline()
            time.sleep(0.2)  # the guest comes to its loop
            began = time.monotonic_ns()
            client.sendall(json.dumps({"execute": "migrate", "arguments": {"uri": f"file:{folder / 'template'}"}}).encode())
            answer = answers.readline()
            while b'"event"' in answer:
                answer = answers.readline()
            if b'"return"' not in answer:
                raise BenchError(f"no snapshot: {answer!r}")
            return (time.monotonic_ns() - began) / 1e6
    finally:
        process.kill()
        process.wait()
