"""virtio-blk (VIRTIO 1.2, 5.2): a disk over a raw image.

Requests are taken in batches, and reads or writes of a batch that are neighbours on the disk become one transfer
(`block_request.py`). With `aio=off` a batch is carried out where it is found. Otherwise it is handed to an engine, which owns
its buffers until it is finished; at most one queue's worth is on the way for each queue. A finished flush means that every
write that was finished before it came is on stable storage, which is all that a driver may ask (5.2.6.2).

An image that has grown is noticed when the driver flushes or resets the disk, without polling: the driver is told through
the config interrupt. One that has shrunk is not; what is missing gives I/O errors.

Threads: all of it on the device's loop, but `reset`, which waits for requests on the way, on a vCPU thread.
"""

from __future__ import annotations

import select
import struct
import time

from stratovirt.backends.block import (
    DISCARD,
    FLUSH,
    KINDS,
    READ,
    SECTOR_SIZE,
    WRITE,
    WRITE_ZEROES,
    RawImage,
)
from stratovirt.errors import GuestError, HostError
from stratovirt.loop import READ as READABLE
from stratovirt.virtio.block_config import F_DISCARD, F_FLUSH, F_WRITE_ZEROES, MAX_RANGE_SECTORS, config_of, features_of
from stratovirt.virtio.block_request import HEADER_SIZE, MAX_MERGED, DiskRequest, MergedRequest, merge, parse
from stratovirt.virtio.device import F_VERSION_1, VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stratovirt.backends.aio_threads import ThreadEngine
    from stratovirt.backends.block_rate import LeakyBucket
    from stratovirt.loop import EventLoop, Timer
    from stratovirt.native._native import Ring
    from stratovirt.snapshot.saved import Saved
    from stratovirt.virtio.block_request import Transfer
    from stratovirt.virtio.queue import Chain, Virtqueue

T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES = 0, 1, 4, 8, 11, 13
S_OK, S_IOERR, S_UNSUPP = 0, 1, 2

_RANGE = struct.Struct("<QII")  # struct virtio_blk_discard_write_zeroes { le64 sector; le32 num_sectors; le32 flags; }
_FLAG_UNMAP = 1
SERIAL_SIZE = 20
# How long to wait for the host to finish what it has begun. After a reset the guest may use the buffers for something else;
# a pause, or a change of image, holds up the loop, and an iothread gives a callback 5 seconds.
RESET_SECONDS, PAUSE_SECONDS = 10.0, 4.0


class _Refused(Exception):
    """The request is not to be done; the driver is told this status and both sides go on."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class VirtioBlock(VirtioDevice):
    """One disk, or with a NoImage a drive with nothing in it; `replace_image` changes what is in it at any time.

    `on_error` hears of I/O errors of the image, for the log; `loop` is the device's, which engines and a limit
    of the request rate need. The limit holds for each queue by itself. `modest`: a vhost-user back end may take its place.
    """

    device_id = 2
    name = "virtio-blk"

    def __init__(self, image: RawImage, queue_size: int = 256, serial: str = "",
                 on_error: Callable[[HostError], None] | None = None, *,
                 loop: EventLoop | None = None, queues: int = 1, modest: bool = False) -> None:
        super().__init__()
        self._modest = modest
        self.queue_sizes = (queue_size,) * queues
        self._on_error = on_error
        self._loop = loop
        self._engine: ThreadEngine | None = None
        self._paused = False
        self._ended_early = False  # requests that were begun a moment ago are finished, and nobody has looked yet
        self._in_flight = [0] * queues
        self._waiting: set[int] = set()  # queues that may hold more than could be taken
        self._buckets: list[LeakyBucket] = []
        self._timers: list[Timer | None] = [None] * queues
        # by kind of request, for the curious; writes of zeroes count as writes
        self.operations, self.bytes, self.failures = [0] * KINDS, [0] * KINDS, [0] * KINDS
        self._insert(image, serial)

    def _insert(self, image: RawImage, serial: str) -> None:
        queues = len(self.queue_sizes)
        self.image = image
        self.serial = serial.encode("ascii", "replace")[:SERIAL_SIZE].ljust(SERIAL_SIZE, b"\0")
        self.sectors = image.size // SECTOR_SIZE
        # A driver that has negotiated already does not see these change: its writes to a read-only image fail.
        self.features = 1 << F_VERSION_1 | features_of(image, queues, self._modest)
        self.config = config_of(image, queues, self.queue_sizes[0], self._modest)
        self._asynchronous = self._loop is not None and image.engine != "off"
        self._buckets = []
        if self._loop is not None and image.iops_limit:
            from stratovirt.backends.block_rate import LeakyBucket

            self._buckets = [LeakyBucket(image.iops_limit) for _ in self.queue_sizes]

    def replace_image(self, image: RawImage, serial: str = "") -> RawImage:
        """Change what is in the drive; returns what was. Requests on the way are finished first, and the driver is told.

        The image that is returned is no longer used, and the caller's to close. Thread: any. Raises: HostError when requests
        do not end; everything is as it was.
        """
        with self._work:
            interrupt, again = self._settle(PAUSE_SECONDS)
            stuck = self._engine.in_flight if self._engine is not None else 0
            old = self.image
            if not stuck:
                self._close_engine()
                self._insert(image, serial)
        self._tell(interrupt, again)
        if stuck:
            raise HostError(f"{stuck} requests to {old.path} do not end")
        if self.transport is not None:
            self.transport.notify_config()
        return old

    # -- requests, on the device's loop

    def _room(self, index: int, queue: Virtqueue) -> int:
        """How many requests may be taken now; when none, it is seen to that the queue is looked at again."""
        if self._in_flight[index] >= queue.size:
            self._waiting.add(index)
            return 0
        if self._buckets and self._loop is not None:
            delay = self._buckets[index].delay(self._loop.clock())
            if delay > 0.0:
                self._come_back(index, delay, self._loop)
                return 0
            return 1
        return min(queue.size - self._in_flight[index], MAX_MERGED)

    def _come_back(self, index: int, delay: float, loop: EventLoop) -> None:
        if self._timers[index] is not None:
            return

        def fire() -> None:
            self._timers[index] = None
            if self.transport is not None:
                self.transport.requeue(index)

        self._timers[index] = loop.call_later(delay, fire)

    def _drain(self, index: int, queue: Virtqueue) -> bool:
        if self._asynchronous and self._engine is None:
            self._open_engine()
        if self._paused:  # nothing is written then, the rings' flags neither: a snapshot may be under way
            self._waiting.add(index)
            return False
        queue.disable_notifications()
        left = queue.size
        at_once = queue.ring if self._engine is None and not self._buckets else None
        try:
            while left > 0:
                room = self._room(index, queue)
                if not room:
                    return False
                if at_once is not None:
                    served, room = self._serve_compiled(at_once, queue, left)
                    left -= served
                chains = queue.pop_batch(room) if room else []
                if chains:
                    left -= len(chains)
                    self._serve(index, queue, chains)
                if len(chains) < room or (not room and left > 0):
                    if not queue.enable_notifications():
                        return False
                    left -= 1
            return True
        finally:
            if self._engine is not None:
                self._ended_early = self._engine.kick()

    def process(self, index: int) -> None:
        super().process(index)
        if self._ended_early:
            self._ended_early = False
            self._on_finished(READABLE)

    def _serve_compiled(self, ring: Ring, queue: Virtqueue, limit: int) -> tuple[int, int]:
        """Have compiled code carry out plain requests, up to `limit`: how many it has, and how many come next for `_serve`."""
        image = self.image
        writes = not image.readonly and image.detect_zeroes == "off" and bool(self.driver_features >> F_FLUSH & 1)
        served, others, reads, read, written, wrote = ring.serve_disk(image.fd, self.sectors, writes, *queue.positions, limit)
        queue.advance(served)
        self.operations[READ] += reads
        self.bytes[READ] += read
        self.operations[WRITE] += written
        self.bytes[WRITE] += wrote
        return served, others

    def _serve(self, index: int, queue: Virtqueue, chains: list[Chain]) -> None:
        """Carry out a batch, or give it to the engine. Raises: GuestError, after all before the request that breaks the device
        have been seen to.
        """
        answers: list[tuple[int, int]] = []
        group: list[DiskRequest] = []  # what is to be done to the image, all of one kind
        left = len(chains)
        try:
            for chain in chains:
                left -= 1
                request = self._request(index, queue, chain, answers)
                if request is None:
                    continue
                if group and (group[0].kind != request.kind or request.kind > WRITE):
                    self._perform(group, answers)
                    group = []
                group.append(request)
        except GuestError:
            answers.append((chain.head, 0))
            queue.unpop(left)
            raise
        finally:
            if group:
                self._perform(group, answers)
            if answers:
                queue.push_all(answers)

    def _perform(self, group: list[DiskRequest], answers: list[tuple[int, int]]) -> None:
        engine, image = self._engine, self.image
        if engine is not None:
            self._in_flight[group[0].index] += len(group)
        transfers: Sequence[Transfer] = merge(group) if len(group) > 1 else group
        for request in transfers:
            if engine is not None:
                engine.submit(request)
                continue
            try:
                image.perform(request)
            except HostError as error:
                request.error = error
            if isinstance(request, MergedRequest) and request.error is not None:  # which of them?
                for part in request.parts:
                    self._perform([part], answers)
            else:
                self._answer(request, answers)

    def _request(self, index: int, queue: Virtqueue, chain: Chain, answers: list[tuple[int, int]]) -> DiskRequest | None:
        """What the driver asks of the image; None when that has its answer already. Raises: GuestError."""
        kind, sector, data_in, data_out, status = parse(self.name, chain)
        if self._buckets:
            self._buckets[index].pour()
        if kind == T_IN:
            length = chain.writable_length - 1
            if not length % SECTOR_SIZE and sector + length // SECTOR_SIZE <= self.sectors:
                return DiskRequest(READ, data_in, sector * SECTOR_SIZE, length, length, chain.head, status, index, queue)
        elif kind == T_GET_ID:
            status[0] = S_OK
            answers.append((chain.head, self._get_id(data_in) + 1))
            return None
        else:
            length = chain.readable_length - HEADER_SIZE
            request = DiskRequest(WRITE, data_out, 0, length, 0, chain.head, status, index, queue)
            try:
                self._change(request, kind, sector)
            except _Refused as refusal:
                status[0] = refusal.status
            else:
                return request
            answers.append((chain.head, 1))
            return None
        status[0] = S_IOERR
        answers.append((chain.head, 1))
        return None

    def _change(self, request: DiskRequest, kind: int, sector: int) -> None:
        """Make a request, of which the data are known, a request of this type. Raises: _Refused."""
        image = self.image
        if kind == T_OUT:
            if image.readonly:
                raise _Refused(S_IOERR)
            request.offset = self._position(sector, request.length)
            if image.detect_zeroes != "off" and request.length:
                from stratovirt.backends.aio_syscalls import is_zero

                if is_zero(request.views):
                    request.kind, request.views = WRITE_ZEROES, []
                    request.unmap = image.detect_zeroes == "unmap"
            # a driver that cannot flush expects a write-through disk (5.2.6.2)
            request.durable = not self.driver_features >> F_FLUSH & 1
            return
        if kind == T_FLUSH:
            request.kind, request.views, request.length = FLUSH, [], 0
            return
        feature = F_DISCARD if kind == T_DISCARD else F_WRITE_ZEROES if kind == T_WRITE_ZEROES else None
        if feature is None or not self.driver_features >> feature & 1 or (kind == T_DISCARD and not image.discards):
            raise _Refused(S_UNSUPP)
        if image.readonly:
            raise _Refused(S_IOERR)
        self._change_range(request, kind)

    def _change_range(self, request: DiskRequest, kind: int) -> None:
        if request.length != _RANGE.size:  # max_discard_seg and max_write_zeroes_seg are 1
            raise _Refused(S_IOERR)
        sector, sectors, flags = _RANGE.unpack(b"".join(request.views))
        if flags & ~_FLAG_UNMAP or (flags and kind == T_DISCARD):
            raise _Refused(S_UNSUPP)
        if sectors > MAX_RANGE_SECTORS:
            raise _Refused(S_IOERR)
        request.kind, request.views = (DISCARD if kind == T_DISCARD else WRITE_ZEROES), []
        request.length = sectors * SECTOR_SIZE
        request.offset = self._position(sector, request.length)
        request.unmap = flags == _FLAG_UNMAP and self.image.discards
        request.durable = kind == T_WRITE_ZEROES and not self.driver_features >> F_FLUSH & 1

    def _position(self, sector: int, length: int) -> int:
        """Byte offset of a request on the disk. Raises _Refused unless all of it lies there."""
        if length % SECTOR_SIZE or sector + length // SECTOR_SIZE > self.sectors:
            raise _Refused(S_IOERR)
        return sector * SECTOR_SIZE

    def _get_id(self, data_in: list[memoryview]) -> int:
        rest = self.serial
        for view in data_in:
            part, rest = rest[: len(view)], rest[len(view) :]
            view[: len(part)] = part
        return SERIAL_SIZE - len(rest)

    def _answer(self, request: Transfer, answers: list[tuple[int, int]]) -> None:
        """Set the status of a finished request, or of all that it is made of, and note what the driver gets."""
        error, kind = request.error, request.kind
        if error is None and kind <= WRITE and isinstance(request, DiskRequest):  # what nearly all are
            self.operations[kind] += 1
            self.bytes[kind] += request.length
            request.status[0] = S_OK
            answers.append((request.head, 1 + request.written))
            return
        parts: Sequence[DiskRequest] = request.parts if isinstance(request, MergedRequest) else (request,)
        if kind == WRITE_ZEROES:
            kind = WRITE
        self.operations[kind] += len(parts)
        if error is None:
            self.bytes[kind] += request.length
            for part in parts:
                part.status[0] = S_OK
                answers.append((part.head, 1 + part.written))
        else:
            self.failures[kind] += len(parts)
            if self._on_error is not None:
                self._on_error(error)
            for part in parts:
                part.status[0] = S_IOERR
                answers.append((part.head, 1))
        if kind == FLUSH:
            self._notice_growth()

    def _notice_growth(self) -> None:
        image = self.image
        try:
            size = image.current_size()
        except OSError:
            return  # a device that is gone; reads and writes tell the driver
        if size > image.size:
            image.size = size
            self.sectors = size // SECTOR_SIZE
            self.config = config_of(image, len(self.queue_sizes), self.queue_sizes[0], self._modest)
            if self.transport is not None:
                self.transport.notify_config()

    # -- the engine

    def _open_engine(self) -> None:
        from stratovirt.backends.aio import open_engine

        if self._loop is None:
            return
        try:
            self._engine = open_engine(self.image)
        except OSError as error:  # no descriptor is left; the disk works without an engine, one request after the other
            self._asynchronous = False
            if self._on_error is not None:
                self._on_error(HostError.from_os(f"opening the engine of {self.image.path}", error))
            return
        self._loop.add(self._engine.fd, READABLE, self._on_finished)

    def _close_engine(self) -> None:
        """Called with `_work` held, when nothing is on the way any more, or nothing that ends."""
        engine, loop, self._engine = self._engine, self._loop, None
        if engine is not None and loop is not None:
            self._in_flight = [0] * len(self.queue_sizes)

            def close() -> None:
                loop.remove(engine.fd)
                engine.close()

            loop.call_soon(close)

    def _on_finished(self, _events: int) -> None:
        with self._work:
            interrupt, again = self._collect()
        self._tell(interrupt, again)

    def _collect(self) -> tuple[bool, set[int]]:
        """Return finished requests to the driver: does it want an interrupt, and which queues have room again?

        Requests of a driver that has reset the disk meanwhile are dropped. Called with `_work` held.
        """
        answers: list[list[tuple[int, int]]] = [[] for _ in self._in_flight]
        engine, queues = self._engine, self.queues
        for request in engine.reap() if engine is not None else ():
            if isinstance(request, DiskRequest):
                index, queue, count = request.index, request.queue, 1
            elif isinstance(request, MergedRequest):
                index, queue, count = request.parts[0].index, request.parts[0].queue, len(request.parts)
            else:
                continue
            if queue in queues:
                if count > 1 and request.error is not None and engine is not None:
                    self._one_by_one(request, engine)
                    continue
                self._answer(request, answers[index])
            self._in_flight[index] -= count
        interrupt, touched = False, set[int]()
        for index, entries in enumerate(answers):
            ring = queues[index] if entries else None
            if ring is not None:
                ring.push_all(entries)
                interrupt = ring.needs_interrupt() or interrupt
                touched.add(index)
        again = set() if self._paused else touched & self._waiting
        self._waiting -= again
        return interrupt, again

    def _one_by_one(self, request: Transfer, engine: ThreadEngine) -> None:
        """A merged request has failed: each of its parts again by itself, for who is to blame is to be seen."""
        for part in request.parts if isinstance(request, MergedRequest) else ():
            engine.submit(part)
        engine.kick()

    def _tell(self, interrupt: bool, again: set[int]) -> None:
        transport = self.transport
        if transport is None:
            return
        if interrupt:
            transport.notify_used()
        for index in again:
            transport.requeue(index)

    # -- standing still

    def _settle(self, seconds: float) -> tuple[bool, set[int]]:
        """Wait until no request is on the way; the result is that of `_collect`. Called with `_work` held."""
        engine = self._engine
        interrupt, again = False, set[int]()
        if engine is None or not engine.in_flight:
            return interrupt, again
        poll = select.poll()
        poll.register(engine.fd, select.POLLIN)
        until = time.monotonic() + seconds
        while engine.in_flight:
            left = until - time.monotonic()
            if left <= 0:
                if self._on_error is not None:
                    self._on_error(HostError(f"{engine.in_flight} requests to {engine.image.path} do not end", 0,
                                             "the disk takes no others in their place until they do"))
                break
            poll.poll(left * 1000)
            wanted, more = self._collect()
            interrupt = interrupt or wanted
            again |= more
        return interrupt, again

    def on_reset(self) -> None:
        self._settle(RESET_SECONDS)
        self._waiting.clear()
        self._notice_growth()

    def pause(self) -> None:
        with self._work:
            self._paused = True
            interrupt, again = self._settle(PAUSE_SECONDS)
        self._tell(interrupt, again)

    def save(self) -> dict[str, object]:
        if self._engine is not None and self._engine.in_flight:
            raise HostError(f"{self._engine.in_flight} requests to {self.image.path} do not end")
        return {"sectors": self.sectors, "readonly": self.image.readonly, "image": self.image.path}

    def restore(self, state: Saved) -> None:
        """The image is the command line's: at another place perhaps, but as large as it was."""
        sectors = state.integer("sectors")
        if sectors != self.sectors:
            raise state.error("sectors", f"the disk had {sectors} sectors, and {self.image.path or 'now it'} has "
                              f"{self.sectors}: it has changed, or is another")
        if state.boolean("readonly") != self.image.readonly:
            raise state.error("readonly", f"the disk was {'' if self.image.readonly else 'not '}writable")
        state.text("image", 4096)

    def resume(self) -> None:
        with self._work:
            self._paused = False
            again, self._waiting = self._waiting, set()
        self._tell(False, again)
