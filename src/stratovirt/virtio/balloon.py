"""virtio-balloon (VIRTIO 1.2, 5.5): takes memory back from the guest, page by page, and gives it back.

    queue 0  inflate     u32 page frame numbers that the guest will not use
    queue 1  deflate     those that it uses again
    queue 2  reporting   with free-page-reporting: the buffers themselves are pages that the guest does not use at present
    last     message     with auto-balloon: how many pages the guest could do without; reporting's number if that is not in use

Config space: u32 num_pages, how many pages we want; u32 actual, how many the guest has given, written by the guest. A page
is 4096 bytes here whatever the guest's own pages are. Pages given are dropped from this process; pages used again come back
zeroed when they are touched, so deflating is nothing but an announcement.

With auto-balloon, which is StratoVirt's and not in VIRTIO: u32 reserved, u32 reserved, u32 membuf_percent, u32 monitor_interval
follow. The guest's driver watches its memory every monitor_interval seconds, keeps membuf_percent of what its programs need
as a buffer, and sends the rest as a message: u16 tag, u64 pages, packed. That becomes num_pages, as if a client had asked.

Threads: queues and `set_target` on the main loop, config space on vCPU threads.
"""

from __future__ import annotations

import struct
from _thread import allocate_lock

from stratovirt.errors import GuestError, HostError
from stratovirt.hostmap import release
from stratovirt.virtio.device import VirtioDevice
from stratovirt.virtio.queue import split

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stratovirt.loop import EventLoop
    from stratovirt.memory import GuestMemory
    from stratovirt.snapshot.saved import Saved
    from stratovirt.virtio.queue import Chain, Virtqueue

F_DEFLATE_ON_OOM, F_REPORTING, F_MESSAGE = 2, 5, 16
INFLATE, DEFLATE, REPORTING = 0, 1, 2
PAGE_SHIFT = 12
MAX_FRAMES = 1024  # in one buffer; Linux sends 256
_MESSAGE = struct.Struct("<HQ")
ANNOUNCE_SECONDS = 1.0  # a guest gives its pages in many steps: clients hear of the sum of a second


class VirtioBalloon(VirtioDevice):
    """`on_changed` is called on the loop with the bytes that the guest has, a second after it says that this has changed.

    `shared`: guest RAM is a mapping that other processes see, whose pages have to be taken out of the file behind it.
    `auto`: membuf_percent and monitor_interval of auto-balloon, None without.
    """

    device_id = 5
    name = "virtio-balloon"

    def __init__(self, memory: GuestMemory, loop: EventLoop, on_changed: Callable[[int], None], *, deflate_on_oom: bool = False,
                 reporting: bool = False, auto: tuple[int, int] | None = None, shared: bool = False,
                 on_error: Callable[[HostError], None] | None = None) -> None:
        super().__init__()
        self.features |= deflate_on_oom << F_DEFLATE_ON_OOM | reporting << F_REPORTING | (auto is not None) << F_MESSAGE
        self.queue_sizes = (256,) * (2 + reporting + (auto is not None))
        self.released = 0  # bytes handed back to the host since the start
        self._memory = memory
        self._loop = loop
        self._on_changed = on_changed
        self._on_error = on_error
        self._shared = shared
        self._config_lock = allocate_lock()  # guards the four below: the loop writes the first number, vCPUs the second
        self._target_pages = 0
        self._actual_pages = 0
        self._announcing = False
        self._settings = struct.pack("<IIII", 0, 0, *auto) if auto is not None else b""
        self._store()

    # -- for QMP, on the loop

    @property
    def guest_bytes(self) -> int:
        """The memory that the guest has left, as it says itself."""
        return max(0, self._memory.size - (self._actual_pages << PAGE_SHIFT))

    def set_target(self, guest_bytes: int) -> None:
        """Ask the guest to make do with `guest_bytes` of its memory."""
        self._set_target_pages(max(0, self._memory.size - guest_bytes) >> PAGE_SHIFT)

    def _set_target_pages(self, pages: int) -> None:
        with self._config_lock:
            self._target_pages = pages
            self._store()
        if self.transport is not None:
            self.transport.notify_config()

    # -- config space

    def _store(self) -> None:
        self.config = struct.pack("<II", self._target_pages, self._actual_pages) + self._settings

    def write_config(self, offset: int, size: int, value: int) -> None:
        if not self.active or not 4 <= offset <= 8 - size:
            return
        with self._config_lock:
            actual = bytearray(self.config[4:8])
            actual[offset - 4 : offset - 4 + size] = value.to_bytes(size, "little")
            self._actual_pages = int.from_bytes(actual, "little")
            self._store()
            announce = not self._announcing
            self._announcing = True
        if announce:  # one at a time: a guest that writes in a loop queues nothing
            self._loop.call_soon(self._announce_later)

    def _announce_later(self) -> None:
        self._loop.call_later(ANNOUNCE_SECONDS, self._announce)

    def _announce(self) -> None:
        with self._config_lock:
            self._announcing = False
        self._on_changed(self.guest_bytes)

    def on_reset(self) -> None:
        """The guest has all of its memory again; what we want of it stays."""
        with self._config_lock:
            self._actual_pages = 0
            self._store()

    def save(self) -> dict[str, object]:
        with self._config_lock:
            return {"target_pages": self._target_pages, "actual_pages": self._actual_pages}

    def restore(self, state: Saved) -> None:
        with self._config_lock:
            self._target_pages = state.integer("target_pages", 0, 0xFFFF_FFFF)
            self._actual_pages = state.integer("actual_pages", 0, 0xFFFF_FFFF)
            self._store()

    # -- queues

    def handle(self, index: int, queue: Virtqueue, chain: Chain) -> int:
        features = self.driver_features
        if features >> F_MESSAGE & 1 and index == 2 + (features >> F_REPORTING & 1):
            self._follow(chain)
            return 0
        if index >= REPORTING:
            for view in chain.writable:
                self._release(view)
            return 0
        for first, count in self._frames(chain):
            part = first << PAGE_SHIFT, count << PAGE_SHIFT
            if index == INFLATE:
                self._release(self._memory.writable(*part))  # it will read as zero
            else:
                self._memory.slice(*part)  # GuestError when it is not RAM
        return 0

    def _follow(self, chain: Chain) -> None:
        """The guest says what it can do without. What is behind the message is of no meaning to us."""
        if chain.readable_length < _MESSAGE.size:
            raise GuestError(self.name, f"a message of {chain.readable_length} bytes, shorter than {_MESSAGE.size}")
        _tag, pages = _MESSAGE.unpack(b"".join(split(chain.readable, _MESSAGE.size)[0]))
        self._set_target_pages(min(pages, self._memory.size >> PAGE_SHIFT))

    def _frames(self, chain: Chain) -> Iterator[tuple[int, int]]:
        """The pages that a buffer names, as (first, how many) of each run."""
        length = chain.readable_length
        if length % 4 or length > 4 * MAX_FRAMES:
            raise GuestError(self.name, f"page frame numbers of {length} bytes", "VIRTIO 1.2, 5.5.6")
        data = b"".join(map(bytes, split(chain.readable, length)[0]))
        first = count = 0
        for frame in sorted(struct.unpack(f"<{length // 4}I", data)):
            if count and frame <= first + count:
                count = max(count, frame - first + 1)
                continue
            if count:
                yield first, count
            first, count = frame, 1
        if count:
            yield first, count

    def _release(self, view: memoryview) -> None:
        try:
            release(view, self._shared, self._memory.page_size)
            self.released += len(view)
        except HostError as error:
            if self._on_error is not None:
                self._on_error(error)
