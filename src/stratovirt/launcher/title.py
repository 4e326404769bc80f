"""What `ps` shows of a machine: its own command line, and not the launcher's, from which it has its memory.

The kernel reads a process's command line from the process's memory, at addresses that prctl(PR_SET_MM) can change. It takes all
addresses of that kind at once (PR_SET_MM_MAP, for which no privilege is needed), so the others are asked for first.
"""

from __future__ import annotations

import posix
import struct

from stratovirt import log
from stratovirt.errors import HostError
from stratovirt.hostmap import ARCHITECTURE, HostMapping, address_of, syscall

_PRCTL, _BRK = (157, 12) if ARCHITECTURE == "x86_64" else (167, 214)
_PR_SET_NAME, _PR_SET_MM, _PR_SET_MM_MAP = 15, 35, 14
_NAME = b"stratovirt"
# struct prctl_mm_map { u64 start_code, end_code, start_data, end_data, start_brk, brk, start_stack, arg_start, arg_end,
# env_start, env_end, *auxv; u32 auxv_size, exe_fd; }
_MAP = struct.Struct("<12QII")
_NO_FILE = 0xFFFF_FFFF
# Where /proc/self/stat has them, counted from behind the name, which may contain anything. The end of the heap is not there.
_CODE, _STACK, _DATA, _HEAP, _ENVIRONMENT = 23, 25, 42, 44, 47

_SHOWN: list[HostMapping] = []  # the kernel has the address until the process ends


def show(arguments: list[str]) -> None:
    """Be `stratovirt` with these arguments from now on. Thread: main, before its filter.

    Where the kernel does not take it, `ps` goes on showing the launcher's.
    """
    text = b"\0".join([_NAME, *(word.encode("utf-8", "surrogateescape") for word in arguments)]) + b"\0"
    try:
        fd = posix.open("/proc/self/stat", posix.O_RDONLY | posix.O_CLOEXEC)
        try:
            words = posix.read(fd, 4096).rpartition(b") ")[2].split()
        finally:
            posix.close(fd)
        code, data, environment = ([int(word) for word in words[first : first + 2]] for first in (_CODE, _DATA, _ENVIRONMENT))
        place = HostMapping(len(text))
        place.view[:] = text
        end = place.address + len(text)
        packed = bytearray(_MAP.pack(*code, *data, int(words[_HEAP]), syscall(_BRK, 0), int(words[_STACK]), place.address, end,
                                     *environment, 0, 0, _NO_FILE))
        address, _anchor = address_of(packed)
        syscall(_PRCTL, _PR_SET_MM, _PR_SET_MM_MAP, address, _MAP.size, 0)
        _SHOWN.append(place)
        name = bytearray(_NAME + b"\0")
        address, _name_anchor = address_of(name)
        syscall(_PRCTL, _PR_SET_NAME, address, 0, 0, 0)
    except (OSError, HostError, ValueError, IndexError) as error:
        log.debug(f"ps shows the launcher's command line: {error}")
