"""The CMOS clock of a PC (Motorola MC146818) as far as a kernel without ACPI needs it: the time of day.

Port 70 selects a register (bit 7 is the NMI mask), port 71 reads or writes it. Time registers follow the clock of the
machine, in UTC, BCD and 24 hours as register B says. There is no update in progress ever, no alarm and no interrupt: a
kernel that finds one register changing while it reads them reads again, as it must.
"""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from stratovirt.snapshot.saved import Saved

REGISTER_A, REGISTER_B, REGISTER_C, REGISTER_D, CENTURY = 0x0A, 0x0B, 0x0C, 0x0D, 0x32
_A_DIVIDER_AND_RATE = 0x26  # 32768 Hz time base, 1024 Hz rate, no update in progress
_B_24_HOURS = 0x02
_D_VALID_RAM_AND_TIME = 0x80
_SIZE = 128


def _bcd(value: int) -> int:
    return value // 10 << 4 | value % 10


class CmosRtc:
    """Offset 0 is the index port, 1 the data port. `now` gives seconds since 1970. Thread: any vCPU."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self.reset()

    def reset(self) -> None:
        self._index = 0
        self._ram = bytearray(_SIZE)
        self._ram[REGISTER_A] = _A_DIVIDER_AND_RATE
        self._ram[REGISTER_B] = _B_24_HOURS

    def save(self) -> dict[str, object]:
        """What a snapshot keeps: not the time of day, which is the host's."""
        return {"index": self._index, "ram": bytes(self._ram).hex()}

    def restore(self, state: Saved) -> None:
        """Take over what `save` gave. Raises: SnapshotError."""
        self._index = state.integer("index", 0, _SIZE - 1)
        self._ram[:] = state.data("ram", _SIZE)
        state.end()

    def read(self, offset: int, size: int) -> int:
        if size != 1 or offset == 0:
            return (1 << (8 * size)) - 1  # the index port is write-only
        return self._read_register(self._index)

    def _read_register(self, index: int) -> int:
        if index == REGISTER_C:
            return 0  # no interrupt is ever pending
        if index == REGISTER_D:
            return _D_VALID_RAM_AND_TIME
        if (index <= 9 and index not in (1, 3, 5)) or index == CENTURY:
            date = time.gmtime(self._now())
            fields = {0: date.tm_sec, 2: date.tm_min, 4: date.tm_hour, 6: (date.tm_wday + 1) % 7 + 1, 7: date.tm_mday,
                      8: date.tm_mon, 9: date.tm_year % 100, CENTURY: date.tm_year // 100}
            return _bcd(fields[index])
        return self._ram[index]

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 1:
            return
        if offset == 0:
            self._index = value & 0x7F
        elif self._index not in (REGISTER_A, REGISTER_B, REGISTER_C, REGISTER_D, CENTURY) and self._index > 9:
            self._ram[self._index] = value
