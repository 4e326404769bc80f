"""The part of `boot_arm64` that runs inside the lab: `python -m benches.boot_arm64_inside KERNEL INITRAMFS COUNT`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

OURS, PEER = "stratovirt", "qemu virt"
_MARK = b"Kernel panic"
_DEADLINE = 60
_MEMORY = "256M"
_WORDS = "console=ttyAMA0 quiet panic=-1 rdinit=/sbin/bootport"
_COPY = Path("/tmp/bench")
_SOURCE = Path(__file__).resolve().parent.parent / "src"


def main(arguments: list[str]) -> int:
    kernel, initramfs, count = Path(arguments[0]), Path(arguments[1]), int(arguments[2])
    _COPY.mkdir()
    kernel, initramfs = (Path(shutil.copy(file, _COPY)) for file in (kernel, initramfs))
    common = ["-smp", "1", "-m", _MEMORY, "-kernel", str(kernel), "-initrd", str(initramfs)]
    common += ["-append", _WORDS, "-serial", "stdio"]
    qemu = ["qemu-system-aarch64", "-M", "virt,gic-version=3", "-enable-kvm", "-cpu", "host", "-nodefaults", "-no-user-config",
            "-display", "none", "-no-reboot"]
    launcher = into_memory()
    for monitor, command in ((OURS, [launcher, "-machine", "microvm", *common]), (PEER, [*qemu, *common])):
        boot(command)  # the first run fills caches
        for _ in range(count):
            print(json.dumps({"monitor": monitor, "nanoseconds": boot(command)}), flush=True)
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


def boot(command: list[str]) -> int:
    """Start, wait for the mark on the guest's console, kill: how many ns that took."""
    began = time.monotonic_ns()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    signal.alarm(_DEADLINE)
    said = b""
    while _MARK not in said:
        piece = os.read(process.stdout.fileno(), 4096)
        if not piece:
            sys.exit(f"{command[0]} ended before the guest's init did: {said.decode(errors='replace')}")
        said += piece
    ended = time.monotonic_ns()
    signal.alarm(0)
    process.kill()
    process.wait()
    process.stdout.close()
    return ended - began


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
