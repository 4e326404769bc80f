"""Every virtio device in a snapshot: another one goes on where it was, and a state that was edited is refused by name."""

from __future__ import annotations

import copy
import itertools
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stratovirt.snapshot.saved import Saved, SnapshotError
from stratovirt.virtio.balloon import VirtioBalloon
from unit.test_console import PORT_ADD, PORT_OPEN, ConsoleDriver
from unit.test_vhost import VsockDriver
from unit.test_vhost_user import Bench
from unit.virtio_devices import SECTOR, BlockDriver, NetDriver, RngDriver, disk_content
from unit.virtio_driver import (
    CONFIG,
    DATA,
    DEVICE_ID,
    INTERRUPT_ACK,
    INTERRUPT_STATUS,
    RAM_SIZE,
    STATUS,
    Driver,
    guest_memory,
)

pytestmark = pytest.mark.usefixtures("implementation")


class BalloonDriver(Driver):
    def __init__(self) -> None:
        from stratovirt.loop import EventLoop

        self.loop = EventLoop()
        memory = guest_memory()
        super().__init__(VirtioBalloon(memory, self.loop, lambda size: None), memory)

    def close(self) -> None:
        super().close()
        self.loop.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    made: list[Any] = []
    number = itertools.count()

    def factory(kind: str) -> Any:
        folder = tmp_path / str(next(number))
        folder.mkdir()
        drivers: dict[str, Callable[[], Driver]] = {
            "blk": lambda: BlockDriver(folder), "rng": RngDriver, "net": NetDriver, "console": lambda: ConsoleDriver(folder),
            "vsock": VsockDriver, "balloon": BalloonDriver,
            "vhost-user-blk": lambda: Bench(folder).blk(), "vhost-user-net": lambda: Bench(folder).net(),
        }
        made.append(drivers[kind]())
        return made[-1]

    yield factory
    for driver in made:
        driver.close()


KINDS = ("blk", "rng", "net", "console", "vsock", "balloon", "vhost-user-blk", "vhost-user-net")


def saved(driver: Driver) -> dict[str, Any]:
    """As the file has it."""
    driver.device.pause()
    state: dict[str, Any] = json.loads(json.dumps(driver.transport.save()))
    return state


def copy_memory(driver: Driver, other: Driver) -> None:
    for source, target in zip(driver.memory.regions, other.memory.regions, strict=True):
        target.u8[:] = source.u8


def go_on(driver: Any, other: Any) -> Any:
    """`other` is the machine that `driver`'s is restored into."""
    state = saved(driver)
    copy_memory(driver, other)
    other.queues = driver.queues
    for queue in other.queues:
        queue.memory = other.memory
    other.window = other.transport.windows[driver.transport.windows.index(driver.window)]
    saved_again = Saved(state, "slots[0]")
    if other.device.waits_for_restore:
        other.device.pause()
    other.transport.restore(saved_again)
    saved_again.end()
    if other.device.waits_for_restore:
        other.device.resume()
    return other


# -- the transport


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["untouched", "probed", "negotiated", "running", "broken"])
def test_a_driver_finds_what_it_left(make: Callable[[str], Any], kind: str, stage: str) -> None:
    driver, other = make(kind), make(kind)
    if stage == "probed":
        driver.window = driver.transport.windows[1]
        driver.add_status(1)
    elif stage == "negotiated":
        driver.negotiate()
        driver.set_up_queue(0, 8)
    elif stage in ("running", "broken"):
        driver.start(size=8)
        driver.transport.notify_config()
    if stage == "broken":
        driver.transport.broken, driver.device.active = True, False
        driver.device.let_others_interrupt(False)
    registers = [driver.read(register) for register in range(0, CONFIG, 4)]
    config = [driver.read(CONFIG + offset, 1) for offset in range(32)]
    go_on(driver, other)
    assert [other.read(register) for register in range(0, CONFIG, 4)] == (
        registers if not other.device.external_queues or stage != "running" else
        [value | (register == INTERRUPT_STATUS) for register, value in zip(range(0, CONFIG, 4), registers, strict=True)])
    assert [other.read(CONFIG + offset, 1) for offset in range(32)] == config
    assert other.device.active == (stage == "running")
    again = stage == "running" and other.device.waits_for_restore
    assert other.line.count == (1 if stage in ("running", "broken") else 0) + again, "a pending interrupt is raised again"
    if stage == "probed":
        assert other.transport.windows[0].read(DEVICE_ID, 4) == 0, "the other window has the device"
    other.write(INTERRUPT_ACK, 3)
    assert other.read(INTERRUPT_STATUS) == int(other.device.others_interrupt)
    other.write(STATUS, 0)
    assert other.read(INTERRUPT_STATUS) == 0
    other.start(size=8)
    assert not other.errors, "and a reset begins anew"


def test_a_host_that_offers_less(make: Callable[[str], Any]) -> None:
    driver, other = make("blk"), make("blk")
    driver.start()
    other.device.features &= ~(1 << 28)
    with pytest.raises(SnapshotError, match=r"^slots\[0\]\.driver_features: "):
        go_on(driver, other)


def places(state: Any, place: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Every value: its name as errors have it, and the way to it."""
    if isinstance(state, dict):
        for name, value in state.items():
            where = f"{place}.{name}" if place else name
            yield where, [name]
            yield from ((deeper, [name, *way]) for deeper, way in places(value, where))
    elif isinstance(state, list):
        for number, value in enumerate(state):
            yield from ((deeper, [number, *way]) for deeper, way in places(value, f"{place}[{number}]"))


def refusal(other: Any, state: dict[str, Any]) -> str:
    """The field that is named."""
    try:
        other.transport.restore(Saved(state))
    except SnapshotError as error:
        return str(error).partition(": ")[0]
    return "none"


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_checked(make: Callable[[str], Any], kind: str) -> None:
    driver, other = make(kind), make(kind)
    driver.start(size=8)
    if kind == "console":
        driver.open(2)
    whole = saved(driver)
    copy_memory(driver, other)
    if other.device.waits_for_restore:
        other.device.pause()
    checked = 0
    for where, way in places(whole):
        for bad in ("remove", [], {}, "no digits", -5, 1 << 70, 1.5, "unknown"):
            state = copy.deepcopy(whole)
            holder = state
            for step in way[:-1]:
                holder = holder[step]
            if bad == "remove":
                del holder[way[-1]]
            elif bad == "unknown":
                holder["more"] = 1
            elif type(bad) is type(holder[way[-1]]) and bad in ([], {}, "no digits"):
                continue  # an empty list may be right, and so may be any text
            else:
                holder[way[-1]] = bad
            other.transport.reset()
            named = refusal(other, state)
            assert named.startswith((where[: len(named)], where)) or named.endswith("more"), (where, bad, named)
            checked += 1
    assert checked > 80


# -- the devices


def test_requests_that_were_not_served_are(make: Callable[[str], Any]) -> None:
    driver, other = make("blk"), make("blk")
    queue = driver.start()
    assert driver.request([(DATA, 16, False), (DATA + 512, SECTOR, True), (DATA + 4096, 1, True)]) == SECTOR + 1
    driver.memory.write(DATA, struct.pack("<IIQ", 0, 0, 7))
    head = queue.add([(DATA, 16, False), (DATA + 512, SECTOR, True), (DATA + 4096, 1, True)])
    driver.write(0x050, 0)  # the notification lies in the eventfd of a machine that is about to be gone
    go_on(driver, other)
    other.serve()
    assert other.queues[0].collect() == [(head, SECTOR + 1)]
    assert other.memory.read(DATA + 512, SECTOR) == disk_content(8)[7 * SECTOR :]
    assert other.line.count > 0


def test_a_disk_of_another_size(make: Callable[[str], Any], tmp_path: Path) -> None:
    driver = make("blk")
    folder = tmp_path / "other"
    folder.mkdir()
    other = BlockDriver(folder, sectors=65)
    with pytest.raises(SnapshotError, match=r"^slots\[0\]\.device\.sectors: the disk had 64 sectors"):
        go_on(driver, other)
    other.close()


def test_frames_go_both_ways_and_buffers_at_hand_come_back(make: Callable[[str], Any]) -> None:
    driver, other = make("net"), make("net")
    queue = driver.start()
    heads = [queue.add([(DATA + 4096 * number, 2048, True)]) for number in range(4)]
    driver.notify()  # the receiver holds a buffer now, which is no more than a promise
    go_on(driver, other)
    other.serve()
    frame = bytes(12) + bytes.fromhex("525400123456") + bytes(6) + b"\x08\x00" + b"hello".ljust(50)
    other.network.send(frame)
    for _ in range(5):
        other.loop.run_once(0.01)
        other.serve()
    returned = other.queues[0].collect()
    assert [head for head, _ in returned] == heads[:1]
    assert other.memory.read(DATA + 12, len(frame) - 12) == frame[12:]
    other.memory.write(DATA + 0x8000, frame)
    other.queues[1].add([(DATA + 0x8000, len(frame), False)])
    other.notify(1)
    assert other.network.recv(4096) == frame
    assert len(other.queues[1].collect()) == 1


def test_filters_and_cable_of_an_interface(make: Callable[[str], Any]) -> None:
    driver, other = make("net"), make("net")
    driver.start()
    one, many = bytes(range(6)), b"".join(bytes((1, 0, 0, 0, 0, number)) for number in range(100))
    receive = driver.net.filter
    assert receive.command(0, 0, b"\0") and receive.command(1, 1, one)
    assert receive.command(1, 0, struct.pack("<I", 1) + one + struct.pack("<I", 100) + many)
    assert receive.command(2, 0, struct.pack("<H", 5))
    driver.net.set_link(False)
    go_on(driver, other)
    assert other.net.filter.save() == receive.save()
    assert not other.net.link_up and other.read(CONFIG + 6, 2) == 0
    assert not other.net.filter.accepts(bytes(6) + bytes(10))
    assert other.net.filter.accepts(one + bytes(10))


def test_a_port_goes_on_in_the_middle_of_a_buffer(make: Callable[[str], Any]) -> None:
    driver, other = make("console"), make("console")
    driver.start_driver()
    driver.open(2)
    client = driver.connect("agent")
    data = bytes(value & 0xFF for value in range(700_000))
    driver.send(7, data)
    driver.run(lambda: driver.device._ports[2].sending is not None)
    driver.device._ports[2].pending[:] = b"typed"
    driver.control()
    go_on(driver, other)
    assert other.device._ports[2].open
    mine, theirs = other.connect("agent"), bytearray()
    unsent = sum(map(len, driver.device._ports[2].sending[1]))

    def received() -> bool:
        try:
            while part := mine.recv(1 << 16):
                theirs.extend(part)
        except BlockingIOError:
            pass
        return len(theirs) >= unsent

    for number in range(len(other.queues)):
        other.transport.requeue(number)
    other.run(received)
    assert bytes(theirs) == data[len(data) - unsent :]
    assert len(other.queues[7].collect()) == 1
    addresses = other.give(6)
    other.idle()
    assert other.received(6, addresses) == b"typed"
    client.close()


def test_a_paused_console_says_nothing_more(make: Callable[[str], Any]) -> None:
    """What the guest has sent, and the device not taken, is in the snapshot: it must not come out of both machines."""
    driver = make("console")
    driver.start_driver()
    driver.open(2)
    client = driver.connect("agent")
    driver.device.pause()
    driver.send(7, b"once")
    client.send(b"typed")
    addresses = driver.give(6)
    driver.idle()
    with pytest.raises(BlockingIOError):
        client.recv(16)
    assert driver.queues[6].collect() == [] and not driver.device._ports[2].pending
    driver.device.resume()
    driver.idle()
    assert client.recv(16) == b"once"
    assert driver.received(6, addresses) == b"typed"


def test_ports_say_anew_who_is_there(make: Callable[[str], Any]) -> None:
    driver, other = make("console"), make("console")
    driver.start_driver()
    driver.open(2)
    driver.connect("agent")
    go_on(driver, other)
    messages = [message[:3] for message in other.control(16)]
    assert (2, PORT_ADD, 1) in messages, "what the guest has not heard yet"
    assert [message for message in messages if message[1] == PORT_OPEN and message[0] == 2] == [(2, PORT_OPEN, 0)], "not now"


def test_sockets_are_reset_and_the_rings_go_on(make: Callable[[str], Any]) -> None:
    driver, other = make("vsock"), make("vsock")
    driver.start()
    assert driver.kernel.running
    state = saved(driver)
    assert not driver.kernel.running, "the kernel has let go of the rings"
    driver.device.resume()
    assert driver.kernel.running
    state["queues"][0]["position"] = 5
    other.memory.write(0, driver.memory.read(0, RAM_SIZE))
    event = driver.queues[2]
    event.memory = other.memory
    other.transport.restore(Saved(state))
    other.serve()
    assert other.kernel.running and event.collect() == []
    bases = dict(struct.unpack("<II", data) for data in other.kernel.arguments(1 << 30 | 8 << 16 | 0xAF12))
    assert bases == {0: 5, 1: 0}
    other.memory.write(DATA, b"\xff" * 8)
    head = event.add([(DATA, 8, True)])
    other.notify(2)
    assert event.collect() == [(head, 4)] and other.memory.read(DATA, 5) == b"\0\0\0\0\xff"
    event.add([(DATA, 8, True)])
    other.notify(2)
    assert event.collect() == [], "once"


def test_a_balloon_keeps_its_size(make: Callable[[str], Any]) -> None:
    driver, other = make("balloon"), make("balloon")
    driver.start()
    driver.device.set_target(RAM_SIZE // 2)
    driver.write(CONFIG + 4, 7)
    go_on(driver, other)
    assert (other.read(CONFIG), other.read(CONFIG + 4)) == (RAM_SIZE // 2 >> 12, 7)
