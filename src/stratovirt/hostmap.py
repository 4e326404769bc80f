"""Raw host addresses: the one module that knows where guest RAM lies in this process.

Python's `mmap` gives a mapping but neither its address nor a way to map a file over part of it. KVM needs the first
(`userspace_addr` of a memory slot), copy-on-write kernel images need the second. Both come from the C library through
`_ctypes`, without the `ctypes` package on top of it, whose import alone costs more than creating a virtual machine.
"""

from __future__ import annotations

import _ctypes
import mmap
import posix

from stratovirt.errors import HostError

PAGE_SIZE = mmap.PAGESIZE  # 4 KiB on x86_64; an arm64 host has pages of 4, 16 or 64 KiB
HUGE_PAGE_SIZE = 2 << 20  # of x86_64, and of arm64 with pages of 4 KiB

_PROT_READ = 0x1
_PROT_READ_WRITE = 0x1 | 0x2
_PROT_READ_EXECUTE = 0x1 | 0x4
_MAP_SHARED = 0x01
_MAP_PRIVATE = 0x02
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MADV_DONTNEED = 4
_MADV_REMOVE = 9
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
_M_ARENA_MAX = -8
# Asked once, here: later a thread's filter may not let it ask.
ARCHITECTURE = posix.uname().machine
_NR_MBIND = 237 if ARCHITECTURE == "x86_64" else 235
_CLEAR_STEP = 1 << 20


class _Byte(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "B"


class _Int(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "i"


class _Word(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "L"


class _CFunction(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = _Word


_libc = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]  # None: what is already loaded
_libc_mmap = _CFunction(_ctypes.dlsym(_libc, "mmap"))
_libc_memcmp = _CFunction(_ctypes.dlsym(_libc, "memcmp"))
_libc_munmap = _CFunction(_ctypes.dlsym(_libc, "munmap"))
_libc_madvise = _CFunction(_ctypes.dlsym(_libc, "madvise"))
_libc_syscall = _CFunction(_ctypes.dlsym(_libc, "syscall"))
_libc_ioctl = _CFunction(_ctypes.dlsym(_libc, "ioctl"))
_MAP_FAILED = (1 << (8 * _ctypes.sizeof(_Word))) - 1


_arrays: dict[int, type] = {}


def _array_of(size: int) -> type:
    if size not in _arrays:
        _arrays[size] = type("_Bytes", (_ctypes.Array,), {"_type_": _Byte, "_length_": size})
    return _arrays[size]


class SharedPages:
    """`size` bytes of memory that the kernel shares through `fd`, from `offset` on; `view` is the whole of it.

    Python's own `mmap` looks at the descriptor first and makes a copy of it, which an iothread's filter does not allow, and
    which it would close one day even if the number is somebody else's by then, in a process that has got other numbers for its
    descriptors. Whoever has made views of `view` lets go of them before `close`, or before this object: then it is as good as
    closed. Raises: HostError.
    """

    __slots__ = ("_address", "_size", "view")

    def __init__(self, fd: int, size: int, offset: int) -> None:
        address = _libc_mmap(_Word(0), _Word(size), _Int(_PROT_READ_WRITE), _Int(_MAP_SHARED), _Int(fd), _Word(offset))
        if address == _MAP_FAILED:
            raise HostError("mmap of pages of the kernel's", _ctypes.get_errno())
        self._address, self._size = address, size
        self.view = memoryview(_array_of(size).from_address(address)).cast("B")  # type: ignore[attr-defined]

    def close(self) -> None:
        self.view.release()
        self._unmap()

    def _unmap(self, unmap: _CFunction = _libc_munmap, word: type[_Word] = _Word) -> None:
        address, self._address = getattr(self, "_address", 0), 0
        if address:
            unmap(word(address), word(self._size))

    __del__ = _unmap


def words_at(address: int, count: int) -> memoryview:
    """So many 32-bit words of memory that somebody else has mapped, and that stays there for as long as the view is used."""
    return memoryview(_array_of(4 * count).from_address(address)).cast("B").cast("I")  # type: ignore[attr-defined]


def map_readable(fd: int, length: int) -> int:
    """Map a file that nobody will change any more, for the rest of this process's life; the address. Raises: HostError."""
    address = _libc_mmap(_Word(0), _Word(length), _Int(_PROT_READ), _Int(_MAP_PRIVATE), _Int(fd), _Word(0))
    if address == _MAP_FAILED:
        raise HostError("mmap of a file", _ctypes.get_errno())
    return int(address)


def touch(address: int, length: int) -> None:
    """Have all pages of a mapping in the page tables, to be read. On a kernel before Linux 5.14 they come as they are read."""
    _libc_madvise(_Word(address), _Word(length), _Int(_MADV_POPULATE_READ))


def copy_pages(address: int, length: int) -> None:
    """Have this process's own copies of private pages, as if it had written to them. Nothing happens before Linux 5.14."""
    _libc_madvise(_Word(address), _Word(length), _Int(_MADV_POPULATE_WRITE))


class HostMapping:
    """A lazily populated mapping of `size` bytes that guest RAM lives in: of nothing, and then private and zero-filled, or
    of the file `fd` from `file_offset` on, `shared` with whoever else maps it or private to this process.

    Memory of nothing begins at a multiple of 2 MiB, or no huge page of the host's could be one of the guest's.

    `address` is where it starts in this process; `view` is the whole of it as writable bytes. Closed on process exit: a
    guest may be running on it until then. `fd` stays the caller's, and is kept here for those who pass it on. `page_size` is
    what pages the host gives and takes back at least.
    Units: bytes. Raises: HostError when the host cannot map that much.
    """

    __slots__ = ("_anchor", "_mapping", "address", "fd", "file_offset", "page_size", "shared", "size", "view")

    def __init__(self, size: int, fd: int = -1, file_offset: int = 0, shared: bool = False, page_size: int = PAGE_SIZE) -> None:
        flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
        spare = HUGE_PAGE_SIZE if fd < 0 and size >= HUGE_PAGE_SIZE else 0  # address space, to begin where we want in it
        if fd < 0:
            # Of a file the pages are reserved: with too few huge pages this call fails, not the guest's first access.
            flags |= mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            self._mapping = mmap.mmap(fd, size + spare, flags=flags, offset=file_offset)
        except (OSError, OverflowError, ValueError) as error:
            errno = error.errno or 0 if isinstance(error, OSError) else 0
            raise HostError(f"cannot map {size >> 20} MiB of guest memory", errno, "ask for less with -m") from error
        self.fd = fd
        self.file_offset = file_offset
        self.shared = shared
        self.page_size = page_size
        self.size = size
        self._anchor = _Byte.from_buffer(self._mapping)
        address = _ctypes.addressof(self._anchor)
        start = -address % HUGE_PAGE_SIZE if spare else 0
        self.view = memoryview(self._mapping)[start : start + size]
        self.address = address + start

    def map_file(self, offset: int, fd: int, file_offset: int, length: int) -> None:
        """Lay `length` bytes of a file over the mapping at `offset`, copy-on-write: the file is never written.

        Only over memory that has no file of its own: others who map that would not see it, and huge pages cannot be split.
        Both offsets must be page-aligned; the tail of the last page beyond the end of the file reads as zero.
        """
        if offset < 0 or length <= 0 or offset + length > self.size or (offset | file_offset) % PAGE_SIZE or self.fd >= 0:
            raise ValueError(f"map_file: [{offset:#x}, +{length:#x}) from file offset {file_offset:#x}")
        result = _libc_mmap(_Word(self.address + offset), _Word(length), _Int(_PROT_READ_WRITE),
                            _Int(_MAP_PRIVATE | _MAP_FIXED), _Int(fd), _Word(file_offset))
        if result == _MAP_FAILED:
            raise HostError("mmap of a file over guest memory", _ctypes.get_errno())

    def unmap_files(self) -> None:
        """Be anonymous memory again, all zero, whatever files `map_file` has laid over it."""
        result = _libc_mmap(_Word(self.address), _Word(self.size), _Int(_PROT_READ_WRITE),
                            _Int(_MAP_PRIVATE | _MAP_FIXED | mmap.MAP_ANONYMOUS | _MAP_NORESERVE), _Int(-1), _Word(0))
        if result == _MAP_FAILED:
            raise HostError("mmap of guest memory anew", _ctypes.get_errno())

    def discard(self) -> None:
        """Drop every page of this process's own: anonymous memory reads as zero again, a private mapping of a file as the
        file. Shared memory becomes zero, in the file and for all who map it.
        """
        if self.shared:
            self._remove()
        elif _libc_madvise(_Word(self.address), _Word(self.size), _Int(_MADV_DONTNEED)) == _MAP_FAILED:
            raise HostError("madvise(MADV_DONTNEED) of guest memory", _ctypes.get_errno())

    def _remove(self) -> None:
        if _libc_madvise(_Word(self.address), _Word(self.size), _Int(_MADV_REMOVE)) != _MAP_FAILED:
            return
        errno = _ctypes.get_errno()
        if errno not in (95, 38):  # EOPNOTSUPP, ENOSYS: not every file system can make holes
            raise HostError("madvise(MADV_REMOVE) of guest memory", errno)
        zeroes = bytes(_CLEAR_STEP)
        for start in range(0, self.size, _CLEAR_STEP):
            part = self.view[start : start + _CLEAR_STEP]
            part[:] = zeroes[: len(part)]

    def populate(self, offset: int, length: int) -> None:
        """Have the host allocate these pages now; what is in them stays. Page-aligned. Thread: any, without the GIL.

        Raises: HostError, also where touching the memory would have been a SIGBUS: no huge page left, file system full.
        """
        if _libc_madvise(_Word(self.address + offset), _Word(length), _Int(_MADV_POPULATE_WRITE)) != _MAP_FAILED:
            return
        errno = _ctypes.get_errno()
        if errno != 22:
            raise HostError(f"cannot allocate {length >> 20} MiB of guest memory", errno,
                            "there is not that much memory, or too few huge pages, or the file system is full")
        if self.fd >= 0:  # a kernel before Linux 5.14
            try:
                posix.posix_fallocate(self.fd, self.file_offset + offset, length)
            except OSError as error:
                raise HostError.from_os(f"cannot allocate {length >> 20} MiB of guest memory", error) from error
        view = self.view[offset : offset + length : PAGE_SIZE]
        view[:] = bytes(view)

    def bind(self, policy: int, nodes: tuple[int, ...]) -> None:
        """Take the pages from these NUMA nodes of the host, by a policy of mbind(2). Raises: HostError."""
        mask = 0
        for node in nodes:
            mask |= 1 << node
        words = (_Word * 2)(mask & (1 << 64) - 1, mask >> 64)
        if _libc_syscall(_Word(_NR_MBIND), _Word(self.address), _Word(self.size), _Word(policy),
                         _Word(_ctypes.addressof(words)), _Word(129), _Word(0)) == _MAP_FAILED:
            raise HostError("mbind of guest memory", _ctypes.get_errno())

    def dont_dump(self) -> None:
        """Leave guest memory out of core dumps (`dump-guest-core=off`)."""
        self._mapping.madvise(mmap.MADV_DONTDUMP)


def is_zero(view: memoryview) -> bool:
    """Is every byte of a part of a mapping zero? Nothing is copied: bytes that equal themselves, shifted by one, are alike."""
    if len(view) < 2:
        return not any(view)
    if view[0]:
        return False
    address = _ctypes.addressof(_Byte.from_buffer(view))
    return not _libc_memcmp(_Word(address), _Word(address + 1), _Word(len(view) - 1)) & 0xFFFF_FFFF


def differing_pages(one: memoryview, other: memoryview, page: int) -> list[int]:
    """Where two buffers of one length, of whole pages, differ: the offsets of those pages. Both must be writable."""
    length = len(one)
    if not length:
        return []
    first, second = _ctypes.addressof(_Byte.from_buffer(one)), _ctypes.addressof(_Byte.from_buffer(other))

    def same(offset: int, size: int) -> bool:
        return not _libc_memcmp(_Word(first + offset), _Word(second + offset), _Word(size)) & 0xFFFF_FFFF

    if same(0, length):
        return []
    found: list[int] = []
    for block in range(0, length, 16 * page):
        if not same(block, min(16 * page, length - block)):
            found += [at for at in range(block, min(block + 16 * page, length), page) if not same(at, page)]
    return found


def release(view: memoryview, shared: bool = False, page_size: int = PAGE_SIZE) -> None:
    """Give the host back the pages that lie wholly in `view`, a part of a mapping; they read as zero when used again.

    Of a file mapping that is not `shared` they read as the file again. Raises: HostError.
    """
    if not len(view):
        return
    start = _ctypes.addressof(_Byte.from_buffer(view))
    first, end = -(-start // page_size) * page_size, (start + len(view)) // page_size * page_size
    if first < end:
        advice = _MADV_REMOVE if shared else _MADV_DONTNEED
        if _libc_madvise(_Word(first), _Word(end - first), _Int(advice)) == _MAP_FAILED:
            raise HostError("madvise to release guest memory", _ctypes.get_errno())


def address_of(buffer: bytearray) -> tuple[int, object]:
    """The address of a buffer, and the anchor to keep for as long as the address is used."""
    anchor = _Byte.from_buffer(buffer)
    return _ctypes.addressof(anchor), anchor


def address_of_view(view: memoryview) -> int:
    """Where a writable view begins. It is valid for as long as what the view is of."""
    return _ctypes.addressof(_Byte.from_buffer(view))


def syscall(number: int, *arguments: int) -> int:
    """A system call by its number. Raises: OSError."""
    result = _libc_syscall(_Word(number), *map(_Word, arguments))
    if result == _MAP_FAILED:
        errno = _ctypes.get_errno()
        raise OSError(errno, posix.strerror(errno))
    return int(result)


def use_one_heap() -> None:
    """Let all threads share the C library's first heap: the interpreter's lock keeps them apart anyway. Otherwise each of the
    first eight gets a heap, and the ninth reads the number of processors from a file first, which it may not by then.
    """
    try:
        mallopt = _CFunction(_ctypes.dlsym(_libc, "mallopt"))
    except OSError:
        return  # another C library, with other ways
    mallopt(_Int(_M_ARENA_MAX), _Int(1))


def trim_heap() -> None:
    """Give back pages of the C library's heap that nothing is in."""
    try:
        malloc_trim = _CFunction(_ctypes.dlsym(_libc, "malloc_trim"))
    except OSError:
        return  # another C library, with other ways
    malloc_trim(_Word(0))


def machine_code(code: bytes) -> _CFunction:
    """A function without arguments that is `code`, in a page of its own that is never writable. Raises: OSError."""
    fd = posix.memfd_create("stratovirt-code", posix.MFD_CLOEXEC)
    try:
        posix.write(fd, code)
        address = _libc_mmap(_Word(0), _Word(PAGE_SIZE), _Int(_PROT_READ_EXECUTE), _Int(_MAP_PRIVATE), _Int(fd), _Word(0))
    finally:
        posix.close(fd)
    if address == _MAP_FAILED:
        errno = _ctypes.get_errno()
        raise OSError(errno, posix.strerror(errno))
    return _CFunction(address)


def ioctl_address(fd: int, request: int, address: int) -> None:
    """An ioctl whose argument is an address by value: `fcntl.ioctl` takes no integer beyond a signed 32-bit one.

    Raises: OSError.
    """
    if _libc_ioctl(_Int(fd), _Word(request), _Word(address)) == _MAP_FAILED:
        errno = _ctypes.get_errno()
        raise OSError(errno, posix.strerror(errno))
