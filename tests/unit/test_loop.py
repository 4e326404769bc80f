"""The event loop, stepped by hand and run on a thread."""

from __future__ import annotations

import os
import tempfile
import threading

import pytest

from stratovirt.loop import READ, WRITE, EventLoop


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def loop():
    loop = EventLoop(Clock())
    yield loop
    loop.close()


def advance(loop: EventLoop, seconds: float) -> None:
    loop.clock.now += seconds  # type: ignore[attr-defined]
    loop.run_once(0)


def test_a_ready_descriptor_calls_its_handler(loop: EventLoop) -> None:
    read, write = os.pipe()
    seen: list[int] = []
    loop.add(read, READ, seen.append)
    loop.run_once(0)
    assert seen == []
    os.write(write, b"x")
    loop.run_once(0)
    loop.run_once(0)
    assert seen == [READ, READ]  # level-triggered: it was not read
    loop.remove(read)
    loop.run_once(0)
    assert len(seen) == 2
    os.close(read)
    os.close(write)


def test_what_is_waited_for_can_change(loop: EventLoop) -> None:
    read, write = os.pipe()
    seen: list[int] = []
    loop.add(write, 0, seen.append)
    loop.run_once(0)
    assert seen == []
    loop.modify(write, WRITE)
    loop.run_once(0)
    assert seen == [WRITE]
    os.close(read)
    loop.modify(write, 0)
    loop.run_once(0)
    assert len(seen) == 2  # hang-ups and errors are always told
    loop.remove(write)
    os.close(write)


def test_unknown_descriptors_may_be_removed_and_files_cannot_be_added(loop: EventLoop) -> None:
    loop.remove(12345)
    with tempfile.TemporaryFile() as file, pytest.raises(PermissionError):
        loop.add(file.fileno(), READ, print)


def test_a_handler_removed_by_another_in_the_same_round_is_not_called(loop: EventLoop) -> None:
    pipes = [os.pipe(), os.pipe()]
    seen: list[int] = []

    def handler(own: int, other: int):
        def handle(_events: int) -> None:
            seen.append(own)
            loop.remove(other)
        return handle

    for (read, write), (other, _) in zip(pipes, reversed(pipes), strict=True):
        loop.add(read, READ, handler(read, other))
        os.write(write, b"x")
    loop.run_once(0)
    assert len(seen) == 1
    for fd in (*pipes[0], *pipes[1]):
        loop.remove(fd)
        os.close(fd)


def test_timers_fire_once_in_the_order_of_their_deadlines(loop: EventLoop) -> None:
    fired: list[str] = []
    loop.call_later(3, lambda: fired.append("c"))
    loop.call_later(1, lambda: fired.append("a"))
    loop.call_later(2, lambda: fired.append("b"))
    advance(loop, 0.5)
    assert fired == []
    advance(loop, 2)
    assert fired == ["a", "b"]
    advance(loop, 10)
    advance(loop, 10)
    assert fired == ["a", "b", "c"]


def test_a_cancelled_timer_stays_silent(loop: EventLoop) -> None:
    fired: list[str] = []
    first = loop.call_later(1, lambda: fired.append("first"))
    second = loop.call_later(1, lambda: fired.append("second"))
    loop.call_later(1, lambda: first.cancel())
    first.cancel()
    first.cancel()
    advance(loop, 2)
    second.cancel()
    assert fired == ["second"]


def test_a_timer_may_cancel_the_next_and_start_another(loop: EventLoop) -> None:
    fired: list[int] = []

    def again() -> None:
        fired.append(len(fired))
        next_one.cancel()
        loop.call_later(1, again)

    loop.call_later(1, again)
    next_one = loop.call_later(1.5, lambda: fired.append(99))
    for _ in range(3):
        advance(loop, 1)
    assert fired == [0, 1, 2]


def test_the_wait_ends_at_the_next_timer() -> None:
    loop = EventLoop()
    fired = []
    loop.call_later(0.01, lambda: fired.append(1))
    loop.call_later(0.005, lambda: fired.append(0)).cancel()
    while not fired:
        loop.run_once()  # no other event can end this wait
    assert fired == [1]
    loop.close()


def test_calls_are_made_in_order_on_the_loop(loop: EventLoop) -> None:
    done: list[int] = []
    for number in range(5):
        loop.call_soon(lambda number=number: done.append(number))
    loop.run_once(0)
    assert done == [0, 1, 2, 3, 4]


def test_a_call_that_calls_again_waits_for_the_next_round(loop: EventLoop) -> None:
    rounds: list[int] = []

    def again() -> None:
        rounds.append(1)
        loop.call_soon(again)

    loop.call_soon(again)
    for expected in (1, 2, 3):
        loop.run_once(0)
        assert len(rounds) == expected


def test_calls_from_threads_arrive_all_of_them() -> None:
    loop = EventLoop()
    done: list[tuple[int, int]] = []
    owner = threading.get_ident()

    def hand_over(thread: int) -> None:
        for number in range(500):
            loop.call_soon(lambda number=number: done.append((thread, number)))

    threads = [threading.Thread(target=hand_over, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while len(done) < 2000:
        loop.run_once(10)
    for number, thread in enumerate(threads):
        thread.join()
        assert [entry[1] for entry in done if entry[0] == number] == list(range(500))
    assert threading.get_ident() == owner
    loop.close()


def test_stop_from_another_thread_ends_run() -> None:
    loop = EventLoop()
    thread = threading.Thread(target=loop.run)
    thread.start()
    loop.stop()
    thread.join(10)
    assert not thread.is_alive()
    loop.close()


def test_stop_before_run() -> None:
    loop = EventLoop()
    loop.stop()
    loop.run()
    loop.close()


def test_a_wait_longer_than_the_kernel_counts_is_no_error(loop: EventLoop) -> None:
    loop.call_later(1e9, lambda: None)
    loop.call_soon(lambda: None)
    loop.run_once()
