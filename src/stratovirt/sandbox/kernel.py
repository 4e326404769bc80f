"""Filters into the kernel: `Sandbox` is made before the first thread, and every thread then confines itself.

Facts about Linux that this rests on:
- A filter holds for the thread that installs it and for those it creates later; it is never taken back, and a second one
  can only forbid more. Without privileges the kernel wants no_new_privs first, which threads inherit as well.
- SECCOMP_RET_TRAP raises SIGSYS on the thread at the refused call, with what the filter returned in si_errno. If the signal
  is blocked, because its handler is running, the kernel ends the whole process with it.
- Before Linux 5.16 a thread with a filter is switched to mitigations of speculation that others do not have, and with it the
  guest on a vCPU's thread; SPEC_ALLOW leaves that as the host's administrator has set it.

The handler is machine code in a page of its own (handler_*.S): it works on any thread, with or without the
interpreter's lock. Nothing else of this process is ever made executable once the filters are in place.
"""

from __future__ import annotations

import posix
import struct

from stratovirt.errors import HostError
from stratovirt.hostmap import ARCHITECTURE, PAGE_SIZE, HostMapping, address_of, syscall, use_one_heap
from stratovirt.sandbox import KIND_NAMES

TYPE_CHECKING = False
if TYPE_CHECKING or ARCHITECTURE != "aarch64":
    from stratovirt.sandbox.tables_x86_64 import CALL_NAMES, FILTERS, HANDLER

    _MPROTECT, _RT_SIGACTION, _PRCTL, _SECCOMP = 10, 13, 157, 317
else:
    from stratovirt.sandbox.tables_aarch64 import CALL_NAMES, FILTERS, HANDLER

    _MPROTECT, _RT_SIGACTION, _PRCTL, _SECCOMP = 226, 134, 167, 277
_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER, _GET_ACTION_AVAIL, _SPEC_ALLOW = 1, 2, 1 << 2
_PROT_READ, _PROT_EXEC = 1, 4
_SIGSYS, _ALL_SIGNALS = 31, 0xFFFF_FFFF_FFFF_FFFF
_SA_SIGINFO, _SA_RESTORER = 0x4, 0x0400_0000
_EINVAL, _EACCES = 22, 13

_PAGE = PAGE_SIZE
_DATA_PAGES = 2
_KIND_SIZE = 24
_NAMES_AT = 8 + 4 * _KIND_SIZE
_DATA_MARK = b"startvit"  # in the handler's code, where the address of its data goes
# In the filters' code: see rules.py.
_PID_MARK = struct.pack("<I", 0x7E57_C0DE)
_IO_URING_MARK, _VHOST_USER_MARK, _ALLOWED = (
    struct.pack("<HBBI", 0x06, 0, 0, answer) for answer in (0x0005_000D, 0x0005_0001, 0x7FFF_0000))
_TRAP_MARK, _KILLED = struct.pack("<H", 0x0003), struct.pack("<I", 0x8000_0000)

_FOREVER: list[HostMapping] = []  # the handler's pages: the kernel has their address until the process ends
_HINT = "-disable-seccomp runs the machine without filters"


class Sandbox:
    """`log_fd` is where the log goes. `io_uring`: threads that serve disks may use it. `vhost_user`: threads may talk to the
    back ends of devices. It holds nobody up before `begin`, and then each thread from `confine` on.

    Thread: the main thread, before it starts others. Raises: HostError.
    """

    def __init__(self, log_fd: int, io_uring: bool = False, vhost_user: bool = False) -> None:
        marks = ((_IO_URING_MARK, io_uring), (_VHOST_USER_MARK, vhost_user))
        self.grants = io_uring, vhost_user
        self._granted = [mark for mark, granted in marks if granted]
        self._pages: HostMapping | None = None
        self._ready: dict[int, bytearray] = {}
        use_one_heap()
        _check_host()
        self._install_handler(log_fd)

    def begin(self) -> None:
        """From here on this process gets no new privileges. Raises: HostError."""
        try:
            syscall(_PRCTL, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        except OSError as error:
            raise HostError.from_os("prctl(PR_SET_NO_NEW_PRIVS)", error, _HINT) from error

    def _install_handler(self, log_fd: int) -> None:
        pages = HostMapping((1 + _DATA_PAGES) * _PAGE)
        data_at = pages.address + _PAGE
        pages.view[: len(HANDLER)] = HANDLER.replace(_DATA_MARK, struct.pack("<Q", data_at))
        kinds = "".join(name.ljust(_KIND_SIZE, "\0") for name in KIND_NAMES).encode()
        calls = CALL_NAMES.split(" ")
        data = struct.pack("<II", log_fd, len(calls)) + kinds
        data = data.ljust(_NAMES_AT, b"\0") + "\0".join(calls).encode() + b"\0"
        pages.view[_PAGE : _PAGE + len(data)] = data
        try:
            syscall(_MPROTECT, pages.address, _PAGE, _PROT_READ | _PROT_EXEC)
        except OSError as error:
            if error.errno != _EACCES:
                raise HostError.from_os("mprotect of the handler of SIGSYS", error, _HINT) from error
            return  # a host that lets nobody make code (SELinux): the filters kill without a line in the log
        # struct kernel_sigaction { handler; unsigned long flags; restorer; u64 mask; }; it never returns to the restorer
        action = bytearray(struct.pack("<QQQQ", pages.address, _SA_SIGINFO | _SA_RESTORER, pages.address, _ALL_SIGNALS))
        address, _anchor = address_of(action)
        try:
            syscall(_RT_SIGACTION, _SIGSYS, address, 0, 8)
        except OSError as error:
            raise HostError.from_os("the handler of SIGSYS", error, _HINT) from error
        self._pages = pages
        _FOREVER.append(pages)

    def move_log(self, log_fd: int) -> None:
        """The log goes to another descriptor."""
        if self._pages is not None:
            self._pages.view[_PAGE : _PAGE + 4] = struct.pack("<I", log_fd)

    def confine(self, kind: int) -> None:
        """From now on this thread, and those that it starts, can do what its kind may and no more. Raises: HostError."""
        program = self._ready.get(kind) or bytearray(self._program(kind))
        address, _anchor = address_of(program)
        # struct sock_fprog { unsigned short len; struct sock_filter *filter; }
        header = bytearray(struct.pack("<HxxxxxxQ", len(program) // 8, address))
        header_at, _header_anchor = address_of(header)
        try:
            try:
                syscall(_SECCOMP, _SET_MODE_FILTER, _SPEC_ALLOW, header_at)
            except OSError as error:
                if error.errno != _EINVAL:
                    raise
                syscall(_SECCOMP, _SET_MODE_FILTER, 0, header_at)  # before Linux 4.17
        except OSError as error:
            raise HostError.from_os("seccomp(SECCOMP_SET_MODE_FILTER)", error, _HINT) from error

    def prepare(self) -> None:
        """Have the filters ready before a thread asks for one. In the process that they are for."""
        for kind in range(len(FILTERS)):
            self._ready[kind] = bytearray(self._program(kind))

    def _program(self, kind: int) -> bytes:
        program = FILTERS[kind].replace(_PID_MARK, struct.pack("<I", posix.getpid()))
        for mark in self._granted:
            program = program.replace(mark, _ALLOWED)
        if self._pages is None:
            program = b"".join(
                code[:4] + _KILLED if code[0] == 0x06 and code[6:] == _TRAP_MARK else code
                for code in (program[at : at + 8] for at in range(0, len(program), 8)))
        return program


def _check_host() -> None:
    """Find out before the guest runs what every thread would find out by itself. Raises: HostError."""
    action = bytearray(struct.pack("<I", 0x0003_0000))  # SECCOMP_RET_TRAP
    address, _anchor = address_of(action)
    try:
        syscall(_SECCOMP, _GET_ACTION_AVAIL, 0, address)
    except OSError as error:
        if error.errno != _EINVAL:  # a kernel before Linux 4.14, which may have filters nevertheless
            raise HostError.from_os("this host has no system call filters: seccomp(2)", error, _HINT) from error
