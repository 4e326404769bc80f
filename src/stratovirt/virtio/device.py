"""What every virtio device is, whatever carries it: identity, features, config space, queues and the work on them.

A device subclasses VirtioDevice, states its facts as class attributes, and implements `handle(queue_index, queue, chain)`.
The transport (mmio) speaks the register protocol; between the two lies this contract:

- The transport negotiates features and calls `activate(queues)` at DRIVER_OK and `reset()` when the driver resets.
- A queue notification becomes `process(index)` on the device's loop: chains are popped, handled, pushed, and the driver is
  interrupted once for the batch, if it asked for that.
- A GuestError breaks the device: it stops, and the transport sets DEVICE_NEEDS_RESET.

Threads: `process` runs on the device's loop; `activate` and `reset` on a vCPU thread. `_work` is the lock between them: the
loop holds it while it works on a queue, so a reset waits for the request in flight, which is what VIRTIO 1.2, 2.1.1 asks
for: after a reset the device touches no buffer. No other register access takes it.
"""

from __future__ import annotations

from _thread import allocate_lock

from stratovirt.errors import GuestError
from stratovirt.loop import READ

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Protocol

    from stratovirt.loop import EventLoop
    from stratovirt.snapshot.saved import Saved
    from stratovirt.virtio.queue import Chain, Virtqueue

    class Lock(Protocol):
        def __enter__(self) -> bool: ...

        def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
                     /) -> None: ...

    class Transport(Protocol):
        @property
        def notify_fds(self) -> list[int]:
            """The eventfd that each queue's notification arrives on."""

        @property
        def interrupt_fd(self) -> int:
            """The eventfd of the interrupt line, for somebody else who uses buffers: see `let_others_interrupt`."""

        def notify_used(self) -> None:
            """Interrupt the driver: buffers were used."""

        def notify_config(self) -> None:
            """Interrupt the driver: the config space changed."""

        def needs_reset(self, error: GuestError) -> None:
            """The device is broken until the driver resets it."""

        def on_notify(self, index: int) -> None:
            """A queue's notification has arrived on its eventfd."""

        def requeue(self, index: int) -> None:
            """Call `process(index)` again, after others had their turn."""


F_INDIRECT_DESC = 28
F_EVENT_IDX = 29
F_VERSION_1 = 32


class VirtioDevice:
    """Base of all virtio devices.

    `features` is a bit mask of what the device offers; `config` its config space, read by the driver, zero beyond its end.
    """

    device_id = 0
    name = "virtio"
    provider = "the device on this host"
    """Where its features come from, for messages."""
    queue_sizes: tuple[int, ...] = ()
    external_queues: frozenset[int] = frozenset()
    """Queues that somebody else serves (the kernel's vhost, another process): their notifications do not come here."""
    shares_notifications = False
    """Somebody else reads the eventfds of its queues at times: `take_notification` knows when they are this process's."""
    waits_for_restore = False
    """Somebody else begins to work as soon as it is told: at a restore it stays paused until all of the machine is restored."""
    interrupted_by_kernel = False
    """The kernel's vhost serves its queues, as a rule, and raises the interrupt line."""
    others_interrupt = False
    """Somebody else raises the interrupt line as well: whenever the driver asks, buffers may have been used."""

    def __init__(self) -> None:
        self.features = 1 << F_VERSION_1
        self.driver_features = 0
        self.config = b""
        self.queues: list[Virtqueue | None] = []
        self.active = False
        self.transport: Transport | None = None
        self._paused = False
        self._work: Lock = allocate_lock()

    # -- life cycle, called by the transport

    def activate(self, queues: list[Virtqueue | None]) -> None:
        """The driver is ready. Queues it did not set up are None."""
        with self._work:
            self.queues = queues
            self.active = True

    def reset(self) -> None:
        """Back to the state before any driver. No request is in flight when this returns."""
        with self._work:
            self.active = False
            self.queues = []
            self.driver_features = 0
            self.on_reset()

    def on_reset(self) -> None:
        """For a device with state of its own. Called with `_work` held."""

    def pause(self) -> None:
        """The machine stops. Nothing is on its way when this returns, and nothing is begun until `resume`."""

    def resume(self) -> None:
        """The machine goes on."""

    @property
    def is_paused(self) -> bool:
        """For a device that has to be paused at all."""
        return self._paused

    def hand_over(self) -> list[Virtqueue | None]:
        """Leave the slot to another device. The queues of a driver that is ready, [] without one: in them every chain that was
        taken has been returned, or is available again. What the device stands on is closed. Thread: the device's loop.
        """
        with self._work:
            self.on_leave()
            queues = self.queues if self.active else []
            self.active, self.queues = False, []
        return queues

    def on_leave(self) -> None:
        """For a device that takes chains, or has something to close. Called with `_work` held."""

    # -- snapshots, in a machine that stands still

    def outstanding(self) -> list[memoryview]:
        """Parts of RAM that it holds and may still write, although it was taken from its queue before this."""
        return []

    def not_to_save(self) -> str:
        """Why it cannot be in a snapshot at all, "" if it can. Called before anything else of one."""
        return ""

    def fetch_state(self, new_file: Callable[[], int]) -> None:
        """For a device with its state elsewhere: get it, by way of a file without a name, from `new_file`. Before `save`.

        Raises: HostError, SnapshotError.
        """

    def lacks(self, features: int, _state: Saved) -> int:
        """Of the driver's `features`, which are `state`'s, those that this device cannot go on with. Raises: SnapshotError."""
        return features & ~self.features

    def save(self) -> dict[str, object]:
        """What a snapshot keeps of it, beside what the transport has. Called after `pause`. Raises: HostError."""
        return {}

    def restore(self, state: Saved) -> None:
        """Take over what `save` gave. Called after `activate` if the driver is ready, else without. Raises: SnapshotError."""

    # -- config space

    def read_config(self, offset: int, size: int) -> int:
        return int.from_bytes(self.config[offset : offset + size], "little")

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Devices without writable fields ignore writes (VIRTIO 1.2, 2.5)."""

    # -- queue work, on the device's loop

    def give_away(self, queues: frozenset[int], loop: EventLoop) -> None:
        """From now on somebody else serves `queues`, and the notifications of all others come to their loops; `loop` is the
        device's own. Thread: any, with `_work` held.
        """
        transport = self.transport
        changed, self.external_queues = queues ^ self.external_queues, queues
        if transport is None:
            return
        for index in changed:
            fd, its_loop = transport.notify_fds[index], self.loop_of(index) or loop
            if index in queues:
                its_loop.remove(fd)
            else:
                its_loop.add(fd, READ, lambda _events, index=index: transport.on_notify(index))  # type: ignore[misc]

    def let_others_interrupt(self, others: bool) -> None:
        """True: before anybody else is told the transport's `interrupt_fd`. False: when nobody signals it any more.

        What was signalled last the driver may take for nothing, if it asks for the reason only after that. So it is told again.
        """
        before = self.others_interrupt
        if before and not others and self.active and self.transport is not None:
            self.transport.notify_used()
        self.others_interrupt = others

    def lock_of(self, index: int) -> Lock:
        """What is held for the work on a queue. A device whose queues are on several loops has one for each, and `_work` is
        all of them.
        """
        return self._work

    def loop_of(self, index: int) -> EventLoop | None:
        """The loop that a queue's notifications are for; None: the device's own."""
        return None

    def take_notification(self, index: int) -> bool:
        """Read the eventfd of a queue, if it is to be read here. For a device that `shares_notifications`."""
        raise NotImplementedError

    def process(self, index: int) -> None:
        """Work on a queue: at most one queue's worth of chains, so that no guest keeps the loop for itself."""
        transport = self.transport
        if transport is None:
            return
        with self.lock_of(index):
            queue = self.queues[index] if self.active and index < len(self.queues) else None
            if queue is None:
                return
            try:
                again = self._drain(index, queue)
                interrupt = queue.needs_interrupt()
            except GuestError as error:
                self.active = False
                transport.needs_reset(error)
                return
        if interrupt:
            transport.notify_used()
        if again:
            transport.requeue(index)

    def _drain(self, index: int, queue: Virtqueue) -> bool:
        """True: chains may be left, come again."""
        if not self.ready(index):
            return False  # and nothing was written, the rings' flags neither: the machine may be paused
        queue.disable_notifications()
        for _ in range(queue.size):
            if not self.ready(index):
                return False
            chain = queue.pop()
            if chain is None:
                if not queue.enable_notifications():
                    return False
                continue
            try:
                written = self.handle(index, queue, chain)
            except GuestError:
                queue.push(chain.head, 0)
                raise
            if written is not None:
                queue.push(chain.head, written)
        return True

    def ready(self, index: int) -> bool:
        """Can the next request be taken now? A device that says no calls `transport.requeue` when it can again."""
        return True

    def handle(self, index: int, queue: Virtqueue, chain: Chain) -> int | None:
        """Serve one request; returns how many bytes were written into it. Raises GuestError to break the device.

        None: it is on its way, and the device pushes it when it is finished.
        """
        raise NotImplementedError(f"{self.name} has no queue {index}")
