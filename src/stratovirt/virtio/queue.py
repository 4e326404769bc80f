"""The split virtqueue: where a guest's rings become chains of buffers, and nowhere else.

Layout (VIRTIO 1.2, 2.7), all little-endian:
    descriptor table   16 bytes each: u64 addr, u32 len, u16 flags, u16 next
    available ring     u16 flags, u16 idx, u16 ring[size], u16 used_event
    used ring          u16 flags, u16 idx, {u32 id, u32 len} ring[size], u16 avail_event

The rings are shared with vCPUs that run while this code does. So an index is one aligned 16-bit access, a descriptor is
copied out once and then judged, and the order matters: entries are read after the index that announces them and written
before the index that publishes them. x86 keeps loads in order and stores in order; what it may reorder is a store with a
later load, which the two "publish, then look whether the other side wants to know" steps depend on: `_full_barrier`.
arm64 keeps none of it in order: there `Virtqueue` is `OrderedVirtqueue`, with a barrier between index and entries as well.

A head that was popped is returned to the guest exactly once: by `push`, or by `pop` itself when its chain is malformed.
"""

from __future__ import annotations

import struct
from _thread import allocate_lock

from stratovirt.errors import GuestError
from stratovirt.hostmap import ARCHITECTURE
from stratovirt.native import compiled

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from stratovirt.memory import GuestMemory
    from stratovirt.native._native import Ring

    Outstanding: TypeAlias = Callable[[int, int, int, Callable[[int], int], Callable[[int], int]], list[int]]

DESC_F_NEXT = 1
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4
AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1

DESC_SIZE = 16
MAX_CHAIN_BYTES = 1 << 32
MAX_REGIONS = 8  # of RAM, that compiled code keeps

_DESCRIPTOR = struct.Struct("<QIHH")
_THREE = struct.Struct("<QIHHQIHHQIHH")
_THREE_SIZE = _THREE.size
_USED_ELEMENT = struct.Struct("<II")

_WEAKLY_ORDERED = ARCHITECTURE != "x86_64"
_fence = allocate_lock()

if not TYPE_CHECKING and compiled is not None and not _WEAKLY_ORDERED:
    _full_barrier = compiled.full_barrier
elif TYPE_CHECKING or not _WEAKLY_ORDERED:

    def _full_barrier() -> None:
        """Order earlier stores before later loads: taking a lock is an atomic read-modify-write, a full barrier on x86."""
        _fence.acquire()
        _fence.release()
else:
    from stratovirt.barrier import create

    _full_barrier = create()


class Chain:
    """A popped descriptor chain: views of guest RAM, in order.

    `readable` is what the driver wrote for the device, `writable` where the device answers; lengths in bytes.
    """

    __slots__ = ("head", "readable", "readable_length", "writable", "writable_length")

    def __init__(self, head: int, readable: list[memoryview], readable_length: int, writable: list[memoryview],
                 writable_length: int) -> None:
        self.head = head
        self.readable = readable
        self.readable_length = readable_length
        self.writable = writable
        self.writable_length = writable_length


def split(views: list[memoryview], length: int) -> tuple[list[memoryview], list[memoryview]]:
    """The first `length` bytes of a list of views, and the rest, wherever the driver drew the borders."""
    front: list[memoryview] = []
    for index, view in enumerate(views):
        if length < len(view):
            if length:
                front.append(view[:length])
                return front, [view[length:], *views[index + 1 :]]
            return front, views[index:]
        front.append(view)
        length -= len(view)
    return front, []


class Virtqueue:
    """One queue in use. Its geometry is fixed for the life of the object.

    `name` is for messages. Thread: the device's loop. Raises: GuestError when the driver breaks a rule of section 2.7; the
    queue must not be used after that.
    """

    __slots__ = (
        "_avail16", "_avail_index", "_desc_base", "_desc_ram", "_event_idx", "_indirect", "_last_signalled", "_memory",
        "_next_avail", "_next_used", "_ring", "_used16", "_used32", "_used_index", "_used_offset", "_used_ram", "avail_ring",
        "descriptor_table", "name", "size", "used_ring",
    )

    def __init__(self, name: str, memory: GuestMemory, size: int, descriptor_table: int, avail_ring: int, used_ring: int,
                 event_idx: bool = False, indirect: bool = True) -> None:
        check_geometry(name, memory, size, descriptor_table, avail_ring, used_ring)
        self.name = name
        self.size = size
        self.descriptor_table = descriptor_table
        self.avail_ring = avail_ring
        self.used_ring = used_ring
        self._memory = memory
        self._event_idx = event_idx
        self._indirect = indirect
        region = memory.region(descriptor_table, DESC_SIZE * size)
        self._desc_ram, self._desc_base = region.u8, descriptor_table - region.base
        region = memory.region(avail_ring, 6 + 2 * size)
        self._avail16, self._avail_index = region.u16, (avail_ring - region.base) >> 1
        region = memory.region(used_ring, 6 + 8 * size)
        self._used_ram, self._used_offset = region.u8, used_ring - region.base
        self._used16, self._used_index = region.u16, (used_ring - region.base) >> 1
        self._used32 = region.u32
        if memory.tracker is not None:
            memory.tracker.mark(used_ring, 6 + 8 * size)
        self._next_avail = 0
        self._next_used = 0
        self._last_signalled = 0
        self._ring = None if compiled is None or len(memory.regions) > MAX_REGIONS else compiled.Ring(
            size, descriptor_table, avail_ring, used_ring, event_idx, indirect,
            [(region.base, region.u8) for region in memory.regions])

    @property
    def used_size(self) -> int:
        """Bytes of the used ring, which is all of a queue that a device writes."""
        return 6 + 8 * self.size

    # -- where it stands, for devices that return chains in the order in which they came

    @property
    def position(self) -> int:
        """The index of the first available chain that has not been returned."""
        return self._next_used

    @property
    def returned(self) -> int:
        """How many chains the used ring has, whoever put them there, modulo 65536."""
        return self._used16[self._used_index + 1]

    def seek(self, position: int) -> None:
        """Go on from there: somebody else has served the queue up to it. Chains that were popped are the driver's again."""
        self._next_avail = self._next_used = self._last_signalled = position

    def rewind(self) -> None:
        """Take the queue over from somebody who served it in the order of the available ring, and is gone: what has not been
        returned is there to be popped.
        """
        self.seek(self.returned)

    def reclaim(self, outstanding: Outstanding) -> list[Chain]:
        """Take the queue over from somebody who served it and is gone: the chains that the driver waits for, as if popped.

        `outstanding` finds them (`virtio/lost.py`). A malformed chain is an error as ever.
        """
        avail, avail_index = self._avail16, self._avail_index + 2
        made_available, used = avail[avail_index - 1], self._used16[self._used_index + 1]
        self._next_avail = made_available
        self._next_used = self._last_signalled = used
        if (made_available - used) & 0xFFFF > self.size:
            raise self._broken(f"avail.idx is {(made_available - used) & 0xFFFF} ahead in a queue of {self.size}", "2.7.13")

        def head(index: int) -> int:
            return avail[avail_index + index % self.size]

        def returned(index: int) -> int:
            return int(_USED_ELEMENT.unpack_from(self._used_ram, self._used_offset + 4 + 8 * (index % self.size))[0])

        chains = []
        for number in outstanding(self.size, made_available, used, head, returned):
            if number >= self.size:
                raise self._broken(f"the available ring names descriptor {number} of {self.size}", "2.7.6")
            chains.append(self._walk(number))
        return chains

    # -- for compiled code, which takes chains, and returns most of them at once

    @property
    def ring(self) -> Ring | None:
        """The queue as compiled code sees it; None when there is none, or when somebody counts what is written to memory."""
        return self._ring if self._memory.tracker is None else None

    @property
    def positions(self) -> tuple[int, int]:
        """Where the next chain is taken, and where it will be returned."""
        return self._next_avail, self._next_used

    def advance(self, count: int, returned: bool = True) -> None:
        """So many chains were taken, and `returned`."""
        self._next_avail = (self._next_avail + count) & 0xFFFF
        if returned:
            self._next_used = (self._next_used + count) & 0xFFFF

    # -- from the driver

    def pop(self) -> Chain | None:
        """The next chain the driver made available, or None."""
        avail = self._avail16
        pending = (avail[self._avail_index + 1] - self._next_avail) & 0xFFFF
        if pending == 0:
            return None
        if pending > self.size:
            raise self._broken(f"avail.idx is {pending} ahead in a queue of {self.size}", "2.7.13")
        head = avail[self._avail_index + 2 + self._next_avail % self.size]
        if head >= self.size:
            raise self._broken(f"the available ring names descriptor {head} of {self.size}", "2.7.6")
        self._next_avail = (self._next_avail + 1) & 0xFFFF
        try:
            return self._walk(head)
        except GuestError:
            self.push(head, 0)
            raise

    def pop_batch(self, limit: int) -> list[Chain]:
        """Up to `limit` chains that the driver made available, in order; none when there are none.

        A malformed chain ends the batch that comes before it, and is the error of the next call: who calls until there are no
        more has served what can be served. `unpop` takes back what was not begun.
        """
        start = self._next_avail
        pending = self._announced() if limit > 0 else 0
        avail, first, size, batch = self._avail16, self._avail_index + 2, self.size, list[Chain]()
        for number in range(start, start + min(pending, limit)):
            head = avail[first + number % size]
            try:
                if head >= size:
                    raise self._broken(f"the available ring names descriptor {head} of {size}", "2.7.6")
                batch.append(self._three(head) or self._walk(head))
            except GuestError:
                if batch:
                    break  # it is still there
                if head < size:
                    self._next_avail = (start + 1) & 0xFFFF
                    self.push(head, 0)
                raise
        self._next_avail = (start + len(batch)) & 0xFFFF
        return batch

    def unpop(self, count: int) -> None:
        """The last `count` chains that were popped were not begun: they are the driver's again, to be popped."""
        self._next_avail = (self._next_avail - count) & 0xFFFF

    def _announced(self) -> int:
        """How many chains are available that were not popped. Their entries may be read when this returns."""
        pending = (self._avail16[self._avail_index + 1] - self._next_avail) & 0xFFFF
        if pending > self.size:
            raise self._broken(f"avail.idx is {pending} ahead in a queue of {self.size}", "2.7.13")
        return pending

    def _three(self, head: int) -> Chain | None:
        """A chain of the shape that nearly all requests of disks have: three descriptors in a row, in the queue's table or in
        one of their own, the last one writable. They are read at once; None: it has another shape, or breaks a rule, or what
        is written is counted, which this way is too short for.
        """
        index, ram, memory = head, self._desc_ram, self._memory
        if memory.tracker is not None:
            return None
        at = self._desc_base + DESC_SIZE * head
        address, length, flags, _ = _DESCRIPTOR.unpack_from(ram, at)
        if flags == DESC_F_INDIRECT:
            if length != _THREE_SIZE or not self._indirect or self.size < 3:
                return None
            region = memory.region(address, _THREE_SIZE)
            index, ram, at = 0, region.u8, address - region.base
        elif head + 3 > self.size:
            return None
        (address, length, flags, following, address2, length2, flags2, following2,
         address3, length3, flags3, _) = _THREE.unpack_from(ram, at)
        if (flags != DESC_F_NEXT or following != index + 1 or flags2 | DESC_F_WRITE != DESC_F_NEXT | DESC_F_WRITE
                or following2 != index + 2 or flags3 != DESC_F_WRITE or not (length and length2 and length3)
                or length + length2 + length3 > MAX_CHAIN_BYTES):
            return None
        region = memory.last
        base, end, ram = region.base, region.end, region.u8
        if (address < base or address2 < base or address3 < base or address + length > end or address2 + length2 > end
                or address3 + length3 > end):
            return None
        address -= base
        address2 -= base
        address3 -= base
        if flags2 == DESC_F_NEXT:
            return Chain(head, [ram[address : address + length], ram[address2 : address2 + length2]], length + length2,
                         [ram[address3 : address3 + length3]], length3)
        return Chain(head, [ram[address : address + length]], length,
                     [ram[address2 : address2 + length2], ram[address3 : address3 + length3]], length2 + length3)

    def _walk(self, head: int) -> Chain:
        """A chain of any shape. Raises: GuestError."""
        table, base, count = self._desc_ram, self._desc_base, self.size
        index, seen, total, indirect = head, 0, 0, False
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        readable_length = 0
        while True:
            address, length, flags, following = _DESCRIPTOR.unpack_from(table, base + DESC_SIZE * index)
            if flags & DESC_F_INDIRECT:
                if indirect or not self._indirect:
                    raise self._broken("an indirect table inside another, or without the feature", "2.7.5.3.1")
                if flags & DESC_F_NEXT or length == 0 or length % DESC_SIZE:
                    raise self._broken(f"an indirect table of {length} bytes, flags {flags:#x}", "2.7.5.3.1")
                count = length // DESC_SIZE
                if count > 0xFFFF:
                    raise self._broken(f"an indirect table of {count} descriptors", "2.7.5.3.1")
                region = self._memory.region(address, length)
                table, base, index, indirect = region.u8, address - region.base, 0, True
                continue
            seen += 1
            if seen > self.size:
                raise self._broken(f"a chain longer than the queue's {self.size} descriptors", "2.7.5.3.1")
            if length == 0:
                raise self._broken("a descriptor of zero bytes", "2.7.5")
            total += length
            if total > MAX_CHAIN_BYTES:
                raise self._broken("a chain of more than 4 GiB", "2.7.5.2")
            if flags & DESC_F_WRITE:
                writable.append(self._memory.writable(address, length))
            elif writable:
                raise self._broken("a device-readable descriptor after a device-writable one", "2.7.4.2")
            else:
                readable.append(self._memory.slice(address, length))
                readable_length = total
            if not flags & DESC_F_NEXT:
                return Chain(head, readable, readable_length, writable, total - readable_length)
            if following >= count:
                raise self._broken(f"a chain goes on at descriptor {following} of {count}", "2.7.5")
            index = following

    # -- to the driver

    def push(self, head: int, written: int) -> None:
        """Return a chain of which `written` bytes were filled in."""
        words, slot = self._used32, (self._used_offset >> 2) + 1 + 2 * (self._next_used % self.size)
        words[slot] = head
        words[slot + 1] = written
        self._next_used = (self._next_used + 1) & 0xFFFF
        self._used16[self._used_index + 1] = self._next_used

    def push_all(self, entries: list[tuple[int, int]]) -> None:
        """Return several chains, (head, written) each, with one store of the index: the driver sees all of them or none."""
        self._fill(entries)
        self._used16[self._used_index + 1] = self._next_used

    def _fill(self, entries: list[tuple[int, int]]) -> None:
        words, first, index, size = self._used32, (self._used_offset >> 2) + 1, self._next_used, self.size
        for head, written in entries:
            slot = first + 2 * (index % size)
            words[slot] = head
            words[slot + 1] = written
            index += 1
        self._next_used = index & 0xFFFF

    def needs_interrupt(self) -> bool:
        """Does the driver want to hear about what was pushed since the last call?"""
        new, old = self._next_used, self._last_signalled
        if new == old:
            return False
        _full_barrier()
        if not self._event_idx:
            self._last_signalled = new
            return not self._avail16[self._avail_index] & AVAIL_F_NO_INTERRUPT
        used_event = self._avail16[self._avail_index + 2 + self.size]
        self._last_signalled = new
        return (new - used_event - 1) & 0xFFFF < (new - old) & 0xFFFF

    def enable_notifications(self) -> bool:
        """Ask for a notification of the next chain. True when one came meanwhile: `pop` again."""
        if self._event_idx:
            self._used16[self._used_index + 2 + 4 * self.size] = self._next_avail
        else:
            self._used16[self._used_index] = 0
        _full_barrier()
        return self._avail16[self._avail_index + 1] != self._next_avail

    def disable_notifications(self) -> None:
        """While the queue is being worked on, notifications are a waste; a hint only."""
        if not self._event_idx:
            self._used16[self._used_index] = USED_F_NO_NOTIFY

    def _broken(self, rule: str, section: str) -> GuestError:
        return GuestError(self.name, rule, f"VIRTIO 1.2, {section}")


class OrderedVirtqueue(Virtqueue):
    """The queue of a weakly ordered processor: every step that x86 takes in order by itself has a barrier in it.

    `barrier` orders all accesses before it before all behind it. The parent's words about the steps hold here.
    """

    __slots__ = ()
    barrier = staticmethod(_full_barrier)

    def pop(self) -> Chain | None:
        if self._avail16[self._avail_index + 1] == self._next_avail:
            return None
        # The entry that is read next is one of those that this look at the index has announced, whatever a second look shows.
        self.barrier()
        return super().pop()

    def _announced(self) -> int:
        pending = super()._announced()
        if pending:
            self.barrier()
        return pending

    def push(self, head: int, written: int) -> None:
        self.push_all([(head, written)])

    def push_all(self, entries: list[tuple[int, int]]) -> None:
        self._fill(entries)
        self.barrier()  # the entries before the index; what was written into the buffers, too
        self._used16[self._used_index + 1] = self._next_used


if not TYPE_CHECKING and _WEAKLY_ORDERED:
    Virtqueue = OrderedVirtqueue


def check_geometry(name: str, memory: GuestMemory, size: int, descriptor_table: int, avail_ring: int, used_ring: int) -> None:
    """Raises GuestError unless the three parts are aligned and lie in RAM (VIRTIO 1.2, 2.7)."""
    if size < 1 or size & (size - 1):
        raise GuestError(name, f"a queue of {size} descriptors", "VIRTIO 1.2, 2.7")
    parts = ((descriptor_table, 16, DESC_SIZE * size), (avail_ring, 2, 6 + 2 * size), (used_ring, 4, 6 + 8 * size))
    for address, alignment, length in parts:
        if address % alignment:
            raise GuestError(name, f"a ring at {address:#x}, not aligned to {alignment}", "VIRTIO 1.2, 2.7")
        memory.region(address, length)
