"""The launcher: takes requests for machines and forks a process for each.

    connected -> asked -> forked -> ended        refused, or too slow: an "error" answer, and the connection is closed

It does nothing else, so that there is little to go wrong: no thread (a fork copies only the one that calls it), no work for a
machine that runs, one callback for each step. A client that says nothing is let go after `REQUEST_SECONDS`, and the oldest
such client when there are `MAX_SILENT` of them. Of a machine that runs, it holds one descriptor, the connection, to tell
its end.

Thread: all of it on the one thread that there is.
"""

from __future__ import annotations

import _socket
import os
import struct

from stratovirt import log
from stratovirt.launcher import wire
from stratovirt.launcher.child import RESET_SIGNALS, Attachment, settle
from stratovirt.launcher.request import Request, RequestError, read_request
from stratovirt.loop import READ, EventLoop

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable

    from stratovirt.loop import Timer
else:
    import _signal  # see process.py

REQUEST_SECONDS = 5.0
MAX_SILENT = 64
_ACCEPTED_AT_ONCE = 16
_ROOM_FOR_RIGHTS = _socket.CMSG_SPACE(wire.MAX_DESCRIPTORS * 4)


class Launcher:
    """Serves `listener`, an AF_UNIX SOCK_SEQPACKET socket, which becomes this object's.

    `start(arguments, attachment)` runs in the child and returns the machine's exit status, or ends the process itself.
    `soft_limit` is how many files a machine may have open, `idle` after how many seconds without one `on_idle` is called
    (0: never).
    """

    def __init__(self, loop: EventLoop, listener: _socket.socket, start: Callable[[list[str], Attachment], int],
                 soft_limit: int, idle: float = 0.0, on_idle: Callable[[], None] = lambda: None) -> None:
        self._loop = loop
        self._listener = listener
        self._start = start
        self._soft_limit = soft_limit
        self._idle = idle
        self._on_idle = on_idle
        self._idle_timer: Timer | None = None
        self._user = os.geteuid()
        self._silent: dict[int, tuple[_socket.socket, Timer]] = {}  # connections whose request has not come, oldest first
        self._machines: dict[int, int] = {}  # process id -> connection
        self._buffer = bytearray(wire.MAX_REQUEST + 1)
        self._view = memoryview(self._buffer)
        listener.setblocking(False)
        loop.add(listener.fileno(), READ, self._on_connections)
        self._watch_signals()
        self._consider_idling()

    @property
    def machines(self) -> int:
        """How many run."""
        return len(self._machines)

    def _watch_signals(self) -> None:
        self._wake_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wake_write_fd = write_fd
        _signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        _signal.signal(_signal.SIGCHLD, lambda _number, _frame: None)  # the byte in the pipe is what matters
        _signal.signal(_signal.SIGPIPE, _signal.SIG_IGN)
        self._loop.add(self._wake_fd, READ, self._on_signals)

    def _on_signals(self, _events: int) -> None:
        try:
            os.read(self._wake_fd, 4096)
        except BlockingIOError:
            return
        self._reap()

    # -- clients

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
            connection = _socket.socket(fileno=fd)
            connection.setblocking(False)
            self._greet(connection)

    def _greet(self, connection: _socket.socket) -> None:
        user = struct.unpack("iII", connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12))[1]
        if user != self._user:
            _refuse(connection, f"this launcher serves user {self._user}, not user {user}")
            return
        if self._take_request(connection):
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
        if not self._take_request(connection):
            _refuse(connection, "no request")  # a wake-up without a message: nothing that a client of ours does

    def _give_up(self, fd: int, why: str) -> None:
        connection, timer = self._silent.pop(fd)
        timer.cancel()
        self._loop.remove(fd)
        _refuse(connection, why)

    def _take_request(self, connection: _socket.socket) -> bool:
        """Read a request and carry it out. False when there is none yet."""
        try:
            length, ancillary, flags, _ = connection.recvmsg_into([self._buffer], _ROOM_FOR_RIGHTS, _socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return False
        except OSError as error:
            log.debug(f"a client went away: {error.strerror}")
            connection.close()
            return True
        received = _descriptors(ancillary)
        if not length:
            _close_all(received)
            connection.close()  # it has hung up
            return True
        try:
            if length > wire.MAX_REQUEST or flags & _socket.MSG_TRUNC:
                raise RequestError(f"the request is longer than {wire.MAX_REQUEST} bytes")
            if flags & _socket.MSG_CTRUNC:
                raise RequestError(f"more than {wire.MAX_DESCRIPTORS} descriptors, or more than this process may open")
            request = read_request(bytes(self._view[:length]), received, self._soft_limit)
        except RequestError as error:
            _close_all(received)
            _refuse(connection, str(error))
            return True
        try:
            self._fork(request, connection)
        finally:
            request.close()
        return True

    # -- machines

    def _fork(self, request: Request, connection: _socket.socket) -> None:
        _signal.pthread_sigmask(_signal.SIG_BLOCK, RESET_SIGNALS)
        try:
            pid = os.fork()
        except OSError as error:
            _signal.pthread_sigmask(_signal.SIG_UNBLOCK, RESET_SIGNALS)
            _refuse(connection, f"fork: {error.strerror}")
            return
        if pid == 0:
            self._become_machine(request, connection)
        _signal.pthread_sigmask(_signal.SIG_UNBLOCK, RESET_SIGNALS)
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        # Nobody but this loop, later, waits for the child: the number is its, even if it has ended by now.
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            # Out of descriptors. The machine has begun, and ends as soon as its client hangs up.
            log.warn(f"pidfd_open: {error.strerror}")
            _refuse(connection, f"pidfd_open: {error.strerror}")
            self._machines[pid] = -1
            return
        try:
            connection.sendmsg([b"pid %d" % pid], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("i", pidfd))])
        except OSError as error:
            log.debug(f"a client went away: {error.strerror}")  # and the machine learns it by itself
        os.close(pidfd)
        self._machines[pid] = connection.detach()

    def _become_machine(self, request: Request, connection: _socket.socket) -> None:
        """In the child, and it does not return."""
        status = 1
        attachment = None
        try:
            self._loop.close()
            self._listener.detach()  # the number will be somebody else's: no object shall close it
            for silent, _ in self._silent.values():
                silent.detach()
            attachment = settle(request, connection.detach(), self._soft_limit)
            status = self._start(request.arguments, attachment)
        except OSError as error:
            os.write(2, f"stratovirt: the machine's process cannot be set up: {error}\n".encode())
        except BaseException:  # noqa: BLE001  # our own defect: it ends here, and never as a second launcher
            import traceback

            os.write(2, traceback.format_exc().encode("utf-8", "backslashreplace"))
        finally:
            if attachment is not None:
                attachment.finish(status)
            os._exit(status)

    def _reap(self) -> None:
        while self._machines:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            fd = self._machines.pop(pid, -1)
            if fd >= 0:
                try:
                    os.write(fd, b"ended %d" % status)
                except OSError as error:
                    log.debug(f"a client went away before its machine: {error.strerror}")
                os.close(fd)
        self._consider_idling()

    def _consider_idling(self) -> None:
        if self._idle and not self._machines and self._idle_timer is None:
            self._idle_timer = self._loop.call_later(self._idle, self._on_idle_timer)

    def _on_idle_timer(self) -> None:
        self._idle_timer = None
        self._on_idle()

    def close(self) -> None:
        """Stop serving. Machines run on, and tell their clients themselves how they end. Idempotent."""
        self._loop.remove(self._listener.fileno())
        self._listener.close()
        for fd in list(self._silent):
            self._give_up(fd, "the launcher is ending")
        _signal.set_wakeup_fd(-1)
        self._loop.remove(self._wake_fd)
        os.close(self._wake_fd)
        os.close(self._wake_write_fd)
        for fd in self._machines.values():
            if fd >= 0:
                os.close(fd)
        self._machines.clear()


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    received: list[int] = []
    for level, kind, data in ancillary:
        if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS):
            received += struct.unpack(f"{len(data) // 4}i", data[: len(data) & -4])
    return received


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _refuse(connection: _socket.socket, why: str) -> None:
    log.info(f"a request was refused: {why}")
    try:
        connection.send(b"error " + why.encode("utf-8", "backslashreplace")[: wire.MAX_ANSWER - 6])
    except OSError:
        pass  # it has gone, and will not miss the reason
    connection.close()
