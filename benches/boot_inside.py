"""The part of `boot` that runs inside the lab: starts the guests, watches their boot-time port, reports raw figures.

`python -m benches.boot_inside KERNEL INITRAMFS COUNT FOLDER`; the report is JSON lines on stdout, traces go to
FOLDER, and `boot.py` reads both. The clock is the lab's, which counts instructions: 1 ns each.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import stratovirt
from benches import kvm_trace, machines, phases_probe
from benches.phases import probe_command
from benches.spinning import Spinning

MEMORY = "256M"
# init does nothing but write to the port; the panic that ends its kernel comes after the measurement.
_BASE = "reboot=t panic=-1 rdinit=/sbin/bootport"
CASES = {"quiet": f"console=ttyS0 quiet {_BASE}", "all messages on the serial port": f"console=ttyS0 {_BASE}"}
OURS, PEER = OURS_FIRST = "stratovirt", machines.PEER
_MARK = {OURS: b"boot-time port, 2", PEER: b"\x02"}
_DEADLINE = 10.0
# While the only processor waits for a file of the machine below, its clock jumps from timer to timer, at any speed: so a first
# run, which may wait for files, has time. And now and then a guest of either monitor stands still, for want of an interrupt
# that the emulation has lost, or goes round in the handler of one that came twice (spinning.py): such a run is repeated, and
# stderr has it.
_FIRST_DEADLINE = 10_000.0
_LOOK = 0.75  # seconds; most boots are over by then, and not looked at
ATTEMPTS = 5
_STANDARD_LIBRARY = Path(os.__file__).parent
_SOURCE = Path(stratovirt.__file__).parent.parent
_COPY = Path("/tmp/bench")


def main(arguments: list[str]) -> int:
    kernel, initramfs, count, folder = Path(arguments[0]), Path(arguments[1]), int(arguments[2]), Path(arguments[3])
    subprocess.run(["mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug"], check=True)
    say("copying what is timed to memory")
    launcher = into_memory()
    kernel, initramfs = (Path(shutil.copy(file, _COPY)) for file in (kernel, initramfs))
    _write_bundle([launcher, *ours(kernel, initramfs, CASES["quiet"])[1:]])
    for number, (case, words) in enumerate(CASES.items()):
        commands = {OURS: [launcher, *ours(kernel, initramfs, words)[1:]], PEER: qemu(kernel, initramfs, words)}
        for monitor, command in commands.items():
            say(f"{case}: {monitor}")
            boot(command, _MARK[monitor], deadline=_FIRST_DEADLINE)  # the first run fills caches
            for _ in range(count):
                _, nanoseconds, busy = boot(command, _MARK[monitor])
                tell("time", case, monitor, nanoseconds=nanoseconds, busy=busy)
            say(f"{case}: {monitor}: tracing")
            trace = f"trace.{number}.{OURS_FIRST.index(monitor)}"
            reasons = kvm_trace.record(lambda command=command, mark=_MARK[monitor]: boot(command, mark), folder / trace)  # type: ignore[misc]
            tell("trace", case, monitor, file=trace, reasons=reasons)
        began, ended, report = boot_in_phases(probe(commands[OURS][1:]), _MARK[OURS])
        tell("phases", case, OURS, began=began, ended=ended, report=report)
    return 0


def _write_bundle(command: list[str]) -> None:
    """The first start from a new place writes the file that later ones take their modules from: let it have the time."""
    say("the first start")
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + _FIRST_DEADLINE
        while not list((_COPY / "src/stratovirt/__pycache__").glob("start.*.bundle")):
            if process.poll() is not None or time.monotonic() > until:
                sys.exit("the first start writes no bundle of modules")
            time.sleep(0.01)
        process.kill()


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


def boot(command: list[str], mark: bytes, extra: Iterable[tuple[int, ...]] = (),
         deadline: float = _DEADLINE) -> tuple[int, int, int]:
    """Start, wait until `mark` comes on stderr, kill: when it began, how many ns until then, and for how many of them the
    processor had work.
    """
    for _ in range(ATTEMPTS):
        times = _attempt(command, mark, extra, deadline)
        if times is not None:
            return times
        say(f"{Path(command[0]).name}: the guest stands still or goes round; once more")
    sys.exit(f"{command[0]}: the guest does not get to its init")


def _attempt(command: list[str], mark: bytes, extra: Iterable[tuple[int, ...]], deadline: float) -> tuple[int, int, int] | None:
    """None: not in time."""
    read_end, write_end = os.pipe()
    null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1)]
    actions = [*null, (os.POSIX_SPAWN_DUP2, write_end, 2), *extra]
    worked = _work()
    began = time.monotonic_ns()
    pid = os.posix_spawnp(command[0], command, os.environ, file_actions=actions)
    os.close(write_end)
    said = b""
    spinning = Spinning(pid)
    while mark not in said:
        if not select.select([read_end], [], [], _LOOK)[0]:
            if spinning.look() or time.monotonic_ns() - began > deadline * 1e9:
                break
            continue
        piece = os.read(read_end, 4096)
        if not piece:
            sys.exit(f"{command[0]} ended before the guest wrote to the boot-time port: {said.decode(errors='replace')}")
        said += piece
    ended = time.monotonic_ns()
    worked = _work() - worked
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(read_end)
    return (began, ended - began, worked) if mark in said else None


def _work() -> int:
    """ns that the only processor has spent on anything but idling. Layout of /proc/schedstat: Documentation/scheduler."""
    line = next(line for line in Path("/proc/schedstat").read_text().splitlines() if line.startswith("cpu0 "))
    return int(line.split()[7])


def boot_in_phases(command: list[str], mark: bytes) -> tuple[int, int, str]:
    """When it began and ended, and what the probe reported."""
    with open("/tmp/phases", "wb+") as file:
        began, lasted, _ = boot(command, mark, [(os.POSIX_SPAWN_DUP2, file.fileno(), 3)])
        file.seek(0)
        return began, began + lasted, file.read().decode()


def probe(arguments: list[str]) -> list[str]:
    """The probe's command line, with interpreter and files from memory as in a timed run."""
    python, *words = probe_command(arguments)
    replaced = [word.replace(str(_SOURCE), str(_COPY / "src")) for word in words]
    shutil.copy(phases_probe.__file__, _COPY)
    replaced[replaced.index(phases_probe.__file__)] = str(_COPY / "phases_probe.py")
    return [str(Path(python).resolve()), *replaced]


# -- All that is timed comes from memory: the lab's files come from the machine below, and waiting for them is no work.

def into_memory() -> str:
    """Put what the two programs open into memory; the path of a launcher that starts ours from there."""
    found = shutil.which(machines.QEMU)
    if found is None:
        sys.exit(f"{machines.QEMU} is not installed")
    program, python = Path(found), Path(sys.executable).resolve()
    _COPY.mkdir()
    for file in {program, python, *libraries(program), *libraries(python)}:
        file.chmod(file.stat().st_mode & 0o7777)  # the overlay copies a file to its tmpfs when its mode is set
    for folder in ("/usr/share/seabios", "/usr/share/qemu", "/usr/lib/x86_64-linux-gnu/qemu"):
        replace_folder(Path(folder), "keymaps", "firmware", "OVMF*", "skiboot*", "opensbi*", "audio-*", "ui-*")
    replace_folder(_STANDARD_LIBRARY, *(entry.name for entry in _STANDARD_LIBRARY.iterdir() if is_unused(entry)))
    # Not the bundle of modules, which is for one place: the first start from here writes another.
    shutil.copytree(_SOURCE / "stratovirt", _COPY / "src/stratovirt", ignore=shutil.ignore_patterns("start.*.bundle"))
    launcher = _COPY / "stratovirt"
    interpreter, _, rest = Path(machines.STRATOVIRT).read_text().partition("\n")
    options = interpreter.partition(" ")[2]
    launcher.write_text(f"#!{python} {options}\n" + rest.replace(str(_SOURCE), str(_COPY / "src")))
    launcher.chmod(0o755)
    return str(launcher)


def is_unused(entry: Path) -> bool:
    """Packages of the standard library that neither the start nor the log line imports."""
    return entry.is_dir() and entry.name not in ("encodings", "lib-dynload", "__pycache__", "collections")


def replace_folder(folder: Path, *without: str) -> None:
    """Lay a copy in memory over `folder`."""
    copy = _COPY / "below" / folder.relative_to("/")
    shutil.copytree(folder, copy, symlinks=True, ignore=shutil.ignore_patterns(*without))
    subprocess.run(["mount", "--bind", str(copy), str(folder)], check=True)


def libraries(program: Path) -> list[Path]:
    listing = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout
    return [Path(word).resolve() for word in listing.split() if word.startswith("/")]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
