"""A microVM that boots Linux, as a test sees it: the process, its console, its QMP socket, and what its command printed."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from qemu.qmp.legacy import QEMUMonitorProtocol

from stratovirt.cli import guest_console

ROOT = Path(__file__).resolve().parents[2]

# form of kernel: (asset of the kernel, asset of the initramfs). On arm64 there is one form only, the Image: of the stock
# kernel, and of the small one.
_X86_64 = {
    "stock-bzimage": ("stock-bzimage", "stock-initramfs"),
    "stock-elf": ("stock-elf", "stock-initramfs"),
    "full-elf": ("full-elf", "full-initramfs"),
    "small-elf": ("microvm-elf", "microvm-initramfs"),
    "small-bzimage": ("microvm-bzimage", "microvm-initramfs"),
    "small-flat": ("microvm-flat", "microvm-initramfs"),
}
_AARCH64 = {
    "stock-elf": ("stock-image", "stock-initramfs"),
    "stock-gzip": ("stock-image-gz", "stock-initramfs"),
    "small-elf": ("microvm-image", "microvm-initramfs"),
    "small-16k-pages": ("microvm-image-16k", "microvm-initramfs"),
    "small-64k-pages": ("microvm-image-64k", "microvm-initramfs"),
}
ARM64 = platform.machine() == "aarch64"
KERNELS = _AARCH64 if ARM64 else _X86_64
SERIAL = "ttyAMA0" if ARM64 else "ttyS0"
KERNEL_LINE = f"console={SERIAL} reboot=k panic=-1 mitigations=off"
# Seconds. A boot takes 3 to 8 in the lab; the deadline only has to end a hang.
DEADLINE = 120.0


class Guest:
    """One run of the `stratovirt` command with its serial port on a pair of pipes.

    The console's bytes are kept whole (`console`) and in the log file; `stdout`, `stderr` and `status` are the guest
    command's, taken out of them. `programs` are some of this machine's that the guest is to have.
    `prefix` is a command that runs the other one.
    """

    def __init__(
        self,
        folder: Path,
        kernel: Path,
        ram_disk: Path,
        command: str,
        log: Path,
        *,
        smp: int = 1,
        memory: int = 256,
        disk: Path | None = None,
        read_only: bool = False,
        rng: bool = True,
        end: str = "reboot",
        words: str = "quiet",
        extra: tuple[str, ...] = (),
        qmp: bool = False,
        descriptors: tuple[int, ...] = (),
        programs: tuple[str, ...] = (),
        prefix: tuple[str, ...] = (),
        shared: bool = False,
    ) -> None:
        self.console = bytearray()
        self.stdout = bytearray()
        self.stderr = bytearray()
        self._decoder = guest_console.GuestConsole(self.stdout.extend, self.stderr.extend, lambda data: None)
        self._changed = threading.Condition()
        self._log = open(log, "wb")  # noqa: SIM115 - closed by close()
        self._monitor: QEMUMonitorProtocol | None = None
        self.qmp_path = folder / f"{log.stem[-20:]}.qmp"
        long = command if not guest_console.fits_inline(command) else ""
        if programs or long:
            ram_disk = self._larger(folder / f"{log.stem[-40:]}.initramfs", ram_disk, programs, long)
        append = f"{KERNEL_LINE} {words} {guest_console.kernel_words(command, end)}"
        machine = "microvm,mem-share=on" if shared else "microvm"
        line = [str(Path(sys.executable).parent / "stratovirt"), "-machine", machine, "-smp", str(smp), "-m", str(memory)]
        line += ["-kernel", str(kernel), "-initrd", str(ram_disk), "-append", append, "-serial", "stdio"]
        if disk is not None:
            line += ["-drive", f"id=disk,file={disk},direct=off,readonly={'on' if read_only else 'off'}"]
            line += ["-device", "virtio-blk-device,drive=disk,id=blk0"]
        if rng:
            line += ["-object", "rng-random,id=random,filename=/dev/urandom"]
            line += ["-device", "virtio-rng-device,rng=random,id=rng0"]
        if qmp:
            line += ["-qmp", f"unix:{self.qmp_path},server,nowait"]
        self._errors = open(log.with_suffix(".vmm"), "w+b")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*prefix, *line, *extra],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=ROOT,
            pass_fds=descriptors,
        )
        self._reader = threading.Thread(target=self._read, name="console", daemon=True)
        self._reader.start()

    @staticmethod
    def _larger(target: Path, ram_disk: Path, programs: tuple[str, ...], command: str) -> Path:
        """The initramfs with programs of this machine in it, and a command that is too long for the kernel's line."""
        from guest.programs import archive

        parts = [ram_disk.read_bytes(), *(archive(name) for name in programs)]
        if command:
            parts.append(guest_console.command_archive(command))
        target.write_bytes(b"".join(parts))
        return target

    # What the guest says

    def _read(self) -> None:
        assert self.process.stdout is not None
        while data := os.read(self.process.stdout.fileno(), 1 << 16):
            with self._changed:
                self._log.write(data)
                self._log.flush()
                self.console += data
                self._decoder.feed(data)
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def wait_for(self, text: bytes, *, stream: bytearray | None = None, count: int = 1, seconds: float = DEADLINE) -> None:
        """Return when `text` has come `count` times: on the console, or in `stream`."""
        seen = self.console if stream is None else stream
        until = time.monotonic() + seconds
        with self._changed:
            while seen.count(text) < count:
                left = until - time.monotonic()
                ended = self.process.poll() is not None and not self._reader.is_alive()
                if left <= 0 or ended:
                    why = "the process has ended" if ended else f"not within {seconds:.0f} s"
                    raise AssertionError(f"no {text!r} ({count} times): {why}\n{self.account()}")
                self._changed.wait(min(left, 1.0))

    def type(self, text: str) -> None:
        """Send text to the guest's serial port."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    # How it ends

    def wait_end(self, seconds: float = DEADLINE) -> int:
        """The exit status of the process, once it has ended by itself."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {seconds:.0f} s\n{self.account()}") from None
        self._reader.join(10)
        return self.process.returncode

    def finish(self, seconds: float = DEADLINE) -> tuple[int, str]:
        """Wait for the end; the guest command's status and stdout. The process must have ended with status 0."""
        assert self.wait_end(seconds) == 0, self.account()
        return self._decoder.finish(), self.stdout.decode()

    @property
    def errors(self) -> str:
        """What the VMM itself printed on stderr."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")

    def account(self) -> str:
        """For failure messages: the last lines of the console, and the VMM's own words."""
        tail = bytes(self.console[-2000:]).decode(errors="replace")
        return f"exit status {self.process.poll()}\n--- stderr\n{self.errors}\n--- console\n{tail}"

    def close(self) -> None:
        if self._monitor is not None:
            with contextlib.suppress(EOFError, OSError):  # the machine has ended, and its end of the connection with it
                self._monitor.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(10)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self._log.close()
        self._errors.close()

    # QMP

    @property
    def monitor(self) -> QEMUMonitorProtocol:
        """QEMU's own client, connected to the socket of `-qmp`."""
        if self._monitor is None:
            until = time.monotonic() + DEADLINE
            while not self.qmp_path.exists():
                if time.monotonic() > until or self.process.poll() is not None:
                    raise AssertionError(f"no QMP socket\n{self.account()}")
                time.sleep(0.02)
            self._monitor = QEMUMonitorProtocol(str(self.qmp_path))
            self._monitor.settimeout(DEADLINE)
            self._monitor.connect()
        return self._monitor

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a QMP command; its return value."""
        return self.monitor.cmd(command, **arguments)

    def wait_event(self, name: str) -> dict[str, Any]:
        """The next event of that name, past or to come."""
        event = self.monitor.pull_event(wait=DEADLINE)
        while event is not None and event["event"] != name:
            event = self.monitor.pull_event(wait=DEADLINE)
        assert event is not None
        return dict(event)
