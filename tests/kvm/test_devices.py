"""Devices driven by a real vCPU: interrupts through irqfd, notifications through ioeventfd, and rubbish to every register."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import pytest

from kvm.guests import DATA, EAX, EBX, ESI, RESET_PORT, Asm
from stratovirt.arch.x86_64 import layout
from stratovirt.errors import ConfigError
from unit.images import Load
from unit.virtio_devices import disk_content
from unit.virtio_driver import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_FEATURES,
    DRIVER_FEATURES_SEL,
    DRIVER_OK,
    FEATURES_OK,
    INTERRUPT_ACK,
    INTERRUPT_STATUS,
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

RINGS = 0x30_0000
BUFFERS = 0x31_0000
DISK = ("-drive", "file={},id=d0,if=none,{}", "-device", "virtio-blk-device,drive=d0,id=blk0")
RNG = ("-object", "rng-random,id=r0,filename=/dev/urandom", "-device", "virtio-rng-device,rng=r0,id=rng0")
PORTS = ("-device", "virtio-serial-device,id=s0", "-chardev", "pty,id=c0", "-device", "virtconsole,chardev=c0,id=p0",
         "-chardev", "pty,id=c1", "-device", "virtserialport,chardev=c1,id=p1")
BALLOON = ("-device", "virtio-balloon-device,id=b0,free-page-reporting=true")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(disk_content(64))
    return path


def disk(path: Path, engine: str = "direct=off") -> tuple[str, ...]:
    return tuple(word.format(path, engine) for word in DISK)


ENGINES = ("direct=off,aio=off", "direct=off,aio=threads", "direct=on,aio=native", "direct=on,aio=io_uring")


def machine_with(machine, kernel: bytes, path: Path, engine: str):
    """A machine with that engine behind its disk. Skips where the host, or the file system, has no such thing."""
    try:
        return machine(kernel, *disk(path, engine))
    except ConfigError as error:
        pytest.skip(f"not on this host: {error}")


# -- interrupts


def test_the_serial_port_interrupts(machine) -> None:
    """Enabling the interrupt of an empty transmitter raises it: irqfd, PIC, local APIC, the guest's handler."""
    asm = Asm().set_stack().gate(36, "serial").load_idt().pic().store(DATA, 0).sti()
    asm.out(0x3F9, 0x02)
    asm.wait_nonzero(DATA).power_off()
    asm.handler("serial").in_eax(0x3FA).store_eax(DATA + 4).inc(DATA).end_of_interrupt()
    vm = machine(asm.kernel(), "-serial", "file,path=/dev/null").run()
    assert vm.word(DATA) == 1
    assert vm.word(DATA + 4) & 0xF == 0x2  # the cause: transmitter empty


def test_the_timer_interrupts_and_wakes_a_halted_processor(machine) -> None:
    asm = Asm().set_stack().gate(32, "tick").load_idt().pic().store(DATA, 0)
    asm.out(0x43, 0x34).out(0x40, 0xA9).out(0x40, 0x04)  # 1 kHz
    asm.sti()
    again = asm.label()
    asm.hlt().load_eax(DATA).cmp_eax(5).jb(again).power_off()
    asm.handler("tick").inc(DATA).end_of_interrupt()
    vm = machine(asm.kernel()).run()
    assert vm.word(DATA) >= 5


# -- virtio-blk, end to end


def bring_up(asm: Asm, window: int, queue: GuestQueue, features: int = 1 << 9, number: int = 0) -> Asm:
    """A driver's initialization, in the order of the specification, for a queue whose place is known beforehand."""
    asm.store(window + STATUS, 0).store(window + STATUS, ACKNOWLEDGE).store(window + STATUS, ACKNOWLEDGE | DRIVER)
    asm.store(window + DRIVER_FEATURES_SEL, 0).store(window + DRIVER_FEATURES, features)
    asm.store(window + DRIVER_FEATURES_SEL, 1).store(window + DRIVER_FEATURES, 1)
    asm.store(window + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)
    asm.store(window + QUEUE_SEL, number).store(window + QUEUE_NUM, queue.size)
    for register, address in ((QUEUE_DESC, queue.desc), (QUEUE_DRIVER, queue.avail), (QUEUE_DEVICE, queue.used)):
        asm.store(window + register, address).store(window + register + 4, 0)
    return asm.store(window + QUEUE_READY, 1).store(window + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)


class NoMemory:
    """Stands in while only the places of a queue's parts are asked for."""

    def write(self, address: int, data: bytes) -> None: ...


def queue_layout(size: int = 16) -> GuestQueue:
    return GuestQueue(NoMemory(), RINGS, size)  # type: ignore[arg-type]


def prepare(vm, requests: list[tuple[int, int]]) -> GuestQueue:
    """A queue of (kind, sector) requests of one sector each, in the guest's memory but not made available yet."""
    queue = GuestQueue(vm.memory, RINGS, 16)
    for number, (kind, sector) in enumerate(requests):
        at = BUFFERS + 0x1000 * number
        vm.memory.write(at, struct.pack("<IIQ", kind, 0, sector))
        vm.memory.write(at + 0x800, b"\xee")
        if kind == 1:
            vm.memory.write(at + 0x200, bytes((number,)) * 512)
        queue.add([(at, 16, False), (at + 0x200, 512, kind == 0), (at + 0x800, 1, True)])
    vm.memory.store_u16(queue.avail + 2, 0)
    return queue


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("window", [layout.slot(0).base, layout.slot(0).acpi_base])
def test_a_disk_read_and_write_with_an_interrupt(machine, image: Path, window: int, engine: str) -> None:
    """Ring, kick, interrupt: the guest waits for its handler, not for the ring."""
    place = queue_layout()
    asm = Asm().set_stack().gate(37, "disk").load_idt().pic().store(DATA, 0).sti()
    bring_up(asm, window, place)
    asm.store(place.avail + 2, 3, 2).store(window + QUEUE_NOTIFY, 0)
    again = asm.label()
    asm.wait_nonzero(DATA)
    asm.mov(EAX, 0).load_eax(place.used + 2, 2).cmp_eax(3).jnz(again).power_off()
    asm.handler("disk").load_eax(window + INTERRUPT_STATUS)
    asm.raw(0x09, 0x05, struct.pack("<I", DATA + 4))  # or [DATA + 4], eax: a second interrupt may find nothing left to say
    asm.store_eax(window + INTERRUPT_ACK)
    asm.inc(DATA).end_of_interrupt()
    vm = machine_with(machine, asm.kernel(), image, engine)
    prepare(vm, [(0, 5), (1, 7), (0, 63)])
    vm.run()
    assert vm.word(DATA + 4) == 1
    assert [vm.memory.read(BUFFERS + 0x1000 * number + 0x800, 1) for number in range(3)] == [b"\0"] * 3
    content = disk_content(64)
    assert vm.memory.read(BUFFERS + 0x200, 512) == content[5 * 512 : 6 * 512]
    assert vm.memory.read(BUFFERS + 0x2200, 512) == content[63 * 512 :]
    assert image.read_bytes() == content[: 7 * 512] + b"\x01" * 512 + content[8 * 512 :]


@pytest.mark.parametrize("engine", ENGINES)
def test_many_kicks_lose_no_request(machine, image: Path, engine: str) -> None:
    """One kick a request, the guest spinning on the used index in between."""
    rounds = 200
    place = queue_layout()
    asm = Asm()
    bring_up(asm, layout.slot(0).base, place)
    asm.mov(EBX, 0)
    loop = asm.label()
    asm.raw(0x43)  # inc ebx
    asm.raw(0x66, 0x89, 0x1D, struct.pack("<I", place.avail + 2))  # mov [avail.idx], bx
    asm.store(layout.slot(0).base + QUEUE_NOTIFY, 0)
    spin = asm.label()
    asm.mov(EAX, 0).load_eax(place.used + 2, 2).raw(0x39, 0xD8).jnz(spin)  # cmp eax, ebx
    asm.cmp_eax(rounds).jnz(loop).power_off()
    vm = machine_with(machine, asm.kernel(), image, engine)
    queue = prepare(vm, [(0, 9)])
    for slot in range(16):
        vm.memory.store_u16(queue.avail + 4 + 2 * slot, 0)
    vm.run()
    assert vm.memory.load_u16(queue.used + 2) == rounds
    assert vm.memory.read(BUFFERS + 0x200, 512) == disk_content(64)[9 * 512 : 10 * 512]


def test_random_bytes_reach_the_guest(machine) -> None:
    place = queue_layout()
    window = layout.slot(6).base
    asm = Asm()
    bring_up(asm, window, place, features=0)
    again = asm.store(place.avail + 2, 1, 2).store(window + QUEUE_NOTIFY, 0).label()
    asm.mov(EAX, 0).load_eax(place.used + 2, 2).cmp_eax(1).jnz(again).power_off()
    vm = machine(asm.kernel(), *RNG)
    queue = GuestQueue(vm.memory, RINGS, 16)
    queue.add([(BUFFERS, 64, True)])
    vm.memory.store_u16(queue.avail + 2, 0)
    vm.run()
    assert queue.collect() == [(0, 64)]
    assert vm.memory.read(BUFFERS, 64) != bytes(64)


def test_pages_that_a_guest_gives_leave_the_process(machine) -> None:
    given, kept = 0x40_0000, 0x40_1000
    place = queue_layout()
    window = layout.slot(6).base
    asm = Asm()
    bring_up(asm, window, place, features=0)
    again = asm.store(place.avail + 2, 1, 2).store(window + QUEUE_NOTIFY, 0).label()
    asm.mov(EAX, 0).load_eax(place.used + 2, 2).cmp_eax(1).jnz(again)
    asm.store(window + 0x104, 1).load_eax(given).store_eax(DATA).load_eax(kept).store_eax(DATA + 4).power_off()
    vm = machine(asm.kernel(), *BALLOON)
    queue = GuestQueue(vm.memory, RINGS, 16)
    vm.memory.write(BUFFERS, struct.pack("<I", given >> 12))
    queue.add([(BUFFERS, 4, False)])
    vm.memory.store_u16(queue.avail + 2, 0)
    for address in (given, kept):
        vm.memory.write(address, b"\xaa" * 4096)
    vm.run()
    assert queue.collect() == [(0, 0)]
    assert (vm.word(DATA), vm.word(DATA + 4)) == (0, 0xAAAA_AAAA)
    assert vm.vm.balloon.guest_bytes == vm.memory.size - 4096


def test_a_console_without_multiport_writes_to_its_character_device(machine, tmp_path: Path) -> None:
    place = queue_layout()
    window = layout.slot(6).base
    output = tmp_path / "output"
    asm = Asm()
    bring_up(asm, window, place, features=0, number=1)
    again = asm.store(place.avail + 2, 1, 2).store(window + QUEUE_NOTIFY, 1).label()
    asm.mov(EAX, 0).load_eax(place.used + 2, 2).cmp_eax(1).jnz(again).power_off()
    vm = machine(asm.kernel(), "-chardev", f"file,id=c,path={output}", "-device", "virtconsole,id=p,chardev=c",
                 "-device", "virtio-serial-device,id=s")
    queue = GuestQueue(vm.memory, RINGS, 16)
    text = bytes(range(256)) * 1024
    vm.memory.write(0x40_0000, text)
    queue.add([(0x40_0000, 100_000, False), (0x40_0000 + 100_000, len(text) - 100_000, False)])
    vm.memory.store_u16(queue.avail + 2, 0)
    vm.run()
    vm.vm.close()
    assert output.read_bytes() == text


@pytest.mark.parametrize("engine", ENGINES)
def test_a_reset_in_place_takes_the_driver_away(machine, image: Path, engine: str) -> None:
    """Boots in a row find the device as new, each reads its sector, and no file descriptor is left behind."""
    place = queue_layout()
    window = layout.slot(0).base
    asm = Asm().load_eax(window + STATUS).out_eax(0x510, 4)
    header = struct.pack("<IIQ", 0, 0, 11)
    for offset in range(0, 16, 4):
        asm.store(BUFFERS + offset, int.from_bytes(header[offset : offset + 4], "little"))
    table = struct.pack("<QIHH", BUFFERS, 16, 1, 1) + struct.pack("<QIHH", BUFFERS + 0x200, 512, 3, 2) + \
        struct.pack("<QIHH", BUFFERS + 0x800, 1, 2, 0)
    for offset in range(0, len(table), 4):
        asm.store(place.desc + offset, int.from_bytes(table[offset : offset + 4], "little"))
    bring_up(asm, window, place)
    again = asm.store(place.avail + 2, 1, 2).store(window + QUEUE_NOTIFY, 0).label()
    asm.mov(EAX, 0).load_eax(place.used + 2, 2).cmp_eax(1).jnz(again)
    asm.load_eax(BUFFERS + 0x200).out_eax(0x510, 4).reset()

    class Port:
        def __init__(self) -> None:
            self.values: list[int] = []

        def read(self, offset: int, size: int) -> int:
            return 0

        def write(self, offset: int, size: int, value: int) -> None:
            self.values.append(value)

    try:
        vm = machine(asm.kernel(), *disk(image, engine), "-action", "reboot=reset")
    except ConfigError as error:
        pytest.skip(f"not on this host: {error}")
    port = Port()
    vm.vm.ports.claim(0x510, 4, port)
    vm.start()
    vm.run_until(lambda: len(port.values) >= 8)
    files = len(os.listdir("/proc/self/fd"))
    vm.run_until(lambda: len(port.values) >= 30)
    assert port.values[:30] == [0, 11] * 15
    assert abs(len(os.listdir("/proc/self/fd")) - files) <= 4  # an engine may be open or not at this very moment


# -- rubbish from a real vCPU


READ, WRITE, IN, OUT, END = range(5)


def interpreter() -> bytes:
    """Does what a table at DATA says: entries of four words, (kind and width, address, value, unused), and then powers off.

    The kind and the width choose the code through a table of addresses: kind * 3 + log2(width).
    """
    asm = Asm().set_stack().mov(ESI, DATA)
    asm.label("next")
    asm.raw(0x8B, 0x1E)  # mov ebx, [esi]
    asm.raw(0x8B, 0x56, 4)  # mov edx, [esi + 4]
    asm.raw(0x8B, 0x46, 8)  # mov eax, [esi + 8]
    asm.raw(0x83, 0xC6, 16)  # add esi, 16
    asm.raw(0xFF, 0x24, 0x9D)._target("table", absolute=True)  # jmp [table + ebx * 4]
    bodies = {READ: (b"\x8a\x02", b"\x66\x8b\x02", b"\x8b\x02"), WRITE: (b"\x88\x02", b"\x66\x89\x02", b"\x89\x02"),
              IN: (b"\xec", b"\x66\xed", b"\xed"), OUT: (b"\xee", b"\x66\xef", b"\xef")}
    names = []
    for kind in (READ, WRITE, IN, OUT):
        for width, code in enumerate(bodies[kind]):
            asm.label(f"op{kind}.{width}")
            names.append(f"op{kind}.{width}")
            asm.raw(code).jmp("next")
    asm.label("end")
    asm.text("done").power_off()
    asm.label("table")
    for name in (*names, "end"):
        asm._target(name, absolute=True)
    return asm.kernel(Load(bytes(4), DATA))


def entry(kind: int, width: int, address: int, value: int = 0) -> bytes:
    return struct.pack("<4I", kind * 3 + width, address, value & 0xFFFF_FFFF, 0)


CONSOLE_ON = entry(OUT, 0, 0x3FB, 0x03) + entry(OUT, 0, 0x3FC, 0)  # no divisor latch, no loop: whatever was done to it
END_ENTRY = struct.pack("<4I", 12, 0, 0, 0)


def run_table(machine, tmp_path: Path, image: Path, entries: list[bytes], *devices: str):
    console = tmp_path / "console"
    vm = machine(interpreter(), *disk(image), *RNG, *devices, "-serial", f"file,path={console}")
    vm.memory.write(DATA, b"".join([*entries, CONSOLE_ON, END_ENTRY]))
    vm.run()
    vm.vm.close()
    assert console.read_bytes().endswith(b"done")
    assert vm.vm.exit_status == 0
    assert vm.told[-1] == ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})
    return vm


def test_every_virtio_register_in_both_windows_of_every_slot(machine, tmp_path: Path, image: Path) -> None:
    generator = random.Random(11)
    entries = []
    slots = [layout.slot(number) for number in range(layout.VIRTIO_SLOTS)]
    for slot in slots:
        for base in (slot.base, slot.acpi_base):
            occupied = slot.number in (0, 6, 7, 8)
            for offset in range(0, 0x200, 1 if occupied else 16):
                for width in (0, 1, 2):
                    entries.append(entry(READ, width, base + offset))
                    value = generator.choice((0, 1, 0xF, 0x7F, 0xFFFF_FFFF, generator.getrandbits(32)))
                    entries.append(entry(WRITE, width, base + offset, value))
    generator.shuffle(entries)
    run_table(machine, tmp_path, image, entries, *PORTS, *BALLOON)
    assert image.read_bytes() == disk_content(64)


def test_every_port(machine, tmp_path: Path, image: Path) -> None:
    """All ports but those that end the guest or belong to the interrupt chips and the timer that live in the kernel."""
    ends = {(RESET_PORT, 0xFE)}
    entries = []
    for port in range(0, 0x1_0000, 1):
        width = port % 3
        entries.append(entry(IN, width, port))
        value = (port * 7) & 0xFFFF_FFFF
        if (port, value & 0xFF) not in ends and not layout.SLEEP_CONTROL_PORT - 3 <= port <= layout.SLEEP_STATUS_PORT:
            entries.append(entry(OUT, width, port, value))
    run_table(machine, tmp_path, image, entries)


def test_random_sequences_over_all_devices(machine, tmp_path: Path, image: Path) -> None:
    """Sequences that keep coming back to the registers that matter, so that drivers half set up meet every other write."""
    generator = random.Random(5)
    windows = [base for number in (0, 6) for base in (layout.slot(number).base, layout.slot(number).acpi_base)]
    ports = [0x60, 0x64, 0x70, 0x71, *range(0x3F8, 0x400), layout.SLEEP_STATUS_PORT]
    steps = (ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, ACKNOWLEDGE | DRIVER | FEATURES_OK, 0xF)
    entries = []
    for _ in range(12_000):
        base = generator.choice(windows)
        pick = generator.random()
        if pick < 0.25:
            entries.append(entry(WRITE, 2, base + STATUS, generator.choice((0, *steps, generator.getrandbits(8)))))
        elif pick < 0.4:
            entries.append(entry(WRITE, 2, base + DRIVER_FEATURES_SEL, generator.choice((0, 1, 1, 2))))
            entries.append(entry(WRITE, 2, base + DRIVER_FEATURES, generator.choice((0, 1, 1, 0xFFFF_FFFF))))
        elif pick < 0.6:
            register = generator.choice((QUEUE_SEL, QUEUE_NUM, QUEUE_READY, QUEUE_NOTIFY, QUEUE_DESC, QUEUE_DRIVER,
                                         QUEUE_DEVICE))
            value = generator.choice((0, 0, 1, 1, 16, RINGS, RINGS + 0x1000, generator.getrandbits(32)))
            entries.append(entry(WRITE, 2, base + register, value))
        elif pick < 0.8:
            entries.append(entry(generator.choice((READ, WRITE)), generator.randrange(3), base + generator.randrange(0x200),
                                 generator.getrandbits(32)))
        else:
            port, value = generator.choice(ports), generator.getrandbits(32)
            if port == RESET_PORT and value & 0xFF == 0xFE:
                continue
            entries.append(entry(generator.choice((IN, OUT)), 0 if port < 0x3F8 else generator.randrange(3), port, value))
    run_table(machine, tmp_path, image, entries)


