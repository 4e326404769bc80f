"""The launcher's socket: handed over by systemd, or bound at its path under a lock that lasts as long as the launcher.

The lock, and not the socket, says whether a launcher is alive: a socket file stays when its process is killed, and two
launchers that start at once must not both take it away from the other. It is a file next to the socket and is never removed.
"""

from __future__ import annotations

import _socket
import fcntl
import os
import stat

from stratovirt.errors import ConfigError
from stratovirt.launcher import wire

BACKLOG = 1024
UNIX_PATH_MAX = 107  # sun_path holds 108 bytes, the last a NUL
SYSTEMD_FD = 3


class LauncherSocket:
    """A listening AF_UNIX SOCK_SEQPACKET socket. `remove` takes its path away, if it is ours."""

    def __init__(self, socket: _socket.socket, path: bytes = b"", lock: int = -1) -> None:
        self.socket = socket
        self.path = path
        self._lock = lock  # held for life

    def remove(self) -> None:
        if self.path:
            try:
                os.unlink(self.path)
            except FileNotFoundError:
                pass  # somebody was faster
            self.path = b""


def from_systemd() -> LauncherSocket | None:
    """The socket of the LISTEN_FDS protocol; None when there is none for this process. Raises: ConfigError."""
    count, pid = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if not count or pid != str(os.getpid()):
        return None

    def refuse(problem: str) -> ConfigError:
        return ConfigError(problem, option="LISTEN_FDS", value=count,
                           accepted="one listening socket: ListenSequentialPacket= in the socket unit, once")

    if count != "1":
        raise refuse(f"{count} sockets are handed over")
    try:
        socket = _socket.socket(fileno=SYSTEMD_FD)
        fits = (socket.family == _socket.AF_UNIX and socket.type == _socket.SOCK_SEQPACKET
                and socket.getsockopt(_socket.SOL_SOCKET, _socket.SO_ACCEPTCONN))
    except OSError as error:
        raise refuse(f"descriptor {SYSTEMD_FD}: {os.strerror(error.errno or 0)}") from error
    if not fits:
        raise refuse("it is not a listening AF_UNIX SOCK_SEQPACKET socket")
    os.set_inheritable(SYSTEMD_FD, False)
    return LauncherSocket(socket)


def bind(path: bytes, directory: bytes = b"") -> LauncherSocket:
    """Listen at `path`; `directory` is made first, for this user alone. Raises: ConfigError."""
    shown = os.fsdecode(path)

    def refuse(problem: str) -> ConfigError:
        return ConfigError(problem, option="--socket", value=shown,
                           accepted=f"a path of at most {UNIX_PATH_MAX} bytes where this user can make files")

    if not path or len(path) > UNIX_PATH_MAX or b"\0" in path:
        raise refuse(f"not a path for a unix socket ({len(path)} bytes)")
    try:
        if directory:
            _make_private(directory)
        lock = _lock(path)
        try:
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise refuse("the path is taken by something that is not a socket")
            os.unlink(path)  # of a launcher that was killed: it would have the lock
        except FileNotFoundError:
            pass  # as it should be
        socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
        os.fchmod(socket.fileno(), 0o600)  # bind gives the file the mode of the socket: it is never open to others
        socket.bind(path)
        socket.listen(BACKLOG)
    except OSError as error:
        raise refuse(os.strerror(error.errno or 0)) from error
    return LauncherSocket(socket, path, lock)


def _make_private(directory: bytes) -> None:
    try:
        os.mkdir(directory, 0o700)
    except FileExistsError:
        trouble = wire.trouble_with(directory)
        if trouble:
            raise ConfigError(trouble, option="--socket", value=os.fsdecode(directory),
                              accepted="a directory of this user's that nobody else has rights to") from None


def _lock(path: bytes) -> int:
    fd = os.open(path + b".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise ConfigError("a launcher is running there already", option="--socket", value=os.fsdecode(path),
                          accepted="a path without one") from None
    return fd
