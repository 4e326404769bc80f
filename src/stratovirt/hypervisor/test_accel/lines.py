"""Interrupt lines that lead to whoever asks: an eventfd each, as KVM's irqfds are.

The lines of a microVM are edge-triggered: a device that triggers raises its line, and it stays so until `lower`. Nothing
raises it again but the next edge.
"""

from __future__ import annotations

import os


class InterruptLine:
    """Thread: `trigger` from any, the others from one."""

    __slots__ = ("_raised", "fd")

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._raised = False

    def trigger(self) -> None:
        os.eventfd_write(self.fd, 1)

    def set_level(self, high: bool) -> None:
        """A level-triggered device: the line is raised by its edge, and not lowered but by `lower`."""
        if high:
            self.trigger()

    def is_raised(self) -> bool:
        try:
            os.eventfd_read(self.fd)
            self._raised = True
        except BlockingIOError:
            return self._raised  # no edge since the last look
        return True

    def lower(self) -> bool:
        """Was it raised?"""
        raised = self.is_raised()
        self._raised = False
        return raised


class InterruptLines:
    """All lines of a machine by number. A number without a line is never raised."""

    def __init__(self) -> None:
        self._lines: dict[int, InterruptLine] = {}

    def connect(self, number: int) -> InterruptLine:
        return self._lines.setdefault(number, InterruptLine())

    def is_raised(self, number: int) -> bool:
        line = self._lines.get(number)
        return line is not None and line.is_raised()

    def lower(self, number: int) -> bool:
        line = self._lines.get(number)
        return line is not None and line.lower()

    def lower_all(self) -> None:
        for line in self._lines.values():
            line.lower()
