"""Letting go of a virtual machine without waiting until KVM has taken it apart.

Destroying a VM with interrupt chips and a timer waits for six SRCU grace periods, 5 to 25 ms in all, and whoever closes the
last reference does the waiting: at the end of a process, everybody who waits for that process. So the last reference is
left to the kernel's garbage collector for unix sockets: it travels in a message that waits in a socket, to which the only
reference is in the same message. When the process has ended, the collector finds that nobody can receive it and closes what
it holds, since Linux 6.9 in a worker of its own. Older kernels do it while the process ends, as they would anyway.
"""

from __future__ import annotations

import posix
import struct

from stratovirt import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket as _socket
else:
    import _socket


def close_behind(fd: int) -> None:
    """From now on, keep what `fd` refers to open until this process has ended, and have it closed soon after that.

    A failure has no consequence but that the process waits, as it would have without.
    """
    try:
        sender, keeper = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
        rights = struct.pack("ii", keeper.fileno(), fd)
        sender.sendmsg([b"\0"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
        keeper.detach()  # both stay open until the process ends: the end of the second is what calls the collector
        sender.detach()
    except OSError:
        return


def let_go(fd: int) -> None:
    """Close `fd` now, and have what it refers to taken apart by somebody else, as above.

    A failure has no consequence but that the caller waits.
    """
    sockets: tuple[_socket.socket, ...] = ()
    try:
        sender, keeper = sockets = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
        rights = struct.pack("ii", keeper.fileno(), fd)
        sender.sendmsg([b"\0"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
    except OSError as error:
        log.debug(f"a VM is closed here, which takes a while: {error.strerror}")
    posix.close(fd)
    for one in reversed(sockets):  # the sender last: its end calls the collector, and by then the keeper must look lost
        one.close()
