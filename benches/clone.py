"""`clone`: from the request for a clone of a template to the first port write of its guest, beside a start of QEMU's microvm.

The template is of a guest that waits for its generation ID to change; what it does then is what the guest of `start` does. The
same snapshot is restored by `-incoming` as well, in the launcher and without. Runs alternate, with a pause in which the
launcher gets its next child ready; *ten at once* has none: from the first request to the last guest's first write.
"""

from __future__ import annotations

import os
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
_NAME = "bench"
_DEADLINE = 30.0


def run(count: int) -> None:
    report = Report("clone")
    with tempfile.TemporaryDirectory(prefix="stratovirt-bench-") as name:
        folder = Path(name)
        guest, plain = folder / "clone.elf", folder / "guest.elf"
        guest.write_bytes(tiny_guest.cloned())
        plain.write_bytes(tiny_guest.image())
        words = machines.ours(guest, "128M", 1)
        alone = Command("stratovirt -incoming", [*words, "-incoming", f"file:{folder / 'template'}"])
        qemu = Command(machines.PEER, machines.qemu(plain, "128M", 1, "-device",
                                                    f"isa-debug-exit,iobase={tiny_guest.EXIT_PORT:#x}"), tiny_guest.QEMU_STATUS)
        clones, warm, whole, walls, several = [], [], [], [], []
        with Launcher(folder) as launcher, Spawner() as spawner:
            report.line("128 MiB, to make the template", make_template(words, folder, launcher), "ms")
            for number in range(-2, count):
                time.sleep(_PAUSE)
                one = launcher.start_and_end([_NAME], b"clone")
                theirs, own = spawner.run(qemu).wall, spawner.run(alone).wall
                time.sleep(_PAUSE)
                restored = launcher.start_and_end(alone.words[1:])
                if number >= 0:
                    clones.append(one)
                    walls.append(theirs)
                    whole.append(own)
                    warm.append(restored)
            for _ in range(max(1, count // 20)):
                time.sleep(_PAUSE)
                several.append(at_once(launcher, 10))
    report.spread("128 MiB, clone, request to first port write", clones, "ms", f"{machines.PEER}, wall time", walls)
    report.spread("128 MiB, ten clones at once", several, "ms")
    report.spread("128 MiB, launcher -incoming, request to first port write", warm, "ms", f"{machines.PEER}, wall time", walls)
    report.spread("128 MiB, standalone, wall time", whole, "ms", f"{machines.PEER}, wall time", walls)
    report.say(f"{statistics.median(clones) / statistics.median(walls):.3f} of QEMU's wall time (bar: {BAR})")


def at_once(launcher: Launcher, count: int) -> float:
    """Ask for so many without a pause: ms from the first request to the last guest's first port write."""
    running = [launcher.machine([_NAME], b"clone") for _ in range(count)]
    last = 0
    for machine in running:
        if machine.await_end() or not machine.first_write():
            raise BenchError("a clone did not get to its end")
        last = max(last, machine.first_write())
        launcher.forget(machine.pid)
    return (last - running[0].asked) / 1e6


def make_template(words: list[str], folder: Path, launcher: Launcher) -> float:
    """Have the launcher hold one, with its files in `folder`; how many ms `stratovirt template create` took."""
    path = folder / "qmp"
    process = subprocess.Popen([*words, "-qmp", f"unix:{path},server,nowait"], stdin=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + _DEADLINE
        while not path.exists():
            if time.monotonic() > until or process.poll() is not None:
                raise BenchError("the machine to be saved does not serve QMP")
            time.sleep(0.01)
        time.sleep(0.2)  # the guest comes to its loop
        began = time.monotonic_ns()
        subprocess.run([machines.STRATOVIRT, "template", "create", _NAME, "--qmp", str(path), "--directory",
                        str(folder / "template"), "--socket", os.fsdecode(launcher.path)], check=True, timeout=_DEADLINE)
        return (time.monotonic_ns() - began) / 1e6
    finally:
        process.kill()
        process.wait()
