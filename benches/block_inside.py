"""The part of `block` that runs inside the lab: boots guests in which fio reads a disk, and watches the monitor meanwhile.

`python -m benches.block_inside KERNEL INITRAMFS COUNT`; the report is JSON lines on stdout. The guest says on its
serial port when a case begins and ends, and then what fio found.
"""

from __future__ import annotations

import base64
import json
import os
import selectors
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from guest.programs import archive

import stratovirt
from benches import block_probe, machines

OURS, PEER = "stratovirt", machines.PEER
PLACES = ("main loop", "iothread")
MEMORY = "512M"  # fio comes with 80 MB of libraries
DISK = Path("/dev/nullb0")
_DISK_GIB = 1
_KVM = Path("/sys/kernel/debug/kvm")
_DEADLINE = 40.0  # seconds of the lab, which has an instruction a nanosecond, for one line of the guest's
_SOURCE = Path(stratovirt.__file__).parent.parent


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
PROFILED = (CASES[0].name, CASES[1].name)

_FIO = "fio --thread --filename=/dev/vda --direct=1 --ioengine=libaio --norandommap --randrepeat=1 --output-format=json " \
       "--output=/tmp/result --name=bench"


def script(cases: tuple[Case, ...]) -> str:
    """What the guest does."""
    lines = [f"run() {{ {_FIO} $*; }}", "say() { echo \"$*\" >/dev/console; }",
             "run --rw=read --bs=4k --number_ios=8"]  # what fio reads of itself is in memory from now on
    for number, case in enumerate(cases):
        lines += [f"say begin {number}; sleep 1",
                  f"run --rw={case.kind} --bs={case.kibibytes}k --iodepth={case.depth} --number_ios={case.requests}",
                  f"sleep 1; say end {number}; sleep 1", f"say result {number} $(tr -d ' \\n' </tmp/result)"]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    kernel, initramfs, count = Path(arguments[0]), Path(arguments[1]), int(arguments[2])
    for command in (["modprobe", "null_blk", "queue_mode=2", "irqmode=0", f"gb={_DISK_GIB}"],
                    ["mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug"]):
        subprocess.run(command, check=True)
    folder = Path("/tmp/bench")
    folder.mkdir()
    kernel = Path(shutil.copy(kernel, folder))
    from stratovirt.cli import guest_console

    say("fio for the guest")
    plain = initramfs.read_bytes() + archive("fio")

    def with_command(cases: tuple[Case, ...]) -> Path:
        path = folder / f"initramfs.{len(cases)}.{cases[0].depth}"
        path.write_bytes(plain + bytes(-len(plain) % 4) + guest_console.command_archive(script(cases)))
        return path

    words = "console=ttyS0 reboot=t panic=-1 quiet loglevel=1 mitigations=off stratovirt.end=reboot"
    everything = with_command(CASES)
    for place in PLACES:
        for monitor, build in ((OURS, ours), (PEER, qemu)):
            for number in range(count):
                say(f"{monitor}, {place}, run {number + 1} of {count}")
                for name, record in watch(build(kernel, everything, words, place), CASES).items():
                    tell("result", name, monitor, place, **record)
    for case in CASES:
        if case.name in PROFILED:
            say(f"profile: {case.name}")
            report = folder / "profile"
            command = ours(kernel, with_command((case,)), words, PLACES[0])[1:]
            python = [sys.executable, "-I", "-S", block_probe.__file__, str(_SOURCE), str(report)]
            watch([*python, *command], (case,))
            tell("profile", case.name, OURS, PLACES[0], requests=case.requests, functions=json.loads(report.read_text()))
    return 0


def say(text: str) -> None:
    print(f"block: in the lab, {time.monotonic():.1f} s: {text}", file=sys.stderr, flush=True)


def tell(kind: str, case: str, monitor: str, place: str, **fields: object) -> None:
    print(json.dumps({"kind": kind, "case": case, "monitor": monitor, "place": place, **fields}), flush=True)


def ours(kernel: Path, initramfs: Path, words: str, place: str) -> list[str]:
    thread = ",iothread=io0" if place == "iothread" else ""
    return machines.ours(
        kernel, MEMORY, 1, "-initrd", str(initramfs), "-append", words, "-serial", "stdio", "-object", "iothread,id=io0",
        "-drive", f"id=disk,file={DISK},direct=on,aio=native", "-device", f"virtio-blk-device,id=disk0,drive=disk{thread}",
    )


def qemu(kernel: Path, initramfs: Path, words: str, place: str) -> list[str]:
    thread = ",iothread=io0" if place == "iothread" else ""
    command = machines.qemu(
        kernel, MEMORY, 1, "-initrd", str(initramfs), "-append", words, "-serial", "stdio", "-object", "iothread,id=io0",
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


def watch(command: list[str], cases: tuple[Case, ...]) -> dict[str, dict[str, float]]:
    """Run the guest to its end; by case, what fio and the accounts say."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout is not None
    selector, data = selectors.DefaultSelector(), b""
    selector.register(process.stdout, selectors.EVENT_READ)
    before: dict[int, Account] = {}
    after: dict[int, Account] = {}
    results: dict[str, dict[str, float]] = {}
    said: list[bytes] = []
    try:
        while True:
            if not selector.select(_DEADLINE):
                sys.exit(f"{command[0]}: the guest says nothing more: {_heard([*said, data])}")
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                break
            *lines, data = (data + piece).split(b"\n")
            for line in lines:
                said.append(line)
                word, _, rest = line.strip().partition(b" ")
                if word in (b"begin", b"end"):
                    (before if word == b"begin" else after)[int(rest)] = account(process.pid)
                elif word == b"result":
                    number, _, text = rest.partition(b" ")
                    if not text.startswith(b"{"):
                        sys.exit(f"{command[0]}: fio reports nothing: {_heard(said)}")
                    case = cases[int(number)]
                    results[case.name] = evaluate(case, json.loads(text), before[int(number)], after[int(number)])
    finally:
        process.kill()
        process.wait()
    if len(results) != len(cases):
        sys.exit(f"{command[0]} ended before the guest was done: {_heard(said)}")
    return results


def _heard(said: list[bytes]) -> str:
    """The last lines of the guest, with the output of its command taken out of the frames that init puts it in."""
    lines = []
    for line in said[-20:]:
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
