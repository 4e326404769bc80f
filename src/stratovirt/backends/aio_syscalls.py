"""System calls that Python's `os` does not have, and the addresses of buffers for them.

Like `hostmap`, this goes through `_ctypes` without the `ctypes` package. Calls release the GIL. A buffer whose address is
taken cannot be freed or resized while the anchor that came with the address lives.
"""

from __future__ import annotations

import _ctypes
import os

_UNKNOWN = -1
_NUMBERS = {  # io_setup, io_destroy, io_submit, io_getevents: asm/unistd_64.h and asm-generic/unistd.h
    "x86_64": (206, 207, 209, 208),
    "aarch64": (0, 1, 2, 4),
}
IO_SETUP, IO_DESTROY, IO_SUBMIT, IO_GETEVENTS = _NUMBERS.get(os.uname().machine, (_UNKNOWN,) * 4)
IO_URING_SETUP, IO_URING_ENTER, IO_URING_REGISTER = 425, 426, 427  # the same everywhere


class _Byte(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "B"


class _Word(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "L"


class _Result(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "l"


class _CFunction(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = _Result


class _SystemCall(_ctypes.CFuncPtr):
    _flags_ = _CFunction._flags_
    _restype_ = _Result
    _argtypes_ = (_Word,) * 7  # converted on the way in: half a microsecond less than objects made for a call


_libc = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]  # None: what is already loaded
_syscall = _SystemCall(_ctypes.dlsym(_libc, "syscall"))
_memcmp = _CFunction(_ctypes.dlsym(_libc, "memcmp"))
_fallocate = _CFunction(_ctypes.dlsym(_libc, "fallocate"))


def syscall(number: int, first: int = 0, second: int = 0, third: int = 0, fourth: int = 0, fifth: int = 0,
            sixth: int = 0) -> int:
    """Raises: OSError."""
    result = _syscall(number, first, second, third, fourth, fifth, sixth)
    if result < 0:
        errno = _ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))
    return int(result)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2). Raises: OSError."""
    if _fallocate(_Word(fd), _Word(mode), _Word(offset), _Word(length)) & 0xFFFF_FFFF:
        errno = _ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))


# The two halves of `pin`, for those who do it for each request.
anchored, address_of = _Byte.from_buffer, _ctypes.addressof


def pin(buffer: memoryview | bytearray) -> tuple[int, object]:
    """The address of a writable buffer, and the anchor to keep for as long as the address is used."""
    anchor = _Byte.from_buffer(buffer)
    return _ctypes.addressof(anchor), anchor


def is_zero(views: list[memoryview]) -> bool:
    """Is every byte zero? Nothing is copied: a run of bytes that equals itself shifted by one is all alike."""
    for view in views:
        if len(view) and view[0]:
            return False
        if len(view) > 1:
            address, _anchor = pin(view)
            if _memcmp(_Word(address), _Word(address + 1), _Word(len(view) - 1)) & 0xFFFF_FFFF:
                return False
    return True


