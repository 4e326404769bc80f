"""vhost-user: what a back end is told, what its answers lead to, hostile ones too, and what becomes of a device without it."""

from __future__ import annotations

import os
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stratovirt.cli.command import parse
from stratovirt.errors import ConfigError
from stratovirt.vhost import user
from stratovirt.vhost.user import BackendError, BackendSocket
from stratovirt.virtio.lost import outstanding
from stratovirt.virtio.vhost_user_blk import VhostUserBlk
from stratovirt.virtio.vhost_user_fs import VhostUserFs
from stratovirt.virtio.vhost_user_net import VhostUserNet
from unit import vhost_user_backend as wire
from unit.test_virtio_conformance import check_virtio_device
from unit.vhost_user_backend import FakeBackend, Peer, VhostUserDriver, shared_memory
from unit.virtio_driver import (
    CONFIG,
    CONFIG_GENERATION,
    DATA,
    EVENT_IDX,
    HIGH_RAM,
    INDIRECT_DESC,
    INTERRUPT_STATUS,
    NEEDS_RESET,
    RAM_SIZE,
    STATUS,
    VERSION_1,
    Driver,
)

IOERR = 1
CAPACITY = 2048
MQ = 1 << 12
MAC = bytes.fromhex("525400123456")
NET_MQ, MRG_RXBUF, CSUM, CTRL_VQ = 1 << 22, 1 << 15, 1 << 0, 1 << 17


def blk_config(capacity: int = CAPACITY) -> bytes:
    """seg_max is 254, num_queues 8."""
    return struct.pack("<QII", capacity, 0, 254).ljust(34, b"\0") + struct.pack("<H", 8) + bytes(24)


class Bench:
    """Makes back ends and devices, and takes them away."""

    def __init__(self, folder: Path) -> None:
        self.backend = FakeBackend(folder / "socket")
        self.backend.config = blk_config()
        self.backend.features |= MQ | 1 << 9 | 1 << 2 | 1 << 11
        self.drivers: list[VhostUserDriver] = []

    def blk(self, queues: int = 1, size: int = 256, reconnect: float = 3) -> VhostUserDriver:
        return self._keep(VhostUserDriver(
            self.backend, lambda socket, loop, report: VhostUserBlk(socket, queues, size, loop, report), reconnect))

    def fs(self, tag: bytes = b"shared") -> VhostUserDriver:
        return self._keep(VhostUserDriver(self.backend, lambda socket, loop, report: VhostUserFs(socket, tag, loop, report)))

    def net(self, pairs: int = 1) -> VhostUserDriver:
        return self._keep(VhostUserDriver(
            self.backend, lambda socket, loop, report: VhostUserNet(socket, pairs, MAC, loop, 256, report)))

    def _keep(self, driver: VhostUserDriver) -> VhostUserDriver:
        self.drivers.append(driver)
        return driver


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    for driver in made.drivers:
        driver.close()
    made.backend.die()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HANDSHAKE_SECONDS", "START_SECONDS", "STOP_SECONDS"):
        monkeypatch.setattr(user, name, 0.2)


def blk_request(driver: VhostUserDriver, number: int = 0) -> int:
    """A read of one sector, made available: its head. The status is at DATA + 1024 * number + 528."""
    base = DATA + 1024 * number
    driver.memory.write(base, struct.pack("<IIQ", 0, 0, 0) + bytes(512) + b"\xff")
    return driver.queues[0].add([(base, 16, False), (base + 16, 512, True), (base + 528, 1, True)])


def status_of(driver: VhostUserDriver, number: int = 0) -> int:
    return driver.memory.read(DATA + 1024 * number + 528, 1)[0]


# -- the normal case


@pytest.mark.parametrize("kind", ["blk", "fs", "net", "net-pairs"])
def test_every_device_conforms(bench: Bench, kind: str) -> None:
    def make() -> Driver:
        if kind.startswith("net"):
            return bench.net(1 if kind == "net" else 3)
        return bench.blk() if kind == "blk" else bench.fs()

    check_virtio_device(make)


def test_the_back_end_is_told_everything_before_a_ring_runs(bench: Bench) -> None:
    driver = bench.blk(queues=2, size=128)
    driver.start(VERSION_1 | EVENT_IDX | MQ)
    peer = bench.backend.peer
    assert [request for request, _ in peer.received] == [
        wire.GET_FEATURES, wire.GET_PROTOCOL_FEATURES, wire.SET_PROTOCOL_FEATURES, wire.GET_QUEUE_NUM, wire.SET_OWNER,
        wire.GET_CONFIG, wire.SET_FEATURES, wire.SET_MEM_TABLE,
        *(wire.SET_VRING_NUM, wire.SET_VRING_BASE, wire.SET_VRING_ADDR, wire.SET_VRING_ERR, wire.SET_VRING_CALL,
          wire.SET_VRING_KICK) * 2,
        wire.SET_VRING_ENABLE, wire.SET_VRING_ENABLE]
    chosen = struct.unpack("=Q", dict(peer.received)[wire.SET_PROTOCOL_FEATURES])[0]
    assert chosen == wire.MQ | wire.REPLY_ACK | wire.CONFIG
    assert peer.features == VERSION_1 | EVENT_IDX | MQ | wire.PROTOCOL_FEATURES
    assert [(region.base, size) for _, size, region in peer.regions] == [(0, RAM_SIZE), (HIGH_RAM, 4096)]
    assert sorted(peer.rings) == [0, 1] and all(ring.size == 128 and ring.enabled for ring in peer.rings.values())


def test_the_back_end_does_not_learn_where_memory_is_mapped(bench: Bench) -> None:
    driver = bench.blk()
    driver.start()
    assert [address - region.base for address, _, region in bench.backend.peer.regions] == [1 << 40, 1 << 40]


def test_features_are_what_the_back_end_has_and_the_device_knows(bench: Bench) -> None:
    ring = VERSION_1 | EVENT_IDX | INDIRECT_DESC
    assert bench.blk(queues=2).offered() == ring | MQ | 1 << 9 | 1 << 2
    assert bench.blk(queues=1).offered() == ring | 1 << 9 | 1 << 2
    assert bench.fs().offered() == ring


def test_the_config_space_is_the_back_ends_with_our_queues(bench: Bench) -> None:
    driver = bench.blk(queues=2, size=64)
    assert driver.read(CONFIG) == CAPACITY
    assert driver.read(CONFIG + 12) == 62
    assert driver.read(CONFIG + 34, 2) == 2


def test_the_guest_reads_the_tag(bench: Bench) -> None:
    tag = "tag-ä".encode()
    driver = bench.fs(tag)
    assert bytes(driver.read(CONFIG + offset, 1) for offset in range(36)) == tag.ljust(36, b"\0")
    assert driver.read(CONFIG + 36) == 1


def test_requests_go_to_the_back_end_and_its_interrupts_to_the_driver(bench: Bench) -> None:
    def handle(chain: object) -> int:
        return 513

    bench.backend.handle = handle
    driver = bench.blk()
    driver.start()
    driver.serve()
    head = blk_request(driver)
    interrupts = driver.line.count
    driver.notify()
    assert driver.queues[0].collect() == [(head, 513)]
    assert driver.line.count > interrupts and driver.read(INTERRUPT_STATUS) == 1
    assert driver.device.external_queues == {0}


def test_a_reset_ends_the_rings_and_they_begin_anew(bench: Bench) -> None:
    driver = bench.blk()
    for _ in range(3):
        driver.start()
        driver.serve()
        blk_request(driver)
        driver.notify()
        assert len(driver.queues[0].collect()) == 1
        assert bench.backend.peer.rings[0].base == 0
        driver.write(STATUS, 0)
        assert bench.backend.peer.rings == {}
        assert driver.device.external_queues == frozenset()
    assert len(bench.backend.peers) == 1 and driver.reported == []


def test_a_notification_has_one_reader(bench: Bench) -> None:
    """One that the loop was about to read when the ring was given away is the back end's."""
    driver = bench.blk()
    notify_fd = driver.transport.notify_fds[0]
    seen: list[bool] = []

    def look(peer: Peer, request: int, payload: bytes) -> bool:
        os.eventfd_write(notify_fd, 1)
        driver.loop.run_once(0)
        seen.append(wire.readable(notify_fd))
        return True

    bench.backend.instead[wire.SET_VRING_KICK] = look
    driver.start()
    driver.transport.on_notify(0)
    assert seen == [True] and wire.readable(notify_fd)
    driver.vhost_user.pause()
    driver.transport.on_notify(0)
    assert not wire.readable(notify_fd)
    with driver.vhost_user._work:  # it is just about to be given away
        os.eventfd_write(notify_fd, 1)
        driver.transport.on_notify(0)
    assert wire.readable(notify_fd)


def test_a_pause_stops_the_rings_and_they_go_on_where_they_were(bench: Bench) -> None:
    driver = bench.blk()
    driver.start()
    driver.serve()
    for number in range(5):
        blk_request(driver, number)
    driver.notify()
    driver.vhost_user.pause()
    assert bench.backend.peer.rings == {}
    late = blk_request(driver, 5)
    driver.notify()
    assert late not in [head for head, _ in driver.queues[0].collect()]
    driver.vhost_user.resume()
    assert bench.backend.peer.rings[0].base == 5
    driver.serve()
    assert driver.queues[0].collect() == [(late, 0)]


def test_a_back_end_without_acknowledgements(bench: Bench) -> None:
    bench.backend.protocol = wire.CONFIG
    driver = bench.blk()
    driver.start()
    driver.wait_until(lambda: len(bench.backend.peer.rings) == 1 and bench.backend.peer.rings[0].enabled)
    assert driver.reported == []


# -- a back end that is not what it should be, at the start


@pytest.mark.parametrize(("change", "message"), [
    ({"features": wire.PROTOCOL_FEATURES}, "lacks VIRTIO_F_VERSION_1"),
    ({"protocol": 0}, "lacks VHOST_USER_PROTOCOL_F_CONFIG"),
    ({"features": VERSION_1}, "lacks VHOST_USER_PROTOCOL_F_CONFIG"),
    ({"queues": 1}, "lacks 2 queues: it has 1"),
    ({"queues": 0}, "lacks 2 queues: it has 0"),
    ({"protocol": wire.CONFIG}, "lacks 2 queues: it has 1"),
])
def test_a_back_end_that_lacks_something(bench: Bench, change: dict[str, int], message: str) -> None:
    for name, value in change.items():
        setattr(bench.backend, name, value)
    with pytest.raises(BackendError, match=message):
        bench.blk(queues=2)


def close(peer: Peer, request: int, payload: bytes) -> bool:
    peer.socket.shutdown(2)
    return False


def silent(peer: Peer, request: int, payload: bytes) -> bool:
    return False


def says(data: Callable[[int], bytes]) -> wire.Answer:
    def answer(peer: Peer, request: int, payload: bytes) -> bool:
        peer.socket.sendall(data(request))
        return False

    return answer


HOSTILE = {
    "closes": close,
    "is silent": silent,
    "answers another request": says(lambda request: struct.pack("=III", request + 1, 5, 8) + bytes(8)),
    "speaks another version": says(lambda request: struct.pack("=III", request, 6, 8) + bytes(8)),
    "answers with a request": says(lambda request: struct.pack("=III", request, 1, 8) + bytes(8)),
    "is too short": says(lambda request: struct.pack("=III", request, 5, 7) + bytes(7)),
    "is too long": says(lambda request: struct.pack("=III", request, 5, 0xFFFF_FFFF)),
    "stops in the middle": says(lambda request: struct.pack("=III", request, 5, 8) + bytes(3)),
    "stops in the header": says(lambda request: b"\1"),
    "cannot": says(lambda request: struct.pack("=III", request, 5, 0)),
    "says noise": says(lambda request: b"\xff" * 4096),
}
HANDSHAKE = (wire.GET_FEATURES, wire.GET_PROTOCOL_FEATURES, wire.GET_QUEUE_NUM, wire.SET_OWNER, wire.GET_CONFIG)
START = (wire.SET_FEATURES, wire.SET_MEM_TABLE, wire.SET_VRING_NUM, wire.SET_VRING_KICK, wire.SET_VRING_ENABLE)


@pytest.mark.parametrize("request_number", HANDSHAKE)
@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_answer_to_the_handshake_is_an_error(bench: Bench, impatient: None, how: str, request_number: int) -> None:
    bench.backend.instead[request_number] = HOSTILE[how]
    started = time.monotonic()
    with pytest.raises(BackendError):
        bench.blk(queues=2)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("request_number", START)
@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_answer_at_the_start_leaves_a_disk_of_errors(
    bench: Bench, impatient: None, how: str, request_number: int
) -> None:
    driver = bench.blk()
    bench.backend.instead[request_number] = HOSTILE[how]
    driver.start()
    assert len(driver.reported) == 1 and isinstance(driver.reported[0], BackendError)
    head = blk_request(driver)
    driver.notify()
    assert driver.queues[0].collect() == [(head, 513)] and status_of(driver) == IOERR


def test_a_request_that_is_refused_is_an_error(bench: Bench) -> None:
    driver = bench.blk()
    bench.backend.instead[wire.SET_MEM_TABLE] = says(lambda request: struct.pack("=IIIQ", request, 5, 8, 1))
    driver.start()
    assert [str(error) for error in driver.reported] == [f"the back end at {bench.backend.path} refuses SET_MEM_TABLE"]


@pytest.mark.parametrize("how", [*HOSTILE, "another ring", "far away"])
def test_a_hostile_answer_to_the_end_does_not_keep_a_driver_from_its_reset(bench: Bench, impatient: None, how: str) -> None:
    special = {"another ring": (1, 0), "far away": (0, 0x1_0000)}
    driver = bench.blk()
    driver.start()
    answer = HOSTILE.get(how) or says(lambda request: struct.pack("=IIIII", request, 5, 8, *special[how]))
    bench.backend.instead[wire.GET_VRING_BASE] = answer
    started = time.monotonic()
    driver.write(STATUS, 0)
    assert time.monotonic() - started < 2
    assert driver.status == 0 and len(driver.reported) == 1
    driver.start()
    assert driver.device.active


@pytest.mark.parametrize("reply", [(0, 59), (1, 60), (60, 0)])
def test_another_part_of_the_config_space_is_an_error(bench: Bench, reply: tuple[int, int]) -> None:
    bench.backend.instead[wire.GET_CONFIG] = says(
        lambda request: struct.pack("=IIIIII", request, 5, 72, *reply, 0) + bytes(60))
    with pytest.raises(BackendError, match="another part of the config space"):
        bench.blk()


def test_a_trickle_does_not_move_the_deadline(bench: Bench, impatient: None) -> None:
    def trickle(peer: Peer, request: int, payload: bytes) -> bool:
        def run() -> None:
            for byte in struct.pack("=IIIQ", request, 5, 8, 0):
                try:
                    peer.socket.send(bytes([byte]))
                except OSError:
                    return
                time.sleep(0.1)

        threading.Thread(target=run, daemon=True).start()
        return False

    bench.backend.instead[wire.GET_FEATURES] = trickle
    started = time.monotonic()
    with pytest.raises(BackendError, match="does not answer GET_FEATURES in time"):
        bench.blk()
    assert time.monotonic() - started < 1


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="No such file"):
        BackendSocket("c0", str(tmp_path / "none"), shared_memory(), 0).connect(0)


# -- a back end that dies


def test_what_it_had_and_what_comes_is_answered_with_errors(bench: Bench) -> None:
    bench.backend.handle = None  # it takes requests and returns them when it is told to
    driver = bench.blk()
    driver.start()
    driver.serve()
    heads = [blk_request(driver, number) for number in range(4)]
    driver.notify()
    bench.backend.peer.give_back(0, 513, 0)
    bench.backend.peer.give_back(0, 513, 0)
    driver.serve()
    assert driver.queues[0].collect() == [(heads[0], 513), (heads[1], 513)]
    interrupts = driver.line.count
    bench.backend.die()
    driver.serve()
    assert driver.queues[0].collect() == [(heads[2], 513), (heads[3], 513)]
    assert [status_of(driver, number) for number in range(4)] == [0xFF, 0xFF, IOERR, IOERR]
    assert driver.line.count > interrupts
    late = blk_request(driver, 4)
    driver.notify()
    assert driver.queues[0].collect() == [(late, 513)] and status_of(driver, 4) == IOERR
    assert not driver.status & NEEDS_RESET
    assert [str(error) for error in driver.reported] == [f"the back end at {bench.backend.path} has closed the connection"]


def test_fuse_requests_are_answered_in_fuses_words(bench: Bench) -> None:
    bench.backend.handle = None
    driver = bench.fs()
    driver.start()
    driver.serve()
    driver.memory.write(DATA, struct.pack("<IIQ", 40, 15, 0x1234_5678_9ABC_DEF0) + bytes(24 + 200))
    queue = driver.queues[1]
    wanted = queue.add([(DATA, 40, False), (DATA + 40, 10, True), (DATA + 100, 100, True)])
    forget = queue.add([(DATA, 40, False)])
    driver.notify(1)
    bench.backend.die()
    driver.serve()
    assert queue.collect() == [(wanted, 16), (forget, 0)]
    answer = driver.memory.read(DATA + 40, 10) + driver.memory.read(DATA + 100, 6)
    assert struct.unpack("<IiQ", answer) == (16, -107, 0x1234_5678_9ABC_DEF0)


def test_a_request_without_a_status_breaks_the_device(bench: Bench) -> None:
    driver = bench.blk()
    driver.start()
    bench.backend.die()
    driver.serve()
    head = driver.queues[0].add([(DATA, 16, False)])
    driver.notify()
    assert driver.queues[0].collect() == [(head, 0)]
    assert driver.status & NEEDS_RESET


def test_rings_that_a_back_end_has_left_in_disorder_need_a_reset(bench: Bench) -> None:
    bench.backend.handle = None
    driver = bench.blk()
    queue = driver.start()
    driver.serve()
    blk_request(driver)
    driver.notify()
    driver.memory.store_u16(queue.used + 2, 0x8000)
    bench.backend.die()
    driver.serve()
    assert driver.status & NEEDS_RESET
    driver.write(STATUS, 0)
    driver.start()
    head = blk_request(driver)
    driver.notify()
    assert driver.queues[0].collect() == [(head, 513)]


def test_it_comes_back_and_goes_on_where_the_queue_stands(bench: Bench) -> None:
    bench.backend.handle = None
    driver = bench.blk()
    driver.start()
    driver.serve()
    for number in range(3):
        blk_request(driver, number)
    driver.notify()
    bench.backend.die()
    driver.serve()
    assert len(driver.queues[0].collect()) == 3
    bench.backend.handle = lambda chain: 513
    bench.backend.config = blk_config(4096)
    bench.backend.listen()
    generation = driver.read(CONFIG_GENERATION)
    driver.clock.now += 2.9
    driver.serve()
    assert len(bench.backend.peers) == 1
    driver.clock.now += 0.2
    driver.wait_until(lambda: 0 in driver.device.external_queues)
    assert len(bench.backend.peers) == 2 and bench.backend.peer.rings[0].base == 3
    assert driver.read(CONFIG) == 4096 and driver.read(CONFIG_GENERATION) == generation + 1
    head = blk_request(driver, 3)
    driver.notify()
    assert driver.queues[0].collect() == [(head, 513)] and status_of(driver, 3) == 0xFF


def test_it_is_tried_again_until_it_is_there(bench: Bench) -> None:
    driver = bench.blk()
    driver.start()
    bench.backend.die()
    driver.serve()
    for _ in range(3):
        driver.clock.now += 3.1
        driver.loop.run_once(0)
        driver.wait_until(lambda: bool(driver.loop._timers))
    bench.backend.listen()
    driver.clock.now += 3.1
    driver.wait_until(lambda: 0 in driver.device.external_queues)
    assert len(driver.reported) == 1


def test_without_reconnect_it_stays_away(bench: Bench) -> None:
    driver = bench.blk(reconnect=0)
    driver.start()
    bench.backend.die()
    driver.serve()
    bench.backend.listen()
    driver.clock.now += 1000
    driver.serve()
    assert len(bench.backend.peers) == 1 and not driver.loop._timers


def test_one_that_comes_back_and_fails_is_tried_less_and_less_often(bench: Bench) -> None:
    driver = bench.blk()
    driver.start()
    bench.backend.instead[wire.SET_MEM_TABLE] = close
    bench.backend.peer.socket.shutdown(2)
    delays = []
    for _ in range(7):
        driver.wait_until(lambda: bool(driver.loop._timers))
        delays.append(driver.loop._timers[0].deadline - driver.clock.now)
        driver.clock.now += delays[-1]
        count = len(driver.reported)
        driver.loop.run_once(0)
        driver.wait_until(lambda count=count: len(driver.reported) > count)  # type: ignore[misc]
    assert delays == [3, 6, 12, 24, 48, 60, 60]


def test_one_that_comes_back_with_less_is_not_taken(bench: Bench) -> None:
    driver = bench.blk()
    driver.start()
    bench.backend.features &= ~EVENT_IDX
    bench.backend.peer.socket.shutdown(2)
    driver.wait_until(lambda: bool(driver.loop._timers))
    driver.clock.now += 3
    driver.wait_until(lambda: len(driver.reported) == 2)
    assert "lacks features that it had: 0x20000000" in str(driver.reported[1])
    head = blk_request(driver)
    driver.notify()
    assert driver.queues[0].collect() == [(head, 513)]


def test_it_dies_while_the_machine_is_paused(bench: Bench) -> None:
    driver = bench.blk()
    driver.start()
    driver.serve()
    driver.vhost_user.pause()
    blk_request(driver)
    bench.backend.die()
    driver.serve()
    assert driver.queues[0].collect() == []
    driver.vhost_user.resume()
    driver.serve()
    assert len(driver.queues[0].collect()) == 1 and status_of(driver) == IOERR


def test_it_does_not_answer_the_pause(bench: Bench, impatient: None) -> None:
    bench.backend.handle = None
    driver = bench.blk()
    driver.start()
    driver.serve()
    head = blk_request(driver)
    driver.notify()
    bench.backend.instead[wire.GET_VRING_BASE] = silent
    driver.vhost_user.pause()
    assert driver.queues[0].collect() == [] and len(driver.reported) == 1
    driver.vhost_user.resume()
    driver.serve()
    assert driver.queues[0].collect() == [(head, 513)] and status_of(driver) == IOERR


def test_it_dies_before_there_is_a_driver(bench: Bench) -> None:
    driver = bench.blk()
    bench.backend.die()
    driver.serve()
    driver.start()
    head = blk_request(driver)
    driver.notify()
    assert driver.queues[0].collect() == [(head, 513)]


# -- a network interface


def command(driver: VhostUserDriver, queue: int, data: bytes) -> int:
    """One command through the control queue: its ack."""
    driver.memory.write(DATA + 0x8000, data + b"\xff")
    driver.queues[queue].add([(DATA + 0x8000, len(data), False), (DATA + 0x8000 + len(data), 1, True)])
    driver.notify(queue)
    assert [written for _, written in driver.queues[queue].collect()] == [1]
    driver.queues[queue].release_all()
    return driver.memory.read(DATA + 0x8000 + len(data), 1)[0]


def enabled(bench: Bench) -> list[int]:
    return [index for index, ring in sorted(bench.backend.peer.rings.items()) if ring.enabled]


def test_offloads_are_the_back_ends_and_the_rest_is_ours(bench: Bench) -> None:
    ring = VERSION_1 | EVENT_IDX | INDIRECT_DESC
    bench.backend.features = ring | MRG_RXBUF | CSUM | CTRL_VQ | NET_MQ | wire.PROTOCOL_FEATURES
    driver = bench.net()
    ours = 1 << 5 | 1 << 16 | 1 << 17 | 1 << 18 | 1 << 19 | 1 << 20 | 1 << 23
    assert driver.offered() == ring | MRG_RXBUF | CSUM | ours
    driver.start()
    assert bench.backend.peer.features == ring | MRG_RXBUF | CSUM | wire.PROTOCOL_FEATURES
    assert bytes(driver.read(CONFIG + offset, 1) for offset in range(10)) == MAC + b"\x01\0\x01\0"


def test_the_pairs_that_the_driver_wants_are_enabled(bench: Bench) -> None:
    driver = bench.net(pairs=3)
    driver.start()
    assert sorted(bench.backend.peer.rings) == [0, 1, 2, 3, 4, 5] and enabled(bench) == [0, 1]
    for count, ack, rings in ((3, 0, 6), (2, 0, 4), (0, 1, 4), (4, 1, 4), (1, 0, 2), (2, 0, 4)):
        assert command(driver, 6, b"\4\0" + count.to_bytes(2, "little")) == ack
        assert enabled(bench) == list(range(rings))
    driver.vhost_user.pause()
    driver.vhost_user.resume()
    assert enabled(bench) == [0, 1, 2, 3]
    driver.write(STATUS, 0)
    driver.start()
    assert enabled(bench) == [0, 1]


def test_a_driver_without_mq_has_its_control_queue_third(bench: Bench) -> None:
    driver = bench.net(pairs=3)
    driver.start(driver.offered() & ~NET_MQ)
    assert sorted(bench.backend.peer.rings) == [0, 1, 3, 4, 5] and enabled(bench) == [0, 1]
    assert command(driver, 2, b"\1\1" + bytes.fromhex("020000000001")) == 0
    assert driver.read(CONFIG) == 0x00000002
    assert command(driver, 2, b"\4\0\1\0") == 1


def test_a_malformed_command_takes_the_rings_back(bench: Bench) -> None:
    driver = bench.net()
    driver.start()
    driver.queues[2].add([(DATA, 1, False)])
    driver.notify(2)
    assert driver.status & NEEDS_RESET and bench.backend.peer.rings == {}


def test_the_link_is_down_without_a_back_end_and_frames_are_dropped(bench: Bench) -> None:
    bench.backend.handle = None
    driver = bench.net()
    driver.start()
    driver.serve()
    for _ in range(3):
        driver.queues[0].add([(DATA, 1526, True)])
        driver.queues[1].add([(DATA + 0x1000, 100, False)])
    for queue in (0, 1):
        driver.notify(queue)
    bench.backend.peer.give_back(0, 100)
    bench.backend.die()
    driver.serve()
    assert driver.read(CONFIG + 6, 2) == 0 and driver.read(INTERRUPT_STATUS) & 2
    assert [len(queue.collect()) for queue in driver.queues[:2]] == [1, 3]
    bench.backend.listen()
    driver.clock.now += 3.1
    driver.wait_until(lambda: 0 in driver.device.external_queues)
    assert driver.read(CONFIG + 6, 2) == 1
    assert [bench.backend.peer.rings[index].base for index in (0, 1)] == [1, 3]
    driver.serve()
    assert len(bench.backend.peer.rings[0].popped) == 2


def test_the_cable_is_pulled(bench: Bench) -> None:
    driver = bench.net()
    driver.start()
    assert isinstance(driver.vhost_user, VhostUserNet)
    driver.vhost_user.set_link(False)
    assert driver.read(CONFIG + 6, 2) == 0 and bench.backend.peer.rings == {}
    driver.queues[1].add([(DATA, 100, False)])
    driver.notify(1)
    assert len(driver.queues[1].collect()) == 1
    driver.vhost_user.set_link(True)
    assert driver.read(CONFIG + 6, 2) == 1 and bench.backend.peer.rings[1].base == 1


def test_more_pairs_than_the_back_end_has(bench: Bench) -> None:
    with pytest.raises(BackendError, match="lacks 9 queues: it has 8"):
        bench.net(pairs=9)


# -- which requests are lost


class Rings:
    """A driver and a device, as far as heads go: a free list from whose top the driver takes, as Linux does."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.free = list(range(size))
        self.available: list[int] = []
        self.used: list[int] = []
        self.waiting: list[int] = []

    def make_available(self) -> None:
        self.available.append(self.free.pop())
        self.waiting.append(self.available[-1])

    def give_back(self, number: int) -> None:
        self.used.append(self.waiting.pop(number))
        self.free.append(self.used[-1])

    def guess(self) -> list[int]:
        """With nothing to go by but what is left of the rings."""
        def entry(ring: list[int]) -> Callable[[int], int]:
            slots = dict(enumerate([0] * self.size))
            for index, head in enumerate(ring):
                slots[index % self.size] = head
            return lambda index: slots[index % self.size]

        return outstanding(self.size, len(self.available) & 0xFFFF, len(self.used) & 0xFFFF, entry(self.available),
                           entry(self.used))


@pytest.mark.parametrize("size", [1, 4, 16, 256])
def test_lost_requests_of_a_queue_that_works_in_order(size: int) -> None:
    chance = random.Random(size)
    rings = Rings(size)
    for step in range(3000):
        if rings.free and (not rings.waiting or chance.random() < 0.5):
            rings.make_available()
        else:
            rings.give_back(0)
        if step % 7 == 0:
            assert rings.guess() == rings.waiting


@pytest.mark.parametrize(("size", "depth", "spread", "least"), [
    (16, 2, 2, 1.0), (16, 8, 4, 0.95), (256, 8, 8, 1.0), (256, 32, 8, 1.0), (256, 32, 100, 0.9)])
def test_lost_requests_of_a_queue_that_does_not(size: int, depth: int, spread: int, least: float) -> None:
    """As many as there are, each once, nearly all of them right; of `depth` in flight, one of the `spread` oldest ends next."""
    chance = random.Random(size)
    rings, right, total = Rings(size), 0, 0
    for step in range(8000):
        while len(rings.waiting) < depth:
            rings.make_available()
        if step % 11 == 0:
            guess = rings.guess()
            assert len(set(guess)) == len(guess) <= len(rings.waiting)
            right += len(set(guess) & set(rings.waiting))
            total += len(rings.waiting)
        rings.give_back(chance.randrange(min(spread, depth)))
    assert right >= least * total, right / total


def test_nothing_is_lost_when_everything_was_returned() -> None:
    rings = Rings(8)
    for _ in range(100):
        rings.make_available()
        rings.give_back(0)
    assert rings.guess() == []


def test_indices_that_wrap() -> None:
    rings = Rings(16)
    for _ in range(0x1_0003):
        rings.make_available()
        rings.give_back(0)
    for _ in range(5):
        rings.make_available()
    assert rings.guess() == rings.waiting


def test_garbage_in_the_rings_is_only_garbage() -> None:
    chance = random.Random(1)
    for _ in range(200):
        count = chance.randrange(17)
        used = chance.randrange(0x1_0000)
        found = outstanding(16, (used + count) & 0xFFFF, used, lambda index: chance.randrange(0x1_0000),
                            lambda index: chance.randrange(1 << 32))
        assert len(found) <= count


# -- the command line


def refuse(line: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(["-kernel", "k", *line.split()])
    return caught.value


FS = "-device vhost-user-fs-device,id=f,chardev=c,tag=t"
BLK = "-device vhost-user-blk-device,id=f,chardev=c"
NET = "-netdev vhost-user,id=f,chardev=c -device virtio-net-device,id=e,netdev=f"
CHARDEV = "-chardev socket,id=c,path=/tmp/s"
SHARED = "-machine mem-share=on"


@pytest.mark.parametrize("device", [FS, BLK, NET])
def test_memory_that_is_not_shared_is_refused_with_both_ways_out(device: str) -> None:
    for memory in ("", "-mem-path /tmp/m", "-object memory-backend-ram,id=m,size=256M -machine memory-backend=m"):
        error = refuse(f"{CHARDEV} {device} {memory}")
        assert "the memory must be shared" in error.problem
        assert "-machine mem-share=on" in error.accepted and "memory-backend-memfd" in error.accepted
        assert error.option == " ".join(device.partition(",")[0].split())


@pytest.mark.parametrize("memory", [
    SHARED, "-object memory-backend-memfd,id=m,size=256M,share=on -machine memory-backend=m",
    "-object memory-backend-memfd,id=m,size=256M -machine memory-backend=m", f"-mem-path /tmp/m {SHARED}"])
def test_memory_that_is_shared(memory: str) -> None:
    config = parse(["-kernel", "k", *f"{CHARDEV},reconnect=7 {FS} {memory}".split()])
    assert config.chardevs == {}
    assert (config.vhost_users["c"].path, config.vhost_users["c"].reconnect) == ("/tmp/s", 7)


def test_a_chardev_as_kata_writes_it() -> None:
    config = parse(["-kernel", "k", *f"{CHARDEV},server,nowait {FS} {SHARED}".split()])
    assert config.vhost_users["c"].reconnect == 3


@pytest.mark.parametrize(("line", "message"), [
    (f"{FS} {SHARED}", 'Chardev "c" not found'),
    (f"{CHARDEV} {FS} {BLK.replace('id=f', 'id=g')} {SHARED}", 'Chardev "c" not found or is in use'),
    (f"-chardev socket,id=c,port=5 {FS} {SHARED}", "needs a unix socket"),
    (f"-chardev stdio,id=c {FS} {SHARED}", "needs a unix socket"),
    (f"{CHARDEV},server,nowait,reconnect=3 {FS} {SHARED}", "a socket that listens connects to nobody"),
    (f"{CHARDEV},reconnect=3601 {FS} {SHARED}", "reconnect"),
    (f"{CHARDEV} {FS}{'x' * 35} {SHARED}", "tag"),
    (f"{CHARDEV} {BLK},num-queues=33 {SHARED}", "num-queues"),
    (f"{CHARDEV} {NET.replace('chardev=c', 'chardev=c,queues=17')} {SHARED}", "queues"),
    (f"{CHARDEV} {NET.replace('chardev=c', 'chardev=d')} {SHARED}", 'Chardev "d" not found'),
    (f"{CHARDEV} {NET.replace('chardev=c', 'chardev=c,vhost=on')} {SHARED}", "vhost"),
    (f"{CHARDEV} {NET.replace('chardev=c', 'chardev=c,queues=2')},mq=off {SHARED}", "has 2 queue pairs"),
    (f"{CHARDEV} {BLK},queue-size=3 {SHARED}", "queue-size"),
])
def test_what_is_refused(line: str, message: str) -> None:
    error = refuse(line)
    assert message in f"{error.option} {error.problem}"
