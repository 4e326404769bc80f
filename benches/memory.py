"""`memory`: what a machine costs beyond its guest's RAM, with many alive: private, proportional and resident memory.

Guest RAM is the mapping of its size; everything else of the process counts. Of proportional memory each process has its share
of what it shares, the launcher's pages above all, so the launcher itself is in the sum of its children's by that much.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benches import machines, ring_guest, tiny_guest
from benches.launchers import Launcher
from benches.report import BenchError, Report
from stratovirt.cli.command import parse
from stratovirt.machine.slots import assign_slots

MACHINES = 100
PRIVATE_BAR, PROPORTIONAL_BAR = 2.0, 2.5  # MiB
_RAM = 128 << 10  # KiB
_DEADLINE = 60.0
AT_WORK_BAR = 4.0  # MiB, private, at any moment
_AT_WORK, _BATCH, _ROUNDS = 4, 8, 3000
_SAMPLE_SECONDS = 0.01
_TUNSETIFF, _SIOCSIFFLAGS = 0x4004_54CA, 0x8914
_TAP_WITH_HEADERS, _IFF_UP = 0x5002, 1  # IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")


class Usage:
    """Memory of one process beyond guest RAM, in MiB."""

    def __init__(self, pid: int) -> None:
        self.private = self.proportional = self.resident = 0.0
        left_out = False
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            head = _HEAD.match(line)
            if head:
                size = (int(head[2], 16) - int(head[1], 16)) >> 10
                left_out = _RAM <= size < _RAM + 4096 or line.endswith("/times")  # guest RAM, and the bench's own
            elif not left_out:
                name, _, value = line.partition(":")
                if name in ("Private_Clean", "Private_Dirty"):
                    self.private += int(value.split()[0]) / 1024
                elif name == "Pss":
                    self.proportional += int(value.split()[0]) / 1024
                elif name == "Rss":
                    self.resident += int(value.split()[0]) / 1024


def run(count: int) -> None:
    report = Report("memory")
    _at_work(report)
    with tempfile.TemporaryDirectory(prefix="stratovirt-bench-") as name:
        folder = Path(name)
        guest = folder / "guest.elf"
        guest.write_bytes(tiny_guest.idle())
        peer = _spawned(lambda number: machines.qemu(guest, "128M", 1))
        report.say(f"{MACHINES} of QEMU: measured")

        def qmp(number: int) -> list[str]:
            return ["-qmp", f"unix:{folder}/{number}.qmp,server,nowait"]

        for case, usages in (
            ("standalone", _spawned(lambda number: machines.ours(guest, "128M", 1))),
            ("launcher", _launched(folder, guest, lambda number: [])),
            ("launcher, with QMP", _launched(folder, guest, qmp)),
        ):
            for what in ("private", "proportional", "resident"):
                values = [getattr(usage, what) for usage in usages]
                theirs = [getattr(usage, what) for usage in peer]
                report.spread(f"{case}, {what}", values, "MiB", machines.PEER, theirs)
            private = statistics.median(usage.private for usage in usages)
            proportional = statistics.median(usage.proportional for usage in usages)
            report.say(f"{case}: {private:.2f} MiB private, {proportional:.2f} MiB proportional"
                       + (f" (bars: {PRIVATE_BAR} and {PROPORTIONAL_BAR})" if case == "launcher" else ""))


def _spawned(words: Callable[[int], list[str]]) -> list[Usage]:
    """The usage of so many processes, all alive."""
    null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    pids: list[int] = []
    try:
        for number in range(MACHINES):
            line = words(number)
            pids.append(os.posix_spawnp(line[0], line, os.environ, file_actions=null))
        _until_quiet(pids)
        return [Usage(pid) for pid in pids]
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)


def _launched(folder: Path, guest: Path, more: Callable[[int], list[str]]) -> list[Usage]:
    with Launcher(folder) as launcher:
        alive = [launcher.machine([*machines.ours(guest, "128M", 1)[1:], *more(number)]) for number in range(MACHINES)]
        try:
            _until_quiet([machine.pid for machine in alive])
            return [Usage(machine.pid) for machine in alive]
        finally:
            for machine in alive:
                machine.kill()
                machine.close()


def _at_work(report: Report) -> None:
    """The highest of many looks at machines that read disks and send frames."""
    taps = _open_taps()
    with tempfile.TemporaryDirectory(prefix="stratovirt-bench-") as name:
        folder = Path(name)
        (folder / "image").write_bytes(os.urandom(1 << 20))
        guest = folder / "guest.elf"
        words = [*machines.ours(guest, "128M", 1)[1:], "-drive", f"id=d,file={folder}/image,readonly=on,direct=off", "-device",
                 "virtio-blk-device,id=b,drive=d"]
        network = ["-netdev", "tap,id=n,fd={}", "-device", "virtio-net-device,id=i,netdev=n"] if taps else []
        windows = [slot.base for slot in assign_slots(parse([*words, *(word.format(taps[0]) for word in network)]).devices)]
        guest.write_bytes(ring_guest.with_network(windows[0], windows[1], _BATCH, 4096, _ROUNDS) if taps else
                          ring_guest.image(windows[0], _BATCH, 4096, _ROUNDS, True))
        highest, samples = [], 0
        with Launcher(folder) as launcher:
            alive = []
            for number in range(_AT_WORK):
                alive.append(launcher.machine([*words, *(word.format(taps[number]) for word in network)]))
                highest.append(0.0)
            ended = [False] * _AT_WORK
            deadline = time.monotonic() + _DEADLINE
            while not all(ended):
                for number, machine in enumerate(alive):
                    if ended[number]:
                        continue
                    try:
                        highest[number] = max(highest[number], Usage(machine.pid).private)
                        samples += 1
                    except (ProcessLookupError, FileNotFoundError):
                        ended[number] = True
                if time.monotonic() > deadline:
                    raise BenchError("the guests do not come to their end")
                time.sleep(_SAMPLE_SECONDS)
            for machine in alive:
                if machine.await_end():
                    raise BenchError("a guest did not come to its end")
    for tap in taps:
        os.close(tap)
    what = "disk and network" if taps else "disk (no right to make a tap)"
    report.line(f"launcher, {what} at work, private, highest of {samples} looks", max(highest), "MiB")
    report.say(f"launcher, {what} at work: never above {max(highest):.2f} MiB private (bar: {AT_WORK_BAR})")


def _open_taps() -> list[int]:
    """One for each machine, up; none where this user may not make them."""
    made: list[int] = []
    try:
        with socket.socket() as control:
            for number in range(_AT_WORK):
                made.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
                name = f"svbench{number}".encode()
                fcntl.ioctl(made[-1], _TUNSETIFF, struct.pack("<16sH22x", name, _TAP_WITH_HEADERS))
                fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("<16sH22x", name, _IFF_UP))
    except OSError:
        for tap in made:
            os.close(tap)
        return []
    return made


def _until_quiet(pids: list[int]) -> None:
    """Wait until all have vCPUs and hardly any processor time is used any more. Raises: BenchError."""
    deadline = time.monotonic() + _DEADLINE
    before = 0
    while time.monotonic() < deadline:
        time.sleep(0.5)
        used = sum(_processor_time(pid) for pid in pids)
        if used - before <= len(pids) // 4 and all(len(os.listdir(f"/proc/{pid}/task")) > 1 for pid in pids):
            return
        before = used
    raise BenchError("the machines do not come to rest")


def _processor_time(pid: int) -> int:
    """Clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return int(fields[11]) + int(fields[12])
