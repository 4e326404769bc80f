"""Devices on vhost-user against back ends that answer anything and leave anything in the rings: only errors that are meant."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

import pytest

from fuzz.fuzzing import fuzz, mutate
from stratovirt.vhost import user
from stratovirt.vhost.user import BackendError
from stratovirt.virtio.vhost_user_blk import VhostUserBlk
from stratovirt.virtio.vhost_user_fs import VhostUserFs
from stratovirt.virtio.vhost_user_net import VhostUserNet
from unit import vhost_user_backend as wire
from unit.vhost_user_backend import FakeBackend, Peer, VhostUserDriver
from unit.virtio_driver import DATA, NEEDS_RESET, STATUS, VERSION_1

SECONDS = 0.05
REQUESTS = (1, 2, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 24)
# What the right answer has in place of its payload, for those that are not acknowledgements.
PAYLOADS = {wire.GET_FEATURES: struct.pack("=Q", VERSION_1 | wire.PROTOCOL_FEATURES), wire.GET_VRING_BASE: bytes(8),
            wire.GET_CONFIG: struct.pack("=III", 0, 60, 0) + bytes(60), wire.GET_QUEUE_NUM: struct.pack("=Q", 8)}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HANDSHAKE_SECONDS", "START_SECONDS", "STOP_SECONDS"):
        monkeypatch.setattr(user, name, SECONDS)


def make(backend: FakeBackend, kind: int) -> VhostUserDriver:
    if kind == 0:
        return VhostUserDriver(backend, lambda socket, loop, report: VhostUserBlk(socket, 2, 64, loop, report), 0)
    if kind == 1:
        return VhostUserDriver(backend, lambda socket, loop, report: VhostUserFs(socket, b"t", loop, report), 0)
    return VhostUserDriver(backend, lambda socket, loop, report: VhostUserNet(socket, 2, bytes(6), loop, 256, report), 0)


def test_any_answer(tmp_path: Path) -> None:
    def one(generator: random.Random) -> None:
        backend = FakeBackend(tmp_path / "socket")

        def answer(peer: Peer, request: int, payload: bytes) -> bool:
            body = PAYLOADS.get(request, bytes(8))
            peer.socket.sendall(mutate(generator, struct.pack("=III", request, 5, len(body)) + body, 3))
            return False

        for request in generator.sample(REQUESTS, generator.choice((1, 1, 2, 16))):
            backend.instead[request] = answer
        started = time.monotonic()
        try:
            driver = make(backend, generator.randrange(3))
        except BackendError:
            driver = None
        finally:
            if generator.random() < 0.5:
                backend.instead.clear()
        if driver is None:
            backend.die()
        else:
            for _ in range(2):
                driver.start()
                driver.notify()
                driver.vhost_user.pause()
                driver.vhost_user.resume()
                driver.serve()
                driver.write(STATUS, 0)
                assert driver.status == 0
            driver.close()
        assert time.monotonic() - started < 5

    fuzz(one, 120)


def test_anything_in_the_rings_of_one_that_dies(tmp_path: Path) -> None:
    def one(generator: random.Random) -> None:
        backend = FakeBackend(tmp_path / "socket")
        backend.config, backend.handle = bytes(60), None
        driver = make(backend, generator.randrange(3))
        try:
            queue = driver.start()
            driver.serve()
            for number in range(generator.randrange(8)):
                queue.add([(DATA + 1024 * number, 64, False), (DATA + 1024 * number + 64, 64, True)])
            driver.notify()
            for _ in range(generator.randrange(4)):
                place = generator.choice((queue.used, queue.avail, queue.desc)) + generator.randrange(64)
                driver.memory.write(place, generator.randbytes(generator.randint(1, 4)))
            backend.die()
            driver.serve()
            assert driver.status & NEEDS_RESET or not driver.vhost_user._served
            driver.write(STATUS, 0)
            driver.start()
            assert driver.device.active
        finally:
            driver.close()

    fuzz(one, 150)
