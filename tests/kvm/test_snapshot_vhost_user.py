"""Snapshots of machines whose disk is qemu-storage-daemon's: a tiny guest writes on and on, and no write is lost."""

from __future__ import annotations

import os
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvm.guests import DATA
from kvm.test_qmp import Client
from kvm.test_seccomp import RINGS, STORAGE_DAEMON, Busy, connect, storage_daemon, wait_until
from stratovirt.arch.x86_64 import layout
from unit.images import Load
from unit.virtio_driver import QUEUE_NOTIFY

SECTOR, SECTORS = 512, 64
NUMBER, PLACE = DATA, RINGS + 0x4000

pytestmark = pytest.mark.skipif(
    not os.path.exists(STORAGE_DAEMON), reason="no qemu-storage-daemon: Debian's qemu-system-common")


def writer() -> bytes:
    """Writes a growing number, one request after the other: number n is the first word of sector n modulo 64."""
    busy = Busy()
    queue, place = busy.queue()
    assert place == PLACE
    busy.memory.write(place, struct.pack("<IIQ", 1, 0, 0))
    queue.add([(place, 16, False), (place + SECTOR, SECTOR, False), (place + 0x7F0, 1, True)])
    busy.drive(0, 0, {0: queue}, times=1)  # which has it do the first one
    asm = busy.asm
    queue_index, used_index = queue.avail + 2, queue.used + 2
    wait = asm.label()
    asm.load_eax(used_index).raw(0x25, b"\xff\xff\0\0").cmp_eax(1).jnz(wait)
    again = asm.label()
    asm.inc(NUMBER).load_eax(NUMBER).store_eax(place + SECTOR).raw(0x25, struct.pack("<I", SECTORS - 1)).store_eax(place + 8)
    asm.raw(0x66, 0xFF, 0x05, struct.pack("<I", queue_index))  # inc word [avail.idx]; every entry of the ring names chain 0
    asm.store(layout.slot(0).base + QUEUE_NOTIFY, 0)
    wait = asm.label()
    asm.load_eax(used_index, 2).raw(0x66, 0x3B, 0x05, struct.pack("<I", queue_index)).jnz(wait)  # cmp ax, [avail.idx]
    asm.jmp(again)
    return asm.kernel(Load(bytes(busy.memory.bytes), RINGS))


def numbers(disk: Path) -> list[int]:
    data = disk.read_bytes()
    return [struct.unpack_from("<I", data, SECTOR * sector)[0] for sector in range(SECTORS)]


def wait_for_writes(disk: Path, count: int = 3 * SECTORS) -> None:
    before = max(numbers(disk))
    wait_until(lambda: max(numbers(disk)) >= before + count)


def check(disk: Path) -> int:
    """The last so many numbers are there, each in its sector, and none that is older or newer."""
    found = numbers(disk)
    newest = max(found)
    assert sorted(found) == list(range(newest - SECTORS + 1, newest + 1))
    assert all(number % SECTORS == sector for sector, number in enumerate(found))
    return newest


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Callable[[], Any]]:
    made = []
    (tmp_path / "disk").write_bytes(bytes(SECTOR * SECTORS))

    def start() -> Any:
        made.append(storage_daemon(tmp_path))
        return made[-1]

    yield start
    for process in made:
        process.kill()
        process.wait()


@pytest.fixture
def start(launch: Callable[..., Any], tmp_path: Path) -> Iterator[Callable[..., tuple[Any, Client]]]:
    clients = []

    def run(name: str, *more: str) -> tuple[Any, Client]:
        qmp = tmp_path / name
        program = launch(writer(), "-machine", "microvm,mem-share=on", "-D", str(tmp_path / f"{name}.log"),
                         "-qmp", f"unix:{qmp},server,nowait", "-chardev",
                         f"socket,id=c0,path={tmp_path / 'back'},reconnect=1",
                         "-device", "vhost-user-blk-device,chardev=c0,id=b0", *more)
        wait_until(qmp.exists)
        clients.append(connect(qmp))
        return program, clients[-1]

    yield run
    for client in clients:
        client.close()


def end(program: Any, client: Client) -> None:
    client.ask("quit")
    assert program.finish()[0] == 0


def test_a_disk_that_is_written_all_the_time(daemon, start, tmp_path) -> None:
    daemon()
    disk, snap = tmp_path / "disk", tmp_path / "snap"
    first, client = start("first")
    wait_for_writes(disk)
    for _ in range(2):  # the second into the place of the first
        assert client.ask("migrate", uri=f"file:{snap}") == {}
        saved = check(disk)
        time.sleep(0.1)
        assert check(disk) == saved, "a machine that stands still writes nothing"
        assert client.ask("query-migrate") == {"status": "completed"}
        client.ask("cont")
        wait_for_writes(disk)
    assert client.ask("migrate", uri=f"file:{snap}", track=True) == {}
    client.ask("cont")
    wait_for_writes(disk)
    assert client.ask("migrate", uri=f"file:{tmp_path / 'next'}", base=str(snap)) == {}
    saved = check(disk)
    end(first, client)
    assert "writes memory" in (tmp_path / "first.log").read_text(), "what a back end writes is found by comparing"
    content = (snap / "memory").read_bytes(), (tmp_path / "next" / "memory").read_bytes()

    second, client = start("second", "-incoming", f"file:{tmp_path / 'next'}")
    wait_for_writes(disk)
    client.ask("stop")
    assert check(disk) > saved
    assert ((snap / "memory").read_bytes(), (tmp_path / "next" / "memory").read_bytes()) == content
    client.ask("cont")
    wait_for_writes(disk)
    assert client.ask("migrate", uri=f"file:{snap}") == {}
    check(disk)
    end(second, client)


def test_a_back_end_that_hangs_is_no_snapshot_and_the_guest_goes_on(daemon, start, tmp_path) -> None:
    process = daemon()
    disk = tmp_path / "disk"
    program, client = start("qmp")
    wait_for_writes(disk)
    process.send_signal(signal.SIGSTOP)
    error = client.ask("migrate", uri=f"file:{tmp_path / 'snap'}")
    assert "vhost-user-blk device b0 cannot be saved" in error["desc"]
    assert list((tmp_path / "snap").iterdir()) == []
    assert client.ask("query-status")["status"] == "running"
    process.kill()  # woken up it would finish what it had begun, in rings that are no longer its own
    process.wait()
    wait_until(lambda: "not connected" in client.ask("migrate", uri=f"file:{tmp_path / 'other'}").get("desc", ""))
    assert not (tmp_path / "other").exists(), "nothing was written"
    daemon()
    wait_for_writes(disk)
    assert client.ask("migrate", uri=f"file:{tmp_path / 'snap'}") == {}
    end(program, client)


def test_another_disk_or_none_is_refused(daemon, start, launch, tmp_path) -> None:
    process = daemon()
    program, client = start("qmp")
    wait_for_writes(tmp_path / "disk")
    assert client.ask("migrate", uri=f"file:{tmp_path / 'snap'}") == {}
    end(program, client)
    process.kill()
    process.wait()
    again = ("-machine", "microvm,mem-share=on", "-chardev", f"socket,id=c0,path={tmp_path / 'back'}",
             "-device", "vhost-user-blk-device,chardev=c0,id=b0", "-incoming", f"file:{tmp_path / 'snap'}")
    status, _, error = launch(None, *again).finish()
    assert status == 1 and "-chardev socket,id=c0,path" in error and "running already" in error
    (tmp_path / "disk").write_bytes(bytes(SECTOR * SECTORS * 2))
    daemon()
    status, _, error = launch(None, *again).finish()
    assert status == 1 and "the disk had 64 sectors" in error and "has 128" in error
    status, _, error = launch(None, *again[:1], "microvm", *again[2:]).finish()
    assert status == 1 and "must be shared" in error
