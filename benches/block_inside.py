"""The part of `block` that runs inside the lab: boots guests in which fio reads a disk, and watches the monitor meanwhile.

`python -m benches.block_inside KERNEL INITRAMFS COUNT FOLDER`; the report is JSON lines on stdout, the profiles go to FOLDER.
The guest says on its serial port when a case begins and ends, and then what fio found.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from guest.programs import archive

from benches import loop_probe, machines
from benches.boot_inside import into_memory
from benches.spinning import Spinning
from stratovirt.cli import guest_console

OURS, PEER = "stratovirt", machines.PEER
PLACES = ("main loop", "iothread")
MEMORY = "512M"  # fio comes with 80 MB of libraries
DISK = Path("/dev/nullb0")
_DISK_GIB = 1
_KVM = Path("/sys/kernel/debug/kvm")
# For one line of the guest's, in seconds of the lab. While its processor waits its clock leaps, so a guest that sleeps for want
# of an interrupt (boot_inside.py) is soon through with them.
_DEADLINE = 1000.0
_LOOK = 0.1
_ATTEMPTS = 12  # some 10,000 interrupts a run, each of which may be the one that comes twice (spinning.py)
_COPY = Path("/tmp/bench")
_WORDS = "console=ttyS0 reboot=t panic=-1 quiet loglevel=1 mitigations=off stratovirt.end=reboot"


class Case(NamedTuple):
    """One run of fio: `requests` of `kibibytes` each, `depth` at a time."""

    name: str
    kind: str
    kibibytes: int
    depth: int
    requests: int


CASES = (
    Case("4 KiB random read, depth 1", "randread", 4, 1, 2000),
    Case("4 KiB random read, depth 32", "randread", 4, 32, 8000),
    Case("128 KiB sequential read, depth 8", "read", 128, 8, 2000),
)

_FIO = "fio --thread --filename=/dev/vda --direct=1 --ioengine=libaio --norandommap --randrepeat=1 --output-format=json " \
       "--output=/tmp/result --name=bench"


def script(cases: tuple[Case, ...]) -> str:
    """What the guest does."""
    lines = [f"run() {{ {_FIO} $*; }}", "say() { echo \"$*\" >/dev/console; }",
             "run --rw=randread --bs=4k --iodepth=32 --number_ios=320"]  # what runs is in memory from now on, on either side
    for number, case in enumerate(cases):
        lines += [f"say begin {number}; sleep 1",
                  f"run --rw={case.kind} --bs={case.kibibytes}k --iodepth={case.depth} --number_ios={case.requests}",
                  f"sleep 1; say end {number}; sleep 1", f"say result {number} $(tr -d ' \\n' </tmp/result)"]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    kernel, initramfs, count, folder = Path(arguments[0]), Path(arguments[1]), int(arguments[2]), Path(arguments[3])
    for command in (["modprobe", "null_blk", "queue_mode=2", "irqmode=0", f"gb={_DISK_GIB}"],
                    ["mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug"]):
        subprocess.run(command, check=True)
    say("copying what is timed to memory")
    plain = initramfs.read_bytes() + archive("fio")
    launcher = into_memory()
    kernel, probe = (Path(shutil.copy(file, _COPY)) for file in (kernel, loop_probe.__file__))
    ram_disk = _COPY / "initramfs"
    ram_disk.write_bytes(plain + bytes(-len(plain) % 4) + guest_console.command_archive(script(CASES)))
    for place in PLACES:
        commands = {OURS: [launcher, *ours(kernel, ram_disk, place)[1:]], PEER: qemu(kernel, ram_disk, place)}
        for monitor, command in commands.items():
            for number in range(count):
                say(f"{monitor}, {place}, run {number + 1} of {count}")
                for name, record in watch(command).items():
                    tell("result", name, monitor, place, **record)
    say(f"{OURS}, {PLACES[0]}, profiled")
    python = [str(Path(sys.executable).resolve()), "-I", "-S", str(probe), str(_COPY / "src"), str(folder / "profile")]
    # The profile is a file: no filters of system calls.
    watch([*python, *ours(kernel, ram_disk, PLACES[0])[1:], "-disable-seccomp"], folder / "profile")
    return 0


def say(text: str) -> None:
    print(f"block: in the lab, {time.monotonic():.1f} s: {text}", file=sys.stderr, flush=True)


def tell(kind: str, case: str, monitor: str, place: str, **fields: object) -> None:
    print(json.dumps({"kind": kind, "case": case, "monitor": monitor, "place": place, **fields}), flush=True)


def ours(kernel: Path, ram_disk: Path, place: str) -> list[str]:
    thread = ",iothread=io0" if place == "iothread" else ""
    return machines.ours(
        kernel, MEMORY, 1, "-initrd", str(ram_disk), "-append", _WORDS, "-serial", "stdio", "-object", "iothread,id=io0",
        "-drive", f"id=disk,file={DISK},direct=on,aio=native", "-device", f"virtio-blk-device,id=disk0,drive=disk{thread}",
    )


def qemu(kernel: Path, ram_disk: Path, place: str) -> list[str]:
    thread = ",iothread=io0" if place == "iothread" else ""
    command = machines.qemu(
        kernel, MEMORY, 1, "-initrd", str(ram_disk), "-append", _WORDS, "-serial", "stdio", "-object", "iothread,id=io0",
        "-global", "virtio-mmio.force-legacy=false",
        "-drive", f"if=none,id=disk,file={DISK},format=raw,cache=none,aio=native",
        "-device", f"virtio-blk-device,drive=disk{thread}", serial=True,
    )
    # Without ACPI it names its devices on the kernel's command line.
    return [word.replace("auto-kernel-cmdline=off", "auto-kernel-cmdline=on,acpi=off") for word in command]


class Account(NamedTuple):
    """What a monitor had used up to a moment: ns of each thread but the vCPU's; exits; exits to user space."""

    threads: dict[int, int]
    exits: int
    user_exits: int


def account(pid: int) -> Account:
    (folder,) = _KVM.glob(f"{pid}-*")
    vcpu = int((folder / "vcpu0/pid").read_text())
    threads = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        if int(task.name) != vcpu:
            threads[int(task.name)] = int((task / "schedstat").read_text().split()[0])
    counts = {name: int((folder / name).read_text()) for name in ("exits", "io_exits", "mmio_exits")}
    return Account(threads, counts["exits"], counts["io_exits"] + counts["mmio_exits"])


class Stuck(Exception):
    """A guest that says nothing more."""


def watch(command: list[str], profile: Path | None = None) -> dict[str, dict[str, float]]:
    """Run the guest to its end, again if it gets stuck; by case, what fio and the accounts say.

    `profile`: what the program writes at SIGUSR2; kept for each case under its name with the case's number behind.
    """
    for _ in range(_ATTEMPTS):
        try:
            return _attempt(command, profile)
        except Stuck as error:
            say(f"{error}; once more")
    sys.exit(f"{command[0]}: the guest gets stuck every time")


def _attempt(command: list[str], profile: Path | None) -> dict[str, dict[str, float]]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    before: dict[int, Account] = {}
    after: dict[int, Account] = {}
    results: dict[str, dict[str, float]] = {}
    said: list[bytes] = []
    try:
        for line in _lines(process, said):
            word, _, rest = line.strip().partition(b" ")
            if word == b"begin":
                before[int(rest)] = account(process.pid)
                if profile is not None:
                    process.send_signal(signal.SIGUSR1)
            elif word == b"end":
                after[int(rest)] = account(process.pid)
                if profile is not None:
                    process.send_signal(signal.SIGUSR2)
                    _wait_for(profile)
                    profile.rename(profile.with_name(f"{profile.name}.{int(rest)}"))
            elif word == b"result":
                number, _, text = rest.partition(b" ")
                if not text.startswith(b"{"):
                    sys.exit(f"{command[0]}: fio reports nothing: {_heard(said)}")
                case = CASES[int(number)]
                results[case.name] = evaluate(case, json.loads(text), before[int(number)], after[int(number)])
    finally:
        process.kill()
        process.communicate()
    if len(results) != len(CASES):
        sys.exit(f"{command[0]} ended before the guest was done: {_heard(said)}")
    return results


def _lines(process: subprocess.Popen[bytes], said: list[bytes]) -> Iterator[bytes]:
    """What the guest says, which is also appended to `said`. Raises: Stuck when a line takes too long."""
    assert process.stdout is not None
    data, began, spinning = b"", time.monotonic(), Spinning(process.pid)
    while True:
        if not select.select([process.stdout], [], [], _LOOK)[0]:
            seconds = time.monotonic() - began
            if spinning.look():
                raise Stuck(f"the guest goes round in the emulator; it has said {_last(said)}")
            if seconds > _DEADLINE:
                raise Stuck(f"the guest says nothing for {seconds:.0f} s after {_last(said)}")
            continue
        piece = os.read(process.stdout.fileno(), 1 << 16)
        if not piece:
            return
        *lines, data = (data + piece).split(b"\n")
        for line in lines:
            said.append(line)
            yield line
        began = time.monotonic()


def _wait_for(file: Path) -> None:
    until = time.monotonic() + _DEADLINE
    while not file.exists():
        if time.monotonic() > until:
            raise Stuck(f"{file.name} is not written")
        time.sleep(0.01)


def _last(said: list[bytes]) -> str:
    return repr(said[-1][:40].decode(errors="replace")) if said else "nothing at all"


def _heard(said: list[bytes]) -> str:
    """The last lines of the guest, with the output of its command taken out of the frames that init puts it in."""
    lines = []
    for line in said[-5:]:
        words = line.split()
        lines.append(base64.b64decode(words[1]) if len(words) == 2 and words[0] in (b"\x1eo", b"\x1ee") else line[:200])
    return b"\n".join(lines).decode(errors="replace")


def evaluate(case: Case, fio: dict[str, object], before: Account, after: Account) -> dict[str, float]:
    job = fio["jobs"][0]  # type: ignore[index]
    read = job["read"]
    if job["error"] or read["total_ios"] != case.requests:
        sys.exit(f"fio: error {job['error']}, {read['total_ios']} requests instead of {case.requests}")
    # The disk's thread is the one that did most of what was done outside the vCPU.
    device = max(after.threads[thread] - before.threads.get(thread, 0) for thread in after.threads)
    return {
        "iops": read["iops"], "mibs": read["bw"] / 1024, "latency_us": read["lat_ns"]["mean"] / 1000,
        "device_us": device / 1000 / case.requests, "exits": (after.exits - before.exits) / case.requests,
        "user_exits": (after.user_exits - before.user_exits) / case.requests,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
