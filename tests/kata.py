"""Kata Containers' driver for StratoVirt, as far as the monitor can tell: what it starts, and what it says to it.

`Sandbox` holds one conversation in the driver's order: the directory, the argument list, the descriptors from 3 upward, QMP
for at most ten seconds, the console, and then one QMP connection for the rest. Both test tiers use it, with a tiny guest or
with Linux.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

QMP_SECONDS, QMP_PAUSE = 10.0, 0.05  # the driver's own limits
LINE_LIMIT = 64 << 10  # a longer line ends the driver's connection
EVENT_SECONDS = 60.0
SANDBOX = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
DEVICES_WORDS = "reboot=k panic=1 net.ifnames=0 ramdom.trust_cpu=on pci=off iommu=off acpi=off"

_TUNSETIFF = 0x4004_54CA
_TAP_FLAGS = 0x0002 | 0x1000 | 0x4000  # IFF_TAP | IFF_NO_PI | IFF_VNET_HDR


def open_tap(name: str) -> int:
    """A queue of a tap as the driver opens it. Raises: OSError without the right to."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("=16sH22x", name.encode(), _TAP_FLAGS))
    except OSError:
        os.close(fd)
        raise
    return fd


class Qmp:
    """The driver's client: no ids, one command at a time, a line each, events in between."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(EVENT_SECONDS)
        try:
            self.socket.connect(str(path))
        except OSError:
            self.socket.close()
            raise
        self._file = self.socket.makefile("rb")
        self._events: list[dict[str, Any]] = []
        greeting = self._read()["QMP"]["version"]["qemu"]
        assert greeting["major"] >= 5, greeting
        assert self.ask("qmp_capabilities") == {}

    def _read(self) -> dict[str, Any]:
        line = self._file.readline(LINE_LIMIT + 1)
        assert line.endswith(b"\r\n") and len(line) <= LINE_LIMIT, line[:200]
        message: dict[str, Any] = json.loads(line)
        return message

    def ask(self, command: str, *fds: int, **arguments: Any) -> Any:
        """The value of `return`, or the object of `error`."""
        request = json.dumps({"execute": command, **({"arguments": arguments} if arguments else {})})
        if fds:
            socket.send_fds(self.socket, [request.encode() + b"\n"], list(fds))
        else:
            self.socket.sendall(request.encode() + b"\n")
        while "event" in (message := self._read()):
            self._events.append(message)
        if "error" in message:
            assert all(isinstance(value, str) for value in message["error"].values()), message
            return message["error"]
        return message["return"]

    def event(self, name: str) -> dict[str, Any]:
        """The data of the next event of that name, past or to come."""
        while True:
            message = self._events.pop(0) if self._events else self._read()
            if message["event"] == name:
                data: dict[str, Any] = message["data"]
                return data

    def close(self) -> None:
        self._file.close()
        self.socket.close()


class Sandbox:
    """One pod's machine. `program` is the command without arguments; the kernel's user words come first in `-append`.

    `image` is a disk with a partition, or `initrd` an initramfs. `vsock` is (descriptor, CID) with the CID reserved already,
    `taps` are (interface, descriptor, MAC). `share` starts virtiofsd on a listening socket, which it may keep; the driver owns
    that socket, whatever the options say. With `debug` there is a console and the environment is the one variable.
    """

    def __init__(self, folder: Path, program: list[str], kernel: Path, *, image: Path | None = None, initrd: Path | None = None,
                 words: str = "", smp: int = 1, memory: int = 2048, debug: bool = False, mem_share: bool = False,
                 vsock: tuple[int, int] | None = None, taps: tuple[tuple[str, int, str], ...] = (),
                 share: Callable[[socket.socket], None] | None = None) -> None:
        self.folder = folder / SANDBOX[:12]  # a whole id would make the sockets' paths too long in a test's directory
        self.folder.mkdir(parents=True)
        self.qmp_path = self.folder / "qmp.socket"
        self.console_path = self.folder / "console.socket"
        self.debug = debug
        self.console: socket.socket | None = None
        self._qmp: Qmp | None = None
        self._slots: list[str | None] = [None] * 4  # the driver's own table; the first is the image's, or nobody's
        passed = [fd for fd, _ in ([vsock] if vsock else [])] + [fd for _, fd, _ in taps]
        self._errors = open(folder / "stderr", "w+b")  # noqa: SIM115 - closed by close(); the driver has /dev/null there
        self.share_path = self.folder / "virtiofs_kata.socket" if share else None
        if share and self.share_path:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(self.share_path))
                listener.listen(1)
                share(listener)
        self.arguments = self._arguments(kernel, image, initrd, words, smp, memory, mem_share or bool(share), vsock, taps)
        self.process = self._execute([*program, *self.arguments], passed)

    def _arguments(self, kernel: Path, image: Path | None, initrd: Path | None, words: str, smp: int, memory: int,
                   mem_share: bool, vsock: tuple[int, int] | None, taps: tuple[tuple[str, int, str], ...]) -> list[str]:
        root = "root=/dev/vda1 rootflags=data=ordered,errors=remount-ro ro rootfstype=ext4" if image else ""
        end = "debug console=hvc0" if self.debug else "quiet 8250.nr_uarts=0 agent.log_vport=1025"
        line = [
            "-name", f"sandbox-{SANDBOX}", "-uuid", str(uuid.uuid4()), "-smp", str(smp), "-m", str(memory),
            "-kernel", str(kernel), "-append", " ".join(part for part in (words, root, DEVICES_WORDS, end) if part),
            "-qmp", f"unix:{self.qmp_path},server,nowait", "-D", "-disable-seccomp",
            "-machine", "type=microvm,dump-guest-core=off" + (",mem-share=on" if mem_share else ""),
        ]
        if initrd:
            line += ["-initrd", str(initrd)]
        line += ["-object", "rng-random,id=objrng0,filename=/dev/urandom",
                 "-device", "virtio-rng-device,rng=objrng0,id=virtio-rng0"]
        if self.debug:
            line += ["-device", "virtio-serial-device,id=virtio-serial0",
                     "-chardev", f"socket,id=charconsole0,path={self.console_path},server,nowait",
                     "-device", "virtconsole,chardev=charconsole0,id=virtio-console0,nr=0"]
        if image:
            line += ["-drive", f"id=rootfs,file={image},readonly=on,direct=off",
                     "-device", "virtio-blk-device,drive=rootfs,id=virtio-blk0"]
        number = 3
        if vsock:
            line += ["-device", f"vhost-vsock-device,id=vsock-id,guest-cid={vsock[1]},vhostfd={number}"]
            number += 1
        if self.share_path:
            line += ["-chardev", f"socket,id=virtio_fs,path={self.share_path},server,nowait",
                     "-device", "vhost-user-fs-device,chardev=virtio_fs,tag=kataShared,id=virtio-fs0"]
        for interface, _, mac in taps:
            line += ["-netdev", f"tap,id={interface},fds={number}",
                     "-device", f"virtio-net-device,netdev={interface},id={interface}" + (f",mac={mac}" if mac else "")]
            number += 1
        return line

    def _execute(self, line: list[str], passed: list[int]) -> subprocess.Popen[bytes]:
        """Start it as Go does: `passed` become 3, 4, …, everything else is closed, and there is no wrapper."""
        copies = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in passed]  # out of the way of the numbers they get

        def arrange() -> None:
            for number, fd in enumerate(copies, 3):
                os.dup2(fd, number)
            os.closerange(3 + len(copies), 1 << 16)

        try:
            return subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._errors, close_fds=False,
                preexec_fn=arrange, env={"STRATOVIRT_LOG_LEVEL": "info"} if self.debug else None)
        finally:
            for fd in copies:
                os.close(fd)

    # -- the start

    def wait_for_monitor(self) -> float:
        """Until QMP answers; the driver then leaves. How many seconds it took."""
        began = time.monotonic()
        while True:
            try:
                Qmp(self.qmp_path).close()
                break
            except OSError:
                assert self.process.poll() is None, self.account()
                assert time.monotonic() - began < QMP_SECONDS, self.account()
                time.sleep(QMP_PAUSE)
        if self.debug:
            self.console = socket.socket(socket.AF_UNIX)
            self.console.settimeout(EVENT_SECONDS)
            self.console.connect(str(self.console_path))  # a failure fails the start
        return time.monotonic() - began

    @property
    def qmp(self) -> Qmp:
        """The connection that the driver opens when it first needs one, and keeps."""
        if self._qmp is None:
            self._qmp = Qmp(self.qmp_path)
        return self._qmp

    def shim_restarts(self) -> None:
        """The shim is started again: its connection is gone without a word, and the next one is a new one."""
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None

    def pin_processors(self, count: int) -> list[int]:
        """The vCPU pinning check: one real thread for each processor, and each can be given a place."""
        threads: dict[int, int] = {}
        for cpu in self.qmp.ask("query-cpus"):
            for name, kind in (("CPU", int), ("thread_id", int), ("current", bool), ("halted", bool), ("qom_path", str),
                               ("arch", str)):
                assert type(cpu[name]) is kind, cpu
            assert all(type(cpu["props"][name]) is int for name in ("socket-id", "core-id", "thread-id")), cpu
            threads[cpu["CPU"]] = cpu["thread_id"]
        assert sorted(threads) == list(range(count))
        assert {str(thread) for thread in threads.values()} <= set(os.listdir(f"/proc/{self.process.pid}/task"))
        for thread in threads.values():
            os.sched_setaffinity(thread, os.sched_getaffinity(thread))
        return [threads[number] for number in sorted(threads)]

    # -- volumes

    def add_volume(self, name: str, path: Path, **more: Any) -> tuple[str, Any]:
        """Plug a raw block volume; the device node that the agent is told to wait for, and the last reply."""
        slot = self._slots.index(None, 1)
        reply = self.blockdev_add(name, path, **more)
        if reply == {}:
            reply = self.qmp.ask("device_add", id=name, driver="virtio-blk-mmio", drive=name, addr=str(slot), romfile="")
        self._slots[slot] = name
        return f"/dev/vd{chr(ord('a') + slot)}", reply

    def blockdev_add(self, name: str, path: Path, **more: Any) -> Any:
        kind = "file" if path.is_file() else "host_device"
        return self.qmp.ask("blockdev-add", **{
            "driver": "raw", "node-name": name, "read-only": False,
            "file": {"driver": kind, "filename": str(path), "aio": "native"}, **more})

    def remove_volume(self, name: str) -> None:
        """Take it out; the driver waits for the event and forgets the slot. The image goes with it."""
        assert self.qmp.ask("device_del", id=name) == {}
        assert self.qmp.event("DEVICE_DELETED") == {"device": name, "path": name}
        self._slots[self._slots.index(name)] = None

    # -- the end

    def stop(self) -> None:
        """The driver's stop: QMP must still be reachable, then the process is killed and its directory removed."""
        assert self.qmp is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(EVENT_SECONDS)
        assert self.process.stdout is not None
        assert self.process.stdout.read() == b"", "something holds the pipe open, or was written to it"
        self.shim_restarts()
        shutil.rmtree(self.folder)

    def account(self) -> str:
        """For failure messages."""
        self._errors.seek(0)
        return f"exit status {self.process.poll()}: {self._errors.read().decode(errors='replace')[-3000:]}"

    def close(self) -> None:
        self.shim_restarts()
        if self.console is not None:
            self.console.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        with contextlib.suppress(OSError):
            self._errors.close()
