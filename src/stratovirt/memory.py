"""Guest RAM: the one gate that every guest-chosen address goes through.

RAM is one or two regions (x86 splits it around the hole below 4 GiB), each one host mapping and one KVM memory slot.
`GuestMemory.slice` turns a guest-physical range into a writable memoryview of that RAM, or raises GuestError; devices
hand such views to `preadv`/`pwritev`, so that data moves between RAM and files without passing through Python.

Ring indices and descriptors are read with `load_u16` and friends: one aligned machine access each, never byte by byte,
so a vCPU that writes at the same moment is seen before or after, not in between. What is read is a copy; check the copy.
"""

from __future__ import annotations

from stratovirt.errors import GuestError
from stratovirt.hostmap import HostMapping

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Tracker(Protocol):
        """Counts which pages are written (`snapshot/dirty.py`). Thread: any."""

        def writable(self, address: int, length: int) -> memoryview: ...

        def mark(self, address: int, length: int) -> None: ...

        def lose(self, why: str) -> None: ...

        @property
        def vhost_log(self) -> int: ...


class RamRegion:
    """One contiguous run of RAM: `base` .. `base + size` in guest-physical addresses, `host` behind it.

    `fd` and `fd_offset` are the file behind it, to be passed to a process that shall see it too when `shared` is true;
    `fd` is -1 for anonymous memory.
    """

    __slots__ = ("base", "end", "fd", "fd_offset", "host", "shared", "size", "u8", "u16", "u32", "u64")

    def __init__(self, base: int, host: HostMapping) -> None:
        self.base = base
        self.size = host.size
        self.end = base + host.size
        self.host = host
        self.fd = host.fd
        self.fd_offset = host.file_offset
        self.shared = host.shared
        self.u8 = host.view
        self.u16 = host.view.cast("H")
        self.u32 = host.view.cast("I")
        self.u64 = host.view.cast("Q")


class GuestMemory:
    """All RAM of a machine.

    Thread: any. Raises: GuestError from every access that is not wholly inside one region of RAM. `last` is the region that
    was found last: where the next address lies, too, as a rule.
    """

    def __init__(self, regions: list[RamRegion]) -> None:
        self.regions = regions
        self.last = regions[0]
        self.size = sum(region.size for region in regions)
        self.tracker: Tracker | None = None
        self.writable = self.slice
        """`slice`, for somebody who is going to write there: every write of this process, or of others through the view, comes
        this way or is told to the `tracker`.
        """
        self.shared = regions[0].shared  # one file, or none, is behind all of them
        self.page_size = regions[0].host.page_size

    def region(self, address: int, length: int) -> RamRegion:
        """The region that holds all of [address, address + length)."""
        last = self.last
        if last.base <= address and address + length <= last.end and length >= 0:
            return last
        for region in self.regions:
            if region.base <= address and address + length <= region.end and length >= 0:
                self.last = region
                return region
        raise GuestError("memory", f"[{address:#x}, +{length:#x}) is not RAM")

    def track(self, tracker: Tracker | None) -> None:
        """Let `tracker` know from now on what is written, or nobody."""
        self.tracker = tracker
        self.writable = self.slice if tracker is None else tracker.writable

    def slice(self, address: int, length: int) -> memoryview:
        """Guest RAM at [address, address + length) as a writable view: no copy."""
        region = self.last  # `region` once more: a call less for each descriptor
        if address < region.base or address + length > region.end or length < 0:
            region = self.region(address, length)
        start = address - region.base
        return region.u8[start : start + length]

    def read(self, address: int, length: int) -> bytes:
        """A copy of guest RAM, taken once."""
        return bytes(self.slice(address, length))

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        self.writable(address, len(data))[:] = data

    def load_u16(self, address: int) -> int:
        region = self.region(address, 2)
        if address & 1:
            raise GuestError("memory", f"{address:#x} is not 2-byte aligned")
        return region.u16[(address - region.base) >> 1]

    def store_u16(self, address: int, value: int) -> None:
        region = self.region(address, 2)
        if address & 1:
            raise GuestError("memory", f"{address:#x} is not 2-byte aligned")
        region.u16[(address - region.base) >> 1] = value
        if self.tracker is not None:
            self.tracker.mark(address, 2)

    def load_u32(self, address: int) -> int:
        region = self.region(address, 4)
        if address & 3:
            raise GuestError("memory", f"{address:#x} is not 4-byte aligned")
        return region.u32[(address - region.base) >> 2]

    def store_u32(self, address: int, value: int) -> None:
        region = self.region(address, 4)
        if address & 3:
            raise GuestError("memory", f"{address:#x} is not 4-byte aligned")
        region.u32[(address - region.base) >> 2] = value
        if self.tracker is not None:
            self.tracker.mark(address, 4)

    def load_u64(self, address: int) -> int:
        region = self.region(address, 8)
        if address & 7:
            raise GuestError("memory", f"{address:#x} is not 8-byte aligned")
        return region.u64[(address - region.base) >> 3]

    def store_u64(self, address: int, value: int) -> None:
        region = self.region(address, 8)
        if address & 7:
            raise GuestError("memory", f"{address:#x} is not 8-byte aligned")
        region.u64[(address - region.base) >> 3] = value
        if self.tracker is not None:
            self.tracker.mark(address, 8)
