"""Clients of the launcher from their connection to their request: who they are, how long they may be silent, one whole message.

    connected -> asked     refused, or too slow: an "error" answer, and the connection is closed

A client that says nothing is let go after `REQUEST_SECONDS`, and the oldest such client when there are `MAX_SILENT` of them.

Thread: the launcher's only one.
"""

from __future__ import annotations

import _socket
import os
import struct

from stratovirt import log
from stratovirt.launcher import wire
from stratovirt.launcher.request import RequestError
from stratovirt.launcher.spare import ROOM_FOR_RIGHTS, descriptors_of
from stratovirt.loop import READ, EventLoop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from stratovirt.loop import Timer

REQUEST_SECONDS = 5.0
MAX_SILENT = 64
_ACCEPTED_AT_ONCE = 16


class Reception:
    """`listener` becomes this object's.

    `on_message(message, received, connection)` gets a message, the descriptors that came with it and the connection, all three
    its own from then on; what it raises as RequestError is the answer, and they are closed.
    """

    def __init__(self, loop: EventLoop, listener: _socket.socket,
                 on_message: Callable[[bytes, list[int], _socket.socket], None]) -> None:
        self._loop = loop
        self._listener = listener
        self._on_message = on_message
        self._user = os.geteuid()
        self._silent: dict[int, tuple[_socket.socket, Timer]] = {}  # connections whose request has not come, oldest first
        self._buffer = bytearray(wire.MAX_REQUEST + 1)
        self._view = memoryview(self._buffer)
        listener.setblocking(False)

    def open(self) -> None:
        """Serve who comes to the listener."""
        self._loop.add(self._listener.fileno(), READ, self._on_connections)

    def serve(self, connection: _socket.socket) -> None:
        """Serve a client that did not come by the listener."""
        connection.setblocking(False)
        self._greet(connection)

    @property
    def sockets(self) -> list[_socket.socket]:
        """All that are open."""
        return [self._listener, *(connection for connection, _ in self._silent.values())]

    def close(self) -> None:
        self._loop.remove(self._listener.fileno())
        self._listener.close()
        for fd in list(self._silent):
            self._give_up(fd, "the launcher is ending")

    def _on_connections(self, _events: int) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                fd, _address = self._listener._accept()  # type: ignore[attr-defined]  # what socket.accept is made of
            except BlockingIOError:
                return
            except OSError as error:
                # ECONNABORTED, or out of descriptors or memory: those who wait stay in the backlog until machines have ended.
                log.warn(f"cannot accept a client: {error.strerror}")
                return
            self.serve(_socket.socket(fileno=fd))

    def _greet(self, connection: _socket.socket) -> None:
        user = struct.unpack("iII", connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12))[1]
        if user != self._user:
            refuse(connection, f"this launcher serves user {self._user}, not user {user}")
            return
        if self._take_message(connection):
            return
        fd = connection.fileno()
        if len(self._silent) >= MAX_SILENT:
            self._give_up(next(iter(self._silent)), f"{MAX_SILENT} clients have connected since and not said anything either")
        timer = self._loop.call_later(REQUEST_SECONDS, lambda: self._give_up(fd, f"no request within {REQUEST_SECONDS:g} s"))
        self._silent[fd] = connection, timer
        self._loop.add(fd, READ, lambda _events: self._on_request(fd))

    def _on_request(self, fd: int) -> None:
        connection, timer = self._silent[fd]
        # Out of the loop first: a child that is forked must not find it there, nor must a number that is used anew.
        self._loop.remove(fd)
        del self._silent[fd]
        timer.cancel()
        if not self._take_message(connection):
            refuse(connection, "no request")  # a wake-up without a message: nothing that a client of ours does

    def _give_up(self, fd: int, why: str) -> None:
        connection, timer = self._silent.pop(fd)
        timer.cancel()
        self._loop.remove(fd)
        refuse(connection, why)

    def _take_message(self, connection: _socket.socket) -> bool:
        """False when there is none yet."""
        try:
            length, ancillary, flags, _ = connection.recvmsg_into([self._buffer], ROOM_FOR_RIGHTS, _socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return False
        except OSError as error:
            log.debug(f"a client went away: {error.strerror}")
            connection.close()
            return True
        received = descriptors_of(ancillary)
        if not length:
            close_all(received)
            connection.close()  # it has hung up
            return True
        try:
            if length > wire.MAX_REQUEST or flags & _socket.MSG_TRUNC:
                raise RequestError(f"the request is longer than {wire.MAX_REQUEST} bytes")
            if flags & _socket.MSG_CTRUNC:
                raise RequestError(f"more than {wire.MAX_DESCRIPTORS} descriptors, or more than this process may open")
            self._on_message(bytes(self._view[:length]), received, connection)
        except RequestError as error:
            refuse(connection, str(error))
            close_all(received)
        return True


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def send(connection: _socket.socket, message: bytes, fds: list[int] | None = None) -> None:
    """If the client is still there."""
    rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
    try:
        connection.sendmsg([message], rights)
    except OSError as error:
        log.debug(f"a client went away: {error.strerror}")


def refuse(connection: _socket.socket, why: str) -> None:
    """Say so, and close the connection."""
    log.info(f"a request was refused: {why}")
    try:
        connection.send(b"error " + why.encode("utf-8", "backslashreplace")[: wire.MAX_ANSWER - 6])
    except OSError:
        pass  # it has gone, and will not miss the reason
    connection.close()
