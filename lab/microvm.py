"""`make run`: starts a microVM and runs a command in it, or a shell; in the lab when this machine's KVM cannot run Linux.

    python -m lab.microvm [--arch aarch64] [--here | --in-lab] [--vmm stratovirt|qemu] [COMMAND]

The guest is Debian's cloud kernel with an initramfs of busybox; its root disk's copy is /dev/vda. The command's output
passes through exactly and the exit status is the command's; 125 means that the microVM failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import select
import shlex
import shutil
import subprocess
import sys
import tempfile
import termios
import tty
from collections.abc import Iterator
from pathlib import Path

from guest import assets, cache

TREE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TREE / "src"))

from stratovirt.cli import guest_console  # noqa: E402
from stratovirt.errors import GuestError  # noqa: E402

EXIT_FAILED = 125
# A stock kernel looks for an i8042 and a CMOS clock for seconds where there are none; ours are there, QEMU's are not.
KERNEL_LINE = "reboot=t panic=-1 quiet loglevel=1 mitigations=off"
CONSOLES = {"x86_64": "ttyS0", "aarch64": "ttyAMA0"}
KERNELS = {
    "x86_64": ("stock-elf", "stock-bzimage", "microvm-elf", "microvm-bzimage"),
    "aarch64": ("stock-image", "stock-image-gz", "microvm-image"),
}
QEMU_LINE = " i8042.noaux i8042.nokbd initcall_blacklist=cmos_init"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="lab.microvm")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--here", action="store_true", help="on this machine's own KVM, whatever the probe says")
    where.add_argument("--in-lab", action="store_true", help="in the lab, whatever the probe says")
    parser.add_argument("--vmm", choices=("stratovirt", "qemu"), default="stratovirt")
    own = platform.machine() if platform.machine() in KERNELS else "x86_64"
    parser.add_argument("--arch", choices=tuple(KERNELS), default=own, help=f"of host and guest (default {own})")
    parser.add_argument("--kernel", choices=sorted({name for names in KERNELS.values() for name in names}))
    parser.add_argument("--smp", type=int, default=1)
    parser.add_argument("--memory", type=int, default=256, help="MiB")
    parser.add_argument("command", nargs="?", default="")
    options = parser.parse_args(arguments)
    options.kernel = options.kernel or KERNELS[options.arch][0]
    if options.kernel not in KERNELS[options.arch]:
        parser.error(f"{options.kernel} is no kernel for {options.arch}; there are: {', '.join(KERNELS[options.arch])}")
    if options.arch == "aarch64" and options.vmm == "qemu":
        parser.error("--vmm qemu is for x86_64: the arm64 host has no QEMU")
    if not options.command and not sys.stdin.isatty():
        from lab.script import standard_input

        options.command = standard_input("run")
    if options.in_lab or not (options.here or (options.arch == platform.machine() and can_run_linux())):
        return _in_lab(options)
    with tempfile.TemporaryDirectory(prefix="stratovirt-run-") as folder:
        work = Path(folder)
        return run(command_line(options, work), options.command)


def can_run_linux() -> bool:
    """Whether this machine's KVM runs a guest kernel, as the product's probe guest finds."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    environment = {**os.environ, "PYTHONPATH": str(TREE / "src")}
    done = subprocess.run(
        [sys.executable, "-m", "stratovirt", "doctor", "--can-run-linux"],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


def command_line(options: argparse.Namespace, work: Path) -> list[str]:
    """The VMM's command line; the disk is a copy in `work`, so that every guest gets it fresh."""
    small = options.kernel.startswith("microvm")
    made = assets.ASSETS[options.arch]
    kernel = made[options.kernel]()
    ram_disk = made["microvm-initramfs" if small else "stock-initramfs"]()
    disk = work / "disk.img"
    subprocess.run(["cp", "--sparse=always", str(made["root-disk"]()), str(disk)], check=True)
    words = f"console={CONSOLES[options.arch]} {KERNEL_LINE}"
    if options.command:
        words += " " + guest_console.kernel_words(options.command)
        if not guest_console.fits_inline(options.command):
            longer = work / "initrd"
            longer.write_bytes(ram_disk.read_bytes() + guest_console.command_archive(options.command))
            ram_disk = longer
    if options.vmm == "qemu":
        line = [shutil.which("qemu-system-x86_64") or "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot"]
        line += ["-display", "none", "-M", f"microvm,acpi={'off' if small else 'on'},rtc=on,isa-serial=on", "-enable-kvm"]
        line += ["-cpu", "host", "-global", "virtio-mmio.force-legacy=false"]
        words += QEMU_LINE
    else:
        line = [sys.executable, "-m", "stratovirt", "-machine", "microvm"]
    line += ["-smp", str(options.smp), "-m", str(options.memory), "-kernel", str(kernel), "-initrd", str(ram_disk)]
    line += [
        "-append",
        words,
        "-drive",
        f"id=disk,file={disk},if=none,format=raw" if options.vmm == "qemu" else f"id=disk,file={disk},direct=off",
    ]
    line += ["-device", "virtio-blk-device,drive=disk,id=blk0", "-object", "rng-random,id=random,filename=/dev/urandom"]
    return [*line, "-device", "virtio-rng-device,rng=random,id=rng0", "-serial", "stdio"]


def run(line: list[str], command: str) -> int:
    """Start the VMM with its serial port on our pipe (or on the terminal, for a shell) and wait for its end."""
    environment = {**os.environ, "PYTHONPATH": str(TREE / "src")}
    environment.setdefault("STRATOVIRT_LOG_LEVEL", "warn")
    if not command:
        with _terminal_kept():
            return subprocess.run(line, env=environment, check=False).returncode
    vmm = subprocess.Popen(line, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert vmm.stdout is not None
    console = guest_console.GuestConsole(_writer(1), _writer(2), _writer(2))
    try:
        while data := os.read(vmm.stdout.fileno(), 1 << 16):
            console.feed(data)
        vmm.wait()
    finally:
        if vmm.poll() is None:
            vmm.kill()
            vmm.wait()
    try:
        return console.finish()
    except GuestError as error:
        print(f"run: {error}; the VMM's exit status is {vmm.returncode}", file=sys.stderr)
        return EXIT_FAILED


def _in_lab(options: argparse.Namespace) -> int:
    from lab import run as lab_run

    if options.in_lab:
        reason = "as asked"
    elif options.arch != platform.machine():
        reason = f"this machine is {platform.machine()}"
    else:
        reason = "this machine's KVM cannot run Linux" if os.path.exists("/dev/kvm") else "no /dev/kvm"
    cache.say(f"starting the microVM in the emulated host ({reason})")
    # Whatever needs building is built here: the lab has no network, and its cache is a copy that ends with it.
    for name in (options.kernel, "stock-initramfs", "microvm-initramfs", "root-disk"):
        assets.ASSETS[options.arch][name]()
    words = ["/usr/bin/env", f"{TREE}/.venv/bin/python", "-m", "lab.microvm", "--arch", options.arch, "--here"]
    words += ["--vmm", options.vmm, "--kernel", options.kernel, "--smp", str(options.smp), "--memory", str(options.memory)]
    if options.command:
        words += ["--", options.command]
    if options.command:
        return lab_run.run("exec " + shlex.join(words), deadline=3600, arch=options.arch)
    return lab_run.run("exec " + shlex.join(words), deadline=86400, terminal=True, arch=options.arch)


def _writer(descriptor: int) -> guest_console.Sink:
    def write(data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(descriptor, view) :]
            except BlockingIOError:
                select.select([], [descriptor], [])

    return write


@contextlib.contextmanager
def _terminal_kept() -> Iterator[None]:
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
