"""Who answers at an address: the map that vCPU exits for MMIO and port I/O go through.

A device claims a range; an access inside it becomes `device.read(offset, size)` or `device.write(offset, size, value)`
with the offset from the start of the range. Accesses that no device claims, or that run past the end of a range, read as
all ones and write nowhere, as an empty ISA or PCI bus answers.
"""

from __future__ import annotations

from _bisect import bisect_right
from _bisect import insort_right as insort

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class IoDevice(Protocol):
        """Anything with registers. Thread: called on vCPU threads, several at once."""

        def read(self, offset: int, size: int) -> int:
            """The value of the register, zero-extended. `size` is 1, 2, 4 or 8 bytes."""

        def write(self, offset: int, size: int, value: int) -> None:
            """Store `value`, which is below 2**(8 * size)."""


class AddressMap:
    """A sorted set of non-overlapping ranges, each owned by one device.

    Thread: built by one thread before vCPUs run; `claim` and `release` replace the tables, so lookups need no lock.
    """

    def __init__(self) -> None:
        self._bases: list[int] = []
        self._ranges: dict[int, tuple[int, IoDevice]] = {}

    def claim(self, base: int, size: int, device: IoDevice) -> None:
        """Give [base, base + size) to `device`. Raises ValueError when part of it is taken."""
        bases = list(self._bases)
        index = bisect_right(bases, base)
        if index and bases[index - 1] + self._ranges[bases[index - 1]][0] > base:
            raise ValueError(f"{base:#x} is inside the range at {bases[index - 1]:#x}")
        if index < len(bases) and base + size > bases[index]:
            raise ValueError(f"[{base:#x}, +{size:#x}) runs into the range at {bases[index]:#x}")
        insort(bases, base)
        self._ranges = {**self._ranges, base: (size, device)}
        self._bases = bases

    def release(self, base: int) -> None:
        """Take back the range that starts at `base`."""
        self._bases = [other for other in self._bases if other != base]
        self._ranges = {other: entry for other, entry in self._ranges.items() if other != base}

    def find(self, address: int, size: int) -> tuple[IoDevice, int] | None:
        """The device that owns all of [address, address + size), and the offset in its range."""
        bases = self._bases
        index = bisect_right(bases, address)
        if index:
            base = bases[index - 1]
            entry = self._ranges.get(base)
            if entry is not None and address + size <= base + entry[0]:
                return entry[1], address - base
        return None

    def read(self, address: int, size: int) -> int:
        found = self.find(address, size)
        if found is None:
            return (1 << (8 * size)) - 1
        return found[0].read(found[1], size)

    def write(self, address: int, size: int, value: int) -> None:
        found = self.find(address, size)
        if found is not None:
            found[0].write(found[1], size, value)
