"""Guest memory out of a file: a memfd, a file of the user's, or a temporary one in a directory, hugetlbfs among them.

All of a machine's memory is one file, its regions one behind the other. The plain case, anonymous and private memory, does
not come here.

    what is asked for                   what is mapped
    mem-share=on, memory-backend-memfd  a memfd
    -mem-path DIRECTORY                 a temporary file in it, that has no name
    -mem-path FILE                      that file: extended if it is empty, and an error if it is too small

It is mapped shared with `share`, else private: the guest then sees what is in the file, and its writes stay in this process.
"""

from __future__ import annotations

import _thread
import os
import stat

from stratovirt.errors import ConfigError, HostError
from stratovirt.hostmap import PAGE_SIZE, HostMapping
from stratovirt.memory import RamRegion
from stratovirt.sparse import unnamed_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.config.vm import RamConfig

_POLICIES = {"default": 0, "preferred": 1, "bind": 2, "interleave": 3}


def create_regions(ram: RamConfig, ranges: list[tuple[int, int]], threads: int) -> list[RamRegion]:
    """Map the memory of a machine with RAM at `ranges`; `threads` allocate it where that is asked for.

    Raises: ConfigError naming the option, HostError when the host has not so much.
    """
    size = sum(length for _, length in ranges)
    fd, page_size = -1, PAGE_SIZE
    if ram.kind == "file":
        fd, page_size = _open(ram, size)
        for _, length in ranges:
            if length % page_size:
                raise ConfigError(f"the pages of this file system have {page_size >> 10} KiB", option="-m",
                                  value=f"{size >> 20}M", accepted=f"a multiple of {page_size >> 10} KiB")
        _extend(ram, fd, size)
    elif ram.kind == "memfd" or ram.share:
        try:
            fd = os.memfd_create("stratovirt-memory", os.MFD_CLOEXEC)
            os.ftruncate(fd, size)
        except OSError as error:
            raise HostError.from_os(f"memfd_create for {size >> 20} MiB of guest memory", error) from error
    regions: list[RamRegion] = []
    offset = 0
    for base, length in ranges:
        try:
            host = HostMapping(length, fd, offset if fd >= 0 else 0, ram.share and fd >= 0, page_size)
        except HostError as error:
            hint = f"there are too few huge pages in {ram.path}" if page_size > PAGE_SIZE else error.hint
            raise ConfigError(f"{error.operation}: {os.strerror(error.errno)}; {hint}", option=ram.option,
                              value=ram.path or None, accepted="memory that the host has") from error
        regions.append(RamRegion(base, host))
        offset += length
    if ram.host_nodes and ram.policy != "default":
        for region in regions:
            try:
                region.host.bind(_POLICIES[ram.policy], ram.host_nodes)
            except HostError as error:
                raise ConfigError(str(error), option=f"{ram.option.partition(',')[0]},host-nodes",
                                  value=":".join(map(str, ram.host_nodes)), accepted="NUMA nodes that this host has") from error
    if ram.prealloc:
        for region in regions:
            populate(region.host, threads)
    return regions


def _open(ram: RamConfig, size: int) -> tuple[int, int]:
    """The file that the memory is to be in, and the size of its pages."""
    path = ram.path
    try:
        if os.path.isdir(path):
            fd = unnamed_file(path)
        else:
            # O_NONBLOCK: opening a FIFO by mistake must not hang
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except (OSError, ValueError) as error:
        why = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
        raise _refuse(ram, why, "a directory or file that can be written") from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise _refuse(ram, "this is not a regular file", "a directory or a regular file")
    huge = file_system(status.st_dev) == "hugetlbfs"
    return fd, os.fstatvfs(fd).f_bsize if huge else PAGE_SIZE


def _extend(ram: RamConfig, fd: int, size: int) -> None:
    present = os.fstat(fd).st_size
    if present >= size:
        return
    if present:
        raise _refuse(ram, f"the file has {present} bytes, and the memory {size}",
                      f"a file of at least {size >> 20} MiB, or an empty one")
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        raise _refuse(ram, f"cannot be made {size >> 20} MiB long: {os.strerror(error.errno or 0)}",
                      "a place for all of the memory") from error


def _refuse(ram: RamConfig, problem: str, accepted: str) -> ConfigError:
    return ConfigError(problem, option=ram.option, value=ram.path, accepted=accepted)


def file_system(device: int) -> str:
    """The type of the mounted file system with the number `device`, "" if it is not to be seen."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:  # 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw
                fields = line.split()
                if fields[2] == wanted:
                    return fields[fields.index("-") + 1]
    except OSError:
        return ""  # a jail without /proc: pages of 4 KiB are assumed, and mmap says if that is wrong
    return ""


def populate(host: HostMapping, threads: int) -> None:
    """Allocate all of `host` now, a part in each of so many threads. Raises: HostError, the first of any of them."""
    share = -(-host.size // max(threads, 1))
    share = -(-share // host.page_size) * host.page_size
    parts = [(start, min(share, host.size - start)) for start in range(0, host.size, share)]
    failures: list[HostError] = []
    done = _thread.allocate_lock()
    left = len(parts) - 1
    if left:
        done.acquire()
    counter = _thread.allocate_lock()

    def work(start: int, length: int) -> None:
        nonlocal left
        try:
            host.populate(start, length)
        except HostError as error:
            failures.append(error)
        with counter:
            left -= 1
            last = left == 0
        if last:
            done.release()

    for start, length in parts[1:]:
        _thread.start_new_thread(work, (start, length))
    try:
        host.populate(*parts[0])
    except HostError as error:
        failures.append(error)
    done.acquire()
    if failures:
        raise failures[0]
