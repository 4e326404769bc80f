"""Devices on vhost-user in a snapshot: what is saved, who may go on with it, and back ends that fail at the wrong moment."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stratovirt.errors import HostError
from stratovirt.snapshot.saved import Saved, SnapshotError
from stratovirt.vhost import user
from stratovirt.vhost.user import BackendError
from stratovirt.virtio import vhost_user
from unit import vhost_user_backend as wire
from unit.test_snapshot_devices import go_on, saved
from unit.test_vhost_user import (
    CAPACITY,
    HOSTILE,
    IOERR,
    MAC,
    NET_MQ,
    Bench,
    blk_config,
    blk_request,
    impatient,
    says,
    status_of,
)
from unit.vhost_user_backend import VhostUserDriver
from unit.virtio_driver import INTERRUPT_STATUS, VERSION_1

__all__ = ["impatient"]

F_RO, F_SEG_MAX, F_BLK_SIZE = 5, 2, 6


@pytest.fixture
def benches(tmp_path: Path) -> Iterator[Callable[[], Bench]]:
    """Each with a back end of its own."""
    made: list[Bench] = []

    def make() -> Bench:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Bench(folder))
        return made[-1]

    yield make
    for bench in made:
        for driver in bench.drivers:
            driver.close()
        bench.backend.die()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vhost_user, "RETURN_SECONDS", 0.1)


def busy_disk(bench: Bench) -> VhostUserDriver:
    """A driver that has had five requests answered."""
    driver = bench.blk()
    driver.start(VERSION_1)
    driver.serve()
    for number in range(5):
        blk_request(driver, number)
    driver.notify()
    assert len(driver.queues[0].collect()) == 5
    return driver


# -- the normal case


def test_a_disk_goes_on_with_another_back_end_where_it_was(benches: Callable[[], Bench]) -> None:
    first, second = benches(), benches()
    driver = busy_disk(first)
    driver.vhost_user.pause()
    late = blk_request(driver, 5)
    driver.notify()
    state = saved(driver)
    assert (state["queues"][0]["position"], state["device"]["sectors"], state["device"]["readonly"]) == (5, CAPACITY, False)
    other = go_on(driver, second.blk())
    peer = second.backend.peer
    assert peer.rings[0].base == 5 and peer.rings[0].enabled
    assert [size for _, size, _ in peer.regions] == [region.size for region in other.memory.regions]
    other.serve()
    assert other.queues[0].collect() == [(late, 0)]
    assert other.read(INTERRUPT_STATUS) == 1
    # and the first one may go on as well
    driver.vhost_user.resume()
    driver.serve()
    assert first.backend.peer.rings[0].base == 5 and driver.reported == other.reported == []


def test_no_ring_runs_before_all_is_restored(benches: Callable[[], Bench]) -> None:
    driver = busy_disk(benches())
    state = saved(driver)
    bench = benches()
    other = bench.blk()
    other.device.pause()
    other.transport.restore(Saved(state))
    other.serve()
    assert bench.backend.peer.rings == {}
    other.device.resume()
    assert bench.backend.peer.rings[0].base == 5


def test_an_interface_keeps_its_pairs_its_filter_and_its_cable(benches: Callable[[], Bench]) -> None:
    first, second = benches(), benches()
    driver = first.net(pairs=3)
    driver.start(VERSION_1 | NET_MQ, size=8)
    device: Any = driver.vhost_user
    assert device._set_pairs(0, struct.pack("<H", 2))
    other = go_on(driver, second.net(pairs=3))
    rings = second.backend.peer.rings
    assert [index for index, ring in sorted(rings.items()) if ring.enabled] == [0, 1, 2, 3]
    assert other.vhost_user.pairs_in_use == 2
    assert other.vhost_user.filter.mac == MAC

    other.vhost_user.set_link(False)
    third = go_on(other, benches().net(pairs=3))
    assert not third.vhost_user.link_up and third.vhost_user.external_queues == frozenset()


# -- shares, whose state is the back end's


def test_a_share_says_why_it_cannot_be_saved(benches: Callable[[], Bench]) -> None:
    bench = benches()
    bench.backend.protocol &= ~wire.DEVICE_STATE
    assert "it lacks VHOST_USER_PROTOCOL_F_DEVICE_STATE" in bench.fs().vhost_user.not_to_save()


def scratch() -> int:
    return os.memfd_create("scratch")


def saved_share(bench: Bench, state: bytes = bytes(range(256)) * 300) -> tuple[VhostUserDriver, dict[str, Any]]:
    bench.backend.state = state
    driver = bench.fs()
    driver.start(VERSION_1)
    driver.serve()
    driver.vhost_user.pause()
    driver.vhost_user.fetch_state(scratch)
    return driver, driver.transport.save()


def restored_share(bench: Bench, state: dict[str, Any], tag: bytes = b"shared") -> VhostUserDriver:
    other = bench.fs(tag)
    other.device.pause()
    other.transport.restore(Saved(state))
    other.device.resume()
    return other


def test_what_a_back_end_keeps_goes_on_in_another(benches: Callable[[], Bench]) -> None:
    driver, state = saved_share(benches())
    assert driver.vhost_user.not_to_save() == ""
    bench = benches()
    other = restored_share(bench, state)
    assert bench.backend.state == bytes(range(256)) * 300 and set(bench.backend.peer.rings) == {0, 1}
    driver.vhost_user.resume()
    assert driver.reported == other.reported == []


def test_a_share_without_a_driver_has_no_state(benches: Callable[[], Bench]) -> None:
    driver = benches().fs()
    driver.vhost_user.pause()
    driver.vhost_user.fetch_state(scratch)
    state = driver.transport.save()
    bench = benches()
    bench.backend.protocol &= ~wire.DEVICE_STATE
    assert not restored_share(bench, state).device.active


@pytest.mark.parametrize("request_number", [wire.SET_DEVICE_STATE_FD, wire.CHECK_DEVICE_STATE])
@pytest.mark.parametrize("how", [*HOSTILE, "cannot do it", "has its own"])
def test_a_share_with_a_hostile_back_end(
    benches: Callable[[], Bench], impatient: None, monkeypatch: pytest.MonkeyPatch, how: str, request_number: int
) -> None:
    monkeypatch.setattr(user, "STATE_SECONDS", 0.2)
    if how == "has its own" and request_number == wire.CHECK_DEVICE_STATE:
        return
    value = 0 if how == "has its own" else 5
    answer = HOSTILE.get(how, says(lambda request: struct.pack("=IIIQ", request, 5, 8, value)))
    good, hostile = benches(), benches()
    driver, state = saved_share(good)
    hostile.backend.instead[request_number] = answer
    with pytest.raises(BackendError):
        saved_share(hostile)
    driver = hostile.drivers[-1]
    with pytest.raises(BackendError, match="is gone"):
        driver.transport.save()
    third = benches()
    third.backend.instead[request_number] = answer
    with pytest.raises(SnapshotError, match=r"^device\.state: "):
        restored_share(third, state)


@pytest.mark.parametrize(("change", "problem"), [
    (lambda bench, state: state["device"].update(tag=b"other".hex()), "device.tag: the guest has seen 'other'"),
    (lambda bench, state: setattr(bench.backend, "protocol", 0xFF), "device.state: .*cannot take it over"),
])
def test_a_share_that_does_not_fit(benches: Callable[[], Bench], change: Callable[..., object], problem: str) -> None:
    _, state = saved_share(benches())
    bench = benches()
    change(bench, state)
    with pytest.raises(SnapshotError, match=problem):
        restored_share(bench, state)


def test_a_state_that_is_too_large(benches: Callable[[], Bench]) -> None:
    with pytest.raises(HostError, match="has a state of 8 MiB"):
        saved_share(benches(), bytes((8 << 20) + 1))


# -- back ends that cannot go on with it


@pytest.mark.parametrize(("change", "problem"), [
    (lambda backend: setattr(backend, "features", backend.features & ~(1 << 28)), "driver_features: .*lacks 0x10000000"),
    (lambda backend: setattr(backend, "config", blk_config(CAPACITY - 1)), "device.sectors: the disk had 2048 sectors"),
    (lambda backend: setattr(backend, "config", blk_config(CAPACITY + 1)), "device.sectors: the disk had 2048 sectors"),
    (lambda backend: setattr(backend, "features", backend.features | 1 << F_RO), "device.readonly: the disk was writable"),
    (lambda backend: setattr(backend, "config", blk_config()[:12] + struct.pack("<I", 1) + blk_config()[16:]),
     "device.limits: .* takes 1 segments"),
    (lambda backend: (setattr(backend, "features", backend.features | 1 << F_BLK_SIZE),
                      setattr(backend, "config", blk_config()[:20] + struct.pack("<I", 4096) + blk_config()[24:])),
     "device.limits: .* has blocks of 4096 bytes"),
])
def test_another_disk_or_a_back_end_that_offers_less_is_refused(
    benches: Callable[[], Bench], change: Callable[[Any], object], problem: str
) -> None:
    driver = benches().blk()
    driver.start(VERSION_1 | 1 << 28 | 1 << F_SEG_MAX)
    bench = benches()
    change(bench.backend)
    with pytest.raises(SnapshotError, match=problem):
        go_on(driver, bench.blk())
    assert bench.backend.peer.rings == {}


def test_features_of_a_device_that_was_there_before_are_not_asked_for(benches: Callable[[], Bench]) -> None:
    """A disk that was plugged in serves a driver that has negotiated more with the empty one."""
    driver = benches().blk()
    driver.start(VERSION_1)
    state = saved(driver)
    state["driver_features"] |= 1 << 13
    bench = benches()
    other = bench.blk()
    assert not other.device.features >> 13 & 1
    other.device.pause()
    other.transport.restore(Saved(state))
    other.device.resume()
    assert other.device.active and not bench.backend.peer.features >> 13 & 1


# -- back ends that fail while a snapshot is taken


def test_a_pause_waits_for_requests_that_come_after_the_positions(benches: Callable[[], Bench]) -> None:
    """As with qemu-storage-daemon, which says where a ring stands and returns later what it took."""
    bench = benches()
    bench.backend.handle = None
    driver = bench.blk()
    driver.start(VERSION_1)
    driver.serve()
    head = blk_request(driver)
    driver.notify()
    ring = bench.backend.peer.rings[0]
    queue = ring.queue
    assert queue is not None and len(ring.popped) == 1
    asked = threading.Event()

    def later() -> None:
        asked.wait(10)
        time.sleep(0.05)
        queue.push(head, 513)

    def stop(peer: wire.Peer, request: int, payload: bytes) -> bool:
        asked.set()
        return True

    bench.backend.instead[wire.GET_VRING_BASE] = stop
    thread = threading.Thread(target=later)
    thread.start()
    driver.vhost_user.pause()
    assert driver.queues[0].collect() == [(head, 513)]
    thread.join()
    assert saved(driver)["queues"][0]["position"] == 1


def test_requests_that_do_not_come_back_are_no_snapshot_and_the_disk_goes_on(
    benches: Callable[[], Bench], hurried: None
) -> None:
    bench = benches()
    bench.backend.handle = None
    driver = bench.blk()
    driver.start(VERSION_1)
    driver.serve()
    head = blk_request(driver)
    driver.notify()
    queue = bench.backend.peer.rings[0].queue
    assert queue is not None
    driver.vhost_user.pause()
    with pytest.raises(BackendError, match="does not return 1 requests"):
        driver.transport.save()
    driver.vhost_user.resume()
    assert bench.backend.peer.rings[0].base == 1
    queue.push(head, 513)
    bench.backend.handle = lambda chain: 7
    after = blk_request(driver, 1)
    driver.notify()
    assert [number for number, _ in driver.queues[0].collect()][-1] == after or driver.queues[0].used_index == 1
    driver.vhost_user.pause()
    driver.transport.save()


def test_a_ring_of_nonsense_is_not_waited_for(benches: Callable[[], Bench]) -> None:
    driver = busy_disk(benches())
    driver.memory.write(driver.queues[0].used + 2, b"\x34\x12")
    started = time.monotonic()
    driver.vhost_user.pause()
    assert time.monotonic() - started < vhost_user.RETURN_SECONDS / 2
    with pytest.raises(BackendError, match="does not return"):
        driver.transport.save()


@pytest.mark.parametrize("how", HOSTILE)
def test_a_back_end_that_answers_the_end_wrongly_is_no_snapshot_and_the_guest_gets_errors(
    benches: Callable[[], Bench], impatient: None, how: str
) -> None:
    bench = benches()
    driver = bench.blk()
    driver.start(VERSION_1)
    driver.serve()
    assert driver.vhost_user.not_to_save() == ""
    bench.backend.instead[wire.GET_VRING_BASE] = HOSTILE[how]
    driver.vhost_user.pause()
    with pytest.raises(BackendError, match="is gone"):
        driver.transport.save()
    driver.wait_until(lambda: not bench.backend.peer.rings)  # it has heard that it is not wanted
    driver.vhost_user.resume()
    blk_request(driver)
    driver.notify()
    assert len(driver.queues[0].collect()) == 1 and status_of(driver) == IOERR


def test_a_back_end_that_is_away_is_no_snapshot(benches: Callable[[], Bench]) -> None:
    bench = benches()
    driver = bench.blk()
    bench.backend.die()
    driver.wait_until(lambda: bool(driver.reported))
    assert driver.vhost_user.not_to_save() == f"the back end at {bench.backend.path} is not connected"


def test_what_it_writes_is_not_counted(benches: Callable[[], Bench]) -> None:
    bench = benches()
    driver = bench.blk()
    lost: list[str] = []

    class Tracker:
        def lose(self, why: str) -> None:
            lost.append(why)

        def mark(self, address: int, length: int) -> None:
            """A queue's used ring."""

    driver.memory.tracker = Tracker()  # type: ignore[assignment]
    driver.start(VERSION_1)
    assert lost == [f"the back end at {bench.backend.path} writes memory"]
    driver.vhost_user.pause()
    driver.vhost_user.resume()
    assert len(lost) == 2
