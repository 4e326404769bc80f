"""The event loop: readiness of file descriptors, timers, and calls handed over from other threads.

Facts about epoll that the code below rests on: a registration belongs to the open file description, not to the number,
so a descriptor must be removed before it is closed; regular files cannot be registered (EPERM); EPOLLHUP and EPOLLERR are
always reported, asked for or not. Registrations here are level-triggered.

One loop runs on the main thread; each iothread has its own. Only `call_soon` may be used from other threads.
"""

from __future__ import annotations

import posix
import select
import time
from _bisect import insort_right as insort  # the half of `bisect` that is part of the interpreter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class Clock(Protocol):
        def __call__(self) -> float:
            """Seconds on a clock that never goes back."""


READ = select.EPOLLIN
WRITE = select.EPOLLOUT
HANGUP = select.EPOLLHUP
ERROR = select.EPOLLERR

_LONGEST_WAIT = 86400.0  # epoll counts milliseconds in an int: a wait of more than 24 days would be an error


class Timer:
    """A call at a deadline. `cancel` is idempotent and may be called from the timer's own callback."""

    __slots__ = ("callback", "deadline")

    def __init__(self, deadline: float, callback: Callable[[], None]) -> None:
        self.deadline = deadline
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None

    def __lt__(self, other: Timer) -> bool:
        return self.deadline < other.deadline


class EventLoop:
    """An epoll loop.

    Thread: the owner's, but for `call_soon` and `stop`, which any thread may call.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self.clock = clock
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._timers: list[Timer] = []
        self._calls: list[Callable[[], None]] = []
        self._wake_fd = posix.eventfd(0, posix.EFD_NONBLOCK | posix.EFD_CLOEXEC)
        self._stopping = False
        self.add(self._wake_fd, READ, self._drain_wake_fd)

    # -- file descriptors

    def add(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Call `handler(ready_events)` whenever `fd` is ready. Raises PermissionError for a regular file."""
        self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def modify(self, fd: int, events: int) -> None:
        """Change what is waited for; 0 leaves only hang-ups and errors."""
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Forget `fd`. Call it before closing; unknown descriptors are ignored."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    # -- time

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Call once, `delay` seconds from now."""
        timer = Timer(self.clock() + delay, callback)
        insort(self._timers, timer)
        return timer

    def _run_timers(self) -> None:
        now = self.clock()
        while self._timers and self._timers[0].deadline <= now:
            callback = self._timers.pop(0).callback
            if callback is not None:
                callback()

    def _wait_time(self) -> float:
        while self._timers and self._timers[0].callback is None:
            self._timers.pop(0)
        if not self._timers:
            return -1.0
        return min(max(0.0, self._timers[0].deadline - self.clock()), _LONGEST_WAIT)

    # -- other threads

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call on the loop's thread, in the order of the requests. Thread: any."""
        self._calls.append(callback)
        posix.eventfd_write(self._wake_fd, 1)

    def _drain_wake_fd(self, _events: int) -> None:
        posix.eventfd_read(self._wake_fd)
        for _ in range(len(self._calls)):  # what the callbacks hand over themselves waits for the next round
            self._calls.pop(0)()
        if self._calls:
            posix.eventfd_write(self._wake_fd, 1)

    # -- running

    def run(self) -> None:
        """Serve until `stop`, which may have come before."""
        while not self._stopping:
            self.run_once()

    def run_once(self, timeout: float | None = None) -> None:
        """Wait for one round of events, at most `timeout` seconds, and serve it. Tests step a loop with it."""
        wait = self._wait_time()
        if timeout is not None:
            wait = timeout if wait < 0 else min(wait, timeout)
        for fd, events in self._epoll.poll(wait):
            handler = self._handlers.get(fd)
            if handler is not None:
                handler(events)
        self._run_timers()

    def stop(self) -> None:
        """Make `run` return after the current round."""
        self._stopping = True
        posix.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        self._handlers.clear()
        self._epoll.close()
        posix.close(self._wake_fd)
