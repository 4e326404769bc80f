"""aio=threads: requests are carried out by at most ten threads, which are started as requests pile up.

The kernel's engines build on this one: what their interface cannot do, or did only in part, a thread finishes.
"""

from __future__ import annotations

import os
from _queue import SimpleQueue
from _thread import allocate_lock, start_new_thread

from stratovirt.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.backends.block import BlockRequest, RawImage

MAX_WORKERS = 10


class ThreadEngine:
    """`in_flight` requests were submitted and not yet reaped.

    Thread: one at a time for everything public; the owner's lock sees to that.
    """

    name = "threads"

    def __init__(self, image: RawImage) -> None:
        self.image = image
        self.in_flight = 0
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._jobs: SimpleQueue[BlockRequest | None] = SimpleQueue()
        self._lock = allocate_lock()  # over what workers share: the three below, and `fd` being open
        self._finished: list[BlockRequest] = []
        self._unfinished = 0
        self._workers = 0

    def submit(self, request: BlockRequest) -> None:
        """Take a request; it may wait for `kick` to begin."""
        self.in_flight += 1
        self.hand_over(request)

    def kick(self) -> bool:
        """Begin everything that was submitted. True: some of it has ended by then, and may be reaped at once."""
        return False

    def reap(self) -> list[BlockRequest]:
        """The requests that are finished, each once. Does not wait."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            pass  # nothing new; an earlier call may have taken what this wake-up was for
        with self._lock:
            finished, self._finished = self._finished, []
        self.in_flight -= len(finished)
        return finished

    def close(self) -> None:
        """Give everything back. Requests still in flight go on, and keep what they use, but nobody hears of their end."""
        with self._lock:
            for _ in range(self._workers):
                self._jobs.put(None)
            os.close(self.fd)
            self.fd = -1

    # -- workers

    def hand_over(self, request: BlockRequest) -> None:
        """Let a thread carry it out."""
        with self._lock:
            self._unfinished += 1
            start = self._workers < min(self._unfinished, MAX_WORKERS)
            if start:
                self._workers += 1
        self._jobs.put(request)
        if start:
            start_new_thread(self._work, ())

    def _work(self) -> None:
        while True:
            request = self._jobs.get()
            if request is None:
                return
            error: HostError | None = HostError("a worker thread ended in the middle of a request")
            try:
                self.image.perform(request)
                error = None
            except HostError as failure:
                error = failure
            finally:
                request.error = error
                with self._lock:
                    self._unfinished -= 1
                    self._finished.append(request)
                    if len(self._finished) == 1 and self.fd >= 0:
                        os.eventfd_write(self.fd, 1)
