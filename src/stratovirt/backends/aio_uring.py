"""aio=io_uring: a submission and a completion ring shared with the kernel, with an eventfd for completions.

Layouts (linux/io_uring.h), native byte order:
    io_uring_params  sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd, resv[3] (u32);
                     sq_off: head, tail, ring_mask, ring_entries, flags, dropped, array, resv (u32), user_addr (u64);
                     cq_off: head, tail, ring_mask, ring_entries, overflow, cqes, flags, resv (u32), user_addr (u64)
    sqe, 64 bytes    opcode (u8), flags (u8), ioprio (u16), fd (s32), off, addr (u64), len, op_flags (u32), user_data (u64)
    cqe, 16 bytes    user_data (u64), res (s32), flags (u32)

Ring indices are aligned 32-bit words that only one side writes: ours are the submission tail and the completion head. There
is no polling thread, so the kernel looks at the submission ring only inside io_uring_enter(2).
"""

from __future__ import annotations

import errno
import os
import struct

from stratovirt.backends.aio_kernel import DEPTH, RWF_DSYNC, KernelEngine
from stratovirt.backends.aio_syscalls import (
    IO_URING_ENTER,
    IO_URING_REGISTER,
    IO_URING_SETUP,
    address_of,
    anchored,
    pin,
    syscall,
)
from stratovirt.backends.block import FLUSH, READ
from stratovirt.errors import HostError
from stratovirt.hostmap import ARCHITECTURE, SharedPages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from stratovirt.backends.block import BlockRequest, RawImage

_READV, _WRITEV, _FSYNC, _READ, _WRITE = 1, 2, 3, 22, 23
_FSYNC_DATASYNC = 1
_REGISTER_EVENTFD = 4
_FEAT_SINGLE_MMAP, _FEAT_NODROP, _FEAT_SUBMIT_STABLE, _FEAT_RW_CUR_POS = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_NEEDED = _FEAT_SINGLE_MMAP | _FEAT_NODROP | _FEAT_SUBMIT_STABLE | _FEAT_RW_CUR_POS  # all of Linux 5.6, as READ and WRITE
_OFFSET_RINGS, _OFFSET_SQES = 0, 0x1000_0000

_PARAMS = struct.Struct("=10I8IQ8IQ")
_SQE = struct.Struct("=BBHiQQIIQ24x")
_CQE = struct.Struct("=QiI")
assert _PARAMS.size == 120 and _SQE.size == 64 and _CQE.size == 16

_barrier: Callable[[], object] | None = None
if ARCHITECTURE != "x86_64":
    from stratovirt.barrier import create

    _barrier = create()


def probe() -> None:
    """Raises: HostError when the kernel has no io_uring, or does not let this process use it."""
    os.close(_set_up()[0])


def _set_up() -> tuple[int, tuple[int, ...]]:
    """A ring's descriptor and its io_uring_params."""
    params = bytearray(_PARAMS.size)
    address, _anchor = pin(params)
    try:
        fd = syscall(IO_URING_SETUP, DEPTH, address)
    except OSError as error:
        hint = "see sysctl kernel.io_uring_disabled"
        if error.errno == errno.EACCES:
            hint = "a running machine may do it if it had a -drive aio=io_uring at its start (seccomp)"
        raise HostError.from_os("io_uring_setup", error, hint) from error
    values = _PARAMS.unpack(params)
    if values[5] & _NEEDED != _NEEDED:
        os.close(fd)
        raise HostError("io_uring of this kernel is too old", 0, "Linux 5.6 or later has what is needed")
    return fd, values


class UringEngine(KernelEngine):
    """Raises: HostError when it cannot be opened."""

    name = "io_uring"

    def __init__(self, image: RawImage) -> None:
        super().__init__(image)
        self._mappings: tuple[SharedPages, ...] = ()
        try:
            self._ring_fd, params = _set_up()
            try:
                self._map(params)
                self._register_eventfd()
            except HostError:
                self._unmap()
                raise
        except HostError:
            super().close()
            raise

    def _unmap(self) -> None:
        os.close(self._ring_fd)
        if self._mappings:
            self._words.release()
        for mapping in self._mappings:
            mapping.close()

    def _map(self, params: tuple[int, ...]) -> None:
        sq_entries, cq_entries = params[0], params[1]
        sq_head, sq_tail, sq_mask, _, _, _, sq_array = params[10:17]
        cq_head, cq_tail, cq_mask, _, _, cqes = params[19:25]
        size = max(sq_array + 4 * sq_entries, cqes + _CQE.size * cq_entries)
        rings = SharedPages(self._ring_fd, size, _OFFSET_RINGS)
        try:
            entries = SharedPages(self._ring_fd, _SQE.size * sq_entries, _OFFSET_SQES)
        except HostError:
            rings.close()
            raise
        self._mappings = (rings, entries)
        self._rings, self._sqes = rings.view, entries.view
        self._words = rings.view[: size & -4].cast("I")
        self._sq_head, self._sq_tail, self._sq_array = sq_head >> 2, sq_tail >> 2, sq_array >> 2
        self._cq_head, self._cq_tail, self._cqes = cq_head >> 2, cq_tail >> 2, cqes
        self._sq_mask, self._cq_mask = self._words[sq_mask >> 2], self._words[cq_mask >> 2]

    def _register_eventfd(self) -> None:
        number = bytearray(self.fd.to_bytes(4, "little"))
        address, _anchor = pin(number)
        try:
            syscall(IO_URING_REGISTER, self._ring_fd, _REGISTER_EVENTFD, address, 1)
        except OSError as error:
            raise HostError.from_os("io_uring_register of an eventfd", error) from error

    def _prepare(self, slot: int, request: BlockRequest) -> None:
        opcode, address, length, flags = _FSYNC, 0, 0, _FSYNC_DATASYNC
        if request.kind == READ and len(request.views) == 1:  # what nearly all are; `_buffers` in place
            self._anchors[slot] = only = anchored(request.views[0])
            opcode, address, length, flags = _READ, address_of(only), request.length, 0
        elif request.kind != FLUSH:
            vector, address, length = self._buffers(slot, request)
            if request.kind == READ:
                opcode, flags = (_READV if vector else _READ), 0
            else:
                opcode, flags = (_WRITEV if vector else _WRITE), (RWF_DSYNC if request.durable else 0)
        _SQE.pack_into(self._sqes, _SQE.size * slot, opcode, 0, 0, self.image.fd, request.offset, address, length, flags, slot)

    def _push(self, slots: list[int]) -> None:
        words, mask = self._words, self._sq_mask
        tail = words[self._sq_tail]
        for slot in slots:
            words[self._sq_array + (tail & mask)] = slot  # a request's entry has the number of its slot
            tail = (tail + 1) & 0xFFFF_FFFF
        words[self._sq_tail] = tail
        try:
            syscall(IO_URING_ENTER, self._ring_fd, len(slots), 0, 0, 0, 0)
        except OSError:
            pass  # what it did not take shows in the ring
        left = (tail - words[self._sq_head]) & 0xFFFF_FFFF
        if left:
            words[self._sq_tail] = (tail - left) & 0xFFFF_FFFF
            for slot in slots[-left:]:
                self._reject(slot)

    def _any(self) -> bool:
        return self._words[self._cq_head] != self._words[self._cq_tail]

    def _results(self) -> list[tuple[int, int]]:
        words = self._words
        head, tail = words[self._cq_head], words[self._cq_tail]
        if head == tail:
            return []
        if _barrier is not None:
            _barrier()  # the entries are read after the index that announces them; x86 does it so by itself
        results = []
        while head != tail:
            slot, result, _ = _CQE.unpack_from(self._rings, self._cqes + _CQE.size * (head & self._cq_mask))
            results.append((slot, result))
            head = (head + 1) & 0xFFFF_FFFF
        words[self._cq_head] = head
        return results

    def close(self) -> None:
        """The ring goes when both its descriptor and its mappings are gone."""
        self._unmap()
        super().close()
