"""`throttling.iops-total`: a leaky bucket that limits requests a second."""

from __future__ import annotations

BURST_SECONDS = 0.1


class LeakyBucket:
    """Each request pours one unit in; `rate` units a second leak out; a tenth of a second's worth fits.

    So requests come evenly, and a guest that was idle has a burst of a tenth of its second at most. Units: seconds on the
    caller's clock. Not locked.
    """

    __slots__ = ("_capacity", "_level", "_rate", "_seen")

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._capacity = max(1.0, rate * BURST_SECONDS)
        self._level = 0.0
        self._seen = 0.0

    def delay(self, now: float) -> float:
        """Seconds until the next request may come; 0.0 if it may now."""
        self._level = max(0.0, self._level - (now - self._seen) * self._rate)
        self._seen = now
        overflow = self._level + 1.0 - self._capacity
        # what rounding leaves over is not worth a timer
        return overflow / self._rate if overflow > 1e-6 else 0.0

    def pour(self) -> None:
        """A request came."""
        self._level += 1.0
