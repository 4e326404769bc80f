"""A vhost-user back end for tests, written from the protocol's text: it does what it is told, or what a test wants instead."""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

from stratovirt.errors import GuestError, StratoVirtError
from stratovirt.hostmap import HostMapping
from stratovirt.loop import EventLoop
from stratovirt.memory import GuestMemory, RamRegion
from stratovirt.vhost.user import BackendSocket
from stratovirt.virtio.queue import Chain, Virtqueue
from stratovirt.virtio.vhost_user import VhostUserDevice
from unit.virtio_driver import EVENT_IDX, INDIRECT_DESC, RAM_SIZE, VERSION_1, Driver

GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 1, 2, 3, 5
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR = 12, 13, 14
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_VRING_ENABLE, GET_CONFIG = 15, 16, 17, 18, 24
SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE = 42, 43
PROTOCOL_FEATURES = 1 << 30
MQ, REPLY_ACK, CONFIG, DEVICE_STATE = 1 << 0, 1 << 3, 1 << 9, 1 << 19
EVERY_PROTOCOL_FEATURE = (1 << 20) - 1

Answer = Callable[["Peer", int, bytes], bool]


class BackendRing:
    """What the back end knows about one ring."""

    def __init__(self) -> None:
        self.size = self.base = 0
        self.addresses = (0, 0, 0)  # descriptors, used, available
        self.fds: dict[int, int] = {}  # by request: KICK, CALL, ERR
        self.enabled = False
        self.queue: Virtqueue | None = None
        self.popped: list[Chain] = []


class Peer:
    """One connection, on a thread of its own."""

    def __init__(self, backend: FakeBackend, connection: socket.socket) -> None:
        self.backend = backend
        self.socket = connection
        self.acknowledges = False
        self.rings: dict[int, BackendRing] = {}
        self.regions: list[tuple[int, int, RamRegion]] = []  # address as the front end calls it, size, and the memory
        self.features = 0
        self.received: list[tuple[int, bytes]] = []
        self.fds: list[int] = []
        self.lock = threading.RLock()  # held while rings are served, and when what they are signalled by is closed

    def reply(self, request: int, payload: bytes, flags: int = 5, size: int | None = None) -> None:
        with contextlib.suppress(OSError):
            self.socket.sendall(struct.pack("=III", request, flags, len(payload) if size is None else size) + payload)

    def run(self) -> None:
        try:
            self._listen()
        finally:
            with self.lock:
                self.rings.clear()
                for fd in self.fds:
                    os.close(fd)
            self.socket.close()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                fds = array.array("i")
                header, rights, _, _ = self.socket.recvmsg(12, socket.CMSG_SPACE(8 * fds.itemsize), socket.MSG_WAITALL)
                if len(header) < 12:
                    return
                for level, kind, data in rights:
                    assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
                    fds.frombytes(data)
                self.fds += fds
                request, flags, size = struct.unpack("=III", header)
                payload = self.socket.recv(size, socket.MSG_WAITALL) if size else b""
                assert flags & 3 == 1 and not flags & 4
                self.received.append((request, payload))
                instead = self.backend.instead.get(request)
                if instead is not None and not instead(self, request, payload):
                    continue
                answered = self.carry_out(request, payload, list(fds))
                if flags & 8:
                    assert self.acknowledges and not answered
                    self.reply(request, bytes(8))

    def carry_out(self, request: int, payload: bytes, fds: list[int]) -> bool:
        """True: it was answered."""
        backend = self.backend
        if request == GET_FEATURES:
            self.reply(request, struct.pack("=Q", backend.features))
        elif request == GET_PROTOCOL_FEATURES:
            self.reply(request, struct.pack("=Q", backend.protocol))
        elif request == GET_QUEUE_NUM:
            self.reply(request, struct.pack("=Q", backend.queues))
        elif request == GET_CONFIG:
            offset, size, _ = struct.unpack_from("=III", payload)
            self.reply(request, payload[:12] + backend.config[offset : offset + size])
        elif request == GET_VRING_BASE:
            index = struct.unpack_from("=I", payload)[0]
            ring = self.rings.pop(index)
            base = ring.queue._next_avail if ring.queue is not None else ring.base
            self.reply(request, struct.pack("=II", index, base))
        elif request == SET_DEVICE_STATE_FD:
            assert not self.rings, "rings are running"
            direction, phase = struct.unpack("=II", payload)
            assert phase == 0 and len(fds) == 1
            if direction == 0:
                os.write(fds[0], backend.state)
            else:
                backend.state = os.read(fds[0], 1 << 24)
            self.reply(request, struct.pack("=Q", 1 << 8))
        elif request == CHECK_DEVICE_STATE:
            self.reply(request, bytes(8))
        else:
            self.take(request, payload, fds)
            return False
        return True

    def take(self, request: int, payload: bytes, fds: list[int]) -> None:
        if request == SET_FEATURES:
            self.features = struct.unpack("=Q", payload)[0]
        elif request == SET_PROTOCOL_FEATURES:
            self.acknowledges = bool(struct.unpack("=Q", payload)[0] & REPLY_ACK)
        elif request == SET_MEM_TABLE:
            count = struct.unpack_from("=I", payload)[0]
            assert count == len(fds)
            self.regions = []
            for number, fd in enumerate(fds):
                base, size, address, offset = struct.unpack_from("=QQQQ", payload, 8 + 32 * number)
                self.regions.append((address, size, RamRegion(base, HostMapping(size, fd, offset, shared=True))))
        elif request in (SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR):
            self.ring(struct.unpack("=Q", payload)[0]).fds[request] = fds[0]
        elif request == SET_VRING_NUM:
            index, size = struct.unpack("=II", payload)
            self.ring(index).size = size
        elif request == SET_VRING_BASE:
            index, base = struct.unpack("=II", payload)
            self.ring(index).base = base
        elif request == SET_VRING_ADDR:
            index, _, descriptors, used, available, _ = struct.unpack("=IIQQQQ", payload)
            self.ring(index).addresses = (descriptors, used, available)
        elif request == SET_VRING_ENABLE:
            index, enabled = struct.unpack("=II", payload)
            ring = self.ring(index)
            ring.enabled = bool(enabled)
            descriptors, used, available = (self.translate(address) for address in ring.addresses)
            ring.queue = Virtqueue("the back end's", GuestMemory([region for _, _, region in self.regions]), ring.size,
                                   descriptors, available, used, bool(self.features & EVENT_IDX),
                                   bool(self.features & INDIRECT_DESC))
            ring.queue.seek(ring.base)

    def ring(self, index: int) -> BackendRing:
        return self.rings.setdefault(index, BackendRing())

    def translate(self, address: int) -> int:
        for start, size, region in self.regions:
            if start <= address < start + size:
                return region.base + address - start
        raise AssertionError(f"{address:#x} is in no region")

    def serve(self) -> None:
        """What a kick leads to. Thread: the test's."""
        with self.lock:
            self._serve()

    def _serve(self) -> None:
        for index, ring in list(self.rings.items()):
            if ring.queue is None or not ring.enabled or not readable(ring.fds[SET_VRING_KICK]):
                continue
            os.eventfd_read(ring.fds[SET_VRING_KICK])
            try:
                while (chain := ring.queue.pop()) is not None:
                    ring.popped.append(chain)
                    if self.backend.handle is not None:
                        self.give_back(index, self.backend.handle(chain))
            except GuestError:
                ring.enabled = False
                os.eventfd_write(ring.fds[SET_VRING_ERR], 1)

    def give_back(self, index: int, written: int, number: int = 0) -> None:
        ring = self.rings[index]
        assert ring.queue is not None
        ring.queue.push(ring.popped.pop(number).head, written)
        if ring.queue.needs_interrupt():
            os.eventfd_write(ring.fds[SET_VRING_CALL], 1)


class FakeBackend:
    """Listens at `path`. `instead` has for a request what is done first; it returns whether the request is carried out, too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.features = VERSION_1 | EVENT_IDX | INDIRECT_DESC | PROTOCOL_FEATURES | 1 << 24 | 1 << 26
        self.protocol = EVERY_PROTOCOL_FEATURE
        self.queues = 8
        self.config = bytes(60)
        self.state = b""
        self.handle: Callable[[Chain], int] | None = lambda chain: 0
        self.instead: dict[int, Answer] = {}
        self.peers: list[Peer] = []
        self.arrived = threading.Semaphore(0)
        self.listener: socket.socket | None = None
        self.listen()

    def listen(self) -> None:
        self.path.unlink(missing_ok=True)
        self.listener = listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen()
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer = Peer(self, listener.accept()[0])
                self.peers.append(peer)
                self.arrived.release()
                threading.Thread(target=peer.run, daemon=True).start()

    @property
    def peer(self) -> Peer:
        return self.peers[-1]

    def die(self) -> None:
        """No longer there, and its socket neither."""
        if self.listener is not None:
            self.listener.shutdown(socket.SHUT_RDWR)
            self.listener.close()
            self.listener = None
        self.path.unlink(missing_ok=True)
        for peer in self.peers:
            with contextlib.suppress(OSError):
                peer.socket.shutdown(socket.SHUT_RDWR)
            peer.socket.close()
            peer.rings.clear()


def shared_memory(size: int = RAM_SIZE) -> GuestMemory:
    """RAM in a memfd, in two regions."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(fd, size + 4096)
    return GuestMemory([RamRegion(0, HostMapping(size, fd, 0, True)), RamRegion(1 << 32, HostMapping(4096, fd, size, True))])


def readable(fd: int) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(0))


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class VhostUserDriver(Driver):
    """A device on a FakeBackend: `make(socket, loop, on_error)` makes it."""

    def __init__(self, backend: FakeBackend, make: Callable[..., VhostUserDevice], reconnect: float = 3) -> None:
        self.backend = backend
        self.clock = FakeClock()
        self.loop = EventLoop(self.clock)
        self.reported: list[StratoVirtError] = []
        memory = shared_memory()
        self.vhost_user = make(BackendSocket("c0", str(backend.path), memory, reconnect), self.loop, self.reported.append)
        super().__init__(self.vhost_user, memory)

    def serve(self, rounds: int = 1000) -> int:
        """The back end's turn, the loop's turn, and that of the queues that are with the device."""
        for _ in range(3):
            if self.backend.peers:
                self.backend.peer.serve()
            self.loop.run_once(0)
            for number, fd in enumerate(self.transport.notify_fds):
                if number not in self.device.external_queues and readable(fd):
                    self.transport.on_notify(number)
        return 0

    def wait_until(self, what: Callable[[], bool]) -> None:
        for _ in range(200):
            if what():
                return
            self.loop.run_once(0.05)
        raise AssertionError("it does not happen")

    def close(self) -> None:
        super().close()
        self.backend.die()
        self.loop.close()
        for fd in (self.memory.regions[0].fd, self.vhost_user._call_fd, self.vhost_user._error_fd):
            os.close(fd)
