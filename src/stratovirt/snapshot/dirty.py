"""Which pages of memory were written since a snapshot, whoever wrote them: what an incremental one needs, without comparing.

    who writes                                        who tells
    the guest, and KVM for it                         KVM's dirty log
    this process, and its threads and engines         `GuestMemory.writable` and `write`: a buffer counts when it is taken
    from a queue; the used rings of all queues and    `mark` (a queue's when it is made, and at every beginning)
    buffers that a device holds                       `VirtioDevice.outstanding`
    vhost-net                                         the kernel's own log (VHOST_F_LOG_ALL), which lies here
    vhost-vsock, which writes no log; a reset         `lose`: then nobody knows, and memory is compared

A page counts as written too often rather than never. Pages are marked with a byte each, so that threads need no lock: a mark is
one store. The kernel sets bits, in memory that only it writes. Reading gathers all of it into the marks, which are cleared by
`begin` and by nothing else: when the snapshot that they were read for fails, they are still there for the next.
"""

from __future__ import annotations

from stratovirt import log
from stratovirt.errors import HostError
from stratovirt.hostmap import PAGE_SIZE, HostMapping, address_of_view
from stratovirt.snapshot.chain import PAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from stratovirt.memory import GuestMemory
    from stratovirt.snapshot.chain import Ranges

    class WriteLog(Protocol):
        """What the hypervisor counts, by the number of the region. Raises: HostError."""

        def start(self) -> None: ...

        def stop(self) -> None: ...

        def read(self, slot: int) -> bytearray: ...

        def clear(self) -> None: ...

_CHUNK = 4096  # bytes of a bitmap that are looked at together
_NOTHING = bytes(_CHUNK)
_BITS = [bytes(number >> bit & 1 for bit in range(8)) for number in range(256)]


class DirtyPages:
    """Counts from `begin` on. `since` is the id of the snapshot that it counts from, "" when it is lost.

    Thread: main, while nothing of the guest runs; `writable`, `mark` and `lose`: any.
    """

    def __init__(self, memory: GuestMemory, hypervisor: WriteLog) -> None:
        self.since = ""
        self._memory = memory
        self._hypervisor = hypervisor
        self.running = False
        self._marks = [HostMapping(_whole_pages(region.size // PAGE)) for region in memory.regions]
        self._vhost = HostMapping(_whole_pages(-(-max(region.end for region in memory.regions) // (8 * PAGE))))

    # -- who writes

    def writable(self, address: int, length: int) -> memoryview:
        """`GuestMemory.slice`, for somebody who will write there. Raises: GuestError."""
        view = self._memory.slice(address, length)
        self.mark(address, length)
        return view

    def mark(self, address: int, length: int) -> None:
        """These bytes, in one region of RAM, are written, or may be until the next beginning."""
        for region, marks in zip(self._memory.regions, self._marks, strict=True):
            if region.base <= address < region.end:
                first, end = (address - region.base) // PAGE, -(-(address + length - region.base) // PAGE)
                marks.view[first:end] = b"\1" * (end - first)

    def mark_view(self, view: memoryview) -> None:
        """The same for a part of RAM that somebody holds."""
        address = address_of_view(view)
        for region in self._memory.regions:
            if 0 <= address - region.host.address < region.size:
                self.mark(region.base + address - region.host.address, len(view))

    def lose(self, why: str) -> None:
        """Somebody writes whom nobody counts: until the next beginning it is not known what was written."""
        if self.since:
            self.since = ""
            log.info(f"pages that were written are not counted any more: {why}")

    @property
    def vhost_log(self) -> int:
        """The address of the log that vhost writes: a bit for each 4 KiB from guest-physical address 0 on."""
        return self._vhost.address

    # -- from one snapshot to the next

    def start(self) -> None:
        """Have everybody count. What follows is `begin`. Raises: HostError, and nobody counts then."""
        if self.running:
            return
        try:
            self._hypervisor.start()
        except HostError:
            self._hypervisor.stop()
            raise
        self.running = True
        self._memory.track(self)

    def begin(self, since: str) -> None:
        """Every page is clean, and memory is what the snapshot `since` has. Raises: HostError; then nothing is known."""
        self.since = ""
        self._gather()
        self._hypervisor.clear()
        for marks in self._marks:
            marks.discard()
        self.since = since

    def written(self) -> Ranges:
        """The ranges of the memory file (all regions, one behind the other) that were written. Raises: HostError."""
        self._gather()
        ranges: Ranges = []
        offset = 0
        for region, marks in zip(self._memory.regions, self._marks, strict=True):
            pages = bytes(marks.view[: region.size // PAGE])
            start = pages.find(1)
            while start >= 0:
                end = pages.find(0, start)
                end = len(pages) if end < 0 else end
                if ranges and ranges[-1][1] == offset + start * PAGE:
                    ranges[-1] = (ranges[-1][0], offset + end * PAGE)
                else:
                    ranges.append((offset + start * PAGE, offset + end * PAGE))
                start = pages.find(1, end)
            offset += region.size
        return ranges

    def stop(self) -> None:
        """Nobody counts any more. Raises: HostError."""
        self.since = ""
        if self.running:
            self.running = False
            self._memory.track(None)
            self._hypervisor.stop()

    def _gather(self) -> None:
        """Put what KVM and vhost have counted into the marks."""
        for number, (region, marks) in enumerate(zip(self._memory.regions, self._marks, strict=True)):
            _merge(marks.view, memoryview(self._hypervisor.read(number)), PAGE_SIZE // PAGE)
            first = region.base // (8 * PAGE)
            _merge(marks.view, self._vhost.view[first : first + region.size // (8 * PAGE)], 1)
        self._vhost.discard()


def _whole_pages(size: int) -> int:
    return -(-size // PAGE_SIZE) * PAGE_SIZE


def _merge(marks: memoryview, bitmap: memoryview, pages_a_bit: int) -> None:
    """Mark the pages whose bits are set."""
    for start in range(0, len(bitmap), _CHUNK):
        chunk = bytes(bitmap[start : start + _CHUNK])
        if chunk == _NOTHING[: len(chunk)]:
            continue
        found = b"".join([_BITS[number] for number in chunk])
        if pages_a_bit > 1:
            found = b"".join([found[at : at + 1] * pages_a_bit for at in range(len(found))])
        at = start * 8 * pages_a_bit
        part = marks[at : at + len(found)]
        both = int.from_bytes(part, "little") | int.from_bytes(found[: len(part)], "little")
        part[:] = both.to_bytes(len(part), "little")
