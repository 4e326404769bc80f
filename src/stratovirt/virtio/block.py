"""virtio-blk (VIRTIO 1.2, 5.2): a disk over a raw image.

Requests are taken in batches, and reads or writes of a batch that are neighbours on the disk become one transfer
(`block_request.py`; `block_order.py` knows what they ask for). With `aio=off` a batch is carried out where it is found, by
compiled code if it is there (`native/disk.c`). Otherwise it is given to an engine, which owns its buffers until it is finished;
at most one queue's worth is on the way for each queue. A finished flush means that every write that was finished before it came
is on stable storage, which is all that a driver may ask (5.2.6.2).

An image that has grown is noticed when the driver flushes or resets the disk, without polling: the driver is told through
the config interrupt. One that has shrunk is not; what is missing gives I/O errors.

Threads: all of it on the device's loop, but `reset`, which waits for requests on the way, on a vCPU thread.
"""

from __future__ import annotations

import select
import time

from stratovirt.backends.block import FLUSH, KINDS, READ, SECTOR_SIZE, WRITE, WRITE_ZEROES, RawImage
from stratovirt.errors import GuestError, HostError
from stratovirt.loop import READ as READABLE
from stratovirt.virtio.block_config import F_FLUSH, config_of, features_of
from stratovirt.virtio.block_order import S_IOERR, S_OK, SERIAL_SIZE, request_of
from stratovirt.virtio.block_request import MAX_MERGED, DiskRequest, MergedRequest, merge
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

# How long to wait for the host to finish what it has begun. After a reset the guest may use the buffers for something else;
# a pause, or a change of image, holds up the loop, and an iothread gives a callback 5 seconds.
RESET_SECONDS, PAUSE_SECONDS = 10.0, 4.0


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
        ring = queue.ring if not self._buckets else None
        try:
            while left > 0:
                room = self._room(index, queue)
                if not room:
                    return False
                if ring is not None and self._engine is not None:
                    taken = self._take_compiled(ring, index, queue, room)
                    left -= taken
                    if taken:
                        continue
                elif ring is not None:
                    served, room = self._serve_compiled(ring, queue, left)
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

    def _has_plain_writes(self) -> bool:
        """There is nothing more to a write than that it is carried out."""
        image = self.image
        return not image.readonly and image.detect_zeroes == "off" and bool(self.driver_features >> F_FLUSH & 1)

    def _take_compiled(self, ring: Ring, index: int, queue: Virtqueue, limit: int) -> int:
        """Have compiled code make requests of chains, and give them to the engine: how many."""
        requests = ring.take_requests(
            DiskRequest, self.sectors, self._has_plain_writes(), queue.positions[0], limit, index, queue)
        queue.advance(len(requests), returned=False)
        if requests:
            self._perform(requests, [])
        return len(requests)

    def _serve_compiled(self, ring: Ring, queue: Virtqueue, limit: int) -> tuple[int, int]:
        """Have compiled code carry out plain requests, up to `limit`: how many it has, and how many come next for `_serve`."""
        served, others, reads, read, written, wrote = ring.serve_disk(
            self.image.fd, self.sectors, self._has_plain_writes(), *queue.positions, limit)
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
                if self._buckets:
                    self._buckets[index].pour()
                request = request_of(self, index, queue, chain, answers)
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
