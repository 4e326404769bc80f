"""The part of `boot_arm64` that runs inside the lab: `python -m benches.boot_arm64_inside KERNEL INITRAMFS COUNT`."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

OURS, PEER = "stratovirt", "qemu virt"
_MARK = b"Kernel panic"
# Seconds of the lab's clock, which leaps from timer to timer while the processor waits for a file, as it may in a first run.
_FIRST_DEADLINE, _DEADLINE = 10_000, 30
_ATTEMPTS = 3
_MEMORY = "256M"
_BASE = "panic=-1 rdinit=/sbin/bootport"
CASES = {"quiet": f"console=ttyAMA0 quiet {_BASE}", "all messages on the serial port": f"console=ttyAMA0 {_BASE}"}
_FOR_EVER = "console=ttyAMA0 quiet panic=0 rdinit=/sbin/bootport"
_COPY = Path("/tmp/bench")
_SOURCE = Path(__file__).resolve().parent.parent / "src"


def main(arguments: list[str]) -> int:
    kernel, initramfs, count = Path(arguments[0]), Path(arguments[1]), int(arguments[2])
    _COPY.mkdir()
    kernel, initramfs = (Path(shutil.copy(file, _COPY)) for file in (kernel, initramfs))
    qemu = ["qemu-system-aarch64", "-M", "virt,gic-version=3", "-enable-kvm", "-cpu", "host", "-nodefaults", "-no-user-config",
            "-display", "none", "-no-reboot"]
    ours = [into_memory(), "-machine", "microvm"]
    machine = ["-smp", "1", "-m", _MEMORY, "-kernel", str(kernel), "-initrd", str(initramfs), "-serial", "stdio", "-append"]
    write_bundle([*ours, *machine, _FOR_EVER])
    for case, words in CASES.items():
        common = [*machine, words]
        for monitor, command in ((OURS, [*ours, *common]), (PEER, [*qemu, *common])):
            boot(command, _FIRST_DEADLINE)  # fills caches
            for _ in range(count):
                print(json.dumps({"case": case, "monitor": monitor, "nanoseconds": boot(command, _DEADLINE)}), flush=True)
    return 0


def into_memory() -> str:
    """A launcher like the installed one, with the program in memory.

    The working tree comes from the machine below: while the emulated processor waits for it, the clock leaps to the next timer.
    """
    shutil.copytree(_SOURCE / "stratovirt", _COPY / "src/stratovirt")
    launcher = _COPY / "stratovirt"
    text = f"import sys\nsys.path.insert(0, '{_COPY}/src')\nfrom stratovirt.__main__ import main\nsys.exit(main())\n"
    launcher.write_text(f"#!{Path(sys.executable).resolve()} -IS\n{text}", encoding="utf-8")
    launcher.chmod(0o755)
    return str(launcher)


def write_bundle(command: list[str]) -> None:
    """The first start from a new place writes the file that later ones take their modules from: let it have the time."""
    until = time.monotonic() + _FIRST_DEADLINE
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while not list((_COPY / "src/stratovirt/__pycache__").glob("start.*.bundle")):
            if process.poll() is not None or time.monotonic() > until:
                sys.exit("the first start writes no bundle of modules")
            time.sleep(0.01)
        process.kill()


def boot(command: list[str], deadline: float) -> int:
    """Start, wait for the mark on the guest's console, kill: how many ns that took."""
    for _ in range(_ATTEMPTS):
        nanoseconds = _attempt(command, deadline)
        if nanoseconds:
            return nanoseconds
        print(f"boot: {command[0]}: no end of init after {deadline} s; once more", file=sys.stderr, flush=True)
    sys.exit(f"{command[0]}: the guest's init does not come to its end")


def _attempt(command: list[str], deadline: float) -> int:
    """0: not in time."""
    said = b""
    began = time.monotonic_ns()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    with process.stdout as console:
        while _MARK not in said and select.select([console], [], [], deadline)[0]:
            piece = os.read(console.fileno(), 4096)
            if not piece:
                sys.exit(f"{command[0]} ended before the guest's init did: {said.decode(errors='replace')}")
            said += piece
        ended = time.monotonic_ns()
        process.kill()
        process.wait()
    return ended - began if _MARK in said else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
