"""Runs a command in the lab: an emulated host with hardware KVM.

The root file system of the x86_64 host is this machine's own; the arm64 host's is made of Debian packages, and sees of this
machine the working tree, its environment and the cache, at their own places.

    python -m lab.run [--arch aarch64] [--share DIR] [--deadline SECONDS] [--icount] [-- COMMAND]

The command's stdout and stderr pass through byte for byte, as they come; the exit status is the command's. 124 means that
the deadline ended the lab, 125 that the lab itself failed. Without a command: a shell on the terminal.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path

from guest import cache
from guest.cpio import Archive

from lab import host
from lab.script import standard_input

TREE = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
LOCK = Path("/tmp/stratovirt-lab.lock")
EXIT_DEADLINE = 124
EXIT_LAB_FAILED = 125
# QEMU 7.2 clears an interrupt flag of a processor at each exit of a nested guest, without a lock and not atomically: now
# and then an interrupt that comes at that very moment stays pending in the local APIC and is forgotten by the processor,
# which sleeps on although an interrupt waits. The next one wakes it. So the host keeps a periodic tick: the APIC's timer in
# periodic mode comes again by itself, whatever was lost before, where a one-shot timer waits to be armed by the very
# handler that never ran. (Not with --icount, where everything runs on the processor's own thread.)
# A second defect of it has no such remedy: it keeps the vector of an interrupt that KVM has injected as if it were an exception
# still to be raised, and raises it when it leaves its loop for a timer before the guest has left next: a second time, with
# interrupts disabled, too. Now and then a guest waits for ever for a lock that it holds itself (benches/spinning.py).
PERIODIC_TICK = "nohz=off highres=off"
# The lab host is up in 3 s (10 with --icount); one that is not up after this long never will be.
BOOT_SECONDS = 120.0
READY = b"ready\n"
_PR_SET_PDEATHSIG = 1
# An AMD processor with nested paging, without the features that QEMU's emulation has not and would warn about. XSAVE is
# among them: the emulation does not let KVM see a guest's XSETBV, so KVM's idea of the guest's extended state is wrong, and
# guests complain of an inconsistent XSAVE area.
_MISSING = "xsave rdseed sha-ni fxsr-opt misalignsse 3dnowprefetch osvw topoext nrip-save xsavec"
PROCESSOR = ",".join(["EPYC", "+svm", "+npt", *(f"-{name}" for name in _MISSING.split())])
# Boots four times as fast as `max`, whose pointer authentication is slow to emulate. EL2 with the host extensions, GICv3.
ARM64_MACHINE = ["-machine", "virt,virtualization=on,gic-version=3", "-cpu", "cortex-a76"]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="lab.run", description="Run a command in an emulated host.")
    parser.add_argument("--arch", choices=host.ARCHITECTURES, default="x86_64", help="of the host (default x86_64)")
    parser.add_argument("--share", type=Path, help="directory that is mounted read-write at /mnt/share")
    parser.add_argument("--deadline", type=float, default=1800.0, help="seconds after which the lab is ended (default 1800)")
    parser.add_argument("--icount", action="store_true", help="one processor whose clock counts instructions, 1 ns each")
    parser.add_argument("--memory", type=int, default=3072, help="MiB (default 3072)")
    parser.add_argument("--prepare", action="store_true", help="build the lab's kernel and initramfs, run nothing")
    parser.add_argument("command", nargs="*", help="shell command; several words are joined by blanks")
    options = parser.parse_args(arguments)
    if options.prepare:
        host.kernel(options.arch), host.host_initramfs(options.arch), host.root_image(options.arch)
        return 0
    command = " ".join(options.command)
    if not command and not sys.stdin.isatty():
        command = standard_input("lab")
    if options.share is not None and not options.share.is_dir():
        print(f"lab: --share {options.share}: not a directory", file=sys.stderr)
        return EXIT_LAB_FAILED
    return run(
        command or None,
        share=options.share,
        deadline=options.deadline,
        icount=options.icount,
        memory=options.memory,
        arch=options.arch,
    )


def run(
    command: str | None,
    *,
    share: Path | None = None,
    deadline: float = 1800.0,
    icount: bool = False,
    memory: int = 3072,
    terminal: bool = False,
    arch: str = "x86_64",
) -> int:
    """Boot the lab, run `command` (None: a shell), power off; the exit status as in the module's docstring.

    With `terminal`, and always for the shell, the command's streams are this terminal.
    One lab runs at a time on a machine: a second one waits, and its deadline counts from its own start.
    """
    kernel, initramfs, root = host.kernel(arch), host.host_initramfs(arch), host.root_image(arch)
    with _machine_wide_lock(), tempfile.TemporaryDirectory(prefix="stratovirt-lab-") as folder:
        work = Path(folder)
        with open(work / "initrd", "wb") as initrd:
            initrd.write(initramfs.read_bytes())
            initrd.write(_instructions(command, arch, share is not None, terminal or command is None))
        return Lab(work, arch, kernel, root, share, icount, memory).run(terminal or command is None, deadline)


class Lab:
    """One QEMU process and the three streams that come out of it."""

    def __init__(
        self, work: Path, arch: str, kernel: Path, root: Path | None, share: Path | None, icount: bool, memory: int
    ) -> None:
        self.work = work
        self.arch = arch
        self.kernel = kernel
        self.root = root
        self.share = share
        self.icount = icount
        self.memory = memory
        self.console = work / "console"
        self.status = b""

    def run(self, interactive: bool, deadline: float) -> int:
        ours, theirs = {}, {}
        for name in ("out", "err", "status"):
            ours[name], theirs[name] = socket.socketpair()
        descriptors = [end.fileno() for end in theirs.values()]
        command = self.command_line(interactive, {name: end.fileno() for name, end in theirs.items()})
        parent = os.getpid()
        with _terminal_kept(), _terminated_by_signals():
            qemu = subprocess.Popen(
                command,
                stdin=None if interactive else subprocess.DEVNULL,
                stdout=None if interactive else sys.stderr.fileno(),
                pass_fds=descriptors,
                preexec_fn=lambda: _die_with(parent),
            )
            for end in theirs.values():
                end.close()
            try:
                in_time = self._relay(qemu, ours, interactive, time.monotonic() + deadline)
            finally:
                if qemu.poll() is None:
                    qemu.kill()
                qemu.wait()
                for end in ours.values():
                    end.close()
        if not in_time:
            booted = self.status.startswith(READY)
            self._explain(f"ended at its deadline of {deadline:.0f} s" if booted else "did not come up")
            return EXIT_DEADLINE if booted else EXIT_LAB_FAILED
        try:
            return int(self.status.removeprefix(READY))
        except ValueError:
            self._explain(f"ended without a status (QEMU's own: {qemu.returncode})")
            return EXIT_LAB_FAILED

    def command_line(self, interactive: bool, streams: dict[str, int]) -> list[str]:
        line = [f"qemu-system-{self.arch}", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        line += self._arm64() if self.arch == "aarch64" else self._x86_64()
        line += ["-m", str(self.memory), "-kernel", str(self.kernel), "-initrd", str(self.work / "initrd")]
        if self.root is not None:
            line += ["-drive", f"if=none,id=root,format=raw,readonly=on,file={str(self.root).replace(',', ',,')}"]
            line += ["-device", "virtio-blk-pci,drive=root"]
        line += ["-serial", f"file:{self.console}", "-monitor", f"unix:{self.work / 'monitor'},server=on,wait=off"]
        line += ["-virtfs", "local,path=/,mount_tag=root,security_model=none,multidevs=remap,readonly=on"]
        if self.share is not None:
            path = str(self.share.resolve()).replace(",", ",,")
            line += ["-virtfs", f"local,path={path},mount_tag=share,security_model=none,multidevs=remap"]
        line += ["-device", "virtio-serial-pci,id=streams"]
        for number, (name, descriptor) in enumerate(streams.items(), 1):
            line += ["-chardev", f"socket,id={name},fd={descriptor}"]
            line += ["-device", f"virtserialport,bus=streams.0,nr={number},chardev={name},name={name}"]
        if interactive:
            line += ["-chardev", "stdio,id=terminal,signal=off"]
            line += ["-device", "virtconsole,bus=streams.0,nr=10,chardev=terminal"]
        return line

    def _x86_64(self) -> list[str]:
        if self.icount:
            processors = ["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-smp", "1"]
        else:
            # One processor: with two, code that one patches (static keys, at every start of a machine) is now and then still
            # executed by the other as it was, and the host goes round in a breakpoint. Two on one thread of the emulator wait
            # up to 100 ms for each other.
            processors = ["-accel", "tcg,tb-size=512", "-smp", "1"]
        words = [
            "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check",
            "rcupdate.rcu_expedited=1 audit=0 apparmor=0 nmi_watchdog=0 nowatchdog random.trust_cpu=on",
            "" if self.icount else PERIODIC_TICK,
        ]
        machine = ["-machine", "q35,smm=off,vmport=off", "-cpu", PROCESSOR]
        return [*machine, *processors, "-append", " ".join(words)]

    def _arm64(self) -> list[str]:
        if self.icount:
            processors = ["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-smp", "1"]
        else:
            processors = ["-accel", "tcg,thread=multi,tb-size=512", "-smp", "2"]
        words = "console=ttyAMA0 quiet panic=-1 mitigations=off nokaslr rcupdate.rcu_expedited=1 audit=0 apparmor=0 nowatchdog"
        return [*ARM64_MACHINE, *processors, "-append", words]

    def _relay(self, qemu: subprocess.Popen[bytes], ends: dict[str, socket.socket], interactive: bool, until: float) -> bool:
        """Pass the streams on until QEMU has ended and all is read. False when `until`, or the time to boot, comes first."""
        booted_until = min(until, time.monotonic() + BOOT_SECONDS)
        poller, names = select.poll(), {end.fileno(): name for name, end in ends.items()}
        for descriptor in names:
            poller.register(descriptor, select.POLLIN)
        if interactive and sys.stdin.isatty():
            # A terminal that was closed. Its SIGHUP reaches the session's leader, and make, if that is it, does not pass it on.
            poller.register(0, 0)
        while names:
            left = (until if self.status.startswith(READY) else booted_until) - time.monotonic()
            if left <= 0:
                return False
            for descriptor, _ in poller.poll(left * 1000):
                if descriptor == 0:
                    raise SystemExit(128 + signal.SIGHUP)
                name = names[descriptor]
                try:
                    data = ends[name].recv(1 << 16)
                except ConnectionResetError:
                    data = b""
                if not data:
                    poller.unregister(descriptor)
                    del names[descriptor]
                elif name == "status":
                    self.status += data
                else:
                    _write_all(1 if name == "out" else 2, data)
        try:
            qemu.wait(max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        return True

    def _explain(self, what: str) -> None:
        print(f"lab: {what}; the end of the lab host's console:", file=sys.stderr)
        text = self.console.read_text(errors="replace") if self.console.exists() else ""
        for line in text.splitlines()[-15:]:
            print(f"lab:   {line}", file=sys.stderr)


def _instructions(command: str | None, arch: str, shared: bool, terminal: bool) -> bytes:
    """The archive that is appended to the initramfs: what to run and where."""
    size = shutil.get_terminal_size()
    settings = {
        "TREE": str(TREE),
        "VENV": str(TREE / ".venv"),
        "SHARE": "1" if shared else "",
        "MODULES": str(host.modules(arch).parent),
        "ROOT": "/dev/vda" if arch == "aarch64" else "",
        "STRATOVIRT_CACHE": str(cache.root().resolve()),
        "ROWS": str(size.lines),
        "COLUMNS": str(size.columns),
        "TERM": os.environ.get("TERM", "linux"),
    }
    lines = "".join(f"{name}={shlex.quote(value)}\n" for name, value in settings.items())
    archive = Archive()
    archive.file("lab/settings", lines.encode())
    archive.file("lab/inside", (HERE / "inside").read_bytes())
    if terminal:
        archive.file("lab/interactive", b"")
    archive.file("lab/cmd", (command if command is not None else "exec bash -i").encode() + b"\n")
    return archive.finish()


@contextlib.contextmanager
def _machine_wide_lock() -> Iterator[None]:
    """Only one lab at a time: two would take each other's processors and run into their deadlines."""
    try:
        descriptor = os.open(LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        descriptor = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        os.fchmod(descriptor, 0o666)  # another user's lab takes the same lock
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            cache.say("another lab is running: waiting for it to end")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _terminal_kept() -> Iterator[None]:
    """Put the terminal back as it was, however QEMU ends."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _terminated_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind like SIGINT, so that QEMU and the temporary directory go too."""

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
