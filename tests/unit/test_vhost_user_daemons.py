"""The devices on vhost-user with Debian's own back ends, driven without a guest: the rings are this test's."""

from __future__ import annotations

import os
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stratovirt.errors import StratoVirtError
from stratovirt.loop import EventLoop
from stratovirt.vhost.user import BackendSocket
from stratovirt.virtio.vhost_user import VhostUserDevice
from stratovirt.virtio.vhost_user_blk import VhostUserBlk
from stratovirt.virtio.vhost_user_fs import VhostUserFs
from stratovirt.virtio.vhost_user_net import VhostUserNet
from unit.vhost_user_backend import readable, shared_memory
from unit.virtio_driver import CONFIG, DATA, EVENT_IDX, STATUS, Driver

STORAGE_DAEMON, VIRTIOFSD, TESTPMD = "/usr/bin/qemu-storage-daemon", "/usr/lib/qemu/virtiofsd", "/usr/bin/dpdk-testpmd"
MAC = bytes.fromhex("525400123456")
SECONDS = 60.0
FUSE_INIT, FUSE_GETATTR, FUSE_LOOKUP = 26, 3, 1


def listens(path: Path) -> bool:
    """Bound, and with room for who connects: __SO_ACCEPTCON among the flags."""
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    return any(line.endswith(f" {path}") and int(line.split()[3], 16) & 0x10000 for line in lines)


class DaemonDriver(Driver):
    def __init__(self, socket: Path, make: Callable[..., VhostUserDevice]) -> None:
        self.loop = EventLoop()
        self.reported: list[StratoVirtError] = []
        memory = shared_memory()
        self.vhost_user = make(BackendSocket("c0", str(socket), memory, 0), self.loop, self.reported.append)
        super().__init__(self.vhost_user, memory)

    def serve(self, rounds: int = 1000) -> int:
        self.loop.run_once(0)
        for number, fd in enumerate(self.transport.notify_fds):
            if number not in self.device.external_queues and readable(fd):
                self.transport.on_notify(number)
        return 0

    def wait(self, number: int) -> list[tuple[int, int]]:
        """Notify a queue, and wait for what it returns and for the interrupt."""
        queue, interrupts = self.queues[number], self.line.count
        self.notify(number)
        until = time.monotonic() + SECONDS
        returned: list[tuple[int, int]] = []
        while not returned or self.line.count == interrupts:
            assert time.monotonic() < until, (returned, self.reported)
            self.loop.run_once(0.1)
            returned += queue.collect()
        queue.release_all()
        return returned


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Callable[..., DaemonDriver]]:
    made: list[tuple[subprocess.Popen[bytes], DaemonDriver]] = []

    def start(command: list[str], make: Callable[..., VhostUserDevice]) -> DaemonDriver:
        if not os.path.exists(command[0]):
            pytest.skip(f"no {command[0]}: Debian's qemu-system-common")
        socket = tmp_path / "socket"
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=tmp_path)
        until = time.monotonic() + SECONDS
        while not listens(socket):
            if process.poll() is not None or time.monotonic() > until:
                process.kill()
                pytest.skip(f"{command[0]} does not run here: {process.communicate()[1].decode()[-300:]}")
            time.sleep(0.02)
        driver = DaemonDriver(socket, make)
        made.append((process, driver))
        return driver

    yield start
    for process, driver in made:
        process.kill()
        process.communicate()
        driver.close()
        driver.loop.close()


@pytest.fixture
def disk(daemon: Callable[..., DaemonDriver], tmp_path: Path) -> DaemonDriver:
    (tmp_path / "image").write_bytes(bytes(range(256)) * 4096)
    return daemon(
        [STORAGE_DAEMON, "--blockdev", f"driver=file,filename={tmp_path / 'image'},node-name=disk", "--export",
         f"type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={tmp_path / 'socket'},writable=on,num-queues=2"],
        lambda socket, loop, report: VhostUserBlk(socket, 2, 128, loop, report))


def transfer(driver: DaemonDriver, kind: int, sector: int, data: bytes = bytes(512), number: int = 0) -> tuple[int, bytes]:
    driver.memory.write(DATA, struct.pack("<IIQ", kind, 0, sector) + data + b"\xff")
    driver.queues[number].add([(DATA, 16, False), (DATA + 16, len(data), kind == 0), (DATA + 16 + len(data), 1, True)])
    driver.wait(number)
    answer = driver.memory.read(DATA + 16, len(data) + 1)
    return answer[-1], answer[:-1]


def test_qemu_storage_daemon(disk: DaemonDriver, tmp_path: Path) -> None:
    for _ in range(3):
        disk.start(disk.offered() & ~EVENT_IDX)
        assert disk.read(CONFIG) == 2048 and disk.read(CONFIG + 34, 2) == 2
        assert transfer(disk, 0, 3) == (0, bytes(range(256)) * 2)
        for number in (0, 1):
            data = os.urandom(512)
            assert transfer(disk, 1, 10 + number, data, number)[0] == 0
            assert (tmp_path / "image").read_bytes()[512 * (10 + number) :][:512] == data
        disk.vhost_user.pause()
        assert [queue["position"] for queue in disk.transport.save()["queues"]] == [2, 1]  # type: ignore[attr-defined]
        disk.vhost_user.resume()
        assert transfer(disk, 0, 10)[0] == 0
        disk.write(STATUS, 0)
    assert disk.reported == []


@pytest.mark.skipif(os.geteuid() != 0, reason="virtiofsd needs root")
def test_virtiofsd(daemon: Callable[..., DaemonDriver], tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "file").write_bytes(b"x" * 12345)
    driver = daemon([VIRTIOFSD, f"--socket-path={tmp_path / 'socket'}", "-o", f"source={tmp_path / 'shared'},sandbox=chroot"],
                    lambda socket, loop, report: VhostUserFs(socket, b"shared", loop, report))

    def fuse(opcode: int, body: bytes, room: int) -> tuple[int, bytes]:
        request = struct.pack("<IIQQIIII", 40 + len(body), opcode, 77, 1, 0, 0, 0, 0) + body
        driver.memory.write(DATA, request)
        driver.queues[1].add([(DATA, len(request), False), (DATA + 0x1000, 16, True), (DATA + 0x2000, room, True)])
        driver.wait(1)
        _, error, unique = struct.unpack("<IiQ", driver.memory.read(DATA + 0x1000, 16))
        assert unique == 77
        return error, driver.memory.read(DATA + 0x2000, room)

    for _ in range(2):
        driver.start(driver.offered() & ~EVENT_IDX)
        error, init = fuse(FUSE_INIT, struct.pack("<IIII", 7, 31, 0x20000, 0), 64)
        assert error == 0 and struct.unpack_from("<I", init)[0] == 7
        assert "DEVICE_STATE" in driver.vhost_user.not_to_save()
        error, entry = fuse(FUSE_LOOKUP, b"file\0", 128)
        assert error == 0 and struct.unpack_from("<Q", entry, 48)[0] == 12345
        driver.write(STATUS, 0)
    assert driver.reported == []


@pytest.mark.skipif(os.geteuid() != 0, reason="testpmd needs root")
@pytest.mark.parametrize("pairs", [1, 2])
def test_testpmd(daemon: Callable[..., DaemonDriver], tmp_path: Path, pairs: int) -> None:
    """It answers ARP: a request goes out through the first pair, and what it makes of it comes in."""
    driver = daemon(
        [TESTPMD, "--no-huge", "-m", "256", "--no-pci", "--lcores", "(0-1)@0", "--file-prefix", f"t{os.getpid()}",
         "--vdev", f"net_vhost0,iface={tmp_path / 'socket'},queues={pairs}", "--", "--forward-mode=icmpecho", "--auto-start",
         "--total-num-mbufs=4096", f"--rxq={pairs}", f"--txq={pairs}", "--stats-period=100"],
        lambda socket, loop, report: VhostUserNet(socket, pairs, MAC, loop, 256, report))
    for _ in range(2):
        driver.start(driver.offered() & ~EVENT_IDX)
        receive, transmit = driver.queues[:2]
        for number in range(8):
            receive.add([(DATA + 2048 * number, 2048, True)])
        arp = struct.pack(">HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, MAC, bytes((10, 0, 0, 1)), bytes(6), bytes((10, 0, 0, 2)))
        frame = b"\xff" * 6 + MAC + b"\x08\x06" + arp
        until, answer = time.monotonic() + SECONDS, b""
        while not answer:
            # testpmd needs a moment until it polls the rings; nothing is lost that it has not seen
            assert time.monotonic() < until, driver.reported
            driver.memory.write(DATA + 0x8000, bytes(12) + frame)
            transmit.add([(DATA + 0x8000, 12 + len(frame), False)])
            driver.notify(0)
            driver.notify(1)
            for _ in range(20):
                driver.loop.run_once(0.05)
                for head, length in receive.collect():
                    answer = driver.memory.read(DATA + 2048 * head, length)[12:]
                if answer:
                    break
            transmit.collect()
            transmit.release_all()
        assert (answer[:6], answer[12:14], answer[20:22]) == (MAC, b"\x08\x06", b"\x00\x02")
        assert answer[28:32] == bytes((10, 0, 0, 2)) and answer[38:42] == bytes((10, 0, 0, 1))
        driver.vhost_user.pause()
        assert driver.transport.save()["device"]["pairs"] == 1  # type: ignore[index]
        driver.vhost_user.resume()
        driver.write(STATUS, 0)
    assert driver.reported == []
