"""aio=native: io_setup(2), io_submit(2), io_getevents(2), with an eventfd for completions.

struct iocb (linux/aio_abi.h), little-endian: 0 data (u64), 8 key (u32), 12 rw_flags (u32), 16 opcode (u16), 18 priority
(s16), 20 fd (u32), 24 buf (u64), 32 nbytes (u64), 40 offset (s64), 48 reserved, 56 flags (u32), 60 resfd (u32).
struct io_event: data (u64), obj (u64), res (s64), res2 (s64).
A context's number is the address of a ring that the kernel maps for us, struct aio_ring: 0 id, 4 nr, 8 head, 12 tail, 16 magic
(all u32), and more. We look there whether requests have ended, and let the kernel take them out.

The kernel copies an iocb and the vector it points to in io_submit. Without O_DIRECT it would also do the request in there.
"""

from __future__ import annotations

import errno
import struct

from stratovirt.backends.aio_kernel import DEPTH, RWF_DSYNC, KernelEngine
from stratovirt.backends.aio_syscalls import IO_DESTROY, IO_GETEVENTS, IO_SETUP, IO_SUBMIT, pin, syscall
from stratovirt.backends.block import FLUSH, READ
from stratovirt.errors import HostError
from stratovirt.hostmap import words_at

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.backends.block import BlockRequest, RawImage

_PREAD, _PWRITE, _FDSYNC, _PREADV, _PWRITEV = 0, 1, 3, 7, 8
_FLAG_RESFD = 1
_RING_HEAD, _RING_TAIL, _RING_MAGIC = 2, 3, 4  # in words
_MAGIC = 0xA10A10A1
_IOCB = struct.Struct("<QIIHhIQQqQII")
_EVENT = struct.Struct("<QQqq")
_POINTER = struct.Struct("<Q")
assert _IOCB.size == 64 and _EVENT.size == 32


def probe() -> None:
    """Raises: HostError when the host has no such interface, or no context left."""
    syscall(IO_DESTROY, _create_context())


def _create_context() -> int:
    context = bytearray(8)
    address, _anchor = pin(context)
    try:
        syscall(IO_SETUP, DEPTH, address)
    except OSError as error:
        hint = "sysctl fs.aio-max-nr limits all processes together" if error.errno == errno.EAGAIN else ""
        raise HostError.from_os("io_setup", error, hint) from error
    return int.from_bytes(context, "little")


class NativeEngine(KernelEngine):
    """Raises: HostError when it cannot be opened."""

    name = "native"

    def __init__(self, image: RawImage) -> None:
        super().__init__(image)
        try:
            self._context = _create_context()
        except HostError:
            super().close()
            raise
        ring = words_at(self._context, 5)
        self._ring = ring if ring[_RING_MAGIC] == _MAGIC else None
        self._iocbs = bytearray(_IOCB.size * DEPTH)
        self._iocbs_at, self._iocbs_anchor = pin(self._iocbs)
        self._pointers = bytearray(_POINTER.size * DEPTH)
        self._pointers_at, self._pointers_anchor = pin(self._pointers)
        self._events = bytearray(_EVENT.size * DEPTH)
        self._events_at, self._events_anchor = pin(self._events)

    def _prepare(self, slot: int, request: BlockRequest) -> None:
        opcode, address, length, flags = _FDSYNC, 0, 0, 0
        if request.kind != FLUSH:
            vector, address, length = self._buffers(slot, request)
            if request.kind == READ:
                opcode = _PREADV if vector else _PREAD
            else:
                opcode = _PWRITEV if vector else _PWRITE
                flags = RWF_DSYNC if request.durable else 0
        _IOCB.pack_into(self._iocbs, _IOCB.size * slot, slot, 0, flags, opcode, 0, self.image.fd, address, length,
                        request.offset, 0, _FLAG_RESFD, self.fd)

    def _push(self, slots: list[int]) -> None:
        for index, slot in enumerate(slots):
            _POINTER.pack_into(self._pointers, _POINTER.size * index, self._iocbs_at + _IOCB.size * slot)
        start = 0
        while start < len(slots):
            try:
                taken = syscall(IO_SUBMIT, self._context, len(slots) - start, self._pointers_at + _POINTER.size * start)
            except OSError:
                taken = 0  # it is about the first one: the kernel reports an error only when nothing was taken before it
            if taken == 0:
                self._reject(slots[start])
                taken = 1
            start += taken

    def _any(self) -> bool:
        ring = self._ring
        return ring is not None and ring[_RING_HEAD] != ring[_RING_TAIL]

    def _results(self) -> list[tuple[int, int]]:
        if len(self._free) == DEPTH:
            return []
        try:
            count = syscall(IO_GETEVENTS, self._context, 0, DEPTH, self._events_at, 0)
        except OSError as error:
            if error.errno == errno.EINTR:
                return []
            raise
        results = []
        for index in range(count):
            slot, _, result, _ = _EVENT.unpack_from(self._events, _EVENT.size * index)
            results.append((slot, result))
        return results

    def close(self) -> None:
        """Waits for what the kernel still has: it writes into the requests' buffers until then."""
        self._ring = None
        syscall(IO_DESTROY, self._context)
        super().close()
