"""virtio-balloon: what a driver gives leaves the process, and nothing else does."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stratovirt.cli import command
from stratovirt.control.commands import COMMANDS
from stratovirt.control.descriptors import Descriptors
from stratovirt.control.protocol import Request
from stratovirt.errors import ConfigError, HostError, StratoVirtError
from stratovirt.hostmap import HostMapping, release
from stratovirt.loop import EventLoop
from stratovirt.virtio.balloon import MAX_FRAMES, VirtioBalloon
from unit.test_virtio_conformance import PARTS
from unit.virtio_driver import CONFIG, CONFIG_GENERATION, HIGH_RAM, NEEDS_RESET, RAM_SIZE, STATUS, Driver, guest_memory

PAGE = 4096
RAM = 4 << 20
LIST = 0x8_0000  # where page frame numbers are written
INFLATE, DEFLATE, REPORTING = 0, 1, 2


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class BalloonDriver(Driver):
    def __init__(self, size: int = RAM, high: int = 0, reporting: bool = True, auto: tuple[int, int] | None = None) -> None:
        self.clock = Clock()
        self.loop = EventLoop(self.clock)
        self.told: list[int] = []
        self.host_errors: list[HostError] = []
        memory = guest_memory(size, high)
        self.balloon = VirtioBalloon(memory, self.loop, self.told.append, reporting=reporting, auto=auto, deflate_on_oom=True,
                                     on_error=self.host_errors.append)
        super().__init__(self.balloon, memory)

    def close(self) -> None:
        super().close()
        self.loop.close()

    def fill(self) -> None:
        """Touch all RAM beyond the rings and the list."""
        for region in self.memory.regions:
            start = 0x10_0000 if region.base == 0 else 0
            region.u8[start:] = b"\xAA" * (region.size - start)

    def kept(self, address: int) -> bool:
        """Does the page still hold what `fill` put there? One that was dropped reads as zero."""
        data = self.memory.read(address, PAGE)
        assert data in (b"\xAA" * PAGE, bytes(PAGE))
        return data[0] == 0xAA

    def name_frames(self, queue: int, frames: list[int]) -> None:
        data = struct.pack(f"<{len(frames)}I", *frames)
        self.memory.write(LIST, data)
        self.queues[queue].add([(LIST, len(data), False)])
        self.notify(queue)
        self.queues[queue].collect()
        self.queues[queue].release_all()

    def write_actual(self, pages: int) -> None:
        self.write(CONFIG + 4, pages)


@pytest.fixture
def make() -> Iterator[Callable[..., BalloonDriver]]:
    made: list[BalloonDriver] = []

    def factory(**options: Any) -> BalloonDriver:
        made.append(BalloonDriver(**options))
        return made[-1]

    yield factory
    for driver in made:
        driver.close()


@pytest.mark.parametrize("options", [{"reporting": False}, {"reporting": True}, {"reporting": True, "auto": (50, 10)}])
@pytest.mark.parametrize("part", PARTS)
def test_it_conforms(make: Callable[..., BalloonDriver], part: Callable[[Driver], None], options: dict[str, Any]) -> None:
    part(make(size=RAM_SIZE, **options))


def test_features_and_queues(make: Callable[..., BalloonDriver]) -> None:
    assert make().offered() == 1 << 32 | 1 << 5 | 1 << 2
    assert len(make(reporting=True).balloon.queue_sizes) == 3
    assert len(make(reporting=False).balloon.queue_sizes) == 2


# -- pages


def test_pages_given_are_dropped_and_their_neighbours_are_not(make: Callable[..., BalloonDriver]) -> None:
    driver = make(high=1 << 20)
    driver.start()
    driver.fill()
    high = HIGH_RAM >> 12
    given = [0x200, 0x202, 0x201, 0x202, 0x2FF, high + 7, 0x310, 0x30F]
    driver.name_frames(INFLATE, given)
    for frame in (*range(0x100, RAM >> 12), *range(high, high + 256)):
        assert driver.kept(frame << 12) == (frame not in given), hex(frame)
    assert driver.balloon.released == len(set(given)) * PAGE


def test_a_page_is_usable_after_deflating_and_even_without(make: Callable[..., BalloonDriver]) -> None:
    driver = make()
    driver.start()
    driver.fill()
    driver.name_frames(INFLATE, [0x200, 0x201])
    driver.name_frames(DEFLATE, [0x200])
    for address in (0x20_0000, 0x20_1000):
        assert not driver.kept(address)
        driver.memory.write(address, b"\xAA" * PAGE)
        assert driver.kept(address)


def test_deflating_drops_nothing(make: Callable[..., BalloonDriver]) -> None:
    driver = make()
    driver.start()
    driver.fill()
    driver.name_frames(DEFLATE, list(range(0x200, 0x300)))
    assert driver.kept(0x20_0000) and driver.kept(0x2F_F000)


def test_reported_ranges_are_dropped_by_whole_pages(make: Callable[..., BalloonDriver]) -> None:
    driver = make()
    driver.start()
    driver.fill()
    driver.queues[REPORTING].add([(0x20_0000, 0x8000, True), (0x30_0800, 0x1800, True), (0x38_0001, 0x800, True)])
    driver.notify(REPORTING)
    assert driver.queues[REPORTING].collect() == [(0, 0)]
    dropped = [frame for frame in range(0x100, RAM >> 12) if not driver.kept(frame << 12)]
    assert dropped == [*range(0x200, 0x208), 0x301]


@pytest.mark.parametrize("frames", [
    [RAM >> 12], [0xFFFF_FFFF], [0x200, (RAM >> 12) - 1, RAM >> 12], [HIGH_RAM >> 12], list(range(0x3FE, 0x402))])
def test_a_page_outside_ram_breaks_the_device(make: Callable[..., BalloonDriver], frames: list[int]) -> None:
    driver = make()
    driver.start()
    driver.fill()
    driver.name_frames(INFLATE, frames)
    assert driver.status & NEEDS_RESET
    assert len(driver.errors) == 1
    assert driver.kept((RAM >> 1) + PAGE)


@pytest.mark.parametrize("length", [3, 4 * MAX_FRAMES + 4, 1 << 20])
def test_lists_that_are_none_break_the_device(make: Callable[..., BalloonDriver], length: int) -> None:
    driver = make()
    driver.start()
    driver.queues[INFLATE].add([(LIST, length, False)])
    driver.notify(INFLATE)
    assert driver.queues[INFLATE].collect() == [(0, 0)]
    assert driver.status & NEEDS_RESET


def test_a_list_may_be_split_anywhere(make: Callable[..., BalloonDriver]) -> None:
    driver = make()
    driver.start()
    driver.fill()
    driver.memory.write(LIST, struct.pack("<II", 0x200, 0x204))
    driver.queues[INFLATE].add([(LIST, 3, False), (LIST + 3, 5, False)])
    driver.notify(INFLATE)
    assert [frame for frame in range(0x200, 0x210) if not driver.kept(frame << 12)] == [0x200, 0x204]


def test_release_keeps_to_its_view() -> None:
    host = HostMapping(8 * PAGE)
    host.view[:] = b"\xAA" * len(host.view)
    release(host.view[PAGE - 1 : 3 * PAGE + 1])
    release(host.view[5 * PAGE + 1 : 6 * PAGE])
    release(host.view[:0])
    assert [host.view[number * PAGE] for number in range(8)] == [0xAA, 0, 0, 0xAA, 0xAA, 0xAA, 0xAA, 0xAA]


# -- sizes


def test_a_target_reaches_the_driver(make: Callable[..., BalloonDriver]) -> None:
    driver = make()
    driver.start()
    generation, interrupts = driver.read(CONFIG_GENERATION), driver.line.count
    driver.balloon.set_target(RAM // 2)
    assert driver.read(CONFIG) == RAM // 2 // PAGE
    assert driver.read(CONFIG_GENERATION) == generation + 1
    assert driver.line.count == interrupts + 1
    for size, pages in ((RAM, 0), (RAM + 1, 0), (1 << 63, 0), (0, RAM // PAGE), (RAM - 1, 0), (RAM - PAGE - 1, 1)):
        driver.balloon.set_target(size)
        assert driver.read(CONFIG) == pages


def test_a_target_from_before_the_driver_waits_for_it(make: Callable[..., BalloonDriver]) -> None:
    driver = make()
    driver.balloon.set_target(RAM // 4)
    driver.start()
    assert driver.read(CONFIG) == RAM * 3 // 4 // PAGE


def test_what_the_driver_says_is_told_once_a_second(make: Callable[..., BalloonDriver]) -> None:
    driver = make()
    driver.start()
    for pages in range(1, 101):
        driver.write_actual(pages)
    assert driver.balloon.guest_bytes == RAM - 100 * PAGE
    driver.loop.run_once(0)
    assert len(driver.loop._timers) == 1
    assert driver.told == []
    driver.clock.now += 1.01
    driver.loop.run_once(0)
    assert driver.told == [RAM - 100 * PAGE]
    driver.write_actual(7)
    driver.loop.run_once(0)
    driver.clock.now += 1.01
    driver.loop.run_once(0)
    assert driver.told == [RAM - 100 * PAGE, RAM - 7 * PAGE]


def test_a_driver_that_writes_nonsense_has_no_memory_left(make: Callable[..., BalloonDriver]) -> None:
    driver = make()
    driver.start()
    driver.write_actual(0xFFFF_FFFF)
    assert driver.balloon.guest_bytes == 0
    driver.write(CONFIG + 4, 0, 1)
    assert driver.read(CONFIG + 4) == 0xFFFF_FF00
    driver.write(CONFIG, 5)  # not the driver's
    driver.write(CONFIG + 2, 5)
    driver.write(CONFIG + 6, 5)  # beyond the end
    driver.write(CONFIG + 8, 5)
    assert (driver.read(CONFIG), driver.read(CONFIG + 4)) == (0, 0xFFFF_FF00)


def test_a_reset_gives_everything_back_and_keeps_the_wish(make: Callable[..., BalloonDriver]) -> None:
    driver = make()
    driver.start()
    driver.balloon.set_target(RAM // 2)
    driver.write_actual(100)
    driver.write(STATUS, 0)
    assert driver.balloon.guest_bytes == RAM
    assert driver.read(CONFIG) == RAM // 2 // PAGE
    driver.write_actual(5)  # no driver: nobody to believe
    assert driver.balloon.guest_bytes == RAM


# -- the command line and QMP


# -- auto-balloon

VERSION_1, DEFLATE_ON_OOM, REPORTS, MESSAGE = 1 << 32, 1 << 2, 1 << 5, 1 << 16


def send(driver: BalloonDriver, queue: int, message: bytes) -> None:
    """A message in two pieces, as a driver may lay it out."""
    driver.memory.write(LIST, message)
    driver.queues[queue].add([(LIST, 3, False), (LIST + 3, len(message) - 3, False)])
    driver.notify(queue)


def test_auto_balloon_shows_its_settings(make: Callable[..., BalloonDriver]) -> None:
    driver = make(auto=(30, 7))
    assert driver.device.features & MESSAGE and len(driver.balloon.queue_sizes) == 4
    assert len(make(reporting=False, auto=(30, 7)).balloon.queue_sizes) == 3
    assert [driver.read(CONFIG + offset) for offset in range(0, 28, 4)] == [0, 0, 0, 0, 30, 7, 0]
    driver.start(VERSION_1 | REPORTS | MESSAGE)
    driver.write_actual(5)
    driver.write(CONFIG + 16, 99)  # not the driver's to write
    assert [driver.read(CONFIG + offset) for offset in range(0, 28, 4)] == [0, 5, 0, 0, 30, 7, 0]
    assert not make().device.features & MESSAGE and make().read(CONFIG + 16) == 0


@pytest.mark.parametrize(("features", "queue"), [(REPORTS | MESSAGE, 3), (MESSAGE, 2)])
def test_a_message_becomes_the_target(make: Callable[..., BalloonDriver], features: int, queue: int) -> None:
    driver = make(auto=(50, 10))
    driver.start(VERSION_1 | features)
    for pages, target in ((100, 100), (0, 0), (RAM // PAGE + 1, RAM // PAGE), (2**64 - 1, RAM // PAGE)):
        generation, interrupts = driver.read(CONFIG_GENERATION), driver.line.count
        send(driver, queue, struct.pack("<HQ", 0xFFFF, pages) + b"more")
        assert driver.read(CONFIG) == target
        assert driver.read(CONFIG_GENERATION) != generation and driver.line.count > interrupts
        assert [head for head, _ in driver.queues[queue].collect()]
        driver.queues[queue].release_all()
    driver.balloon.set_target(RAM // 2)
    assert driver.read(CONFIG) == RAM // 2 // PAGE


def test_a_message_that_is_none_breaks_the_device(make: Callable[..., BalloonDriver]) -> None:
    driver = make(auto=(50, 10))
    driver.start(VERSION_1 | REPORTS | MESSAGE)
    send(driver, 3, bytes(9))
    assert driver.read(STATUS) & NEEDS_RESET and driver.read(CONFIG) == 0
    assert [head for head, _ in driver.queues[3].collect()], "its buffer is returned"


def test_without_the_feature_no_queue_takes_messages(make: Callable[..., BalloonDriver]) -> None:
    driver = make(auto=(50, 10))
    driver.start(VERSION_1 | REPORTS)
    send(driver, 2, struct.pack("<HQ", 0, 100))
    assert driver.read(CONFIG) == 0 and not driver.read(STATUS) & NEEDS_RESET


def test_one_balloon_for_a_machine() -> None:
    with pytest.raises(ConfigError, match="there is a balloon already"):
        command.parse(["-kernel", "k", "-device", "virtio-balloon-device,id=a", "-device", "virtio-balloon-device,id=b"])


class Machine:
    def __init__(self, balloon: VirtioBalloon | None) -> None:
        self.balloon = balloon

    def execute(self, name: str, arguments: dict[str, object] | None = None) -> object:
        return COMMANDS.dispatch(self, Request(name, arguments, None), Descriptors())  # type: ignore[arg-type]


def test_qmp(make: Callable[..., BalloonDriver]) -> None:
    driver = make()
    driver.start()
    machine = Machine(driver.balloon)
    assert machine.execute("query-balloon") == {"actual": RAM}
    assert machine.execute("balloon", {"value": RAM // 2}) == {}
    assert driver.read(CONFIG) == RAM // 2 // PAGE
    assert machine.execute("query-balloon") == {"actual": RAM}  # the guest has not followed yet
    driver.write_actual(RAM // 2 // PAGE)
    assert machine.execute("query-balloon") == {"actual": RAM // 2}
    assert machine.execute("balloon") == {}
    assert driver.read(CONFIG) == RAM // PAGE
    for value in (-1, 1 << 64, "1G", True, None):
        with pytest.raises(StratoVirtError):
            machine.execute("balloon", {"value": value})


def test_qmp_without_a_balloon() -> None:
    for name in ("balloon", "query-balloon"):
        with pytest.raises(StratoVirtError, match="No balloon device has been activated"):
            Machine(None).execute(name)
