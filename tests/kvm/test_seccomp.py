"""The whole program under its filters: which threads have them, what they allow, and what happens when they do not."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvm.conftest import SOURCE
from kvm.guests import Asm, hello
from kvm.test_qmp import Client
from stratovirt.arch.x86_64 import layout
from stratovirt.backends.tap import open_taps
from stratovirt.config.vm import NetdevConfig
from stratovirt.errors import ConfigError
from stratovirt.sandbox import KIND_NAMES, MAIN, VCPU
from system_calls import compare, seen
from unit.images import Load
from unit.virtio_devices import disk_content
from unit.virtio_driver import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_FEATURES,
    DRIVER_FEATURES_SEL,
    DRIVER_OK,
    FEATURES_OK,
    QUEUE_DESC,
    QUEUE_DEVICE,
    QUEUE_DRIVER,
    QUEUE_NOTIFY,
    QUEUE_NUM,
    QUEUE_READY,
    QUEUE_SEL,
    STATUS,
    GuestQueue,
)

DEADLINE = 60.0
RINGS = 0x30_0000  # 64 KiB for each queue: its rings, and from 16 KiB on its buffers
QUEUE_SIZE = 32


class Image:
    """Memory of a guest before it starts, as much of it as queues take."""

    def __init__(self) -> None:
        self.bytes = bytearray(1 << 20)

    def write(self, address: int, data: bytes) -> None:
        self.bytes[address - RINGS : address - RINGS + len(data)] = data


class Busy:
    """A guest that drives its devices for ever: all queues are in its image, ready to be served."""

    def __init__(self) -> None:
        self.memory = Image()
        self.asm = Asm().set_stack()
        self._queues = 0

    def queue(self) -> tuple[GuestQueue, int]:
        """A queue, and where its buffers can be."""
        base = RINGS + 0x10000 * self._queues
        self._queues += 1
        return GuestQueue(self.memory, base, QUEUE_SIZE), base + 0x4000  # type: ignore[arg-type]

    def drive(self, slot: int, features: int, queues: dict[int, GuestQueue], times: int = 2) -> None:
        """Take the device of a slot into use, as the specification says, and let it go and take it again once."""
        window, asm = layout.slot(slot).base, self.asm
        for _ in range(times):
            asm.store(window + STATUS, 0).store(window + STATUS, ACKNOWLEDGE).store(window + STATUS, ACKNOWLEDGE | DRIVER)
            asm.store(window + DRIVER_FEATURES_SEL, 0).store(window + DRIVER_FEATURES, features)
            asm.store(window + DRIVER_FEATURES_SEL, 1).store(window + DRIVER_FEATURES, 1)
            asm.store(window + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)
            for number, queue in queues.items():
                asm.store(window + QUEUE_SEL, number).store(window + QUEUE_NUM, queue.size)
                for register, address in ((QUEUE_DESC, queue.desc), (QUEUE_DRIVER, queue.avail), (QUEUE_DEVICE, queue.used)):
                    asm.store(window + register, address).store(window + register + 4, 0)
                asm.store(window + QUEUE_READY, 1)
            asm.store(window + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
            for number in queues:
                asm.store(window + QUEUE_NOTIFY, number)

    def disk(self, slot: int, holes: bool = True) -> None:
        """Reads, writes, a flush; with `holes` a discard and zeroes."""
        queue, at = self.queue()
        for number, (kind, sector) in enumerate(((0, 5), (1, 7), (4, 0), (11, 16), (13, 24), (0, 63))[: None if holes else 3]):
            place = at + 0x800 * number
            self.memory.write(place, struct.pack("<IIQ", kind, 0, sector if kind < 2 else 0))
            chain = [(place, 16, False)]
            if kind < 2:
                chain.append((place + 0x200, 512, kind == 0))
            elif kind > 4:
                self.memory.write(place + 0x200, struct.pack("<QII", sector, 8, 0))
                chain.append((place + 0x200, 16, False))
            queue.add([*chain, (place + 0x7F0, 1, True)])
        # VIRTIO_BLK_F_FLUSH, DISCARD, WRITE_ZEROES
        self.drive(slot, 1 << 9 | (1 << 13 | 1 << 14 if holes else 0), {0: queue})

    def interface(self, slot: int) -> None:
        """Buffers for what comes, and a frame to send."""
        receive, at = self.queue()
        for number in range(8):
            receive.add([(at + 0x800 * number, 0x700, True)])
        send, at = self.queue()
        self.memory.write(at, bytes(12) + b"\xff" * 6 + b"\x52\x54\0\0\0\1" + b"\x88\xb5" + bytes(46))
        send.add([(at, 72, False)])
        self.drive(slot, 0, {0: receive, 1: send})

    def entropy(self, slot: int) -> None:
        queue, at = self.queue()
        queue.add([(at, 64, True)])
        self.drive(slot, 0, {0: queue})

    def kernel(self) -> bytes:
        again = self.asm.text("driven\n").sti().label()
        self.asm.hlt().jmp(again)
        return self.asm.kernel(Load(bytes(self.memory.bytes), RINGS))


def image(path: Path) -> Path:
    path.write_bytes(disk_content(64))
    return path


def idle() -> bytes:
    return Asm().set_stack().text("running\n").sti().halt_forever().kernel()


def connect(path: Path) -> Client:
    client = Client(path)
    client.ask("qmp_capabilities")
    return client


def threads_of(pid: int) -> list[Path]:
    """/proc/PID/task/*, without the workers of the kernel that count as threads of this process."""
    return [task for task in Path(f"/proc/{pid}/task").iterdir()
            if not (task / "comm").read_text().startswith(("kvm-", "vhost-"))]


def status_of(pid: int, field: str) -> set[int]:
    """The field of /proc/PID/task/*/status, of all threads."""
    found = set()
    for task in threads_of(pid):
        found |= {int(line.split()[1]) for line in (task / "status").read_text().splitlines() if line.startswith(f"{field}:")}
    return found


# -- on and off


def test_every_thread_has_a_filter_while_the_machine_runs(launch, tmp_path: Path) -> None:
    qmp = tmp_path / "qmp"
    program = launch(idle(), "-smp", "3", "-object", "iothread,id=io0", "-qmp", f"unix:{qmp},server,nowait")
    program.wait_for("running\n")
    client = connect(qmp)  # answered by the loop: the main thread is confined
    pid = program.process.pid
    assert len(threads_of(pid)) == 5
    assert status_of(pid, "Seccomp") == {2}
    assert status_of(pid, "NoNewPrivs") == {1}
    client.ask("quit")
    assert program.finish()[0] == 0
    client.close()


def test_disable_seccomp(launch, tmp_path: Path) -> None:
    qmp = tmp_path / "qmp"
    program = launch(idle(), "-disable-seccomp", "-qmp", f"unix:{qmp},server,nowait")
    program.wait_for("running\n")
    client = connect(qmp)
    assert status_of(program.process.pid, "Seccomp") == {0}
    assert status_of(program.process.pid, "NoNewPrivs") == {0}
    client.close()


def test_a_host_without_filters(kernel, tmp_path: Path) -> None:
    """As in a container whose own filter does not know seccomp(2)."""
    code = f"""import os, struct, sys; sys.path.insert(0, {str(SOURCE)!r})
from stratovirt.sandbox import kernel
code = ((0x20, 0, 0, 0), (0x15, 0, 1, 317), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7fff0000))
real, kernel.FILTERS = kernel.FILTERS, [b"".join(struct.pack("<HBBI", *one) for one in code)]
sandbox = kernel.Sandbox(2)
sandbox.begin()
sandbox.confine(0)
kernel.FILTERS = real
from stratovirt.__main__ import main
sys.exit(main())"""
    words = ["-machine", "microvm", "-m", "128", "-kernel", kernel(hello()), "-serial", "stdio"]
    for more, status, out in (((), 1, b""), (("-disable-seccomp",), 0, b"hello\n")):
        done = subprocess.run([sys.executable, "-IS", "-c", code, *words, *more], stdin=subprocess.DEVNULL, capture_output=True,
                              timeout=DEADLINE, check=False)
        assert (done.returncode, done.stdout) == (status, out)
        if status:
            assert done.stderr.startswith(b"stratovirt: ")
            assert b"-disable-seccomp" in done.stderr
            assert done.stderr.count(b"\n") == 1


# -- what has to work


def test_a_line_of_a_vcpu_begins_a_new_log_on_the_main_thread(launch, tmp_path: Path) -> None:
    """The boot-time port's line comes from a vCPU's thread, which may not open or rename files."""
    log = tmp_path / "log"
    log.touch()
    os.truncate(log, 100 << 20)
    asm = Asm().set_stack().text("running\n").out(0x3FB, 0x03)
    asm.in_eax(0x3F8).out(0x3FF, 1)  # the scratch register is the boot-time port
    program = launch(asm.sti().halt_forever().kernel(), "-D", str(log))
    program.wait_for("running\n")
    until = time.monotonic() + DEADLINE
    while not (tmp_path / "log1").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    program.process.send_signal(signal.SIGTERM)
    status, _, error = program.finish()
    assert (status, error) == (0, "")
    assert "received signal 15" in log.read_text()


def test_stopped_and_continued_from_outside(launch, tmp_path: Path) -> None:
    """Waits that SIGSTOP has interrupted go on through restart_syscall."""
    qmp = tmp_path / "qmp"
    program = launch(idle(), "-smp", "2", "-object", "iothread,id=io0", "-qmp", f"unix:{qmp},server,nowait")
    program.wait_for("running\n")
    client = connect(qmp)
    for _ in range(3):
        program.process.send_signal(signal.SIGSTOP)
        time.sleep(0.05)
        program.process.send_signal(signal.SIGCONT)
        assert client.ask("stop") == {}
        assert client.ask("cont") == {}
    client.ask("quit")
    assert program.finish()[0] == 0
    client.close()


def test_a_ring_that_nobody_asked_for(launch, tmp_path: Path) -> None:
    qmp = tmp_path / "qmp"
    program = launch(idle(), "-qmp", f"unix:{qmp},server,nowait")
    program.wait_for("running\n")
    client = connect(qmp)
    assert client.ask("blockdev-add", **{"node-name": "d0", "driver": "raw", "cache": {"direct": False},
                                           "file": {"driver": "file", "filename": str(image(tmp_path / "disk")),
                                                    "aio": "iouring"}}) == {}
    assert client.ask("device_add", id="d0", driver="virtio-blk-mmio", drive="d0", addr="0x0") == {}
    assert client.ask("query-status")["running"] is True
    client.close()


# -- violations: a defect is put into a device, and the product's own way into the sandbox is taken

DEFECTS = {
    0: ("from stratovirt.devices.i8042 import I8042\n"
        "I8042.write = lambda self, *arguments: os.open('/etc/passwd', os.O_RDONLY)"),
    1: ("from stratovirt.backends.block import RawImage\n"
        "RawImage.perform = lambda self, request: os.open('/etc/passwd', os.O_RDONLY)"),
    2: ("from stratovirt.machine.lifecycle import Lifecycle\n"
        "Lifecycle.pause = lambda self: os.execv('/bin/true', ['true'])"),
}


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_violation_ends_the_machine_with_a_line_in_its_log(kernel, tmp_path: Path, kind: int) -> None:
    log, qmp = tmp_path / "log", tmp_path / "qmp"
    guest = Busy()
    guest.disk(0)
    guest.asm.text("going\n")
    if kind == 0:
        guest.asm.out(0x64, 0x20)
    code = (f"import os, sys; sys.path.insert(0, {str(SOURCE)!r})\n{DEFECTS[kind]}\n"
            "from stratovirt.__main__ import main\nsys.exit(main())")
    words = ["-machine", "microvm", "-m", "128", "-kernel", kernel(guest.kernel()), "-serial", "file,path=/dev/null",
             "-D", str(log), "-qmp", f"unix:{qmp},server,nowait", "-object", "iothread,id=io0",
             "-drive", f"file={image(tmp_path / 'disk')},id=d0,direct=off,aio=off,discard=unmap",
             "-device", "virtio-blk-device,drive=d0,id=b0,iothread=io0"]
    process = subprocess.Popen([sys.executable, "-IS", "-c", code, *words], stderr=subprocess.PIPE)
    try:
        if kind == 2:
            until = time.monotonic() + DEADLINE
            while not qmp.exists():
                assert time.monotonic() < until
                time.sleep(0.01)
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(qmp))
                client.sendall(json.dumps({"execute": "stop"}).encode())
                assert process.wait(DEADLINE) == -signal.SIGSYS
        assert process.wait(DEADLINE) == -signal.SIGSYS
        assert process.stderr is not None
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.wait()
    last = log.read_text().splitlines()[-1]
    call = "execve (59)" if kind == 2 else "openat (257)"
    assert re.fullmatch(rf"\S+: \[{process.pid}\]\[\d+\]\[seccomp\]:ERROR: system call {re.escape(call)} is not allowed on "
                        rf"{KIND_NAMES[kind]}; arguments .*; the process ends", last), last


# -- what strace sees


def drives(tmp_path: Path) -> list[str]:
    """Disks in slots 0 to 3, a kind of engine in each."""
    words = []
    for number, (engine, thread) in enumerate((("threads", ",iothread=io0"), ("native,direct=on", ",iothread=io0"),
                                               ("io_uring", ""), ("off", ""))):
        path = image(tmp_path / f"disk{number}")
        direct = "" if "direct" in engine else ",direct=off"
        words += ["-drive", f"file={path},id=d{number},aio={engine}{direct},discard=unmap",
                  "-device", f"virtio-blk-device,drive=d{number},id=b{number}{thread}"]
    return words


def make_tap(name: str) -> bool:
    """Is there a tap of that name to be had?"""
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return False
    try:
        for tap in open_taps(NetdevConfig("t", name)):
            tap.close()
    except ConfigError:
        return False
    return True


def test_what_strace_sees_is_what_is_allowed(launch, tmp_path: Path) -> None:
    """Every device that this host can give a machine, hot-plug, pause, reset, log, end; and nothing is allowed for nothing."""
    assert shutil.which("strace"), "strace is missing: lab/setup.sh test"
    if not make_tap("svtrace0"):
        pytest.skip("this host gives no taps")
    trace, qmp, log, console = tmp_path / "trace", tmp_path / "qmp", tmp_path / "log", tmp_path / "console"
    guest = Busy()
    for slot in range(4):
        guest.disk(slot)
    guest.interface(4)
    guest.interface(5)
    guest.entropy(6)
    words = [*drives(tmp_path), "-object", "iothread,id=io0", "-object", "rng-random,id=r0,filename=/dev/urandom",
             "-device", "virtio-rng-device,rng=r0,id=rng0", "-device", "virtio-balloon-device,id=bal0",
             "-netdev", "tap,id=n0,ifname=svtrace0", "-device", "virtio-net-device,netdev=n0,id=net0,iothread=io0",
             "-netdev", "tap,id=n1,ifname=svtrace1", "-device", "virtio-net-device,netdev=n1,id=net1",
             "-chardev", f"socket,id=c0,path={console},server,nowait", "-device", "virtio-serial-device,id=s0",
             "-device", "virtconsole,chardev=c0,id=p0", "-qmp", f"unix:{qmp},server,nowait", "-D", str(log), "-smp", "2"]
    log.touch()
    os.truncate(log, 100 << 20)  # the next line begins a new one
    words += ["-pidfile", str(tmp_path / "pid")]
    program = launch(guest.kernel(), *words, prefix=("strace", "-D", "-f", "-ff", "-o", str(trace)))
    program.wait_for("driven\n")
    client = connect(qmp)
    with socket.socket(socket.AF_UNIX) as terminal:
        terminal.connect(str(console))
        assert client.ask("stop") == {}
        assert client.ask("migrate", uri=f"file:{tmp_path / 'snapshot'}") == {}
        assert client.ask("cont") == {}
        added = {"node-name": "d9", "driver": "raw", "cache": {"direct": False},
                 "file": {"driver": "file", "filename": str(image(tmp_path / "disk9")), "aio": "threads"}}
        assert client.ask("blockdev-add", **added) == {}
        assert client.ask("device_del", id="b3") == {}
        assert client.ask("device_add", id="d9", driver="virtio-blk-mmio", drive="d9", addr="0x3") == {}
        assert client.ask("device_del", id="d9") == {}
        assert client.ask("device_del", id="net1") == {}
        assert client.ask("netdev_add", id="n2", ifname="svtrace2") == {}
        assert client.ask("device_add", id="n2", driver="virtio-net-mmio", netdev="n2", addr="0x1") == {}
        assert client.ask("device_del", id="n2") == {}
        assert client.ask("device_del", id="net0") == {}
        assert client.ask("netdev_add", id="n3", ifname="svtrace3") == {}
        assert client.ask("device_add", id="n3", driver="virtio-net-mmio", netdev="n3", addr="0x0") == {}
        assert client.ask("device_del", id="b0") == {}
        assert client.ask("query-kvm")["enabled"] is True
        assert client.ask("system_reset") == {}
        program.wait_for("driven\n")
        assert client.ask("balloon", value=100 << 20) == {}
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
        status, _, error = program.finish()
    client.close()
    assert (status, error) == (0, "")
    assert (tmp_path / "log1").exists()
    forbidden, idle_calls = compare(seen(trace))
    assert not any(forbidden.values()), forbidden
    assert not any(idle_calls.values()), f"allowed, and not needed in this run: {idle_calls}"


STORAGE_DAEMON = "/usr/bin/qemu-storage-daemon"


def storage_daemon(folder: Path) -> subprocess.Popen[bytes]:
    """A disk's back end in another process, listening at `folder`/back."""
    (folder / "back").unlink(missing_ok=True)
    socket = folder / "back"
    process = subprocess.Popen(
        [STORAGE_DAEMON, "--blockdev", f"driver=file,filename={folder / 'disk'},node-name=disk", "--export",
         f"type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={socket},writable=on"], stdin=subprocess.DEVNULL)
    wait_until(lambda: sockets_at(socket) >= 1)
    return process


def sockets_at(path: Path) -> int:
    """One that listens, and one for each connection."""
    return Path("/proc/net/unix").read_text().count(str(path))


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_back_end_in_another_process_is_talked_to_and_tried_again(launch, tmp_path: Path) -> None:
    if not os.path.exists(STORAGE_DAEMON):
        pytest.skip(f"no {STORAGE_DAEMON}: Debian's qemu-system-common")
    trace, qmp, log = tmp_path / "trace", tmp_path / "qmp", tmp_path / "log"
    image(tmp_path / "disk")
    guest = Busy()
    guest.disk(0, holes=False)
    daemon = storage_daemon(tmp_path)
    try:
        program = launch(guest.kernel(), "-machine", "microvm,mem-share=on", "-D", str(log),
                         "-qmp", f"unix:{qmp},server,nowait", "-chardev", f"socket,id=c0,path={tmp_path / 'back'},reconnect=1",
                         "-device", "vhost-user-blk-device,chardev=c0,id=b0",
                         prefix=("strace", "-D", "-f", "-ff", "-o", str(trace)))
        program.wait_for("driven\n")
        client = connect(qmp)
        assert client.ask("stop") == {}
        assert client.ask("cont") == {}
        daemon.kill()
        daemon.wait()
        wait_until(lambda: "b0: " in log.read_text())
        daemon = storage_daemon(tmp_path)
        wait_until(lambda: sockets_at(tmp_path / "back") >= 2)
        assert client.ask("system_reset") == {}
        program.wait_for("driven\n")
        client.ask("quit")
        status, _, error = program.finish()
        client.close()
    finally:
        daemon.kill()
        daemon.wait()
    assert (status, error) == (0, "")
    assert "[seccomp]" not in log.read_text()
    found = seen(trace)
    assert {"sendmsg", "recvmsg"} <= found[VCPU]
    assert {"sendmsg", "recvmsg", "socket", "connect"} <= found[MAIN]
