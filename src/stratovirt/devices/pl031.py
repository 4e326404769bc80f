"""The PL031 real-time clock: seconds since 1970, counted on from wherever the guest sets it.

Layout, 32-bit registers:
    000  RTCDR   r   the clock                 010  RTCIMSC  rw  interrupt mask
    004  RTCMR   rw  alarm                     014  RTCRIS   r   raw interrupt
    008  RTCLR   rw  sets the clock            018  RTCMIS   r   masked interrupt
    00C  RTCCR   rw  bit 0: running, always    01C  RTCICR   w   clears the interrupt
    FE0-FFC      r   identification, a byte each

The alarm is compared with the clock when one of the registers is used, and by a timer of the loop.
Spec: Arm PrimeCell Real Time Clock (PL031) Technical Reference Manual, DDI 0224, chapter 3. Thread: any vCPU.
"""

from __future__ import annotations

import time
from _thread import allocate_lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from stratovirt.snapshot.saved import Saved

    class LevelLine(Protocol):
        def set_level(self, high: bool) -> None: ...


DR, MR, LR, CR, IMSC, RIS, MIS, ICR = range(0x00, 0x20, 4)
_ID = 0xFE0
IDENTIFICATION = (0x31, 0x10, 0x04, 0x00, 0x0D, 0xF0, 0x05, 0xB1)
_MASK = 0xFFFF_FFFF


class Pl031:
    """`now` gives seconds since 1970. `set_alarm(seconds)` asks for a call of `check_alarm` after so many."""

    def __init__(self, irq: LevelLine, now: Callable[[], float] = time.time,
                 set_alarm: Callable[[float], None] | None = None) -> None:
        self._irq = irq
        self._now = now
        self._set_alarm = set_alarm
        self._lock = allocate_lock()
        self._power_on()

    def _power_on(self) -> None:
        self._offset = 0  # of the guest's clock from the machine's
        self._match = 0
        self._armed = False
        self._load = 0
        self._mask = 0
        self._raised = False
        self._output = False

    def read(self, offset: int, size: int) -> int:
        if offset >= _ID:
            index = (offset - _ID) >> 2
            return IDENTIFICATION[index] if offset & 3 == 0 and index < len(IDENTIFICATION) else 0
        with self._lock:
            self._compare()
            values = {DR: self._clock(), MR: self._match, LR: self._load, CR: 1, IMSC: self._mask, RIS: int(self._raised),
                      MIS: int(self._raised and self._mask)}
            value = values.get(offset, 0)
        self._update()
        return value & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 4:
            return
        wait = None
        with self._lock:
            if offset == MR:
                self._match, self._armed = value, True
                wait = (value - self._clock()) & _MASK
            elif offset == LR:
                self._load = value
                self._offset = value - int(self._now())
                wait = (self._match - self._clock()) & _MASK if self._armed else None
            elif offset == IMSC:
                self._mask = value & 1
            elif offset == ICR and value & 1:
                self._raised = False
            self._compare()
        self._update()
        self._ask(wait)

    def check_alarm(self) -> None:
        """The time that was asked for with `set_alarm` has passed, or nearly: two clocks never run alike."""
        with self._lock:
            self._compare()
            wait = (self._match - self._clock()) & _MASK if self._armed else None
        self._update()
        self._ask(wait)

    def _ask(self, wait: int | None) -> None:
        # An alarm further away than a year is one in the past, as far as anybody can tell.
        if wait is not None and wait < 366 * 86400 and self._set_alarm is not None:
            self._set_alarm(float(wait))

    def _clock(self) -> int:
        return (int(self._now()) + self._offset) & _MASK

    def _compare(self) -> None:
        if self._armed and (self._clock() - self._match) & _MASK < 1 << 31:
            self._armed = False
            self._raised = True

    def _update(self) -> None:
        with self._lock:
            output = bool(self._raised and self._mask)
            changed, self._output = output != self._output, output
        if changed:
            self._irq.set_level(output)

    def reset(self) -> None:
        with self._lock:
            self._power_on()
        self._irq.set_level(False)

    def save(self) -> dict[str, object]:
        """What a snapshot keeps: how far the clock is from the host's, not the time of day."""
        with self._lock:
            return {"offset": self._offset & _MASK, "match": self._match, "armed": self._armed, "load": self._load,
                    "mask": self._mask, "raised": self._raised}

    def restore(self, state: Saved) -> None:
        """Take over what `save` gave. Raises: SnapshotError; nothing is changed then."""
        offset, match, load = (state.integer(name, 0, _MASK) for name in ("offset", "match", "load"))
        mask, armed, raised = state.integer("mask", 0, 1), state.boolean("armed"), state.boolean("raised")
        state.end()
        with self._lock:
            self._offset, self._match, self._load, self._mask = offset, match, load, mask
            self._armed, self._raised = armed, raised
            self._compare()
            self._output = bool(self._raised and self._mask)
            self._irq.set_level(self._output)
        self.check_alarm()
