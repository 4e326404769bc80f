"""Listening sockets, for QMP and for character devices.

A unix socket is created with mode 0600 from the first moment, replaces a socket file that nobody listens on any more, and
never anything else; it is removed at close if it is still ours. Only `_socket`, the C half of the socket module: this is on
the way to a running guest.
"""

from __future__ import annotations

import _socket
import os
import stat

from stratovirt.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

UNIX_PATH_MAX = 107  # sun_path holds 108 bytes, the last a NUL
BACKLOG = 128

_ECONNREFUSED, _EADDRINUSE = 111, 98


def accept(listener: _socket.socket) -> _socket.socket:
    """The next client, nonblocking. Raises: OSError, BlockingIOError when nobody waits."""
    fd, _address = listener._accept()  # type: ignore[attr-defined]  # what socket.accept is made of
    # The kind is given, or Python asks the kernel for it.
    client = _socket.socket(listener.family, _socket.SOCK_STREAM, listener.proto, fileno=fd)
    client.setblocking(False)
    return client


class Listener:
    """A bound, listening, nonblocking socket. `fd` is for the event loop; `close` also removes the path."""

    __slots__ = ("_identity", "_path", "socket")

    def __init__(self, socket: _socket.socket, path: str = "", identity: tuple[int, int] = (0, 0)) -> None:
        self.socket = socket
        self._path = path
        self._identity = identity

    @property
    def fd(self) -> int:
        return self.socket.fileno()

    def accept(self) -> _socket.socket:
        return accept(self.socket)

    def close(self) -> None:
        """Stop listening and remove the path, unless somebody else has put something there since. Idempotent."""
        self.socket.close()
        path, self._path = self._path, ""
        if not path:
            return
        try:
            status = os.lstat(path)
            if (status.st_dev, status.st_ino) == self._identity:
                os.unlink(path)
        except FileNotFoundError:
            return
        except OSError as error:
            from stratovirt import log

            log.warn(f"cannot remove the socket {path}: {error.strerror}")


def listen_unix(path: str, option: str) -> Listener:
    """Listen on the unix socket `path`. Raises: ConfigError naming `option` and saying what is in the way."""
    accepted = f"a path of at most {UNIX_PATH_MAX} bytes in a directory that can be written to"

    def refuse(problem: str) -> ConfigError:
        return ConfigError(problem, option=option, value=path, accepted=accepted)

    encoded = os.fsencode(path)
    if not encoded or b"\0" in encoded:
        raise refuse("not a path for a unix socket")
    if len(encoded) > UNIX_PATH_MAX:
        raise refuse(f"the socket path is too long: {len(encoded)} bytes")
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK | _socket.SOCK_CLOEXEC)
    try:
        os.fchmod(listener.fileno(), 0o600)  # bind gives the file the mode of the socket: it is never open to others
        for attempt in range(2):
            try:
                listener.bind(path)
                break
            except OSError as error:
                if error.errno != _EADDRINUSE:
                    raise refuse(f"cannot create the socket: {os.strerror(error.errno or 0)}") from error
            if attempt or not _remove_stale(path, refuse):
                raise refuse("the path is taken")
        listener.listen(BACKLOG)
        status = os.lstat(path)
    except BaseException:
        listener.close()
        raise
    return Listener(listener, path, (status.st_dev, status.st_ino))


def _remove_stale(path: str, refuse: Callable[[str], ConfigError]) -> bool:
    """Remove the socket file of a process that has gone. Raises what `refuse` makes when it is anything else."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise refuse("the path is taken by something that is not a socket")
        probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK | _socket.SOCK_CLOEXEC)
        try:
            probe.connect(path)
        except OSError as error:
            if error.errno != _ECONNREFUSED:
                raise refuse(f"the path is taken by a socket in use: {os.strerror(error.errno or 0)}") from error
        else:
            raise refuse("the path is taken: another process listens on it")
        finally:
            probe.close()
        os.unlink(path)
    except FileNotFoundError:
        return True  # gone in between
    except OSError as error:
        raise refuse(f"cannot remove the old socket: {os.strerror(error.errno or 0)}") from error
    return True


def listen_tcp(host: str, port: int, option: str) -> Listener:
    """Listen on a numeric IPv4 or IPv6 address. Raises: ConfigError naming `option`."""
    value = f"{host}:{port}"
    accepted = "a numeric address of this host and a free port from 1 to 65535"
    family = _socket.AF_INET6 if ":" in host else _socket.AF_INET
    try:
        _socket.inet_pton(family, host)
    except (OSError, ValueError) as error:
        raise ConfigError("not a numeric address", option=option, value=value, accepted=accepted) from error
    listener = _socket.socket(family, _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK | _socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise ConfigError(f"cannot listen: {why}", option=option, value=value, accepted=accepted) from error
    return Listener(listener)
