"""Which pages of memory differ from a snapshot's: by looking at all of it.

It takes as long as reading the memory does, needs no preparation and overlooks nothing, whoever has written. Where the kernel
has counted what is written (`dirty.py`), only a part has to be written and nothing compared.
"""

from __future__ import annotations

from stratovirt.hostmap import differing_pages
from stratovirt.snapshot.chain import PAGE, Chain, Reader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.memory import RamRegion
    from stratovirt.snapshot.chain import Ranges

_STEP = 1 << 20


def from_memory(chain: Chain, regions: list[RamRegion]) -> Ranges:
    """The ranges of the memory file in which RAM is no longer what `chain` has. Raises: SnapshotError.

    Thread: main, while nothing of the guest runs.
    """
    reader, buffer = Reader(chain), memoryview(bytearray(_STEP))
    found = _Found()
    offset = 0
    for region in regions:
        for start in range(0, region.size, _STEP):
            part = buffer[: min(_STEP, region.size - start)]
            reader.read(part, offset + start)
            found.add(offset + start, differing_pages(region.u8[start : start + len(part)], part, PAGE))
        offset += region.size
    return found.ranges


def between(one: Chain, other: Chain) -> Ranges:
    """The ranges in which two snapshots of machines of one size differ. Raises: SnapshotError."""
    readers = Reader(one), Reader(other)
    buffers = memoryview(bytearray(_STEP)), memoryview(bytearray(_STEP))
    found = _Found()
    for start in range(0, one.size, _STEP):
        parts = [buffer[: min(_STEP, one.size - start)] for buffer in buffers]
        for reader, part in zip(readers, parts, strict=True):
            reader.read(part, start)
        found.add(start, differing_pages(parts[0], parts[1], PAGE))
    return found.ranges


class _Found:
    """Pages, joined to ranges."""

    def __init__(self) -> None:
        self.ranges: Ranges = []

    def add(self, start: int, pages: list[int]) -> None:
        ranges = self.ranges
        for page in pages:
            at = start + page
            if ranges and ranges[-1][1] == at:
                ranges[-1] = (ranges[-1][0], at + PAGE)
            else:
                ranges.append((at, at + PAGE))
