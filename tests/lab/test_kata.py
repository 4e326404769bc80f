"""Kata's driver and Linux: the root is a partition of the first disk, the console is hvc0, the agent answers on vsock."""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from guest import assets
from linux_guest import DEADLINE

from kata import Sandbox, open_tap
from stratovirt.cli import guest_console

VIRTIOFSD = "/usr/lib/qemu/virtiofsd"
pytestmark = [
    pytest.mark.skipif(not os.path.exists("/dev/vhost-vsock") and not os.environ.get("STRATOVIRT_LAB"),
                       reason="no /dev/vhost-vsock"),
    pytest.mark.skipif(not os.path.exists(VIRTIOFSD), reason="no virtiofsd: Debian's qemu-system-common"),
]

MEBIBYTE = 1 << 20
HOST, GUEST = "10.79.0.1", "10.79.0.2"
VSOCK_SET_GUEST_CID = 0x4008_AF60
AGENT_PORT = 1024
PARTITION_START = 2048  # sectors

# What stands for the agent: the network first, then it waits for its handshake and for its volumes.
AGENT = f"""
ip link set eth0 up; ip addr add {GUEST}/24 dev eth0
echo root $(awk '$2 == "/" && $1 != "rootfs" {{ print $1, $3, substr($4, 1, 2) }}' /proc/mounts)
echo disks $(cd /sys/block; echo vd*) on $(cut -d' ' -f1 /proc/consoles)
ping -c 2 -q {HOST} >/tmp/ping; echo ping $? $(cat /sys/class/net/eth0/address)
mount -t virtiofs kataShared /mnt; echo shared $(cat /mnt/from-host); echo to the host >/mnt/from-guest
echo hello | vsockcat listen {AGENT_PORT}
for disk in b c d; do
    until [ "$(cat /sys/block/vd$disk/size)" != 0 ]; do sleep 0.1; done
    echo "vd$disk $(md5sum </dev/vd$disk)"
    echo "the guest's" | dd of=/dev/vd$disk conv=sync,notrunc,fsync 2>/tmp/e && echo "wrote vd$disk"
done
until [ "$(cat /sys/block/vdc/size)" = 0 ]; do sleep 0.1; done
echo out vdc
ip link set eth1 up
until [ "$(cat /sys/class/net/eth1/carrier)" = 1 ]; do sleep 0.1; done
echo in eth1
until [ "$(cat /sys/class/net/eth1/carrier)" = 0 ]; do sleep 0.1; done
echo out eth1
sleep 1000
"""


def partitioned(root: Path, target: Path, program: Path) -> Path:
    """An image with one partition that holds the root file system, and in it vsockcat and the command for init."""
    size = root.stat().st_size
    file_system = target.with_suffix(".ext4")
    shutil.copyfile(root, file_system)
    command = target.with_suffix(".cmd")
    command.write_text(AGENT)
    subprocess.run(["debugfs", "-w", "-f", "-", str(file_system)], check=True, capture_output=True, text=True,
                   input=f"write {program} sbin/vsockcat\nset_inode_field sbin/vsockcat mode 0100755\nwrite {command} cmd\n")
    with open(target, "wb") as image:
        entry = struct.pack("<B3sB3sII", 0, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", PARTITION_START, size // 512)
        image.write(bytes(446) + entry + bytes(48) + b"\x55\xaa")
        image.seek(PARTITION_START * 512)
        image.write(file_system.read_bytes())
    file_system.unlink()
    return target


class Console:
    """Reads console.socket as the driver does, and takes the command's output out of it."""

    def __init__(self, connection: socket.socket) -> None:
        self.stdout, self.everything = bytearray(), bytearray()
        self._decoder = guest_console.GuestConsole(self.stdout.extend, self.stdout.extend, lambda data: None)
        self._connection = connection
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while data := self._connection.recv(1 << 16):
                with self._changed:
                    self.everything += data
                    self._decoder.feed(data)
                    self._changed.notify_all()
        except OSError:
            return

    def wait_for(self, text: str, account: Callable[[], str]) -> str:
        """The rest of the line that begins with `text`."""
        until = time.monotonic() + DEADLINE
        with self._changed:
            while True:
                for line in self.stdout.decode().splitlines(keepends=True):
                    if line.startswith(text) and line.endswith("\n"):
                        return line.removeprefix(text).strip()
                left = until - time.monotonic()
                assert left > 0, f"no {text!r}: {bytes(self.everything[-2000:])!r} {account()}"
                self._changed.wait(left)


def dial(cid: int, account: Callable[[], str]) -> socket.socket:
    """The agent's handshake: a new socket each time, until the guest listens."""
    until = time.monotonic() + DEADLINE
    while True:
        agent = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        agent.settimeout(5)
        try:
            agent.connect((cid, AGENT_PORT))
            return agent
        except OSError:
            agent.close()
            assert time.monotonic() < until, account()
            time.sleep(0.05)


@pytest.fixture
def taps() -> Iterator[tuple[int, int]]:
    """Two taps, the first up and with the host's address: their queues."""
    fds = open_tap("svkata0"), open_tap("svkata1")
    for words in (("addr", "add", f"{HOST}/24", "dev", "svkata0"), ("link", "set", "svkata0", "up"),
                  ("link", "set", "svkata1", "up")):
        subprocess.run(["ip", *words], check=True, timeout=DEADLINE)
    yield fds
    for fd in fds:
        os.close(fd)


def test_a_pod_with_three_volumes(
    tmp_path: Path, kernels: Callable[[str], Path], taps: tuple[int, int], file_system: Callable[[int], Path]
) -> None:
    storage = file_system(24)  # with O_DIRECT: the driver asks for aio=native
    cid = random.randrange(1 << 31, (1 << 32) - 1)
    vsock = os.open("/dev/vhost-vsock", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(vsock, VSOCK_SET_GUEST_CID, cid.to_bytes(8, "little"))
    image = partitioned(assets.NAMES["root-disk"](), tmp_path / "kata-containers.img", kernels("vsockcat"))
    shared, daemons = tmp_path / "shared", []
    shared.mkdir()
    (shared / "from-host").write_text("a container's files\n")

    def share(listener: socket.socket) -> None:
        # The lab's file system is entered with chroot, where virtiofsd's default sandbox is refused.
        options = f"source={shared},sandbox=chroot,cache=auto"
        daemons.append(subprocess.Popen(
            [VIRTIOFSD, f"--fd={listener.fileno()}", "-o", options, "--thread-pool-size=1"], pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    words = f"init=/init {guest_console.kernel_words('', 'reboot')}"
    sandbox = Sandbox(tmp_path / "vm", [str(Path(sys.executable).parent / "stratovirt")], kernels("microvm-bzimage"),
                      image=image, words=words, smp=2, memory=512, debug=True, vsock=(vsock, cid),
                      taps=(("eth0", taps[0], "02:42:ac:11:00:02"),), share=share)
    os.close(vsock)
    try:
        print(f"QMP after {sandbox.wait_for_monitor():.2f} s")
        assert sandbox.console is not None
        console = Console(sandbox.console)

        def said(text: str) -> str:
            return console.wait_for(text, sandbox.account)

        assert said("root ") == "/dev/root ext4 ro"
        assert said("disks ") == "vda vdb vdc vdd on hvc0"
        assert said("ping ") == "0 02:42:ac:11:00:02"
        assert said("shared ") == "a container's files"
        with dial(cid, sandbox.account) as agent:
            agent.sendall(b"from the host\n")
            agent.shutdown(socket.SHUT_WR)
            assert agent.makefile("rb").read() == b"hello\n"
        said("from the host")
        assert len(set(sandbox.pin_processors(2))) == 2
        volumes = []
        for number in range(3):
            path = storage / f"volume{number}"
            path.write_bytes(hashlib.sha512(str(number).encode()).digest() * (MEBIBYTE // 64) * (number + 1))
            node, reply = sandbox.add_volume(f"drive-{number:016x}", path)
            assert (node, reply) == (f"/dev/vd{'bcd'[number]}", {})
            content = path.read_bytes()
            assert said(f"vd{'bcd'[number]} ").split()[0] == hashlib.md5(content).hexdigest()
            said(f"wrote vd{'bcd'[number]}")
            volumes.append((path, content))
        sandbox.shim_restarts()
        sandbox.remove_volume("drive-0000000000000001")
        said("out vdc")
        for path, content in volumes:
            assert path.read_bytes() == b"the guest's\n".ljust(512, b"\0") + content[512:]
        assert sandbox.qmp.ask("getfd", taps[1], fdname="net-fd") == {}
        assert sandbox.qmp.ask("netdev_add", id="eth1", type="tap", fds="net-fd") == {}
        assert sandbox.qmp.ask("device_add", id="eth1", driver="virtio-net-mmio", netdev="eth1", addr="1") == {}
        said("in eth1")
        assert sandbox.qmp.ask("device_del", id="eth1") == {}
        assert sandbox.qmp.event("DEVICE_DELETED")["device"] == "eth1"
        said("out eth1")
        assert (shared / "from-guest").read_text() == "to the host\n"
        sandbox.stop()
        assert daemons[0].wait(DEADLINE) is not None  # it ends with its one connection
        assert "Traceback" not in sandbox.account() and "ERROR" not in sandbox.account()
    finally:
        sandbox.close()
        for daemon in daemons:
            daemon.kill()
            daemon.wait()
