"""What a guest finds in memory when it starts: kernel, initrd, and what the architecture's part of this writes beside them.

The kernel file is mapped, not read: whole pages of its segments lie copy-on-write in guest RAM, and only the odd ends are
copied. Memory that is a file itself (`mem-share`, `-mem-path`) is read into instead. Everything is put in place again by
`load` after a reset.
"""

from __future__ import annotations

import mmap
import posix
from _stat import S_ISDIR, S_ISREG  # `stat` itself is a module on top of it

from stratovirt.errors import ConfigError, HostError
from stratovirt.hostmap import PAGE_SIZE
from stratovirt.loader.image import page_parts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.config.vm import VmConfig
    from stratovirt.hypervisor.kvm.vcpu import KvmVcpu
    from stratovirt.loader.image import KernelImage, Segment
    from stratovirt.memory import GuestMemory


class BootFile:
    """A kernel or initrd file, open for the life of the machine. Raises: ConfigError naming `option`."""

    __slots__ = ("fd", "path", "size")

    def __init__(self, path: str, option: str) -> None:
        self.path = path
        try:
            # O_NONBLOCK: opening a FIFO by mistake must not hang
            self.fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK)
        except (OSError, ValueError) as error:
            why = posix.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
            raise ConfigError(why, option=option, value=path, accepted="a readable regular file") from error
        status = posix.fstat(self.fd)
        if not S_ISREG(status.st_mode):
            posix.close(self.fd)
            kind = "a directory" if S_ISDIR(status.st_mode) else "not a regular file"
            raise ConfigError(f"this is {kind}", option=option, value=path, accepted="a readable regular file")
        self.size = status.st_size

    def map(self) -> memoryview:
        """The whole file as read-only bytes."""
        if self.size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(self.fd, self.size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ))

    def read_into(self, view: memoryview, offset: int) -> None:
        """Copy part of the file straight into guest RAM."""
        while view:
            done = posix.preadv(self.fd, [view], offset)
            if done == 0:
                raise HostError(f"{self.path} became shorter while it was read")
            view, offset = view[done:], offset + done


class UnpackedFile(BootFile):
    """A kernel that was unpacked, as a file in memory: mapped like any other, and still there for a reset."""

    __slots__ = ()

    def __init__(self, path: str, data: bytes) -> None:
        self.path = path
        try:
            self.fd = posix.memfd_create("stratovirt-kernel", posix.MFD_CLOEXEC)
            done = 0
            while done < len(data):
                done += posix.write(self.fd, memoryview(data)[done:])
        except OSError as error:
            raise HostError.from_os(f"memfd_create for the {len(data) >> 20} MiB of the unpacked kernel", error) from error
        self.size = len(data)


class Boot:
    """The boot of one machine. An architecture says what its kernels are, where they go, and what lies beside them.

    Raises: ConfigError when a file is not what its option says, or does not fit.
    """

    kernel: KernelImage

    def __init__(self, config: VmConfig, ram: list[tuple[int, int]]) -> None:
        self._ram_size = config.memory_size
        self._kernel_file = BootFile(config.kernel, "-kernel")
        kernel_end = self.identify(config.kernel, ram)
        self._initrd_file: BootFile | None = None
        self._initrd_at = (0, 0)
        if config.initrd:
            self._open_initrd(config.initrd, ram, kernel_end)

    # -- what an architecture implements

    def identify(self, path: str, ram: list[tuple[int, int]]) -> int:
        """Set `kernel` from `_kernel_file`, placed in `ram`; the first address behind it."""
        raise NotImplementedError

    def write_tables(self, memory: GuestMemory) -> None:
        """Write what the kernel is told about the machine."""
        raise NotImplementedError

    def enter(self, vcpu: KvmVcpu) -> None:
        """Point the boot processor at the kernel's entry."""
        raise NotImplementedError

    def _open_initrd(self, path: str, ram: list[tuple[int, int]], kernel_end: int) -> None:
        from stratovirt.loader.initrd import identify_initrd, place_initrd

        file = BootFile(path, "-initrd")
        identify_initrd(file.map(), path)
        address = place_initrd(file.size, ram, self.kernel.initrd_addr_max, kernel_end, path)
        self._initrd_file = file
        self._initrd_at = (address, file.size)

    # -- memory

    def load(self, memory: GuestMemory) -> None:
        """Put everything into RAM, which is zero or holds an earlier load. Thread: main, while no vCPU runs."""
        for segment in self.kernel.segments:
            if memory.region(segment.address, segment.memory_size).fd >= 0:
                self._read_segment(memory, segment)
                continue
            parts = page_parts(segment)
            if parts.mapped is not None:
                self._map(memory, self._kernel_file, *parts.mapped)
            for offset, address, length in parts.copied:
                self._kernel_file.read_into(memory.slice(address, length), offset)
        if self._initrd_file is not None:
            address, size = self._initrd_at
            # Memory with a file of its own is shared with those who would not see a mapping of this process.
            whole = size & -PAGE_SIZE if memory.region(address, size).fd < 0 else 0
            if whole:
                self._map(memory, self._initrd_file, 0, address, whole)
            if size > whole:
                self._initrd_file.read_into(memory.slice(address + whole, size - whole), whole)
        self.write_tables(memory)

    def _read_segment(self, memory: GuestMemory, segment: Segment) -> None:
        """Copy a segment into memory that has a file of its own, which may not have been empty."""
        view = memory.slice(segment.address, segment.memory_size)
        self._kernel_file.read_into(view[: segment.file_size], segment.file_offset)
        view[segment.file_size :] = bytes(segment.memory_size - segment.file_size)

    @staticmethod
    def _map(memory: GuestMemory, file: BootFile, offset: int, address: int, length: int) -> None:
        region = memory.region(address, length)
        region.host.map_file(address - region.base, file.fd, offset, length)
