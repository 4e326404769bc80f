"""Time that stands still until it is told to move, and event loops whose devices live by it.

Only what a guest can notice follows the virtual clock: the timers and clocks of devices. Sockets, terminals and QMP have their
timers on the same loops and in the host's time, because those who sit at the other end do.
"""

from __future__ import annotations

from stratovirt.loop import EventLoop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

NS_PER_SECOND = 1_000_000_000
LATEST = (1 << 63) - 1
_MAX_STOPS = 10_000  # on the way of one advance; what is due after so many is run late, at its end


class DeviceLoop(EventLoop):
    """The loop `inner` as its devices see it: descriptors and calls are the inner loop's, timers follow `clock`.

    `call` runs a function on the inner loop's thread and waits for it; the virtual clock runs due timers that way.
    """

    def __init__(self, inner: EventLoop, clock: Callable[[], float], call: Callable[[Callable[[], None]], None]) -> None:
        # The base is not initialized: an epoll of its own is what this loop must not have.
        self.clock = clock
        self.call = call
        self._inner = inner
        self._timers = []

    def add(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        self._inner.add(fd, events, handler)

    def modify(self, fd: int, events: int) -> None:
        self._inner.modify(fd, events)

    def remove(self, fd: int) -> None:
        self._inner.remove(fd)

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._inner.call_soon(callback)

    def run(self) -> None:
        self._inner.run()

    def run_once(self, timeout: float | None = None) -> None:
        self._inner.run_once(timeout)

    def stop(self) -> None:
        self._inner.stop()

    def close(self) -> None:
        self._inner.close()

    def next_deadline(self) -> float | None:
        """In seconds; None without a timer."""
        while self._timers and self._timers[0].callback is None:
            self._timers.pop(0)
        return self._timers[0].deadline if self._timers else None

    def run_due(self) -> None:
        """Run the timers whose time has come, in order."""
        self._run_timers()


class VirtualClock:
    """Units: nanoseconds, from 0. Thread: one moves it, any may read it."""

    def __init__(self) -> None:
        self.ns = 0
        self._loops: list[DeviceLoop] = []

    def seconds(self) -> float:
        return self.ns / NS_PER_SECOND

    def device_loop(self, loop: EventLoop, call: Callable[[Callable[[], None]], None]) -> DeviceLoop:
        follower = DeviceLoop(loop, self.seconds, call)
        self._loops.append(follower)
        return follower

    def next_deadline(self) -> int | None:
        """The earliest of all loops; it may have passed already. Raises: StateError when a loop is stuck."""
        found: list[float] = []

        def look(loop: DeviceLoop) -> None:
            deadline = loop.next_deadline()
            if deadline is not None:
                found.append(deadline)

        for loop in self._loops:
            loop.call(lambda loop=loop: look(loop))  # type: ignore[misc]
        if not found:
            return None
        # The first nanosecond of which `seconds` makes nothing before the deadline.
        deadline = min(found)
        numerator, denominator = deadline.as_integer_ratio()
        ns = numerator * NS_PER_SECOND // denominator
        return ns if ns / NS_PER_SECOND >= deadline else ns + 1

    def advance(self, target: int) -> None:
        """Go to `target`, which is not in the past, and run the timers on the way, each at its time.

        Raises: StateError when a loop is stuck.
        """
        for _ in range(_MAX_STOPS):
            deadline = self.next_deadline()
            if deadline is None or deadline > target:
                break
            self.ns = max(self.ns, deadline)
            self._run_due()
        self.ns = target
        self._run_due()

    def _run_due(self) -> None:
        for loop in self._loops:
            loop.call(loop.run_due)
