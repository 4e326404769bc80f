"""The test accelerator: a whole machine without KVM, driven over its socket as a guest would drive it."""

from __future__ import annotations

import calendar
import gc
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stratovirt.arch.x86_64 import layout
from stratovirt.errors import ConfigError
from stratovirt.hypervisor.test_accel.commands import MAX_BYTES, MAX_LINE
from unit import virtio_driver as v
from unit.images import bzimage
from unit.mod_test import MachineUnderTest

SECOND = 1_000_000_000
RAM_END = 256 << 20
DISK, OTHER = layout.slot(0), layout.slot(6)
RNG = "-object rng-random,id=r,filename=/dev/zero -device virtio-rng-device,id=rng,rng=r"
RINGS, HEADER, DATA, STATUS = 0x10_0000, 0x20_0000, 0x20_1000, 0x20_3000

Make = Callable[..., MachineUnderTest]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[MachineUnderTest] = []

    def factory(arguments: str = "") -> MachineUnderTest:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(MachineUnderTest(folder, arguments))
        return made[-1]

    yield factory
    for machine in made:
        machine.close()


@pytest.fixture(autouse=True, scope="module")
def _nothing_left() -> Iterator[None]:
    """Disks and kernels close their files when they are collected: not in the middle of somebody else's test."""
    yield
    gc.collect()


class Driver:
    """A virtio driver, of one queue, over the protocol."""

    def __init__(self, machine: MachineUnderTest, base: int, size: int = 8, queue: int = 0) -> None:
        self.machine = machine
        self.base = base
        self.size = size
        self.queue = queue
        self.desc, self.avail, self.used = RINGS, RINGS + 0x1000, RINGS + 0x2000
        self.published = 0

    def get(self, register: int) -> int:
        return self.machine.load(self.base + register)

    def put(self, register: int, value: int) -> None:
        self.machine.store(self.base + register, value)

    def start(self, features: int = v.VERSION_1) -> None:
        self.put(v.STATUS, 0)
        self.put(v.STATUS, v.ACKNOWLEDGE | v.DRIVER)
        for half in (0, 1):
            self.put(v.DRIVER_FEATURES_SEL, half)
            self.put(v.DRIVER_FEATURES, features >> 32 * half & 0xFFFF_FFFF)
        self.put(v.STATUS, v.ACKNOWLEDGE | v.DRIVER | v.FEATURES_OK)
        assert self.get(v.STATUS) & v.FEATURES_OK
        self.put(v.QUEUE_SEL, self.queue)
        assert self.get(v.QUEUE_NUM_MAX) >= self.size
        self.put(v.QUEUE_NUM, self.size)
        for register, address in ((v.QUEUE_DESC, self.desc), (v.QUEUE_DRIVER, self.avail), (v.QUEUE_DEVICE, self.used)):
            self.put(register, address)
            self.put(register + 4, 0)
        self.put(v.QUEUE_READY, 1)
        self.put(v.STATUS, v.ACKNOWLEDGE | v.DRIVER | v.FEATURES_OK | v.DRIVER_OK)

    def offer(self, buffers: list[tuple[int, int, bool]]) -> None:
        """Make a chain of (address, length, device writes) available and notify."""
        for number, (address, length, writable) in enumerate(buffers):
            more = number + 1 < len(buffers)
            flags = (v.WRITE if writable else 0) | (v.NEXT if more else 0)
            self.machine.store(self.desc + 16 * number, address, 8)
            self.machine.store(self.desc + 16 * number + 8, length | flags << 32 | (number + 1 if more else 0) << 48, 8)
        self.machine.store(self.avail + 4 + 2 * (self.published % self.size), 0, 2)
        self.published += 1
        self.machine.store(self.avail + 2, self.published, 2)
        self.put(v.QUEUE_NOTIFY, self.queue)

    @property
    def used_index(self) -> int:
        return self.machine.load(self.used + 2, 2)

    def written(self, number: int) -> int:
        """Bytes that the device wrote for the request `number`."""
        return self.machine.load(self.used + 8 + 8 * (number % self.size))

    def request(self, buffers: list[tuple[int, int, bool]]) -> int:
        """One request there and back; the number of bytes written."""
        self.offer(buffers)
        self.await_used(self.published)
        return self.written(self.published - 1)

    def await_used(self, index: int) -> None:
        deadline = time.monotonic() + 30
        while self.used_index != index:
            assert time.monotonic() < deadline, f"used.idx is {self.used_index}, not {index}"


# -- a disk, end to end

def disk(tmp_path: Path, keys: str = "", device_keys: str = "") -> tuple[str, Path]:
    image = tmp_path / "disk.img"
    image.write_bytes(b"".join(bytes([number]) * 512 for number in range(64)))
    return (f"-drive id=d,file={image},direct=off{keys} -device virtio-blk-device,id=b,drive=d{device_keys}", image)


@pytest.mark.parametrize("iothread", [False, True])
def test_a_disk_is_read_and_written(make: Make, tmp_path: Path, iothread: bool) -> None:
    options, image = disk(tmp_path, device_keys=",iothread=io" if iothread else "")
    machine = make(("-object iothread,id=io " if iothread else "") + options)
    driver = Driver(machine, DISK.base)
    assert (driver.get(v.MAGIC), driver.get(v.VERSION), driver.get(v.DEVICE_ID)) == (0x74726976, 2, 2)
    assert machine.load(DISK.base + v.CONFIG, 8) == 64  # sectors
    driver.start()
    assert not machine.is_raised(DISK.irq)

    machine.store(HEADER, 0, 8)  # VIRTIO_BLK_T_IN
    machine.store(HEADER + 8, 5, 8)
    machine.store(STATUS, 0xFF, 1)
    assert driver.request([(HEADER, 16, False), (DATA, 1024, True), (STATUS, 1, True)]) == 1025
    assert machine.read(DATA, 1024) == b"\x05" * 512 + b"\x06" * 512
    assert machine.load(STATUS, 1) == 0

    machine.until(lambda: machine.is_raised(DISK.irq))
    assert driver.get(v.INTERRUPT_STATUS) == 1
    driver.put(v.INTERRUPT_ACK, 1)
    assert driver.get(v.INTERRUPT_STATUS) == 0
    assert [machine.do(f"eoi_intx {DISK.irq}") for _ in range(2)] == ["TRUE", "FALSE"]
    assert not machine.is_raised(DISK.irq)

    machine.write(HEADER, (1).to_bytes(8, "little") + (9).to_bytes(8, "little"))  # VIRTIO_BLK_T_OUT
    machine.do(f"memset {DATA:x} 200 0xabcd")
    assert driver.request([(HEADER, 16, False), (DATA, 512, False), (STATUS, 1, True)]) == 1
    assert image.read_bytes()[9 * 512 : 10 * 512] == b"\xab\xcd" * 256
    machine.until(lambda: machine.is_raised(DISK.irq))


def test_both_windows_of_a_slot_are_there(make: Make, tmp_path: Path) -> None:
    machine = make(disk(tmp_path)[0])
    assert machine.load(DISK.acpi_base + v.DEVICE_ID) == 2
    assert machine.load(layout.slot(1).base) == 0xFFFF_FFFF  # without QMP an empty slot stays empty


@pytest.mark.parametrize("iothread", [False, True])
def test_a_request_limit_follows_the_virtual_clock(make: Make, tmp_path: Path, iothread: bool) -> None:
    options, _ = disk(tmp_path, ",throttling.iops-total=1", ",iothread=io" if iothread else "")
    machine = make(("-object iothread,id=io " if iothread else "") + options)
    driver = Driver(machine, DISK.base)
    driver.start()
    request = [(HEADER, 16, False), (DATA, 512, True), (STATUS, 1, True)]
    driver.request(request)
    driver.offer(request)
    machine.until(lambda: machine.vm.slots[0].device._timers[0] is not None)  # type: ignore[attr-defined]
    assert driver.used_index == 1
    assert machine.step(SECOND // 2) == SECOND // 2
    for _ in range(20):
        assert driver.used_index == 1
    assert machine.step() == pytest.approx(SECOND, abs=1000)
    driver.await_used(2)


# -- other devices

def test_the_serial_port_writes_and_interrupts(make: Make, tmp_path: Path) -> None:
    output = tmp_path / "output"
    machine = make(f"-serial file,path={output}")
    for byte in b"Hi\n":
        machine.port_out(layout.SERIAL_PORT, byte)
    machine.until(lambda: output.exists() and output.read_bytes() == b"Hi\n")  # the virtual clock stands still
    assert not machine.is_raised(layout.SERIAL_IRQ)
    machine.port_out(layout.SERIAL_PORT + 1, 2)  # interrupt when the transmitter is empty
    assert machine.is_raised(layout.SERIAL_IRQ)


def test_the_serial_port_reads(make: Make, tmp_path: Path) -> None:
    path = str(tmp_path / "serial.sock")
    machine = make(f"-serial socket,path={path},server,nowait")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(path)
        client.send(b"x")
        machine.until(lambda: machine.port_in(layout.SERIAL_PORT + 5) & 1 == 1)
        assert machine.port_in(layout.SERIAL_PORT) == ord("x")


def test_the_clock_of_the_machine_is_the_virtual_one(make: Make) -> None:
    machine = make()

    def register(index: int) -> int:
        machine.port_out(0x70, index)
        return machine.port_in(0x71)

    assert [register(index) for index in (0, 7, 8, 9, 0x32)] == [0, 1, 1, 0x70, 0x19]
    moment = calendar.timegm((2031, 12, 31, 23, 59, 58)) * SECOND
    assert machine.do(f"clock_set {moment}") == str(moment)
    assert [register(index) for index in (0, 2, 4, 7, 8, 9)] == [0x58, 0x59, 0x23, 0x31, 0x12, 0x31]
    assert machine.step(2 * SECOND) == moment + 2 * SECOND
    assert [register(index) for index in (0, 2, 4, 7, 8, 9)] == [0, 0, 0, 1, 1, 0x32]
    assert machine.do(f"clock_set {(1 << 63) - 1}") == str((1 << 63) - 1)
    assert register(0x32) == 0x22


def test_the_rate_of_random_bytes_follows_the_virtual_clock(make: Make) -> None:
    machine = make(RNG + ",max-bytes=1000,period=1000")
    driver = Driver(machine, OTHER.base)
    driver.start()
    buffer = [(DATA, 600, True)]
    assert driver.request(buffer) == 600
    assert driver.request(buffer) == 400  # what was left of the first second
    driver.offer(buffer)
    rng = machine.vm.slots[0].device
    machine.until(lambda: rng._timer is not None)  # type: ignore[attr-defined]
    for _ in range(20):
        assert driver.used_index == 2
    assert machine.step() == 10_000_000  # the device looks again after 10 ms, and not before
    driver.await_used(3)
    assert driver.written(2) == 10
    machine.step(SECOND)
    assert driver.request(buffer) == 600


def test_a_balloon_takes_pages_and_tells_in_virtual_time(make: Make) -> None:
    machine = make("-device virtio-balloon-device,id=b")
    driver = Driver(machine, OTHER.base)
    driver.start()
    machine.write(DATA, b"\x5a" * 0x2000)
    machine.store(HEADER, DATA >> 12)
    assert driver.request([(HEADER, 4, False)]) == 0
    assert machine.read(DATA, 0x2000) == bytes(0x1000) + b"\x5a" * 0x1000
    driver.put(v.INTERRUPT_ACK, 3)
    machine.do(f"eoi_intx {OTHER.irq}")
    assert machine.vm.balloon is not None
    machine.vm.balloon.set_target(RAM_END - 0x1000)
    assert machine.is_raised(OTHER.irq) and driver.get(v.INTERRUPT_STATUS) & 2
    assert machine.load(OTHER.base + v.CONFIG) == 1
    machine.store(OTHER.base + v.CONFIG + 4, 1)
    for _ in range(20):
        assert machine.step(SECOND // 40) < SECOND
    assert not machine.told
    machine.step(SECOND)
    machine.until(lambda: ("BALLOON_CHANGED", {"actual": RAM_END - 0x1000}) in machine.told)


def test_a_console_writes_what_the_driver_sends(make: Make, tmp_path: Path) -> None:
    output = tmp_path / "output"
    machine = make(f"-chardev file,id=c,path={output} -device virtio-serial-device,id=s -device virtconsole,id=con,chardev=c")
    driver = Driver(machine, OTHER.base, queue=1)
    driver.start()
    machine.write(DATA, b"from a driver")
    assert driver.request([(DATA, 5, False), (DATA + 5, 8, False)]) == 0
    machine.until(lambda: output.read_bytes() == b"from a driver")


# -- memory

def test_every_width_in_memory(make: Make) -> None:
    machine = make()
    machine.store(0x1000, 0x1122_3344_5566_7788, 8)
    assert [machine.load(0x1000, size) for size in (1, 2, 4, 8)] == [0x88, 0x7788, 0x5566_7788, 0x1122_3344_5566_7788]
    machine.store(0x1001, 0xA, 1)
    assert machine.ask("writew 0x1002 F") == "OK"  # an odd number of digits, and capitals
    assert machine.read(0x1000, 8) == bytes.fromhex("880a0f0044332211")
    assert machine.ask("readb 1000") == "OK 0x0000000000000088"
    assert machine.load(0x1003, 4) == 0x2233_4400  # unaligned


def test_runs_of_bytes(make: Make) -> None:
    machine = make("-m 128")
    data = random.Random(1).randbytes(MAX_BYTES)
    machine.write(0x10_0123, data)
    assert machine.read(0x10_0123, MAX_BYTES) == data
    assert machine.ask("memset 5000 7 0x1") == "OK"
    assert machine.ask("memset 5007 7 abcdef") == "OK"
    assert machine.ask("read 5000 0xf") == "OK 0x" + "01" * 7 + "abcdefabcdefab" + "00"
    assert machine.do(f"memset 0 {128 << 20:x} 0x123456") == ""  # all of RAM
    third = bytes.fromhex("123456")
    for address in (0, 0xFFFF, 0x10000, 0x12345, (128 << 20) - 64):
        assert machine.read(address, 64) == (third * 30)[address % 3 : address % 3 + 64]


def test_accesses_at_the_end_of_ram(make: Make) -> None:
    machine = make()
    machine.store(RAM_END - 2, 0x1234_5678, 4)
    assert machine.load(RAM_END - 2, 4) == 0xFFFF_5678
    assert machine.read(RAM_END - 2, 4) == b"\x78\x56\xff\xff"
    assert machine.load(RAM_END, 8) == (1 << 64) - 1
    assert machine.load((1 << 64) - 1, 1) == 0xFF


def test_registers_have_the_width_they_have(make: Make, tmp_path: Path) -> None:
    machine = make(disk(tmp_path)[0])
    assert machine.load(DISK.base, 4) == 0x74726976
    assert machine.load(DISK.base, 8) == 0  # no register is 8 bytes wide
    assert machine.read(DISK.base, 8) == b"virt\x02\x00\x00\x00"  # but a run of bytes is of words
    assert machine.read(DISK.base + v.CONFIG + 1, 6) == bytes(6)
    assert machine.load(DISK.base + layout.VIRTIO_MMIO_SIZE - 2, 4) == 0xFFFF_FFFF  # nobody has all of it


def test_a_kernel_lies_in_memory_and_a_reset_puts_it_back(make: Make, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(bzimage())
    machine = make(f"-kernel {kernel} -append hello")
    line = machine.read(layout.COMMAND_LINE, 5)
    assert line == b"hello"
    machine.do(f"memset {layout.COMMAND_LINE:x} 5 0")
    machine.store(0x50_0000, 1)
    machine.vm.reset(guest=False)
    assert machine.read(layout.COMMAND_LINE, 5) == b"hello"
    assert machine.load(0x50_0000) == 0


# -- ports and the machine's life

def test_ports(make: Make) -> None:
    machine = make()
    assert machine.ask("inb 0x80") == "OK 0x00000000000000ff"
    assert machine.port_in(0x80, 2) == 0xFFFF
    assert machine.port_in(0x80, 4) == 0xFFFF_FFFF
    machine.port_out(0x70, 0x10)
    machine.port_out(0x71, 0x5A)
    assert machine.port_in(0x71) == 0x5A


def test_the_reset_line_resets_in_place(make: Make) -> None:
    machine = make("-action reboot=reset")
    machine.store(0x1000, 1)
    machine.port_out(layout.KEYBOARD_CONTROLLER_PORT, 0xFE)
    machine.until(lambda: ("RESET", {"guest": True}) in machine.told)
    assert machine.load(0x1000) == 0


def test_power_off_ends_the_machine(make: Make) -> None:
    machine = make()
    machine.port_out(layout.SLEEP_CONTROL_PORT, 1 << 5 | layout.SLEEP_TYPE_S5 << 2)
    machine.until(lambda: machine.vm.state == "shutdown")
    assert machine.told[-1] == ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})


def test_a_paused_machine_lets_itself_be_looked_at(make: Make, tmp_path: Path) -> None:
    machine = make("-S " + disk(tmp_path)[0])
    assert machine.vm.state == "paused"
    machine.store(0x1000, 7)
    machine.vm.resume()
    driver = Driver(machine, DISK.base)
    driver.start()
    machine.vm.pause()
    driver.offer([(HEADER, 16, False), (DATA, 512, True), (STATUS, 1, True)])
    for _ in range(20):
        assert driver.used_index == 0
    machine.vm.resume()
    driver.await_used(1)
    assert [name for name, _ in machine.told] == ["RESUME", "STOP", "RESUME"]
    assert machine.vm.vcpu_thread_ids() == []


def test_a_reset_lowers_the_lines(make: Make, tmp_path: Path) -> None:
    machine = make(f"-serial file,path={tmp_path / 'out'}")
    machine.port_out(layout.SERIAL_PORT + 1, 2)
    assert machine.is_raised(layout.SERIAL_IRQ)
    machine.vm.reset(guest=False)
    assert not machine.is_raised(layout.SERIAL_IRQ)


# -- the protocol itself

def test_the_clock_stands_still_without_timers(make: Make) -> None:
    machine = make()
    assert [machine.step(), machine.step(0), machine.step(5), machine.step()] == [0, 0, 5, 5]
    assert machine.do("clock_set 5") == "5"


@pytest.mark.parametrize("command", [
    "", " ", "hello", "READB 0", "readb", "readb 0 0", "readb 0x", "readb -1", "readb +1", "readb 1_0", "readb g",
    "readb 0x0x1", "readb 10000000000000000", "readw ffffffffffffffff", "readq fffffffffffffff9", "readb \u0661",
    "writeb 1000", "writeb 1000 100", "writew 1000 10000", "writel 1000 100000000", "writeq 1000 10000000000000000",
    "writeb 1000 1 1", "read 1000", "read 1000 0", f"read 1000 {MAX_BYTES + 1:x}", "read 1000 1 1",
    "read ffffffffffffffff 2", "write 1000 2 0x11", "write 1000 1 0x1122", "write 1000 1 0x", "write 1000 0 0x",
    "write 1000 1 zz", "write 1000 1", "memset 1000 0 1", "memset 1000 1", "memset 1000 1 0x",
    "memset 1000 ffffffffffffffff 1", f"memset {RAM_END - 16:x} {MAX_BYTES + 1:x} 1", "memset 1000 10000000000000000 1",
    "clock_step -1", "clock_step 0x1", "clock_step 1 2", "clock_step 9223372036854775808", f"clock_step {'9' * 5000}",
    "clock_set", "clock_set 4", "clock_set x", "clock_set 9223372036854775808", "clock_step \u00b2", "query_msix 1",
    "query_msix x 1", "query_msix 1 0x1", "query_intx", "query_intx x", "query_intx -1", "eoi_intx", "eoi_intx 0x4",
    "inb 10000", "inq 0", "inb", "outb 70 100", "outw 70 10000", "outb 70", "outq 70 1", "readb\x001000",
    "\x1b[2Jreadb 1000",
])
def test_what_is_malformed_gets_a_reason_and_changes_nothing(make: Make, command: str) -> None:
    machine = make()
    machine.store(0x1000, 0x5A5A_5A5A_5A5A_5A5A, 8)
    machine.step(5)
    answer = machine.ask(command)
    assert answer.startswith("ERR ")
    assert len(answer) > 8
    assert answer.isprintable()
    assert machine.load(0x1000, 8) == 0x5A5A_5A5A_5A5A_5A5A
    assert machine.step(0) == 5


def test_timers_run_in_order_each_at_its_time() -> None:
    from stratovirt.hypervisor.test_accel.clock import VirtualClock
    from stratovirt.loop import EventLoop

    clock, inner = VirtualClock(), EventLoop()
    loops = [clock.device_loop(inner, lambda function: function()) for _ in range(2)]
    seen: list[tuple[str, int]] = []

    def again() -> None:
        seen.append(("again", clock.ns))
        loops[1].call_later(0.3, again)

    loops[0].call_later(0.5, lambda: seen.append(("half", clock.ns)))
    loops[1].call_later(0.3, again)
    loops[0].call_later(0.1, lambda: seen.append(("never", clock.ns))).cancel()
    loops[0].call_later(3.0, lambda: seen.append(("late", clock.ns)))
    inner.run_once(0)  # the host's time changes nothing
    assert seen == []
    clock.advance(SECOND)
    assert [name for name, _ in seen] == ["again", "half", "again", "again"]
    assert [when // 1000 for _, when in seen] == [300_000, 500_000, 600_000, 900_000]
    assert clock.ns == SECOND
    assert loops[1].next_deadline() == pytest.approx(1.2)
    inner.close()


def test_a_timer_that_never_rests_does_not_hold_the_clock_up() -> None:
    from stratovirt.hypervisor.test_accel.clock import LATEST, VirtualClock
    from stratovirt.loop import EventLoop

    clock, inner = VirtualClock(), EventLoop()
    loop = clock.device_loop(inner, lambda function: function())
    fired: list[int] = []

    def again() -> None:
        fired.append(clock.ns)
        loop.call_later(0.001, again)

    again()
    clock.advance(LATEST)
    assert clock.ns == LATEST
    assert 1000 < len(fired) < 100_000
    assert fired == sorted(fired)
    inner.close()


def test_no_interrupt_where_there_is_no_line(make: Make) -> None:
    machine = make()
    for irq in (0, 255, 1 << 60):
        assert machine.ask(f"query_intx {irq}") == "OK FALSE"
        assert machine.ask(f"eoi_intx {irq}") == "OK FALSE"
    assert machine.ask(f"query_msix {0xFEE0_0000} 33") == "OK FALSE"


def test_white_space_does_not_matter(make: Make) -> None:
    machine = make()
    assert machine.ask("  writeb \t 1000  0x7 \r") == "OK"
    assert machine.load(0x1000, 1) == 7


def test_many_commands_at_once_are_answered_in_order(make: Make) -> None:
    machine = make()
    count = 3000
    machine.send(b"".join(b"writel %x %x\nreadl %x\n" % (0x1000, number, 0x1000) for number in range(count)))
    for number in range(count):
        assert machine.reply() == "OK"
        assert machine.reply() == f"OK 0x{number:016x}"


def test_a_peer_that_does_not_read_is_not_answered_into_memory(make: Make) -> None:
    machine = make()
    command = b"read 0 %x\n" % MAX_BYTES
    machine.peer.send(command * 40)
    for _ in range(300):
        machine.loop.run_once(0)
    peer = machine.vm.accelerator._peer  # type: ignore[union-attr]
    assert 0 < len(peer._output) < 2 * MAX_LINE
    for _ in range(40):
        assert len(machine.reply()) == 5 + 2 * MAX_BYTES
    assert machine.ask("readb 0") == "OK 0x0000000000000000"


def test_a_line_without_end_is_thrown_away(make: Make) -> None:
    machine = make()
    machine.send(b"writeb 1000 " + b"0" * (3 * MAX_LINE) + b"7\n")
    assert machine.reply() == "ERR the line is too long"
    assert machine.load(0x1000, 1) == 0
    machine.send(b"x" * (MAX_LINE // 2))
    machine.send(b"\n")
    assert machine.reply().startswith("ERR ")


def test_a_line_may_come_in_pieces(make: Make) -> None:
    machine = make()
    for byte in b"writeb 1000 5\nreadb 1000":
        machine.send(bytes([byte]))
        machine.loop.run_once(0)
    machine.send(b"\n")
    assert [machine.reply(), machine.reply()] == ["OK", "OK 0x0000000000000005"]


@pytest.mark.parametrize("seed", range(4))
def test_rubbish_is_answered_line_by_line(make: Make, tmp_path: Path, seed: int) -> None:
    machine = make(f"{disk(tmp_path)[0]} {RNG} -serial file,path={tmp_path / 'out'}")
    rng = random.Random(seed)
    words = ["readb", "readq", "writel", "writeq", "read", "write", "memset", "clock_step", "clock_set", "inb", "inl", "outb",
             "query_msix", "query_intx", "eoi_intx"]
    bases = [0, 0x1000, RAM_END - 4, DISK.base, OTHER.base, DISK.acpi_base, 0x3F8, 0x70, (1 << 64) - 8]

    def line() -> bytes:
        kind = rng.random()
        if kind < 0.2:
            return rng.randbytes(rng.randrange(40)).replace(b"\n", b"")
        arguments = [rng.choice([f"{rng.choice(bases) + rng.randrange(0x120):x}", str(rng.randrange(1000)),
                                 rng.randbytes(rng.randrange(9)).hex(), ""]) for _ in range(rng.randrange(4))]
        return " ".join([rng.choice(words), *arguments]).encode()

    for _ in range(40):
        lines = [line() for _ in range(50)]
        machine.send(b"".join(text + b"\n" for text in lines))
        for _text in lines:
            answer = machine.reply()
            assert answer.startswith(("OK", "ERR ")), answer
    assert machine.vm.state == "running"


def test_hanging_up_ends_the_machine(make: Make) -> None:
    machine = make()
    machine.peer.close()
    machine.until(lambda: machine.vm.state == "shutdown")
    assert machine.vm.exit_status == 0
    assert machine.told == [("SHUTDOWN", {"guest": False, "reason": "host-test-hang-up"})]


def test_what_was_asked_before_the_last_word_is_answered(make: Make) -> None:
    machine = make()
    machine.send(b"writeb 1000 9\nreadb 1000\nreadb 10")
    machine.peer.shutdown(socket.SHUT_WR)
    assert [machine.reply(), machine.reply()] == ["OK", "OK 0x0000000000000009"]
    machine.until(lambda: machine.vm.state == "shutdown")


def test_hanging_up_with_replies_on_the_way(make: Make) -> None:
    machine = make()
    machine.send(b"read 0 %x\n" % MAX_BYTES * 8)
    for _ in range(10):
        machine.loop.run_once(0)
    machine.peer.close()
    machine.until(lambda: machine.vm.state == "shutdown")


def test_nobody_listens(tmp_path: Path) -> None:
    from stratovirt.cli.command import parse
    from stratovirt.loop import EventLoop
    from stratovirt.machine.microvm import MicroVm

    plain = tmp_path / "file"
    plain.touch()
    for path in (tmp_path / "missing", plain, tmp_path):
        loop = EventLoop()
        machine = MicroVm(parse(["-accel", "test", "-mod-test", str(path)]), loop, 0.0)
        with pytest.raises(ConfigError) as caught:
            machine.build()
        assert (caught.value.option, caught.value.value) == ("-mod-test", str(path))
        machine.close()
        loop.close()


def test_kvm_is_not_opened(make: Make) -> None:
    make()
    assert not [link for fd in os.listdir("/proc/self/fd")
                if "kvm" in (link := _link(fd))]


def _link(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""
