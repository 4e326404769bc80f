"""What the kernel's two asynchronous interfaces have in common: numbered slots, a backlog, and what a result means.

A slot holds a request, and the addresses that the kernel was given, until the kernel reports its end. Reads, writes and
flushes go to the kernel. Everything else, and everything that the kernel refuses or does only in part (buffers that
O_DIRECT does not like, a short read), goes on in the threads of the base class, which take any request.
"""

from __future__ import annotations

import errno
import struct

from stratovirt.backends.aio_syscalls import address_of, anchored, pin
from stratovirt.backends.aio_threads import ThreadEngine
from stratovirt.backends.block import FLUSH, READ, WRITE
from stratovirt.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.backends.block import BlockRequest, RawImage

DEPTH = 128
RWF_DSYNC = 0x02  # this write is on stable storage when it is reported finished
_IOV_MAX = 1024
_NAMES = {READ: "read", WRITE: "write", FLUSH: "fdatasync"}
# "Not this way": the request may still succeed with a plain system call.
_REFUSALS = (errno.EINVAL, errno.EAGAIN, errno.EINTR, errno.EOPNOTSUPP, errno.ENOSYS, errno.ECANCELED)


class KernelEngine(ThreadEngine):
    """At most DEPTH requests are with the kernel; more wait in the order they came."""

    def __init__(self, image: RawImage) -> None:
        super().__init__(image)
        self._requests: list[BlockRequest | None] = [None] * DEPTH
        self._anchors: list[object] = [None] * DEPTH
        self._free = list(range(DEPTH))
        self._backlog: list[BlockRequest] = []

    # -- what the interface implements

    def _prepare(self, slot: int, request: BlockRequest) -> None:
        """Describe the request to the kernel, keeping in `_anchors[slot]` what must stay where it is."""
        raise NotImplementedError

    def _push(self, slots: list[int]) -> None:
        """Hand prepared slots to the kernel; `_reject` those that it does not take."""
        raise NotImplementedError

    def _any(self) -> bool:
        """Does the kernel report any as finished? A look at memory."""
        raise NotImplementedError

    def _results(self) -> list[tuple[int, int]]:
        """(slot, bytes done or -errno) of each request that the kernel reports finished, once."""
        raise NotImplementedError

    # -- the engine

    def submit(self, request: BlockRequest) -> None:
        if request.kind > FLUSH or len(request.views) > _IOV_MAX or (request.kind != FLUSH and not request.length):
            super().submit(request)
            return
        self.in_flight += 1
        self._backlog.append(request)

    def kick(self) -> bool:
        while self._backlog and self._free:
            count = min(len(self._backlog), len(self._free))
            batch, self._backlog = self._backlog[:count], self._backlog[count:]
            slots = self._free[-count:]
            del self._free[-count:]
            for slot, request in zip(slots, batch, strict=True):
                self._requests[slot] = request
                self._prepare(slot, request)
            self._push(slots)
        return self._any()

    def reap(self) -> list[BlockRequest]:
        finished = super().reap()
        again = True
        while again:
            requests, anchors, free = self._requests, self._anchors, self._free
            for slot, result in self._results():
                request = requests[slot]
                requests[slot] = anchors[slot] = None
                free.append(slot)
                if request is not None and (result == request.length or self._is_finished(request, result)):
                    finished.append(request)
                    self.in_flight -= 1
            again = self.kick()
        return finished

    def _release(self, slot: int) -> BlockRequest | None:
        request = self._requests[slot]
        self._requests[slot] = self._anchors[slot] = None
        self._free.append(slot)
        return request

    def _reject(self, slot: int) -> None:
        request = self._release(slot)
        if request is not None:
            self.hand_over(request)

    def _is_finished(self, request: BlockRequest, result: int) -> bool:
        if result < 0 and -result not in _REFUSALS:
            where = "" if request.kind == FLUSH else f" at {request.offset:#x}"
            request.error = HostError(f"{_NAMES[request.kind]} of {self.image.path}{where}", -result)
            return True
        if result == request.length:
            return True
        if result > 0:
            self._advance(request, result)
        self.hand_over(request)
        return False

    def _advance(self, request: BlockRequest, done: int) -> None:
        """Leave of the request what is still to be done."""
        request.offset += done
        views = request.views
        while done and done >= len(views[0]):
            done -= len(views[0])
            views = views[1:]
        request.views = [views[0][done:], *views[1:]] if done else views

    # -- for the interfaces

    def _buffers(self, slot: int, request: BlockRequest) -> tuple[bool, int, int]:
        """(is a vector, address, length or count) of a request's data, pinned in the slot."""
        views = request.views
        if len(views) == 1:
            self._anchors[slot] = only = anchored(views[0])
            return False, address_of(only), request.length
        pieces = [anchored(view) for view in views]
        words: list[int] = []
        for piece, view in zip(pieces, views, strict=True):
            words += address_of(piece), len(view)
        vector = bytearray(struct.pack(f"={len(words)}Q", *words))
        address, anchor = pin(vector)
        self._anchors[slot] = (pieces, vector, anchor)
        return True, address, len(views)
