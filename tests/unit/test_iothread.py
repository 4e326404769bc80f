"""Iothreads: calls reach their loop, the end waits for them, and a device on one can be reset by another thread."""

from __future__ import annotations

import os
import threading

import pytest

from stratovirt import iothread as iothread_module
from stratovirt.errors import StateError
from stratovirt.iothread import IoThread
from stratovirt.loop import READ
from stratovirt.virtio.net import RX
from unit import virtio_driver as vd
from unit.test_net import HIGH_FEATURES, Interface, frame

WAIT = 20.0


def no_failure() -> None:
    raise AssertionError("the iothread failed")


@pytest.fixture
def thread():
    thread = IoThread("io0", no_failure)
    thread.start()
    yield thread
    thread.stop()
    thread.loop.close()


def test_calls_run_on_the_thread_and_are_waited_for(thread: IoThread) -> None:
    where: list[int] = []
    thread.call(lambda: where.append(threading.get_ident()))
    thread.call(lambda: thread.call(lambda: where.append(threading.get_ident())))
    assert len(where) == 2 and where[0] == where[1] != threading.get_ident()


def test_before_its_start_and_after_its_end_calls_run_at_once() -> None:
    where: list[int] = []
    thread = IoThread("io0", no_failure)
    thread.call(lambda: where.append(threading.get_ident()))
    thread.start()
    thread.stop()
    thread.stop()
    thread.call(lambda: where.append(threading.get_ident()))
    assert where == [threading.get_ident()] * 2
    thread.loop.close()


def test_what_was_added_before_the_start_is_served(thread: IoThread) -> None:
    other = IoThread("io1", no_failure)
    served = threading.Event()
    fd = os.eventfd(1, os.EFD_NONBLOCK)

    def serve(_events: int) -> None:
        os.eventfd_read(fd)
        served.set()

    other.loop.add(fd, READ, serve)
    other.start()
    assert served.wait(WAIT)
    other.stop()
    other.loop.close()
    os.close(fd)


def test_nothing_runs_after_stop() -> None:
    thread = IoThread("io0", no_failure)
    thread.start()
    ran: list[int] = []
    thread.loop.call_soon(lambda: ran.append(1))
    thread.stop()
    before = len(ran)
    thread.loop.call_soon(lambda: ran.append(1))
    assert len(ran) == before
    thread.loop.close()


def test_a_defect_is_told_and_the_thread_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    told = threading.Event()
    lines: list[str] = []
    monkeypatch.setattr(iothread_module.log.LOG, "write", lambda _level, line, _depth: lines.append(line))
    thread = IoThread("io0", told.set)
    thread.start()
    thread.loop.call_soon(lambda: {}["missing"])
    assert told.wait(WAIT)
    assert any("KeyError" in line for line in lines)
    thread.stop()
    thread.loop.close()


def test_a_stuck_thread_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iothread_module, "STOP_SECONDS", 0.05)
    thread = IoThread("io0", no_failure)
    thread.start()
    stuck, go_on = threading.Event(), threading.Event()
    thread.loop.call_soon(lambda: (stuck.set(), go_on.wait(WAIT)))
    assert stuck.wait(WAIT)
    with pytest.raises(StateError, match="io0"):
        thread.call(no_failure)
    with pytest.raises(StateError, match="io0"):
        thread.stop()
    go_on.set()


def test_resets_from_another_thread_while_frames_arrive() -> None:
    """A driver resets its device again and again while the iothread fills its buffers: no buffer is touched after a reset."""
    net = Interface()
    thread = IoThread("io0", no_failure)
    # the interface's loop becomes the iothread's: moved there before the thread starts
    pair = net.device.pairs[0]
    pair.receiver.detach()
    net.loop.close()
    net.loop = net.driver.loop = net.device._loop = pair.receiver.loop = pair.sender.loop = thread.loop
    pair.receiver.attach(net.tap)
    for index, fd in enumerate(net.driver.transport.notify_fds):
        thread.loop.add(fd, READ, net._notifier(index))
    thread.start()
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            try:
                net.network.send(bytes(12) + frame(200))
            except BlockingIOError:
                stop.wait(0.001)

    sender = threading.Thread(target=flood)
    sender.start()
    try:
        for _ in range(50):
            net.driver.start(HIGH_FEATURES)
            queue = net.driver.queues[RX]
            for number in range(64):
                queue.add([(0x4_0000 + 512 * number, 512, True)])
            net.driver.write(vd.QUEUE_NOTIFY, RX)
            while queue.used_idx() < 8:
                stop.wait(0.0005)
            net.driver.write(vd.STATUS, 0)
            net.memory.write(0x4_0000, b"\xaa" * 512 * 64)
            rings = net.memory.read(0, 0x2000)
            thread.call(lambda: None)  # what was ready has been served
            assert net.memory.read(0x4_0000, 512 * 64) == b"\xaa" * 512 * 64
            assert net.memory.read(0, 0x2000) == rings
    finally:
        stop.set()
        sender.join()
        thread.stop()
        net.close()
