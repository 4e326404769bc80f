"""Events: what happened to the machine, told to whoever asked to hear (QMP clients, above all)."""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Subscriber = Callable[[str, dict[str, object], int, int], None]


class EventHub:
    """Thread: the main loop's."""

    def __init__(self) -> None:
        self._subscribers: list[Subscriber] = []

    def subscribe(self, subscriber: Subscriber) -> None:
        """Call `subscriber(name, data, seconds, microseconds)` for every event from now on."""
        self._subscribers.append(subscriber)

    def unsubscribe(self, subscriber: Subscriber) -> None:
        self._subscribers = [other for other in self._subscribers if other != subscriber]

    def emit(self, name: str, data: dict[str, object] | None = None) -> None:
        seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        for subscriber in list(self._subscribers):
            subscriber(name, data or {}, seconds, nanoseconds // 1000)
