"""The whole conversation of Kata's driver with the real process, and a guest that sees what is plugged in.

The guest has the drivers of a disk in slot 1 and an interface in slot 5, as far as it takes to be told of changes. Its memory
is shared, as Kata has it for virtiofsd, so the test reads what the guest has seen.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kata import Sandbox, open_tap
from kvm.conftest import SOURCE
from kvm.guests import DATA, Asm
from stratovirt.arch.x86_64 import layout
from unit.virtio_driver import (
    ACKNOWLEDGE,
    CONFIG,
    DRIVER,
    DRIVER_FEATURES,
    DRIVER_FEATURES_SEL,
    DRIVER_OK,
    FEATURES_OK,
    INTERRUPT_ACK,
    STATUS,
)

DEADLINE = 60.0
PROGRAM = [sys.executable, "-IS", "-c",
           f"import sys; sys.path.insert(0, {str(SOURCE)!r}); from stratovirt.__main__ import main; sys.exit(main())"]
DISK_INTERRUPTS, CAPACITY, NET_INTERRUPTS, LINK, ALIVE = (DATA + 4 * number for number in range(5))
F_STATUS = 1 << 16  # of the interface: its configuration has the state of the link
LINK_AT = 6


def guest() -> bytes:
    disk, net = layout.slot(1), layout.slot(5)
    asm = Asm().set_stack().gate(32 + disk.irq, "disk").gate(32 + net.irq, "net").load_idt().pic()
    for address in (DISK_INTERRUPTS, CAPACITY, NET_INTERRUPTS, LINK, ALIVE):
        asm.store(address, 0)
    for slot, features in ((disk, 0), (net, F_STATUS)):
        for status in (0, ACKNOWLEDGE | DRIVER):
            asm.store(slot.base + STATUS, status)
        for word, bits in ((0, features), (1, 1)):
            asm.store(slot.base + DRIVER_FEATURES_SEL, word).store(slot.base + DRIVER_FEATURES, bits)
        for status in (FEATURES_OK, FEATURES_OK | DRIVER_OK):
            asm.store(slot.base + STATUS, ACKNOWLEDGE | DRIVER | status)
    asm.sti()
    again = asm.label()
    asm.inc(ALIVE).jmp(again)
    for name, slot, at, size, seen, times in (("disk", disk, 0, 4, CAPACITY, DISK_INTERRUPTS),
                                              ("net", net, LINK_AT, 2, LINK, NET_INTERRUPTS)):
        asm.handler(name).store(slot.base + INTERRUPT_ACK, 3).mov(0, 0)
        asm.load_eax(slot.base + CONFIG + at, size).store_eax(seen).inc(times).end_of_interrupt()
    return asm.kernel()


class Ram:
    """The guest's shared memory, mapped by another process: this one."""

    def __init__(self, pid: int) -> None:
        files = (f"/proc/{pid}/fd/{name}" for name in os.listdir(f"/proc/{pid}/fd"))
        path = next(path for path in files if os.readlink(path).startswith("/memfd:"))
        fd = os.open(path, os.O_RDONLY)
        self._map = mmap.mmap(fd, DATA + mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ)
        os.close(fd)

    def word(self, address: int) -> int:
        return int.from_bytes(self._map[address : address + 4], "little")

    def wait(self, address: int, value: int) -> None:
        until = time.monotonic() + DEADLINE
        while self.word(address) != value:
            assert time.monotonic() < until, (hex(address), self.word(address), value)
            time.sleep(0.002)

    def close(self) -> None:
        self._map.close()


@pytest.fixture
def kata(tmp_path: Path) -> Iterator[Callable[..., Sandbox]]:
    """Starts a sandbox with the guest above and, where this machine lets it have one, a tap on descriptor 3."""
    made: list[Sandbox] = []
    kernel = tmp_path / "vmlinux.container"
    kernel.write_bytes(guest())

    def start(**options: object) -> Sandbox:
        rootfs = tmp_path / "kata-containers.img"
        rootfs.write_bytes(bytes(1 << 20))
        taps: tuple[tuple[str, int, str], ...] = ()
        try:
            taps = (("eth0", open_tap("svkata0"), "02:42:ac:11:00:02"),)
        except OSError:
            pass  # no right to: the rest of the conversation is the same
        try:
            sandbox = Sandbox(tmp_path / "vm", PROGRAM, kernel, image=rootfs, memory=128, mem_share=True, taps=taps,
                              words="systemd.unit=kata-containers.target agent.log=debug", **options)  # type: ignore[arg-type]
        finally:
            for _, fd, _ in taps:
                os.close(fd)
        made.append(sandbox)
        return sandbox

    yield start
    for sandbox in made:
        sandbox.close()


def volume(tmp_path: Path, number: int) -> Path:
    path = tmp_path / f"volume{number}"
    path.write_bytes(bytes(512 * (100 + number)))
    return path


def has_o_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("debug", [False, True], ids=["quiet", "debug"])
def test_the_whole_conversation(kata: Callable[..., Sandbox], tmp_path: Path, debug: bool) -> None:
    if not has_o_direct(volume(tmp_path, 0)):
        pytest.skip("the driver asks for aio=native, and this file system has no O_DIRECT")
    sandbox = kata(smp=2, debug=debug)
    assert sandbox.wait_for_monitor() < 10
    ram = Ram(sandbox.process.pid)
    before = ram.word(ALIVE)
    ram_runs = time.monotonic() + DEADLINE
    while ram.word(ALIVE) == before:  # nobody sends `cont`
        assert time.monotonic() < ram_runs
    assert len(set(sandbox.pin_processors(2))) == 2
    assert (sandbox.folder / "qmp.socket").stat().st_mode & 0o777 == 0o600

    # Three volumes: slots 1 to 3, of which the guest drives the first.
    for number in range(3):
        node, reply = sandbox.add_volume(f"drive-{number:016x}", volume(tmp_path, number))
        assert (node, reply) == (f"/dev/vd{'bcd'[number]}", {})
    ram.wait(CAPACITY, 100)
    assert ram.word(DISK_INTERRUPTS) == 1

    # What goes wrong is an error reply, and nothing changes: the driver does not roll back and may come again.
    assert "has been added" in sandbox.blockdev_add("drive-0000000000000000", volume(tmp_path, 0))["desc"]
    assert sandbox.blockdev_add("drive-gone", tmp_path / "gone")["class"] == "GenericError"
    assert sandbox.blockdev_add("drive-extra", volume(tmp_path, 7)) == {}  # and no device_add follows
    for addr, words in (("1", "The slot 1 is occupied already."), ("0", "The slot 0 is occupied already."),
                        ("4", "A maximum of 4 block replaceable devices are supported.")):
        reply = sandbox.qmp.ask("device_add", id="drive-extra", driver="virtio-blk-mmio", drive="drive-extra", addr=addr)
        assert reply == {"class": "GenericError", "desc": words}
    assert sandbox.qmp.ask("blockdev-del", **{"node-name": "drive-extra"}) == {}

    # Out, and the same name in again, over a restart of the shim.
    sandbox.remove_volume("drive-0000000000000000")
    ram.wait(CAPACITY, 0)
    assert "not found" in sandbox.qmp.ask("device_del", id="drive-0000000000000000")["desc"]
    sandbox.shim_restarts()
    for number in range(11, 16):
        node, reply = sandbox.add_volume("drive-0000000000000000", volume(tmp_path, number), discard="unmap")
        assert (node, reply) == ("/dev/vdb", {})
        ram.wait(CAPACITY, 100 + number)
        sandbox.remove_volume("drive-0000000000000000")
        ram.wait(CAPACITY, 0)
    ram.wait(DISK_INTERRUPTS, 12)

    # Not Kata's, but any other client's of the same interface: an interface comes and goes.
    try:
        tap = open_tap("svkata1")
    except OSError:
        tap = -1
    if tap >= 0:
        for _ in range(3):
            assert sandbox.qmp.ask("getfd", tap, fdname="net-fd") == {}
            assert sandbox.qmp.ask("netdev_add", id="eth1", type="tap", fds="net-fd") == {}
            assert sandbox.qmp.ask("device_add", id="eth1", driver="virtio-net-mmio", netdev="eth1", addr="1",
                                   mac="02:42:ac:11:00:03") == {}
            ram.wait(LINK, 1)
            assert sandbox.qmp.ask("device_del", id="eth1") == {}
            assert sandbox.qmp.event("DEVICE_DELETED")["device"] == "eth1"
            ram.wait(LINK, 0)
        os.close(tap)

    # A monitor that only connects, several times, harms nobody; then the end.
    for _ in range(3):
        sandbox.shim_restarts()
        assert sandbox.qmp.ask("query-status")["running"] is True
    assert sandbox.qmp.ask("quit") == {}
    assert sandbox.qmp.event("SHUTDOWN") == {"guest": False, "reason": "host-qmp-quit"}
    assert sandbox.process.wait(DEADLINE) == 0
    assert not sandbox.qmp_path.exists() and not sandbox.console_path.exists()
    assert "ERROR" not in sandbox.account() and "Traceback" not in sandbox.account()
    ram.close()


def test_the_stop_of_a_sandbox_leaves_nothing(kata: Callable[..., Sandbox], tmp_path: Path) -> None:
    """Paused or not, QMP is there for the driver's last look; after SIGKILL the pipe ends and the directory can go."""
    sandbox = kata()
    sandbox.wait_for_monitor()
    assert sandbox.qmp.ask("stop") == {}
    sandbox.shim_restarts()
    sandbox.stop()
    assert not sandbox.folder.exists()


def test_the_version_probe() -> None:
    done = subprocess.run([*PROGRAM, "--version"], capture_output=True, text=True, check=True, timeout=DEADLINE)
    assert done.stdout.startswith("StratoVirt ") and done.stdout.count("\n") == 1
