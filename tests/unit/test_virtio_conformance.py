"""What VIRTIO 1.2 asks of every device, asked of each of ours: `check_virtio_device` and its parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from unit.virtio_devices import BlockDriver, NetDriver, RngDriver
from unit.virtio_driver import (
    ACKNOWLEDGE,
    CONFIG,
    CONFIG_GENERATION,
    DATA,
    DEVICE_FEATURES,
    DEVICE_FEATURES_SEL,
    DEVICE_ID,
    DRIVER,
    DRIVER_FEATURES,
    DRIVER_FEATURES_SEL,
    DRIVER_OK,
    FAILED,
    FEATURES_OK,
    INTERRUPT_ACK,
    INTERRUPT_STATUS,
    MAGIC,
    NEEDS_RESET,
    QUEUE_DESC,
    QUEUE_DEVICE,
    QUEUE_DRIVER,
    QUEUE_NUM,
    QUEUE_NUM_MAX,
    QUEUE_READY,
    QUEUE_SEL,
    RAM_SIZE,
    STATUS,
    VENDOR_ID,
    VERSION,
    VERSION_1,
    WRITE,
    Driver,
    DriverFactory,
    GuestQueue,
)

pytestmark = pytest.mark.usefixtures("implementation")

FACTORIES = ("block", "block-readonly", "net", "net-pairs", "rng", "rng-limited")


@pytest.fixture(params=FACTORIES)
def factory(request: pytest.FixtureRequest, tmp_path: Path):
    made: list[Driver] = []

    def make() -> Driver:
        driver: Driver
        while made:  # an image has one writer
            made.pop().close()
        if request.param.startswith("block"):
            driver = BlockDriver(tmp_path, readonly=request.param == "block-readonly")
        elif request.param.startswith("net"):
            driver = NetDriver(pairs=2 if request.param == "net-pairs" else 1)
        else:
            driver = RngDriver(rate=1000.0 if request.param == "rng-limited" else None)
        made.append(driver)
        return driver

    yield make
    for driver in made:
        driver.close()


def test_every_device_conforms(factory: DriverFactory) -> None:
    check_virtio_device(factory)


def check_virtio_device(factory: DriverFactory) -> None:
    """Each part on a device of its own; parts leave nothing behind."""
    for part in PARTS:
        part(factory())


# -- identity


def identifies_itself(driver: Driver) -> None:
    assert driver.read(MAGIC).to_bytes(4, "little") == b"virt"
    assert driver.read(VERSION) == 2
    assert driver.read(DEVICE_ID) == driver.device.device_id != 0
    driver.read(VENDOR_ID)
    assert driver.read(STATUS) == 0
    for register in (MAGIC, VERSION, DEVICE_ID, VENDOR_ID):
        before = driver.read(register)
        driver.write(register, ~before & 0xFFFF_FFFF)
        assert driver.read(register) == before


def shows_no_shared_memory(driver: Driver) -> None:
    driver.write(0x0AC, 0)
    assert driver.read(0x0B0) == driver.read(0x0B4) == 0xFFFF_FFFF


# -- features


def offers_version_1_and_nothing_beyond_64_bits(driver: Driver) -> None:
    assert driver.offered() & VERSION_1
    for select in (2, 3, 31, 0xFFFF_FFFF):
        driver.write(DEVICE_FEATURES_SEL, select)
        assert driver.read(DEVICE_FEATURES) == 0


def accepts_what_it_offers(driver: Driver) -> None:
    assert driver.negotiate() & FEATURES_OK
    assert driver.negotiate(VERSION_1) & FEATURES_OK


def refuses_a_legacy_driver(driver: Driver) -> None:
    assert not driver.negotiate(driver.offered() & ~VERSION_1) & FEATURES_OK
    assert not driver.negotiate(0) & FEATURES_OK


def refuses_what_it_does_not_offer(driver: Driver) -> None:
    offered = driver.offered()
    for bit in range(64):
        if not offered >> bit & 1:
            assert not driver.negotiate(VERSION_1 | 1 << bit) & FEATURES_OK, bit


def lets_a_refused_driver_try_again(driver: Driver) -> None:
    assert not driver.negotiate(0) & FEATURES_OK
    driver.choose(VERSION_1)
    assert driver.add_status(FEATURES_OK) & FEATURES_OK


def features_are_frozen_after_features_ok(driver: Driver) -> None:
    driver.negotiate(VERSION_1)
    driver.choose(driver.offered())
    driver.set_up_queue(0)
    driver.add_status(DRIVER_OK)
    assert driver.device.driver_features == VERSION_1


def ignores_features_before_driver(driver: Driver) -> None:
    driver.choose(driver.offered())
    driver.add_status(ACKNOWLEDGE)
    driver.choose(driver.offered())
    driver.add_status(DRIVER)
    assert not driver.add_status(FEATURES_OK) & FEATURES_OK
    driver.write(DRIVER_FEATURES_SEL, 2)  # a third half does not exist
    driver.write(DRIVER_FEATURES, 1)
    assert not driver.add_status(FEATURES_OK) & FEATURES_OK


# -- status


def needs_features_ok_for_driver_ok(driver: Driver) -> None:
    driver.add_status(ACKNOWLEDGE | DRIVER)
    assert not driver.add_status(DRIVER_OK) & DRIVER_OK
    assert not driver.device.active
    driver.choose(0)
    driver.add_status(FEATURES_OK)
    assert not driver.add_status(DRIVER_OK) & DRIVER_OK
    assert not driver.device.active


def does_not_start_for_a_driver_that_failed(driver: Driver) -> None:
    driver.negotiate()
    driver.set_up_queue(0)
    driver.add_status(FAILED)
    driver.add_status(DRIVER_OK)
    assert not driver.device.active


def status_bits_are_only_cleared_by_reset(driver: Driver) -> None:
    driver.negotiate()
    before = driver.status
    driver.write(STATUS, ACKNOWLEDGE)
    assert driver.status == before
    driver.write(STATUS, 0)
    assert driver.status == 0


def the_driver_cannot_set_needs_reset(driver: Driver) -> None:
    driver.add_status(ACKNOWLEDGE)
    driver.write(STATUS, 0xFFFF_FFFF & ~(FEATURES_OK | DRIVER_OK | FAILED))
    assert not driver.status & NEEDS_RESET


def resets_in_every_state(driver: Driver) -> None:
    def broken() -> None:
        queue = driver.start()
        queue.publish(0, move=queue.size + 1)
        driver.notify()
        assert driver.status & NEEDS_RESET

    states = (
        lambda: None,
        lambda: driver.add_status(ACKNOWLEDGE),
        lambda: driver.add_status(ACKNOWLEDGE | DRIVER),
        driver.negotiate,
        lambda: (driver.negotiate(), driver.set_up_queue(0)),
        driver.start,
        lambda: driver.add_status(FAILED),
        lambda: (driver.start(), driver.add_status(FAILED)),
        broken,
    )
    for enter in states:
        enter()
        driver.write(STATUS, 0)
        assert driver.status == 0
        assert not driver.device.active
        assert driver.read(QUEUE_READY) == 0
        assert driver.read(INTERRUPT_STATUS) == 0
        assert driver.device.driver_features == 0
        driver.start()
        assert driver.device.active
        assert driver.status == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK


# -- config space


def config_space_is_zero_beyond_its_end(driver: Driver) -> None:
    config = driver.device.config
    shown = bytes(driver.read(CONFIG + offset, 1) for offset in range(0x100))
    assert shown == config.ljust(0x100, b"\0")
    for size in (2, 4, 8):
        for offset in range(0x100 - size + 1):
            assert driver.read(CONFIG + offset, size) == int.from_bytes(shown[offset : offset + size], "little")


def config_space_takes_any_write(driver: Driver) -> None:
    before = driver.device.config
    for size in (1, 2, 4, 8):
        for offset in range(0x100 - size + 1):
            driver.write(CONFIG + offset, (1 << 8 * size) - 1, size)
    assert driver.device.config[:8] == before[:8]
    assert len(driver.device.config) == len(before)
    assert driver.read(CONFIG_GENERATION) == 0


# -- queues


def has_queues_with_sizes_of_powers_of_two(driver: Driver) -> None:
    count = len(driver.device.queue_sizes)
    assert count
    for number in range(count):
        driver.write(QUEUE_SEL, number)
        size = driver.read(QUEUE_NUM_MAX)
        assert size and not size & (size - 1)
    for number in (count, count + 1, 0xFFFF, 0x8000_0000, 0xFFFF_FFFF):
        driver.write(QUEUE_SEL, number)
        assert driver.read(QUEUE_NUM_MAX) == 0
        driver.write(QUEUE_READY, 1)
        assert driver.read(QUEUE_READY) == 0


def takes_queue_sizes_up_to_its_own(driver: Driver) -> None:
    driver.negotiate()
    largest = driver.read(QUEUE_NUM_MAX)
    for size, taken in ((0, False), (3, False), (largest * 2, False), (0xFFFF_FFFF, False), (largest // 2, True), (1, True)):
        driver.negotiate()
        before = driver.transport._queues[0].size
        driver.write(QUEUE_NUM, size)
        assert driver.transport._queues[0].size == (size if taken else before)


def queues_cannot_be_set_up_before_features_ok(driver: Driver) -> None:
    driver.add_status(ACKNOWLEDGE | DRIVER)
    driver.set_up_queue(0)
    assert driver.read(QUEUE_READY) == 0


def geometry(driver: Driver) -> list[tuple[int, bool, tuple[int, int, int]]]:
    return [(setup.size, setup.ready, setup.rings()) for setup in driver.transport._queues]


def scribble_over_the_queue_registers(driver: Driver) -> None:
    for number in range(len(driver.device.queue_sizes)):
        driver.write(QUEUE_SEL, number)
        for register in (QUEUE_NUM, QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE):
            for value in (1, 2, 0x2000, 0xFFFF_FFFF):
                driver.write(register, value)
                driver.write(register + 4, value)


def queue_geometry_is_frozen_after_queue_ready(driver: Driver) -> None:
    driver.negotiate()
    driver.set_up_queue(0)
    before = geometry(driver)[0]
    driver.write(QUEUE_SEL, 0)
    for register in (QUEUE_NUM, QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE, QUEUE_DESC + 4, QUEUE_DRIVER + 4, QUEUE_DEVICE + 4):
        driver.write(register, 2)
    assert geometry(driver)[0] == before


def queue_geometry_is_frozen_after_driver_ok(driver: Driver) -> None:
    driver.start()
    before = geometry(driver)
    queues = driver.device.queues
    in_use = [(queue.size, queue.descriptor_table, queue.avail_ring, queue.used_ring) for queue in queues if queue]
    scribble_over_the_queue_registers(driver)
    for number in range(len(driver.device.queue_sizes)):
        driver.write(QUEUE_SEL, number)
        driver.write(QUEUE_READY, 0)
    scribble_over_the_queue_registers(driver)
    assert geometry(driver) == before
    assert driver.device.queues is queues
    assert [(queue.size, queue.descriptor_table, queue.avail_ring, queue.used_ring) for queue in queues if queue] == in_use
    assert driver.read(QUEUE_READY) == 1


def a_queue_that_was_not_set_up_stays_silent(driver: Driver) -> None:
    driver.negotiate()
    driver.add_status(DRIVER_OK)
    driver.notify()
    assert driver.line.count == 0
    assert not driver.status & NEEDS_RESET


def bad_ring_addresses_break_the_device(driver: Driver) -> None:
    for register, address in ((QUEUE_DESC, 0x1008), (QUEUE_DRIVER, 0x2001), (QUEUE_DEVICE, 0x3002), (QUEUE_DESC, RAM_SIZE),
                              (QUEUE_DRIVER, RAM_SIZE - 2), (QUEUE_DEVICE, 0xFFFF_FFFF_FFFF_FFFC)):
        driver.negotiate()
        driver.write(QUEUE_SEL, 0)
        driver.write(register, address & 0xFFFF_FFFF)
        driver.write(register + 4, address >> 32)
        driver.write(QUEUE_READY, 1)
        assert driver.read(QUEUE_READY) == 0
        assert driver.status & NEEDS_RESET
        driver.add_status(DRIVER_OK)
        assert not driver.device.active


# -- chains


def malformed_chains(queue: GuestQueue, memory_end: int) -> list[tuple[str, list[tuple[int, int, int, int]]]]:
    """Descriptors (address, length, flags, next) from index 0 that no driver may make available."""
    last = queue.size - 1
    return [
        ("outside RAM", [(memory_end, 16, 0, 0)]),
        ("runs out of RAM", [(memory_end - 8, 16, 0, 0)]),
        ("over 2**64", [(0xFFFF_FFFF_FFFF_FFF8, 16, WRITE, 0)]),
        ("zero bytes", [(DATA, 0, WRITE, 0)]),
        ("goes on outside the table", [(DATA, 16, 1, queue.size)]),
        ("goes on at 65535", [(DATA, 16, 1, 0xFFFF)]),
        ("loops", [(DATA, 16, WRITE | 1, 0)]),
        ("loops over two", [(DATA, 16, WRITE | 1, 1), (DATA, 16, WRITE | 1, 0)]),
        ("readable after writable", [(DATA, 16, WRITE | 1, 1), (DATA, 16, 0, 0)]),
        ("empty indirect table", [(DATA, 0, 4, 0)]),
        ("indirect table of 17 bytes", [(DATA, 17, 4, 0)]),
        ("indirect table that goes on", [(DATA, 16, 5, 1), (DATA, 16, 0, 0)]),
        ("indirect table outside RAM", [(memory_end, 16, 4, 0)]),
        ("indirect table of more than 65535", [(DATA, 16 * 65536, 4, 0)]),
        ("more than 4 GiB", [(0, memory_end, 1 | WRITE, min(1, last)), (0, 0xFFFF_FFFF, WRITE, 0)]),
    ]


def every_popped_head_comes_back_once(driver: Driver) -> None:
    names = [name for name, _ in malformed_chains(driver.start(), RAM_SIZE)]
    for number, name in enumerate(names):
        queue = driver.start()
        for index, descriptor in enumerate(malformed_chains(queue, RAM_SIZE)[number][1]):
            queue.describe(index, *descriptor)
        interrupts, errors = driver.line.count, len(driver.errors)
        queue.publish(0)
        driver.notify()
        assert queue.collect() == [(0, 0)], name
        assert driver.status & NEEDS_RESET, name
        assert not driver.device.active
        assert len(driver.errors) == errors + 1, name
        assert driver.line.count == interrupts + 1, name
        assert driver.read(INTERRUPT_STATUS) & 2, name  # configuration change: the driver learns that it must reset
        queue.publish(0)
        driver.notify()
        assert queue.collect() == [], name  # a broken device touches no queue


def heads_outside_the_table_are_fatal(driver: Driver) -> None:
    for head in (256, 0x7FFF, 0xFFFF):
        queue = driver.start()
        queue.publish(head)
        driver.notify()
        assert queue.collect() == []
        assert driver.status & NEEDS_RESET


# -- interrupts and windows


def interrupt_status_is_acknowledged_bit_by_bit(driver: Driver) -> None:
    driver.start()
    driver.transport.notify_used()
    driver.transport.notify_config()
    assert driver.read(INTERRUPT_STATUS) == 3
    driver.write(INTERRUPT_ACK, 0xFFFF_FFFC)
    assert driver.read(INTERRUPT_STATUS) == 3
    used = int(driver.device.others_interrupt)  # with vhost any interrupt may be for used buffers
    driver.write(INTERRUPT_ACK, 1)
    assert driver.read(INTERRUPT_STATUS) == 2 | used
    driver.write(INTERRUPT_ACK, 2)
    assert driver.read(INTERRUPT_STATUS) == used


def does_not_interrupt_before_driver_ok(driver: Driver) -> None:
    driver.negotiate()
    driver.transport.notify_used()
    driver.transport.notify_config()
    assert driver.line.count == 0
    assert driver.read(INTERRUPT_STATUS) == 0


def the_first_owner_hides_the_device_in_the_other_window(driver: Driver) -> None:
    first, second = driver.transport.windows
    for owner, other in ((first, second), (second, first)):
        assert owner.read(DEVICE_ID, 4) == other.read(DEVICE_ID, 4) == driver.device.device_id
        owner.write(STATUS, 4, ACKNOWLEDGE)
        assert owner.read(DEVICE_ID, 4) == driver.device.device_id
        assert other.read(DEVICE_ID, 4) == 0
        assert other.read(MAGIC, 4) == owner.read(MAGIC, 4)
        other.write(STATUS, 4, 0)
        assert owner.read(STATUS, 4) == ACKNOWLEDGE  # the other cannot reset it
        other.write(STATUS, 4, ACKNOWLEDGE | DRIVER)
        assert owner.read(STATUS, 4) == ACKNOWLEDGE
        owner.write(STATUS, 4, 0)


def machine_reset_releases_the_windows(driver: Driver) -> None:
    first, second = driver.transport.windows
    first.write(STATUS, 4, ACKNOWLEDGE)
    driver.transport.reset()
    assert second.read(DEVICE_ID, 4) == driver.device.device_id
    assert second.read(STATUS, 4) == 0


PARTS = (
    identifies_itself,
    shows_no_shared_memory,
    offers_version_1_and_nothing_beyond_64_bits,
    accepts_what_it_offers,
    refuses_a_legacy_driver,
    refuses_what_it_does_not_offer,
    lets_a_refused_driver_try_again,
    features_are_frozen_after_features_ok,
    ignores_features_before_driver,
    needs_features_ok_for_driver_ok,
    does_not_start_for_a_driver_that_failed,
    status_bits_are_only_cleared_by_reset,
    the_driver_cannot_set_needs_reset,
    resets_in_every_state,
    config_space_is_zero_beyond_its_end,
    config_space_takes_any_write,
    has_queues_with_sizes_of_powers_of_two,
    takes_queue_sizes_up_to_its_own,
    queues_cannot_be_set_up_before_features_ok,
    queue_geometry_is_frozen_after_queue_ready,
    queue_geometry_is_frozen_after_driver_ok,
    a_queue_that_was_not_set_up_stays_silent,
    bad_ring_addresses_break_the_device,
    every_popped_head_comes_back_once,
    heads_outside_the_table_are_fatal,
    interrupt_status_is_acknowledged_bit_by_bit,
    does_not_interrupt_before_driver_ok,
    the_first_owner_hides_the_device_in_the_other_window,
    machine_reset_releases_the_windows,
)
