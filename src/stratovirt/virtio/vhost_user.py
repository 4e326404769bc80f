"""What devices on vhost-user have in common: the back end's connection through the life of the device, and after its loss.

While the driver is there, the machine runs and the connection stands, the back end has the queues: notifications go to it
straight from KVM, its interrupts come through the loop, because the driver of a virtio-mmio device reads InterruptStatus.

When the connection is lost, or the back end does what it must not, the log has it, and this process takes the queues over: it
answers what the driver waits for, and everything new, with `fail`, each device in its own words for an error. So no program in
the guest waits for ever. The back end is tried again after a while (`reconnect` of its -chardev), and goes on where the queues
stand.

    connected   active, not paused   the queues are with
    yes         yes                  the back end
    yes         no                   nobody
    no          yes                  this process
    no          no                   nobody

A back end that has said where its rings stand may still have requests to return (qemu-storage-daemon does). A pause waits for
those; for what does not come there is no snapshot. A snapshot has the device's own state and what the back end offered; another
one may go on with it that offers as much of what the driver uses, and the same disk.

Threads: as of every device; the connection is used with `_work` held. A new connection is made on a thread of its own, because
a handshake may take seconds, and becomes the device's on the loop.
"""

from __future__ import annotations

import os
import select
import time
from _thread import allocate_lock, start_new_thread

from stratovirt import log
from stratovirt.errors import GuestError, HostError
from stratovirt.loop import READ
from stratovirt.vhost._user import P_CONFIG, P_MQ
from stratovirt.vhost.user import BackendError
from stratovirt.virtio.device import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, VirtioDevice
from stratovirt.virtio.lost import outstanding

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from stratovirt.errors import StratoVirtError
    from stratovirt.loop import EventLoop
    from stratovirt.snapshot.saved import Saved
    from stratovirt.vhost.user import BackendSocket, VhostUser
    from stratovirt.virtio.queue import Chain, Virtqueue

LONGEST_PAUSE = 60.0  # seconds between attempts to have a back end that takes the connection and then fails

RETURN_SECONDS = 5.0  # how long a pause waits for requests that the back end has taken

_RING_FEATURES = 1 << F_VERSION_1 | 1 << F_INDIRECT_DESC | 1 << F_EVENT_IDX


class VhostUserDevice(VirtioDevice):
    """Base of the devices. `loop` is the device's own. `on_error` hears of failures.

    Raises: BackendError when there is none at the start, or one that lacks what it must have.
    """

    usable_features = 0
    """Bits that the back end may bring, beside those of the rings."""
    needed_config = 0
    """How much of the config space is the back end's."""
    wanted_protocol = 0
    """Features of the protocol that it uses if they are there."""
    shares_notifications = True
    waits_for_restore = True
    needed_queues = 1
    """What the back end must have, as it counts: queues, or pairs of them."""

    def __init__(self, backend: BackendSocket, queue_sizes: tuple[int, ...], loop: EventLoop,
                 on_error: Callable[[StratoVirtError], None] | None = None) -> None:
        super().__init__()
        self._work = self._lock = allocate_lock()
        self.queue_sizes = queue_sizes
        self._backend = backend
        self._loop = loop
        self._on_error = on_error
        self._paused = False
        self._served: list[int] = []  # the queues that the back end has now
        self._missing = 0  # requests that the back end had not returned when the last pause had waited for them
        self._orphaned = False  # a back end was lost that had the queues, and nobody has looked yet how they stand
        self._pause = backend.reconnect
        self._left = False
        connection = self._connect()
        self.features = connection.features & (_RING_FEATURES | self.usable_features)
        if self.needed_config:
            self.config = self.make_config(connection.read_config(self.needed_config))
        self._connection: VhostUser | None = connection
        self._call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._error_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        loop.add(self._call_fd, READ, self._on_call)
        loop.add(self._error_fd, READ, self._on_broken_ring)
        self._watch(connection)

    @property
    def chardev(self) -> str:
        """The id of the back end's character device."""
        return self._backend.id

    @property
    def provider(self) -> str:  # type: ignore[override]  # the base's is the same for all
        return f"the back end at {self._backend.path}"

    # -- the connection

    def _connect(self) -> VhostUser:
        """A connection to a back end that can do what this device needs. Raises: BackendError. Thread: any."""
        needed = self.needed_queues
        connection = self._backend.connect(
            (needed > 1) << P_MQ | bool(self.needed_config) << P_CONFIG | self.wanted_protocol)
        missing = ""
        if not connection.features >> F_VERSION_1 & 1:
            missing = "VIRTIO_F_VERSION_1"
        elif self.needed_config and not connection.protocol >> P_CONFIG & 1:
            missing = "VHOST_USER_PROTOCOL_F_CONFIG"
        elif connection.queues < needed:
            missing = f"{needed} queues: it has {connection.queues}"
        if missing:
            connection.close()
            raise BackendError(f"{connection.name} lacks {missing}")
        return connection

    def _watch(self, connection: VhostUser) -> None:
        """Only for the end of the connection: what comes over it otherwise are replies, and who waits for one reads it."""
        self._loop.add(connection.fd, 0, lambda _events: self._on_hangup(connection))

    def _on_hangup(self, connection: VhostUser) -> None:
        with self._work:
            if connection is self._connection:
                self._lose(BackendError(f"{connection.name} has closed the connection"))
        self._tell_driver()

    def _lose(self, error: HostError) -> None:
        """The back end is of no use any more. With `_work` held."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        self._report(error)
        self._loop.remove(connection.fd)
        connection.close()
        self._orphaned = self._orphaned or bool(self._served)
        self._served = []
        self.connection_changed(False)
        self.give_away(frozenset(), self._loop)
        self._take_over()
        if self._backend.reconnect:
            self._loop.call_soon(self._try_later)

    def _try_later(self) -> None:
        def attempt() -> None:
            if not self._left:
                start_new_thread(self._reconnect, ())

        self._loop.call_later(self._pause, attempt)
        self._pause = min(2 * self._pause, max(LONGEST_PAUSE, self._backend.reconnect))

    def _reconnect(self) -> None:
        """Thread: one for each attempt."""
        try:
            connection = self._connect()
            try:
                config = self.make_config(connection.read_config(self.needed_config)) if self.needed_config else self.config
            except BackendError:
                connection.close()
                raise
        except BackendError:
            # Nobody is there, which the log knows.
            self._pause = self._backend.reconnect
            self._loop.call_soon(self._try_later)
            return
        self._loop.call_soon(lambda: self._reconnected(connection, config))

    def _reconnected(self, connection: VhostUser, config: bytes) -> None:
        if self._left:
            connection.close()
            return
        missing = (self.driver_features if self.active else self.features) & ~connection.features & (
            _RING_FEATURES | self.usable_features)
        if missing:
            self._report(BackendError(f"{connection.name} is back and lacks features that it had: {missing:#x}"))
            connection.close()
            self._try_later()
            return
        changed = config != self.config
        with self._work:
            self._connection = connection
            self.config = config
            self._watch(connection)
            self.connection_changed(True)
            self._sync()
            connected = self._connection is not None
        if connected:
            log.info(f"{self.name}: {connection.name} is back")
        if changed and self.transport is not None:
            self.transport.notify_config()
        self._tell_driver()

    def check_features(self, negotiated: int, duties: int) -> None:
        """Can the back end serve a driver that has negotiated so much with another device? `duties`: beside those of the rings,
        features that bind the device. All others only allow it something. Raises: BackendError.
        """
        connection = self._connection
        missing = negotiated & (_RING_FEATURES | duties) & ~(connection.features if connection is not None else 0)
        if missing:
            raise BackendError(f"the back end at {self._backend.path} lacks features that the driver uses: {missing:#x}")

    def connection_changed(self, connected: bool) -> None:
        """For a device that shows it to the driver. Called with `_work` held."""

    def make_config(self, config: bytes) -> bytes:
        """The config space that the driver sees, out of the back end's."""
        return config

    # -- life cycle

    def activate(self, queues: list[Virtqueue | None]) -> None:
        super().activate(queues)
        with self._work:
            self._sync()

    def on_reset(self) -> None:
        self._sync()
        self._orphaned = False

    def pause(self) -> None:
        with self._work:
            self._paused = True
            self._sync()

    def resume(self) -> None:
        with self._work:
            self._paused = False
            self._sync()
        self._tell_driver()

    # -- snapshots

    def not_to_save(self) -> str:
        return "" if self._connection is not None else f"{self.provider} is not connected"

    def save(self) -> dict[str, object]:
        if self._connection is None:
            raise BackendError(f"{self.provider} is gone")
        if self._missing:
            raise BackendError(f"{self.provider} does not return {self._missing} requests")
        return {"features": self.features, "backend": self._backend.path}

    def lacks(self, features: int, state: Saved) -> int:
        """A driver that has negotiated with another device before this one may use more than the back end has ever offered."""
        return features & state.integer("features") & ~self.features

    def restore(self, state: Saved) -> None:
        state.text("backend", 4096)

    def on_leave(self) -> None:
        self._left = True
        self._sync()
        self._take_over()
        connection, self._connection = self._connection, None
        if connection is not None:
            self._loop.remove(connection.fd)
            connection.close()
        for fd in (self._call_fd, self._error_fd):
            self._loop.remove(fd)
            os.close(fd)

    def _sync(self) -> None:
        """Give the queues to whom they belong now. With `_work` held."""
        self._take_over()
        connection = self._connection
        wanted = self.active and not self._paused and self.is_wired and not self._left
        if connection is not None and bool(self._served) != wanted:
            try:
                if wanted:
                    self._start(connection)
                else:
                    self._stop(connection)
            except HostError as error:
                self._lose(error)
        self.give_away(frozenset(self._served), self._loop)

    @property
    def is_wired(self) -> bool:
        """False: the back end is not to have the queues for now, although it is there."""
        return True

    def _start(self, connection: VhostUser) -> None:
        transport = self.transport
        rings = {index: queue for index, queue in enumerate(self.queues) if queue is not None and self.is_backends(index)}
        if transport is not None and rings:
            self._served = list(rings)
            self.give_away(frozenset(rings), self._loop)  # before it reads their eventfds
            tracker = self._backend.memory.tracker
            if tracker is not None:
                tracker.lose(f"{connection.name} writes memory")
            connection.start(self.backend_features(), rings, transport.notify_fds, self._call_fd, self._error_fd)
            for index in rings:
                if self.is_enabled(index):
                    connection.enable(index, True)
            for index in rings:
                transport.requeue(index)  # what came before; a kick too many does no harm

    def is_backends(self, index: int) -> bool:
        """Is a queue one for the back end?"""
        return True

    def is_enabled(self, index: int) -> bool:
        """Does the driver use a queue that the back end has?"""
        return True

    def backend_features(self) -> int:
        """What the back end is told of the driver's choice."""
        return self.driver_features

    def _stop(self, connection: VhostUser) -> None:
        served = self._served
        positions = connection.stop(served)
        self._served = []
        stopped: list[Virtqueue] = []
        for index, position in positions.items():
            queue = self.queues[index] if index < len(self.queues) else None
            if queue is not None:  # not after a reset
                queue.seek(position)
                stopped.append(queue)
        self._missing = _wait_for_returns(stopped)

    # -- without a back end

    def _take_over(self) -> None:
        """Answer what a back end has left behind, unless the machine is to stand still. With `_work` held."""
        if not self._orphaned or not self.active or (self._paused and not self._left):
            return
        self._orphaned = False
        try:
            for index, queue in enumerate(self.queues):
                if queue is not None:
                    self.take_over(index, queue)
        except GuestError as error:
            self.active = False
            if self.transport is not None:
                self.transport.needs_reset(error)

    def take_over(self, index: int, queue: Virtqueue) -> None:
        """The back end of a queue is gone. Raises: GuestError when the queue cannot be followed."""
        for chain in queue.reclaim(outstanding):
            queue.push(chain.head, self.fail(index, chain))

    def fail(self, index: int, chain: Chain) -> int:
        """Answer a request with an error; how many bytes were written into it. Raises: GuestError."""
        raise NotImplementedError

    def take_notification(self, index: int) -> bool:
        """An eventfd has one reader. What is read here is lost for the back end, and qemu-storage-daemon gives up when it was
        woken for nothing. So the look whose it is, and the reading, are one.
        """
        if self.transport is None or not self._lock.acquire(False):
            return False  # it is just given away or taken back: if it comes here, it is there again in the next round
        try:
            if index in self.external_queues:
                return False
            os.eventfd_read(self.transport.notify_fds[index])
        except BlockingIOError:
            return False  # drained already
        finally:
            self._lock.release()
        return True

    def process(self, index: int) -> None:
        if self._connection is None or not self.is_wired:  # else the back end has it, or will get it with a kick of its own
            super().process(index)

    def ready(self, index: int) -> bool:
        return not self._paused and not self._served

    def handle(self, index: int, queue: Virtqueue, chain: Chain) -> int:
        return self.fail(index, chain)

    def _tell_driver(self) -> None:
        """The queues may have changed hands, and buffers may have been used without a word. Without `_work`."""
        transport = self.transport
        if transport is None or not self.active:
            return
        transport.notify_used()
        for index in range(len(self.queue_sizes)):
            transport.requeue(index)

    def _report(self, error: StratoVirtError) -> None:
        if self._on_error is not None:
            self._on_error(error)

    # -- what the back end tells, on the loop

    def _on_call(self, _events: int) -> None:
        os.eventfd_read(self._call_fd)
        self._pause = self._backend.reconnect  # it works
        if self.transport is not None:
            self.transport.notify_used()

    def _on_broken_ring(self, _events: int) -> None:
        os.eventfd_read(self._error_fd)
        with self._work:
            broken = bool(self._served)
            self.active = self.active and not broken
            self._sync()
        if broken and self.transport is not None:
            self.transport.needs_reset(GuestError(self.name, "a ring that the back end cannot follow", "VIRTIO 1.2, 2.7"))


def _wait_for_returns(queues: list[Virtqueue]) -> int:
    """Wait until all chains that were taken have been returned; how many are missing when there is no more time.

    Nothing tells of the last one: a back end that has stopped a ring signals nothing. A senseless ring is not waited for.
    """
    until = time.monotonic() + RETURN_SECONDS
    while True:
        missing = [(queue.position - queue.returned) & 0xFFFF for queue in queues]
        hopeless = any(count > queue.size for count, queue in zip(missing, queues, strict=True))
        if not any(missing) or hopeless or time.monotonic() > until:
            return sum(missing)
        select.poll().poll(1)
