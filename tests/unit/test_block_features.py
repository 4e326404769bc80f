"""virtio-blk beyond reads and writes: requests on their way, discard and zeroes, a request limit, images that change."""

from __future__ import annotations

import os
import select
import struct
import threading
import time
from pathlib import Path

import pytest

from stratovirt.backends import aio
from stratovirt.backends.aio_syscalls import is_zero
from stratovirt.backends.aio_threads import ThreadEngine
from stratovirt.backends.block import BlockRequest, NoImage, RawImage
from stratovirt.backends.block_rate import LeakyBucket
from stratovirt.config.vm import DriveConfig
from stratovirt.errors import ConfigError, HostError
from stratovirt.loop import EventLoop
from stratovirt.virtio import block
from stratovirt.virtio.block import VirtioBlock
from unit.virtio_devices import SECTOR, FakeClock, disk_content
from unit.virtio_driver import CONFIG, DATA, INTERRUPT_STATUS, NEEDS_RESET, RAM_SIZE, VERSION_1, Driver

pytestmark = pytest.mark.usefixtures("implementation")

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPPORTED = 0, 1, 2
F_BLK_SIZE, F_TOPOLOGY, F_MQ, F_DISCARD, F_WRITE_ZEROES = 1 << 6, 1 << 10, 1 << 12, 1 << 13, 1 << 14
SECTORS = 256

HEADER_AT, STATUS_AT, DATA_AT = DATA, DATA + 0x8000, DATA + 0x1_0000


def usable(name: str) -> bool:
    try:
        aio.probe(name)
    except ConfigError:
        return False
    return True


class Disk(Driver):
    """virtio-blk on a loop of its own."""

    def __init__(self, folder: Path, engine: str = "off", queues: int = 1, queue_size: int = 64, clock: FakeClock | None = None,
                 readonly: bool = False, kind: type[RawImage] = RawImage, **options: object) -> None:
        self.path = folder / "disk.img"
        if not self.path.exists():
            self.path.write_bytes(disk_content(SECTORS))
        first = "off" if engine == "off" else "threads"
        self.image = kind(DriveConfig("d", str(self.path), readonly, False, first, **options))  # type: ignore[arg-type]
        self.image.engine = engine
        self.loop = EventLoop(clock) if clock is not None else EventLoop()
        self.host_errors: list[HostError] = []
        self.block = VirtioBlock(self.image, queue_size, "", self.host_errors.append, loop=self.loop, queues=queues)
        super().__init__(self.block)
        for index, fd in enumerate(self.transport.notify_fds):
            self.loop.add(fd, select.EPOLLIN, lambda _events, index=index: self.transport.on_notify(index))

    def close(self) -> None:
        self.device.reset()
        self.block.replace_image(NoImage())
        self.loop.run_once(0)
        self.loop.close()
        super().close()
        self.image.close()

    def put(self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0, number: int = 0, queue: int = 0) -> int:
        """Make a request available, with memory of its own for each `number`; returns its head."""
        header, status, at = HEADER_AT + 16 * number, STATUS_AT + number, DATA_AT + 0x1000 * number
        self.memory.write(header, struct.pack("<IIQ", kind, 0, sector))
        self.memory.write(status, b"\xee")
        self.memory.write(at, data or bytes(room))
        buffers = [(header, 16, False)]
        if data:
            buffers.append((at, len(data), False))
        if room:
            buffers.append((at, room, True))
        return self.queues[queue].add([*buffers, (status, 1, True)])

    def wait(self, count: int, queue: int = 0) -> list[tuple[int, int]]:
        """Run the loop until so many requests have come back."""
        returned: list[tuple[int, int]] = []
        for _ in range(10_000):
            returned += self.queues[queue].collect()
            if len(returned) >= count:
                return returned
            self.loop.run_once(1.0)
        raise AssertionError(f"{len(returned)} of {count} requests came back")

    def command(self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0) -> tuple[int, int, bytes]:
        head = self.put(kind, sector, data, room)
        self.write(0x050, 0)
        (entry,) = self.wait(1)
        self.queues[0].release_all()
        assert entry[0] == head
        return self.memory.read(STATUS_AT, 1)[0], entry[1], self.memory.read(DATA_AT, room)


def span(sector: int, sectors: int, flags: int = 0) -> bytes:
    return struct.pack("<QII", sector, sectors, flags)


ENGINES = [pytest.param(name, marks=pytest.mark.skipif(not usable(name), reason=f"this host has no {name}"))
           for name in ("threads", "native", "io_uring")]


# -- requests on their way


@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_answers_from_every_engine(tmp_path: Path, engine: str) -> None:
    disk = Disk(tmp_path, engine, discard=True)
    disk.start()
    content = disk_content(SECTORS)
    assert disk.command(IN, 3, room=1024) == (OK, 1025, content[3 * SECTOR : 5 * SECTOR])
    assert disk.command(OUT, 254, b"w" * 1024) == (OK, 1, b"")
    assert disk.command(FLUSH) == (OK, 1, b"")
    assert disk.command(IN, SECTORS, room=512)[:2] == (IOERR, 1)
    assert disk.command(IN, 0, room=511)[:2] == (IOERR, 1)
    assert disk.command(IN)[:2] == (OK, 1)
    assert disk.command(GET_ID, room=20)[:2] == (OK, 21)
    assert disk.command(99, room=16)[:2] == (UNSUPPORTED, 1)
    assert disk.command(DISCARD, 0, span(8, 8)) == (OK, 1, b"")
    assert disk.command(WRITE_ZEROES, 0, span(20, 1)) == (OK, 1, b"")
    assert disk.path.read_bytes() == content[: 8 * SECTOR] + bytes(8 * SECTOR) + content[16 * SECTOR : 20 * SECTOR] + \
        bytes(SECTOR) + content[21 * SECTOR : 254 * SECTOR] + b"w" * 1024
    os.truncate(disk.path, 0)
    assert disk.command(IN, 3, room=512)[:2] == (IOERR, 1)
    assert len(disk.host_errors) == 1
    disk.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_full_queue_of_requests_again_and_again(tmp_path: Path, engine: str) -> None:
    disk = Disk(tmp_path, engine, queue_size=256)
    queue = disk.start()
    content = disk_content(SECTORS)
    for turn in range(5):
        heads = [disk.put(IN, (turn + 3 * number) % SECTORS, room=512, number=number) for number in range(85)]
        disk.write(0x050, 0)
        returned = disk.wait(85)
        assert sorted(head for head, _ in returned) == sorted(heads)
        assert {written for _, written in returned} == {513}
        for number in range(85):
            sector = (turn + 3 * number) % SECTORS
            assert disk.memory.read(DATA_AT + 0x1000 * number, 512) == content[sector * SECTOR : (sector + 1) * SECTOR]
        queue.release_all()
    assert disk.read(INTERRUPT_STATUS) & 1
    disk.close()


class HeldImage(RawImage):
    """Requests end when the test lets them."""

    def __init__(self, drive: DriveConfig) -> None:
        super().__init__(drive)
        self.gate = threading.Event()
        self.started = threading.Semaphore(0)

    def perform(self, request: BlockRequest) -> None:
        self.started.release()
        assert self.gate.wait(30)
        super().perform(request)


@pytest.fixture
def held(tmp_path: Path):
    disk = Disk(tmp_path, "threads", queue_size=8, kind=HeldImage)
    disk.start()
    yield disk
    assert isinstance(disk.image, HeldImage)
    disk.image.gate.set()
    disk.close()


def test_known_defect_13_no_more_on_the_way_than_the_queue_holds(held: Disk) -> None:
    """The same head is made available over and over without waiting for its return; the driver chose 4 of 8 descriptors."""
    queue = held.start(size=4)
    head = held.put(IN, 1, room=512)
    most = 0
    for _ in range(20):
        for _ in range(3):
            queue.publish(head)
        held.write(0x050, 0)
        held.loop.run_once(0)
        held.loop.run_once(0)
        assert held.block._engine is not None
        most = max(most, held.block._engine.in_flight)
    assert most == 4


def test_known_defect_06_a_reset_waits_for_requests_on_the_way(held: Disk) -> None:
    held.put(IN, 1, room=512, number=0)
    held.put(IN, 2, room=512, number=1)
    held.write(0x050, 0)
    held.loop.run_once(1.0)
    held.image.started.acquire()
    thread = threading.Thread(target=lambda: held.write(0x070, 0))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive(), "the reset did not wait"
    held.image.gate.set()
    thread.join(30)
    assert not thread.is_alive()
    assert held.block._engine is not None and held.block._engine.in_flight == 0
    # the driver that had asked is gone: nothing was given back, and nothing is touched any more
    assert held.queues[0].used_idx() == 0
    before = held.memory.read(0, len(held.memory.regions[0].u8))
    held.loop.run_once(0)
    assert held.memory.read(0, len(before)) == before
    held.start()
    assert held.command(IN, 5, room=512)[2] == disk_content(SECTORS)[5 * SECTOR : 6 * SECTOR]


def test_a_disk_that_hangs_does_not_hold_a_reset_for_ever(held: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "RESET_SECONDS", 0.05)
    held.put(IN, 1, room=512)
    held.write(0x050, 0)
    held.loop.run_once(1.0)
    held.write(0x070, 0)
    assert "1 requests to" in str(held.host_errors[0])
    queue = held.start()
    held.image.gate.set()
    while held.block._engine is not None and held.block._engine.in_flight:
        held.loop.run_once(1.0)
    assert queue.used_idx() == 0, "the old driver's request went to the new one"
    assert held.command(IN, 1, room=512)[0] == OK


def test_pause_waits_and_begins_nothing_until_resume(held: Disk) -> None:
    held.start(VERSION_1)
    held.image.gate.set()
    held.put(IN, 1, room=512, number=0)
    held.write(0x050, 0)
    held.loop.run_once(1.0)
    held.block.pause()
    assert len(held.queues[0].collect()) == 1
    assert held.line.count == 1
    held.queues[0].release_all()
    held.put(IN, 2, room=512, number=1)
    before = held.memory.read(0, RAM_SIZE)
    held.write(0x050, 0)
    held.loop.run_once(0.1)
    held.loop.run_once(0.1)
    assert held.queues[0].collect() == []
    assert held.memory.read(0, RAM_SIZE) == before  # the flags of the used ring neither
    held.block.resume()
    assert len(held.wait(1)) == 1


def test_what_was_on_the_way_comes_back_when_the_driver_breaks_the_device(held: Disk) -> None:
    first = held.put(IN, 1, room=512, number=0)
    held.write(0x050, 0)
    held.loop.run_once(1.0)
    bad = held.queues[0].add([(HEADER_AT, 3, False)])
    held.write(0x050, 0)
    held.loop.run_once(1.0)
    assert held.status & NEEDS_RESET
    held.image.gate.set()
    assert sorted(held.wait(2)) == sorted([(bad, 0), (first, 513)])


def test_an_image_is_replaced_after_the_last_request_to_it(held: Disk, tmp_path: Path) -> None:
    held.put(OUT, 1, b"o" * 512)
    held.write(0x050, 0)
    held.loop.run_once(1.0)
    other = tmp_path / "other.img"
    other.write_bytes(b"n" * SECTOR * 8)
    fresh = RawImage(DriveConfig("n", str(other), direct=False))
    old: list[RawImage] = []
    thread = threading.Thread(target=lambda: old.append(held.block.replace_image(fresh)))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    held.image.gate.set()
    thread.join(30)
    assert old == [held.image]
    assert held.path.read_bytes()[SECTOR : 2 * SECTOR] == b"o" * SECTOR
    held.wait(1)
    held.queues[0].release_all()
    assert held.read(CONFIG, 4) == 8
    assert held.command(IN, 1, room=512)[2] == b"n" * 512
    held.block.replace_image(held.image)
    fresh.close()


def test_an_image_whose_requests_do_not_end_stays(held: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "PAUSE_SECONDS", 0.05)
    assert isinstance(held.image, HeldImage)
    held.put(IN, 1, room=512)
    held.write(0x050, 0)
    held.loop.run_once(1.0)
    held.image.started.acquire()
    with pytest.raises(HostError, match="1 requests to"):
        held.block.replace_image(NoImage())
    assert held.block.image is held.image and held.queues[0].collect() == []
    held.image.gate.set()
    assert held.wait(1)[0][1] == 513
    held.queues[0].release_all()
    assert held.block.replace_image(NoImage()) is held.image
    assert held.command(IN, 1, room=512)[0] == IOERR


def test_an_empty_drive(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    disk.block.replace_image(NoImage())
    disk.start()
    assert disk.read(CONFIG, 4) == 0
    assert disk.command(IN, 0, room=512)[:2] == (IOERR, 1)
    assert disk.command(OUT, 0, b"x" * 512)[:2] == (IOERR, 1)
    assert disk.command(WRITE_ZEROES, 0, span(0, 8))[0] in (IOERR, UNSUPPORTED)
    assert not disk.status & NEEDS_RESET
    disk.close()


def test_without_a_descriptor_for_its_engine_a_disk_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(tmp_path, "threads")
    disk.start()

    def refuse(*_: object) -> ThreadEngine:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(aio, "open_engine", refuse)
    assert disk.command(IN, 3, room=512)[0] == OK
    assert "Too many open files" in str(disk.host_errors[0])
    disk.close()


# -- discard, zeroes


def test_offered_only_when_the_drive_takes_them(tmp_path: Path) -> None:
    cases: tuple[tuple[dict[str, object], int], ...] = (
        ({}, 0), ({"discard": True}, F_DISCARD | F_WRITE_ZEROES), ({"detect_zeroes": "on"}, F_WRITE_ZEROES),
        ({"discard": True, "readonly": True}, 0))
    for options, expected in cases:
        disk = Disk(tmp_path, **options)  # type: ignore[arg-type]
        assert disk.offered() & (F_DISCARD | F_WRITE_ZEROES) == expected
        assert disk.read(CONFIG + 36) == (0x7F_FFFF if expected & F_DISCARD else 0)
        assert disk.read(CONFIG + 40) == (1 if expected & F_DISCARD else 0)
        assert disk.read(CONFIG + 48) == (0x7F_FFFF if expected else 0)
        assert disk.read(CONFIG + 52) == (1 if expected else 0)
        assert disk.read(CONFIG + 56, 1) == (1 if expected & F_DISCARD else 0)
        disk.close()


@pytest.mark.parametrize(("kind", "payload", "status"), [
    (DISCARD, span(0, SECTORS), OK),
    (DISCARD, span(SECTORS - 1, 1), OK),
    (DISCARD, span(SECTORS, 0), OK),
    (DISCARD, span(SECTORS, 1), IOERR),
    (DISCARD, span(1, SECTORS), IOERR),
    (DISCARD, span((1 << 64) - 1, 1), IOERR),
    (DISCARD, span(1 << 55, 1), IOERR),
    (DISCARD, span(0, 0x80_0000), IOERR),
    (DISCARD, span(0, 0xFFFF_FFFF), IOERR),
    (DISCARD, span(0, 1, 1), UNSUPPORTED),
    (DISCARD, span(0, 1, 2), UNSUPPORTED),
    (DISCARD, span(0, 1) + span(2, 1), IOERR),
    (DISCARD, span(0, 1)[:15], IOERR),
    (DISCARD, b"", IOERR),
    (WRITE_ZEROES, span(0, SECTORS), OK),
    (WRITE_ZEROES, span(0, SECTORS, 1), OK),
    (WRITE_ZEROES, span(0, SECTORS, 2), UNSUPPORTED),
    (WRITE_ZEROES, span(0, SECTORS, 0x8000_0001), UNSUPPORTED),
    (WRITE_ZEROES, span(1, SECTORS), IOERR),
    (WRITE_ZEROES, span(0, 1) * 2, IOERR),
])
def test_ranges_are_checked(tmp_path: Path, kind: int, payload: bytes, status: int) -> None:
    disk = Disk(tmp_path, discard=True)
    disk.start()
    before = disk.path.read_bytes()
    assert disk.command(kind, 0, payload)[:2] == (status, 1)
    sector, sectors = struct.unpack_from("<QI", payload) if len(payload) >= 12 else (0, 0)
    after = disk.path.read_bytes()
    assert len(after) == len(before)
    if status == OK:
        assert after[sector * SECTOR : (sector + sectors) * SECTOR] == bytes(sectors * SECTOR)
        assert after[: sector * SECTOR] == before[: sector * SECTOR]
    else:
        assert after == before
    assert not disk.status & NEEDS_RESET
    disk.close()


def test_unsupported_unless_negotiated(tmp_path: Path) -> None:
    disk = Disk(tmp_path, discard=True)
    disk.start(VERSION_1)
    assert disk.command(DISCARD, 0, span(0, 8))[0] == UNSUPPORTED
    assert disk.command(WRITE_ZEROES, 0, span(0, 8))[0] == UNSUPPORTED
    assert disk.path.read_bytes() == disk_content(SECTORS)
    disk.close()


@pytest.mark.parametrize("detect", ["off", "on", "unmap"])
def test_writes_of_zeroes(tmp_path: Path, detect: str) -> None:
    disk = Disk(tmp_path, detect_zeroes=detect, discard=True)
    disk.path.write_bytes(b"\xa5" * SECTORS * SECTOR)
    os.fsync(os.open(disk.path, os.O_RDWR))
    full = disk.path.stat().st_blocks
    disk.start()
    assert disk.command(OUT, 8, bytes(0x1000)) == (OK, 1, b"")
    almost = bytes(0xFFF) + b"\1"
    assert disk.command(OUT, 32, almost) == (OK, 1, b"")
    content = disk.path.read_bytes()
    assert content[8 * SECTOR : 16 * SECTOR] == bytes(0x1000) and content[32 * SECTOR : 40 * SECTOR] == almost
    assert content.count(b"\xa5") == SECTORS * SECTOR - 0x2000
    assert (disk.path.stat().st_blocks < full) == (detect == "unmap")
    disk.close()


def test_is_zero_sees_every_byte() -> None:
    data = bytearray(5000)
    view = memoryview(data)
    assert is_zero([view]) and is_zero([]) and is_zero([view[:0], view[:1]]) and is_zero([view[:3], view[3:]])
    for position in (0, 1, 2, 2500, 4998, 4999):
        data[position] = 128
        assert not is_zero([view]) and not is_zero([view[:100], view[100:]])
        data[position] = 0
    assert not is_zero([memoryview(bytearray(b"\1"))]) and not is_zero([memoryview(bytearray(b"\1" * 10))])


# -- the request limit


def test_a_bucket_lets_a_tenth_of_a_second_through_and_then_the_rate() -> None:
    bucket = LeakyBucket(100)
    now, passed = 50.0, []
    for _ in range(1000):
        delay = bucket.delay(now)
        if delay == 0.0:
            bucket.pour()
            passed.append(now)
        else:
            now += delay
    first = [moment for moment in passed if moment == 50.0]
    assert len(first) == 10
    assert len(passed) - 10 == pytest.approx((passed[-1] - 50.0) * 100, abs=1)
    now += 1000
    burst = 0
    while bucket.delay(now) == 0.0:
        bucket.pour()
        burst += 1
    assert burst == 10


@pytest.mark.parametrize("rate", [1, 3, 1_000_000])
def test_a_bucket_never_stops_for_good(rate: int) -> None:
    bucket = LeakyBucket(rate)
    now = 0.0
    for _ in range(100):
        while (delay := bucket.delay(now)) > 0.0:
            assert delay <= 1.0 / rate + 1e-9
            now += delay
        bucket.pour()
    assert now <= 100 / rate


@pytest.mark.parametrize("engine", ["off", "threads"])
def test_the_limit_holds_for_each_queue_and_loses_nothing(tmp_path: Path, engine: str) -> None:
    clock = FakeClock()
    disk = Disk(tmp_path, engine, queues=2, clock=clock, iops_limit=40)
    disk.start()
    for queue in (0, 1):
        for number in range(10):
            disk.put(IN, number, room=512, number=10 * queue + number, queue=queue)
        disk.write(0x050, queue)
    seen = [0, 0]

    def settle(*expected: int) -> None:
        """So many have come back by now, however long worker threads take; and no more."""
        until = time.monotonic() + 30
        extra = 5
        while extra:
            assert time.monotonic() < until, seen
            disk.loop.run_once(0.01)
            for queue in (0, 1):
                seen[queue] += len(disk.queues[queue].collect())
            extra -= seen == list(expected)
        assert seen == list(expected)

    settle(4, 4)
    clock.now += 0.05
    settle(6, 6)
    clock.now += 10
    settle(10, 10)
    disk.close()


# -- what the driver sees of the disk


def test_several_queues(tmp_path: Path) -> None:
    disk = Disk(tmp_path, "threads", queues=3)
    disk.start()
    assert disk.offered() & F_MQ and disk.read(CONFIG + 34, 2) == 3
    for queue in (2, 0, 1):
        disk.put(IN, queue, room=512, number=queue, queue=queue)
        disk.write(0x050, queue)
    for queue in range(3):
        disk.wait(1, queue)
        assert disk.memory.read(DATA_AT + 0x1000 * queue, 512) == disk_content(SECTORS)[queue * SECTOR : (queue + 1) * SECTOR]
    disk.close()


def test_topology(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    assert disk.offered() & (F_BLK_SIZE | F_TOPOLOGY) == F_BLK_SIZE | F_TOPOLOGY
    block_size = max(512, min(disk.path.stat().st_blksize, 4096))
    assert disk.read(CONFIG + 20) == 512
    assert 512 << disk.read(CONFIG + 24, 1) == block_size
    assert disk.read(CONFIG + 26, 2) * 512 == block_size
    disk.close()


def test_growth_is_noticed_at_a_flush_and_at_a_reset(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    disk.start()
    generation = disk.read(0x0FC)
    os.truncate(disk.path, (SECTORS + 8) * SECTOR + 100)
    assert disk.command(IN, SECTORS, room=512)[0] == IOERR
    assert disk.command(FLUSH)[0] == OK
    assert disk.read(CONFIG) == SECTORS + 8
    assert disk.read(0x0FC) != generation and disk.read(INTERRUPT_STATUS) & 2
    assert disk.command(IN, SECTORS + 7, room=512) == (OK, 513, bytes(512))
    os.truncate(disk.path, SECTORS * SECTOR)
    assert disk.command(FLUSH)[0] == OK
    assert disk.read(CONFIG) == SECTORS + 8, "a driver cannot take a smaller disk"
    os.truncate(disk.path, (SECTORS + 16) * SECTOR)
    disk.start()
    assert disk.read(CONFIG) == SECTORS + 16
    disk.close()


def test_a_disk_without_an_engine_imports_none(tmp_path: Path) -> None:
    """`direct=off` is what starts fastest: nothing of the engines is on its way."""
    import subprocess
    import sys

    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    script = (
        "import sys; from stratovirt.backends.block import RawImage; from stratovirt.virtio.block import VirtioBlock\n"
        "from stratovirt.config.vm import DriveConfig; from stratovirt.loop import EventLoop\n"
        f"VirtioBlock(RawImage(DriveConfig('d', {str(path)!r}, direct=False)), loop=EventLoop())\n"
        "print([name for name in sys.modules if 'aio' in name or 'block_' in name or name == 'ctypes'])"
    )
    done = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": str(Path(block.__file__).parents[2])})
    expected = [f"stratovirt.virtio.block_{name}" for name in ("config", "request", "order")]
    assert done.stdout.strip() == str(expected), done.stdout


