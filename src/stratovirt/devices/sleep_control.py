"""The sleep registers of hardware-reduced ACPI (ACPI 6.4, 4.8.3.7): how a guest powers itself off.

Offset 0 is SLEEP_CONTROL, 1 SLEEP_STATUS. A write with SLP_EN (bit 5) and the sleep type of \\_S5 in bits 2-4 is power-off.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SLEEP_ENABLE = 1 << 5
SLEEP_TYPE_S5 = 5


class SleepControl:
    """`on_power_off` is called when the guest enters S5. Thread: any vCPU."""

    __slots__ = ("_on_power_off",)

    def __init__(self, on_power_off: Callable[[], None]) -> None:
        self._on_power_off = on_power_off

    def read(self, offset: int, size: int) -> int:
        return 0  # not waking from anything

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0 and value & SLEEP_ENABLE and value >> 2 & 7 == SLEEP_TYPE_S5:
            self._on_power_off()
