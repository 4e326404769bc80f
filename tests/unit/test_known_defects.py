"""Defects that other monitors had, one test for each that could happen here; the number is the row in our list of them.

 1 queue geometry writable after DRIVER_OK       13 more requests in flight than the queue holds
 2 wrong bounds check on a buffer                 15 notification of a queue that does not exist
 3 stall after a ring was full                    16 a DMA address points at the device's own registers
 4 unbounded input of the serial port             18 avail.idx jumps further than the queue is long
 6 I/O in flight across a reset                   19 head not returned, or only the first descriptor used
 7 image format guessed                           20 16-bit indirect table, config overflow, empty iovec, ring arithmetic
 8 ring index torn                                21 register sequence drives an index out of its buffer
 9 accessor trusts a length                       22 shared memory fetched twice
10 crafted ELF notes                              23 device entered twice at once
11 transport registers unchecked                  24 unbounded state keyed by the guest
"""

from __future__ import annotations

import random
import struct
import threading
from pathlib import Path

import pytest

from stratovirt.address_map import AddressMap
from stratovirt.backends.block import BlockRequest, RawImage
from stratovirt.config.vm import DriveConfig
from stratovirt.devices.cmos_rtc import CmosRtc
from stratovirt.devices.serial import RECEIVE_BUFFER_SIZE, Serial
from stratovirt.errors import ConfigError, GuestError
from stratovirt.loader.kernel import identify_kernel
from stratovirt.virtio import queue as queue_module
from stratovirt.virtio.queue import Chain, Virtqueue
from unit.images import Load, elf, note
from unit.virtio_devices import BlockDriver, RngDriver, disk_content
from unit.virtio_driver import (
    CONFIG,
    DATA,
    HIGH_RAM,
    INDIRECT,
    NEEDS_RESET,
    NEXT,
    QUEUE_NOTIFY,
    QUEUE_SEL,
    RAM_SIZE,
    RINGS,
    STATUS,
    WRITE,
    GuestQueue,
    Line,
    guest_memory,
)

pytestmark = pytest.mark.usefixtures("implementation")


@pytest.fixture
def disk(tmp_path: Path):
    driver = BlockDriver(tmp_path)
    driver.start()
    yield driver
    driver.close()


def read_request(driver: BlockDriver, sector: int = 0) -> list[tuple[int, int, bool]]:
    driver.memory.write(DATA, struct.pack("<IIQ", 0, 0, sector))
    return [(DATA, 16, False), (DATA + 0x1000, 512, True), (DATA + 0x100, 1, True)]


def test_known_defect_01_queue_geometry_frozen(disk: BlockDriver) -> None:
    """Whatever is written to the queue registers after DRIVER_OK, requests go on over the rings that were agreed."""
    disk.write(QUEUE_SEL, 0)
    generator = random.Random(1)
    for _ in range(2000):
        disk.write(generator.randrange(0x030, 0x0C0, 4) | 0, generator.choice((0, 1, 2, 0xFFFF, generator.getrandbits(32))))
        if not disk.status & 4:
            disk.start()
    disk.start()
    for register in (0x038, 0x080, 0x084, 0x090, 0x094, 0x0A0, 0x0A4, 0x044):
        for value in (0, 2, 0xF000, 0xFFFF_FFFF):
            disk.write(register, value)
    assert disk.request(read_request(disk)) == 513


def test_known_defect_02_every_buffer_goes_through_one_check() -> None:
    memory = guest_memory(high=RAM_SIZE)
    ends = (0, RAM_SIZE, HIGH_RAM, HIGH_RAM + RAM_SIZE, 1 << 63, 1 << 64)
    for end in ends:
        for before in range(-4, 5):
            for length in (0, 1, 2, 4, 8, RAM_SIZE, RAM_SIZE + 1, 1 << 32, 1 << 64):
                address = end + before
                inside = any(base <= address and address + length <= base + RAM_SIZE for base in (0, HIGH_RAM))
                try:
                    view = memory.slice(address, length)
                except GuestError:
                    assert not inside, (address, length)
                else:
                    assert inside, (address, length)
                    assert len(view) == length


def test_known_defect_03_requests_resume_after_a_full_ring(tmp_path: Path) -> None:
    driver = RngDriver(rate=100.0)
    queue = driver.start(size=4)
    for _ in range(4):
        queue.add([(DATA, 100, True)])
    driver.notify()
    for _ in range(10):
        driver.advance(1.0)
    assert len(queue.collect()) == 4
    queue.release_all()
    queue.add([(DATA, 100, True)])
    driver.notify()
    assert len(queue.collect()) == 1
    driver.close()


def test_known_defect_04_serial_input_is_bounded() -> None:
    class Source:
        can_write = True

        def write(self, data: bytes) -> None: ...

        def set_receiver(self, receive, can_receive, writable=None) -> None:
            self.receive, self.can_receive = receive, can_receive

        def resume_input(self) -> None: ...

    source = Source()
    port = Serial(Line(), source)
    sent = 0
    for _ in range(1000):
        room = source.can_receive()
        source.receive(bytes(room))
        sent += room
    assert sent == RECEIVE_BUFFER_SIZE
    taken = 0
    while port.read(5, 1) & 1:
        port.read(0, 1)
        taken += 1
    assert taken == sent


@pytest.mark.reference
def test_known_defect_06_reset_waits_for_the_request_in_flight(disk: BlockDriver) -> None:
    """A reset from a vCPU while the loop is in the middle of a read returns only when the buffer is no longer used."""
    inside, go_on, order = threading.Event(), threading.Event(), []
    real = disk.image.perform

    def slow(request: BlockRequest) -> None:
        inside.set()
        assert go_on.wait(10)
        real(request)
        order.append("read done")

    disk.image.perform = slow  # type: ignore[method-assign]
    queue = disk.queues[0]
    queue.add(read_request(disk))
    disk.write(QUEUE_NOTIFY, 0)

    def reset() -> None:
        disk.write(STATUS, 0)
        order.append("reset done")

    loop = threading.Thread(target=disk.serve)
    vcpu = threading.Thread(target=reset)
    loop.start()
    assert inside.wait(10)
    vcpu.start()
    vcpu.join(0.05)
    assert vcpu.is_alive()
    go_on.set()
    loop.join(10)
    vcpu.join(10)
    assert order == ["read done", "reset done"]
    disk.memory.write(DATA + 0x1000, bytes(512))
    disk.serve()
    assert disk.memory.read(DATA + 0x1000, 512) == bytes(512)


def test_known_defect_06_nothing_is_written_after_a_reset(disk: BlockDriver) -> None:
    queue = disk.queues[0]
    queue.add(read_request(disk, 1))
    disk.write(QUEUE_NOTIFY, 0)
    disk.write(STATUS, 0)
    before = disk.memory.read(0, RAM_SIZE)
    disk.serve()
    assert disk.memory.read(0, RAM_SIZE) == before
    assert disk.line.count == 0


@pytest.mark.parametrize("magic", [b"QFI\xfb" + b"\0\0\0\x03" + b"\0" * 8 + b"/etc/passwd", b"KDMV", b"vhdxfile", b"\x7fELF"])
def test_known_defect_07_formats_are_never_guessed(tmp_path: Path, magic: bytes) -> None:
    path = tmp_path / "disk.img"
    content = magic.ljust(8 * 512, b"\0")
    path.write_bytes(content)
    image = RawImage(DriveConfig("d", str(path)))
    data = bytearray(8 * 512)
    image.read([memoryview(data)], 0)
    assert image.size == len(content)
    assert bytes(data) == content
    image.close()


def test_known_defect_08_ring_indices_are_single_16_bit_accesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index in memory never shows one byte old and one byte new: it is stored through a view of 16-bit items."""
    memory = guest_memory()
    guest = GuestQueue(memory, RINGS, 2)
    queue = Virtqueue("q", memory, 2, guest.desc, guest.avail, guest.used)
    assert queue._used16.format == queue._avail16.format == "H"
    assert queue._used16.itemsize == 2
    queue._next_used = 0x00FF
    seen: set[int] = set()
    stop = threading.Event()
    index_at = (guest.used + 2) >> 1
    ram = memory.regions[0].u16

    def watch() -> None:
        while not stop.is_set():
            seen.add(ram[index_at])

    watcher = threading.Thread(target=watch)
    ram[index_at] = 0xFF
    watcher.start()
    for _ in range(3000):
        queue._next_used = 0x00FF
        queue.push(0, 0)  # publishes 0x0100
        ram[index_at] = 0x00FF
    stop.set()
    watcher.join()
    assert seen <= {0x00FF, 0x0100}


def test_known_defect_08_entries_are_published_before_the_index() -> None:
    """The store of used.idx is the last one of a push."""
    memory = guest_memory()
    guest = GuestQueue(memory, RINGS, 4)
    queue = Virtqueue("q", memory, 4, guest.desc, guest.avail, guest.used)
    entries: list[bytes] = []

    class Index:
        """Stands for the used ring's 16-bit view: looks at the entry at the moment the index is stored."""

        def __setitem__(self, index: int, value: int) -> None:
            entries.append(memory.read(guest.used + 4, 8))

    queue._used16 = Index()  # type: ignore[assignment]
    queue.push(3, 77)
    assert entries == [struct.pack("<II", 3, 77)]


def test_known_defect_09_slices_have_the_length_that_was_checked() -> None:
    memory = guest_memory()
    for address, length in ((0, 1), (RAM_SIZE - 1, 1), (5, 1000), (RAM_SIZE, 0)):
        assert len(memory.slice(address, length)) == length
    with pytest.raises(GuestError):
        memory.slice(RAM_SIZE - 1, 2)
    with pytest.raises(GuestError):
        memory.slice(0, -1)
    with pytest.raises(GuestError):
        memory.slice(16, -8)


@pytest.mark.parametrize("notes", [
    b"\xff" * 12, b"\0" * 12, b"\0" * 4096, struct.pack("<III", 4, 0xFFFF_FFF0, 18) + b"Xen\0",
    struct.pack("<III", 0xFFFF_FFFF, 4, 18) + b"Xen\0" + b"\0\0\x10\0", note(b"Xen\0", 18, b""), note(b"Xen\0", 18, b"\0" * 3),
    note(b"Xen\0", 18, b"\xff" * 8), note(b"", 18, b"\0\0\x10\0"), b"Xen",
])
def test_known_defect_10_crafted_notes_end_in_an_image_or_an_error(notes: bytes) -> None:
    data = elf([Load(b"\xf4" * 16, 0x10_0000)], entry=0x10_0000, notes=notes)
    try:
        image = identify_kernel(memoryview(data), "kernel")
    except ConfigError:
        return
    assert image.entry < 1 << 64


def test_known_defect_11_every_register_width_and_value(tmp_path: Path) -> None:
    """All offsets of the window with all widths and telling values, through the map that vCPUs use."""
    driver = BlockDriver(tmp_path)
    mmio = AddressMap()
    base = 0xF010_0000
    mmio.claim(base, 0x200, driver.window)
    for status in (0, 0xF):
        for size in (1, 2, 4, 8):
            for offset in range(-8, 0x208):
                assert 0 <= mmio.read(base + offset, size) < 1 << 8 * size
                for value in (0, 1, 0x7F, 1 << 8 * size - 1, (1 << 8 * size) - 1):
                    mmio.write(base + offset, size, value)
                assert 0 <= mmio.read(base + offset, size) < 1 << 8 * size
            driver.write(STATUS, status)
    driver.start()
    assert driver.request(read_request(driver)) == 513
    driver.close()


@pytest.mark.reference
def test_known_defect_13_no_more_requests_than_the_queue_holds(disk: BlockDriver) -> None:
    """A driver that makes the same head available for ever gets at most a queue's worth of work each turn."""
    queue = disk.start(size=8)
    disk.queues = [queue]
    handled = []
    real = disk.image.perform
    disk.image.perform = lambda request: handled.append(1) or real(request)  # type: ignore[method-assign,func-returns-value]
    head = queue.add(read_request(disk))
    for _ in range(7):
        queue.publish(head)
    disk.transport.device.process(0)
    assert len(handled) == 8
    queue.publish(head, move=9)
    disk.transport.device.process(0)
    assert len(handled) == 8
    assert disk.status & NEEDS_RESET


def test_known_defect_15_notifications_of_queues_that_do_not_exist(disk: BlockDriver) -> None:
    queue = disk.queues[0]
    disk.serve()  # activation looks at the queues once by itself
    queue.add(read_request(disk))
    for number in (1, 2, 0xFF, 0x100, 0xFFFF, 0x1_0000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF):
        disk.notify(number)
        assert queue.collect() == []
    disk.notify(0)
    assert len(queue.collect()) == 1


def test_known_defect_16_a_descriptor_that_points_at_registers_fails(disk: BlockDriver) -> None:
    for address in (0xF010_0000 + QUEUE_NOTIFY, 0xFEE0_0000, 0xFEC0_0000, 0xC000_0000):
        disk.start()
        disk.memory.write(DATA, struct.pack("<IIQ", 0, 0, 0))
        disk.queues[0].add([(DATA, 16, False), (address, 512, True), (DATA + 0x100, 1, True)])
        disk.notify()
        assert disk.queues[0].collect() == [(0, 0)]
        assert disk.status & NEEDS_RESET


@pytest.mark.parametrize("distance", [257, 1000, 0x7FFF, 0x8000, 0xFFFF])
def test_known_defect_18_avail_index_too_far_ahead_is_fatal(disk: BlockDriver, distance: int) -> None:
    queue = disk.queues[0]
    queue.describe(0, DATA, 16, WRITE)
    queue.publish(0, move=distance)
    disk.notify()
    assert queue.collect() == []
    assert disk.status & NEEDS_RESET
    assert "ahead" in str(disk.errors[-1])


def test_known_defect_19_the_head_of_a_bad_chain_comes_back(disk: BlockDriver) -> None:
    """Good requests before a bad one are answered, the bad one's head is returned, and nothing after it is touched."""
    queue = disk.queues[0]
    good = queue.add(read_request(disk))
    bad = queue.add([(DATA, 16, False), (RAM_SIZE, 512, True)])
    queue.add(read_request(disk))
    disk.notify()
    assert queue.collect() == [(good, 513), (bad, 0)]
    assert disk.status & NEEDS_RESET


def test_known_defect_19_all_descriptors_count(disk: BlockDriver) -> None:
    disk.memory.write(DATA, struct.pack("<IIQ", 0, 0, 0))
    buffers = [(DATA + number, 1, False) for number in range(16)]
    buffers += [(DATA + 0x1000 + 8 * number, 8, True) for number in range(64)]
    assert disk.request([*buffers, (DATA + 0x100, 1, True)]) == 513
    assert disk.memory.read(DATA + 0x1000, 512) == disk_content(64)[:512]


def test_known_defect_20_indirect_table_longer_than_16_bits(tmp_path: Path) -> None:
    memory = guest_memory(4 * RAM_SIZE)
    driver = BlockDriver(tmp_path, memory=memory)
    for count, accepted in ((0xFFFF, True), (0x1_0000, False), (0x1_0001, False)):
        driver.start()
        memory.write(DATA, struct.pack("<IIQ", 0, 0, 0))
        table = RAM_SIZE
        memory.write(table, struct.pack("<QIHH", DATA, 16, NEXT, 1) + struct.pack("<QIHH", DATA + 0x1000, 513, WRITE, 0))
        driver.queues[0].describe(0, table, 16 * count, INDIRECT)
        driver.queues[0].publish(0)
        driver.notify()
        assert driver.queues[0].collect() == [(0, 513 if accepted else 0)]
    driver.close()


def test_known_defect_20_config_offset_plus_length(disk: BlockDriver) -> None:
    for offset in (0, 59, 60, 61, 0xFC, 0xFF, 0x100, 0xFFFF_FFFF, (1 << 64) - 1):
        for size in (1, 2, 4, 8):
            value = disk.device.read_config(offset, size)
            assert value == int.from_bytes(disk.device.config[offset : offset + size], "little")
            disk.device.write_config(offset, size, (1 << 8 * size) - 1)
    assert disk.read(CONFIG, 8) == 64


def test_known_defect_20_empty_buffers(disk: BlockDriver) -> None:
    queue = disk.queues[0]
    disk.memory.write(DATA, struct.pack("<IIQ", 0, 0, 0))
    queue.add([(DATA, 16, False), (DATA, 0, True), (DATA + 0x100, 1, True)])
    disk.notify()
    assert queue.collect() == [(0, 0)]
    assert disk.status & NEEDS_RESET


def test_known_defect_20_ring_address_arithmetic() -> None:
    memory = guest_memory()
    top = 1 << 64
    for size in (1, 256, 32768):
        for desc, avail, used in ((top - 16, 0, 0), (0, top - 2, 0), (0, 0, top - 4), (RAM_SIZE - 16 * size + 16, 0, 0)):
            with pytest.raises(GuestError):
                queue_module.check_geometry("q", memory, size, desc, avail, used)


def test_known_defect_21_any_register_sequence_stays_in_bounds() -> None:
    generator = random.Random(21)
    rtc, port = CmosRtc(lambda: 1e9), Serial(Line())
    for _ in range(20_000):
        size = generator.choice((1, 2, 4))
        value = generator.getrandbits(8 * size)
        for device, count in ((rtc, 2), (port, 8)):
            offset = generator.randrange(count)
            if generator.random() < 0.5:
                device.write(offset, size, value)
            assert 0 <= device.read(offset, size) < 1 << 8 * size
    assert len(port._receive) <= RECEIVE_BUFFER_SIZE
    assert len(rtc._ram) == 128


def test_known_defect_22_a_descriptor_is_fetched_once() -> None:
    """A vCPU that rewrites the table and the request after they were read changes nothing any more."""
    memory = guest_memory()
    guest = GuestQueue(memory, RINGS, 8)
    queue = Virtqueue("q", memory, 8, guest.desc, guest.avail, guest.used)
    fetched: list[int] = []
    layout = queue_module._DESCRIPTOR

    class Counting:
        def unpack_from(self, table: memoryview, offset: int) -> tuple[int, int, int, int]:
            entry = layout.unpack_from(table, offset)
            fetched.append((offset - guest.desc) // 16)
            memory.write(offset, b"\xff" * 16)  # the guest is at it again
            return entry  # type: ignore[return-value]

    queue_module._DESCRIPTOR = Counting()  # type: ignore[assignment]
    try:
        guest.add([(DATA, 16, False), (DATA + 64, 8, True)])
        chain = queue.pop()
    finally:
        queue_module._DESCRIPTOR = layout
    assert isinstance(chain, Chain)
    assert (chain.readable_length, chain.writable_length) == (16, 8)
    assert sorted(fetched) == [0, 1]


def test_known_defect_22_a_block_header_is_copied_before_it_is_judged(disk: BlockDriver) -> None:
    """The data buffer of a read lies over the header, so the read itself rewrites type and sector: too late."""
    disk.path.write_bytes(struct.pack("<IIQ", 1, 0, (1 << 64) - 1) * 32 * 64)
    disk.memory.write(DATA, struct.pack("<IIQ", 0, 0, 5))
    assert disk.request([(DATA, 16, False), (DATA, 512, True), (DATA + 0x1000, 1, True)]) == 513
    assert disk.memory.read(DATA + 0x1000, 1) == b"\0"


@pytest.mark.reference
def test_known_defect_23_a_device_is_not_entered_twice(disk: BlockDriver) -> None:
    """Two threads with the same notification: one works, the other waits."""
    inside = 0
    overlaps = []
    real = disk.image.perform

    def watched(request: BlockRequest) -> None:
        nonlocal inside
        inside += 1
        overlaps.append(inside)
        real(request)
        inside -= 1

    disk.image.perform = watched  # type: ignore[method-assign]
    queue = disk.queues[0]
    for _ in range(40):
        queue.add(read_request(disk))
    threads = [threading.Thread(target=disk.device.process, args=(0,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert overlaps == [1] * 40
    assert len(queue.collect()) == 40


def test_known_defect_24_chains_stop_at_the_queue_size(disk: BlockDriver) -> None:
    queue = disk.start(size=4)
    disk.queues = [queue]
    for number in range(4):
        queue.describe(number, DATA, 1, WRITE | NEXT, (number + 1) % 4)
    queue.publish(0)
    disk.notify()
    assert queue.collect() == [(0, 0)]
    assert "longer than the queue" in str(disk.errors[-1])
