"""virtio-rng: bytes for the guest, no more than it may have."""

from __future__ import annotations

import pytest

from stratovirt.errors import HostError
from stratovirt.virtio.rng import MAX_REQUEST
from unit.virtio_devices import RngDriver
from unit.virtio_driver import DATA, NEEDS_RESET, RAM_SIZE, Driver, GuestQueue, guest_memory


@pytest.fixture
def make():
    made: list[Driver] = []

    def factory(**options) -> RngDriver:
        driver = RngDriver(**options)
        made.append(driver)
        return driver

    yield factory
    for driver in made:
        driver.close()


def ask(queue: GuestQueue, length: int, count: int = 1) -> None:
    for _ in range(count):
        queue.add([(DATA, length, True)])


def test_buffers_are_filled(make) -> None:
    driver = make()
    driver.start()
    assert driver.request([(DATA, 64, True), (DATA + 0x1000, 64, True)]) == 128
    first, second = driver.memory.read(DATA, 64), driver.memory.read(DATA + 0x1000, 64)
    assert first != second != bytes(64) != first


def test_readable_buffers_are_left_alone(make) -> None:
    driver = make()
    driver.start()
    driver.memory.write(DATA, b"mine" * 4)
    assert driver.request([(DATA, 16, False)]) == 0
    assert driver.request([(DATA, 16, False), (DATA + 64, 16, True)]) == 16
    assert driver.memory.read(DATA, 16) == b"mine" * 4
    assert not driver.status & NEEDS_RESET


def test_one_request_takes_a_megabyte_at_most(make) -> None:
    driver = make(memory=guest_memory(4 * RAM_SIZE))
    driver.start()
    assert driver.request([(RAM_SIZE, 2 * RAM_SIZE, True)]) == MAX_REQUEST
    assert driver.memory.read(RAM_SIZE + MAX_REQUEST, 64) == bytes(64)


def test_the_rate_holds_whatever_the_guest_does(make) -> None:
    driver = make(rate=1000.0)
    queue = driver.start()
    total = 0
    for _ in range(50):  # five seconds
        queue.release_all()
        ask(queue, 700, 40)
        driver.notify()
        while True:
            returned = queue.collect()
            if not returned:
                break
            total += sum(written for _, written in returned)
        driver.write(0x070, 0)  # a reset does not fill the bucket
        queue = driver.start()
        driver.advance(0.1)
    assert 5000 <= total + sum(written for _, written in queue.collect()) <= 1000 + 5 * 1000 + 1


def test_requests_that_must_wait_are_served_by_the_timer(make) -> None:
    driver = make(rate=1000.0)
    queue = driver.start()
    ask(queue, 1000, 3)
    driver.notify()
    assert [written for _, written in queue.collect()] == [1000]
    driver.advance(0.0005)
    assert queue.collect() == []
    driver.advance(0.5)
    assert [written for _, written in queue.collect()] == [500]
    for _ in range(100):
        driver.advance(0.1)
    assert len(queue.collect()) == 1


def test_a_source_that_is_empty_does_not_spin(make) -> None:
    driver = make(filename="/dev/null")
    queue = driver.start()
    ask(queue, 16, 10)
    driver.notify()
    assert driver.serve() == 0
    for _ in range(20):
        driver.advance(0.02)
        assert driver.serve() == 0


@pytest.mark.parametrize("rate", [None, 1000.0])
def test_no_buffer_goes_back_empty(make, monkeypatch: pytest.MonkeyPatch, rate: float | None) -> None:
    """A source that is dry, then fails, then has three bytes: the request waits, and the others behind it."""
    driver = make(rate=rate)
    queue = driver.start()
    driver.serve()
    real = driver.source.read_into
    answers = iter((0, 0, HostError("read of the source", 5), 3))

    def sometimes(views: list[memoryview]) -> int:
        answer = next(answers, None)
        if isinstance(answer, HostError):
            raise answer
        return real(views) if answer is None else answer

    monkeypatch.setattr(driver.source, "read_into", sometimes)
    ask(queue, 16, 3)
    driver.notify()
    for _ in range(3):
        assert queue.collect() == []
        driver.advance(0.02)
    assert [written for _, written in queue.collect()] == [3, 16, 16]
    assert driver.line.count == 1
    assert len(driver.host_errors) == 1
    assert not driver.status & NEEDS_RESET


def test_a_request_that_waits_for_the_source_is_forgotten_by_a_reset(make, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = make()
    queue = driver.start()
    real = driver.source.read_into
    monkeypatch.setattr(driver.source, "read_into", lambda _views: 0)
    ask(queue, 16)
    driver.notify()
    driver.write(0x070, 0)
    monkeypatch.setattr(driver.source, "read_into", real)
    driver.advance(1.0)
    assert queue.collect() == []
    queue = driver.start()
    ask(queue, 16)
    driver.notify()
    assert queue.collect() == [(0, 16)]


def test_a_timer_that_outlives_a_reset_does_no_harm(make) -> None:
    driver = make(rate=100.0)
    queue = driver.start()
    ask(queue, 100, 2)
    driver.notify()
    driver.write(0x070, 0)
    driver.advance(10)
    assert len(queue.collect()) == 1
    driver.start()
    assert driver.request([(DATA, 50, True)]) == 50
