"""virtio-rng (VIRTIO 1.2, 5.4): random bytes for the guest. One queue; the driver supplies writable buffers.

With `max-bytes` and `period` the guest gets at most that many bytes a period: a bucket that fills steadily and from which
every request takes. An empty bucket leaves requests in the queue until a timer finds it filled again. A source that has
nothing at the moment keeps its request waiting likewise: a buffer goes back with at least one byte (5.4.6.1), and Linux
would take an empty one for the end of the device.
"""

from __future__ import annotations

from stratovirt.backends.rng import RandomSource
from stratovirt.errors import HostError
from stratovirt.loop import EventLoop
from stratovirt.virtio.device import VirtioDevice
from stratovirt.virtio.queue import Chain, Virtqueue, split

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from stratovirt.loop import Timer

MAX_REQUEST = 1 << 20  # the guest picks the length; more than this is not read in one go
_RETRY_SECONDS = 0.01


class VirtioRng(VirtioDevice):
    """`rate` in bytes a second, None for no limit."""

    device_id = 4
    name = "virtio-rng"
    queue_sizes = (256,)

    def __init__(self, source: RandomSource, loop: EventLoop, rate: float | None = None,
                 on_error: Callable[[HostError], None] | None = None) -> None:
        super().__init__()
        self.source = source
        self._loop = loop
        self._rate = rate
        self._on_error = on_error
        self._tokens = self._capacity = rate or 0.0  # bytes; the bucket holds one second
        self._filled_at = loop.clock()
        self._timer: Timer | None = None
        self._dry = False
        self._waiting: Chain | None = None  # popped, but there were no bytes for it

    def ready(self, index: int) -> bool:
        if self._dry or not self._fill():
            self._come_back(index)
            return False
        queue = self.queues[index]
        if self._waiting is None or queue is None:
            return True
        written = self._serve(self._waiting)
        if written:
            queue.push(self._waiting.head, written)
            self._waiting = None
        return self.ready(index)

    def _fill(self) -> bool:
        """May at least one byte be given now?"""
        if self._rate is None:
            return True
        now = self._loop.clock()
        self._tokens = min(self._capacity, self._tokens + (now - self._filled_at) * self._rate)
        self._filled_at = now
        return self._tokens >= 1.0

    def _come_back(self, index: int) -> None:
        if self._timer is not None:
            return
        delay = max(_RETRY_SECONDS, (1.0 - self._tokens) / self._rate if self._rate else 0.0)

        def fire() -> None:
            self._timer = None
            self._dry = False
            if self.transport is not None:
                self.transport.requeue(index)

        self._timer = self._loop.call_later(delay, fire)

    def outstanding(self) -> list[memoryview]:
        return self._waiting.writable if self._waiting is not None else []

    def handle(self, index: int, queue: Virtqueue, chain: Chain) -> int | None:
        written = self._serve(chain)
        if self._dry:
            self._waiting = chain
            return None
        return written

    def _serve(self, chain: Chain) -> int:
        """Fill in what the rate allows and the source has: 0 and `_dry` when it has nothing, or failed."""
        limit = min(chain.writable_length, MAX_REQUEST)
        if self._rate is not None:
            limit = min(limit, int(self._tokens))
        views, _ = split(chain.writable, limit)
        written = 0
        if views:
            try:
                written = self.source.read_into(views)
            except HostError as error:
                if self._on_error is not None:
                    self._on_error(error)
                written = 0
            self._dry = written == 0  # do not spin on it
        if self._rate is not None:
            self._tokens -= written
        return written

    def on_reset(self) -> None:
        self._dry = False
        self._waiting = None
