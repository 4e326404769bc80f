"""`disk`: what a monitor needs for a request of a disk, on this machine's own KVM; ours and QEMU's microvm, one guest.

The guest (`ring_guest.py`) reads from an image that is in the page cache, so what is measured is the way of a request: the
notification, the rings, the read, the interrupt. Where KVM emulates every instruction, the guest's part is the same for both.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from benches import machines, ring_guest, tiny_guest
from benches.report import BenchError, Report

_OURS_WINDOW = 0xF010_0000
# QEMU's microvm has 24 transports and gives the first device the last.
_QEMU_WINDOW = 0xFEB0_0000 + 23 * 0x200
_SECONDS = 60.0
_WAITING = 0.02
# name, bytes, requests of a batch, batches, apart on the disk
_CASES = (("4 KiB, depth 1", 4096, 1, 20000, True), ("4 KiB apart, depth 32", 4096, 32, 2000, True),
          ("4 KiB in turn, depth 32", 4096, 32, 2000, False), ("128 KiB in turn, depth 8", 128 << 10, 8, 1000, False))
# name, our keys, QEMU's
_ENGINES = (("each one's default engine", "direct=off", "cache=writeback"),
            ("io_uring", "direct=off,aio=io_uring", "cache=writeback,aio=io_uring"))


def run(count: int) -> None:
    report = Report("disk")
    runs = max(3, count // 4)
    with tempfile.TemporaryDirectory(prefix="stratovirt-bench-") as name:
        folder = Path(name)
        image = folder / "image"
        image.write_bytes(os.urandom(1 << 20))
        for case, size, batch, rounds, apart in _CASES:
            ours, theirs = folder / "ours.elf", folder / "theirs.elf"
            ours.write_bytes(ring_guest.image(_OURS_WINDOW, batch, size, rounds, apart))
            theirs.write_bytes(ring_guest.image(_QEMU_WINDOW, batch, size, rounds, apart))
            for engine, our_keys, qemu_keys in _ENGINES:
                for place in ("main loop", "iothread"):
                    commands = (_ours(ours, image, our_keys, place), _qemu(theirs, image, qemu_keys, place))
                    found: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
                    for _ in range(runs):  # in turns, so that what else the machine does meets both
                        for command, results in zip(commands, found, strict=True):
                            results.append(_timed(command))
                    requests = batch * rounds
                    mine, others = (requests / statistics.median(seconds for seconds, _ in results) for results in found)
                    work, their_work = (1e6 * statistics.median(seconds for _, seconds in results) / requests
                                        for results in found)
                    label = f"{case}, {engine}, {place}"
                    report.line(f"{label}, requests", mine, "a second", machines.PEER, others)
                    mibs, peer_mibs = mine * size / (1 << 20), others * size / (1 << 20)
                    report.line(f"{label}, throughput", mibs, "MiB/s", machines.PEER, peer_mibs)
                    report.line(f"{label}, work for a request", work, "us", machines.PEER, their_work)
                    report.say(f"{label}: {mine / others:.3f} of QEMU's requests a second")


def _ours(kernel: Path, image: Path, keys: str, place: str) -> list[str]:
    thread = ",iothread=io0" if place == "iothread" else ""
    return machines.ours(kernel, "128M", 1, "-serial", "stdio", "-object", "iothread,id=io0", "-drive",
                         f"id=d,file={image},readonly=on,{keys}", "-device", f"virtio-blk-device,id=b,drive=d{thread}")


def _qemu(kernel: Path, image: Path, keys: str, place: str) -> list[str]:
    thread = ",iothread=io0" if place == "iothread" else ""
    return machines.qemu(kernel, "128M", 1, "-serial", "stdio", "-device", f"isa-debug-exit,iobase={tiny_guest.EXIT_PORT:#x}",
                         "-global", "virtio-mmio.force-legacy=false", "-object", "iothread,id=io0", "-drive",
                         f"if=none,id=d,file={image},format=raw,readonly=on,{keys}", "-device",
                         f"virtio-blk-device,drive=d{thread}", serial=True)


def _timed(command: list[str]) -> tuple[float, float]:
    """Seconds between the guest's two letters, and those of processor time that all threads but the vCPU's took meanwhile."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    times, accounts = [], []
    try:
        for letter in (ring_guest.BEGIN, ring_guest.END):
            if os.read(process.stdout.fileno(), 1) != letter:
                process.kill()
                raise BenchError(f"{command[0]}: the guest did not get there: {process.communicate()[1].decode()[-500:]}")
            times.append(time.perf_counter())
            accounts.append(_account(process.pid))
        time.sleep(_WAITING)  # the guest looks for its byte: what works now is the vCPU
        accounts.append(_account(process.pid))
        process.stdin.write(b"x")
        process.stdin.flush()
        process.wait(_SECONDS)
    finally:
        process.kill()
        process.communicate()
    before, after, later = accounts
    vcpu = max(later, key=lambda thread: later[thread] - after.get(thread, 0))
    work = sum(nanoseconds - before.get(thread, 0) for thread, nanoseconds in after.items() if thread != vcpu)
    return times[1] - times[0], work / 1e9


def _account(pid: int) -> dict[int, int]:
    """ns that each thread has been on a processor."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # one that has ended
            found[int(task.name)] = int((task / "schedstat").read_text().split()[0])
    return found
