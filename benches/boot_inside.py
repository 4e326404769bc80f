"""The part of `boot` that runs inside the lab: starts the guests, watches their boot-time port, reports raw figures.

`python -m benches.boot_inside KERNEL INITRAMFS COUNT FOLDER`; the report is JSON lines on stdout, traces go to
FOLDER, and `boot.py` reads both. The clock is the lab's, which counts instructions: 1 ns each.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import stratovirt
from benches import kvm_trace, machines
from benches.phases import probe_command

MEMORY = "256M"
# init does nothing but write to the port; the panic that ends its kernel comes after the measurement.
_BASE = "reboot=t panic=-1 rdinit=/sbin/bootport"
CASES = {"no console": _BASE, "console on the serial port": f"console=ttyS0 {_BASE}"}
OURS, PEER = OURS_FIRST = "stratovirt", machines.PEER
_MARK = {OURS: b"boot-time port, 2", PEER: b"\x02"}
_DEADLINE = 10
_STANDARD_LIBRARY = Path(os.__file__).parent


def main(arguments: list[str]) -> int:
    kernel, initramfs, count, folder = Path(arguments[0]), Path(arguments[1]), int(arguments[2]), Path(arguments[3])
    say("copying what is timed to memory")
    into_memory(timed_files())
    kernel, initramfs = (Path(shutil.copy(file, f"/tmp/{file.name}")) for file in (kernel, initramfs))
    for number, (case, words) in enumerate(CASES.items()):
        commands = {OURS: ours(kernel, initramfs, words), PEER: qemu(kernel, initramfs, words)}
        for monitor, command in commands.items():
            say(f"{case}: {monitor}")
            boot(command, _MARK[monitor])  # the first run fills caches
            for _ in range(count):
                tell("time", case, monitor, nanoseconds=boot(command, _MARK[monitor])[1])
            say(f"{case}: {monitor}: tracing")
            trace = f"trace.{number}.{OURS_FIRST.index(monitor)}"
            kvm_trace.record(lambda command=command, mark=_MARK[monitor]: boot(command, mark), folder / trace)  # type: ignore[misc]
            tell("trace", case, monitor, file=trace)
        began, ended, report = boot_in_phases(probe_command(commands[OURS][1:]), _MARK[OURS])
        tell("phases", case, OURS, began=began, ended=ended, report=report)
    return 0


def say(text: str) -> None:
    print(f"boot: in the lab, {time.monotonic():.1f} s: {text}", file=sys.stderr, flush=True)


def tell(kind: str, case: str, monitor: str, **fields: object) -> None:
    print(json.dumps({"kind": kind, "case": case, "monitor": monitor, **fields}), flush=True)


def ours(kernel: Path, initramfs: Path, words: str) -> list[str]:
    return machines.ours(kernel, MEMORY, 1, "-initrd", str(initramfs), "-append", words, "-serial", "stdio")


def qemu(kernel: Path, initramfs: Path, words: str) -> list[str]:
    """A debug console stands in for our boot-time port; on stderr, where our log line comes."""
    port = ["-chardev", "file,id=port,path=/dev/stderr", "-device", "isa-debugcon,iobase=0x3ff,chardev=port"]
    more = ["-initrd", str(initramfs), "-append", words, "-serial", "stdio", *port]
    return machines.qemu(kernel, MEMORY, 1, *more, serial=True)


def boot(command: list[str], mark: bytes, extra: Iterable[tuple[int, ...]] = ()) -> tuple[int, int]:
    """Start, wait until `mark` comes on stderr, kill: when it began, and how many ns until then."""
    read_end, write_end = os.pipe()
    null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1)]
    actions = [*null, (os.POSIX_SPAWN_DUP2, write_end, 2), *extra]
    began = time.monotonic_ns()
    pid = os.posix_spawnp(command[0], command, os.environ, file_actions=actions)
    os.close(write_end)
    signal.alarm(_DEADLINE)
    said = b""
    while mark not in said:
        piece = os.read(read_end, 4096)
        if not piece:
            sys.exit(f"{command[0]} ended before the guest wrote to the boot-time port: {said.decode(errors='replace')}")
        said += piece
    ended = time.monotonic_ns()
    signal.alarm(0)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(read_end)
    return began, ended - began


def boot_in_phases(command: list[str], mark: bytes) -> tuple[int, int, str]:
    """When it began and ended, and what the probe reported."""
    with open("/tmp/phases", "wb+") as file:
        began, lasted = boot(command, mark, [(os.POSIX_SPAWN_DUP2, file.fileno(), 3)])
        file.seek(0)
        return began, began + lasted, file.read().decode()


# -- files that are timed come from memory

def timed_files() -> list[Path]:
    """What the two programs open: themselves, their libraries, Python's, and firmware."""
    program = shutil.which(machines.QEMU)
    if program is None:
        sys.exit(f"{machines.QEMU} is not installed")
    python = Path(sys.executable).resolve()
    files = [Path(program), python, Path(machines.STRATOVIRT), *libraries(Path(program)), *libraries(python)]
    files += Path("/usr/share/seabios").glob("*.bin")
    files += Path("/usr/share/qemu").glob("*.bin")
    files += Path("/usr/lib/x86_64-linux-gnu/qemu").glob("*.so")
    files += Path(stratovirt.__file__).parent.rglob("*.py*")
    for pattern in ("*.py", "__pycache__/*.pyc", "encodings/*.py", "encodings/__pycache__/*.pyc", "lib-dynload/*.so"):
        files += _STANDARD_LIBRARY.glob(pattern)
    return files


def libraries(program: Path) -> list[Path]:
    listing = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout
    return [Path(word).resolve() for word in listing.split() if word.startswith("/")]


def into_memory(files: Iterable[Path]) -> None:
    """Have the lab's overlay copy `files` to its tmpfs: it does so when a file's mode is set, and their times stay."""
    for file in files:
        file.chmod(file.stat().st_mode & 0o7777)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
