"""The launcher: takes requests for machines and forks a process for each.

    connected -> asked -> handed over -> ended   refused, or too slow: an "error" answer, and the connection is closed

One child is always forked ahead of its request: the spare. It has left the launcher, has been through what a machine's start
goes through as far as it is the same for all, has a VM of KVM, and waits at a socket for a request, which makes it a machine.
So the fork, most of the first writes to shared pages, and most of what KVM takes its time for, are over when the request
comes. The launcher's end is the spare's.

The launcher does nothing else, so that there is little to go wrong: no thread (a fork copies only the one that calls it), no
work for a machine that runs, one callback for each step. A client that says nothing is let go after `REQUEST_SECONDS`, and the
oldest such client when there are `MAX_SILENT` of them. Of a machine that runs it holds one descriptor, the connection, to tell
its end.

Thread: all of it on the one thread that there is.
"""

from __future__ import annotations

import _socket
import os
import select
import struct

from stratovirt import log
from stratovirt.launcher import wire
from stratovirt.launcher.child import RESET_SIGNALS, Attachment, detach, settle
from stratovirt.launcher.request import RequestError, read_request
from stratovirt.loop import READ, EventLoop

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable

    from stratovirt.loop import Timer
    from stratovirt.machine.kvm import KvmAhead
else:
    import _signal  # see process.py

REQUEST_SECONDS = 5.0
MAX_SILENT = 64
SPARE_SECONDS = 0.005
_ACCEPTED_AT_ONCE = 16
_ROOM_FOR_RIGHTS = _socket.CMSG_SPACE((wire.MAX_DESCRIPTORS + 1) * 4)


class Spare:
    """A child without a request yet, and the socket where it waits for one."""

    __slots__ = ("pid", "pidfd", "socket")

    def __init__(self, pid: int, pidfd: int, socket: _socket.socket) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.socket = socket

    def close(self) -> None:
        """Let go of it: without a request it ends."""
        self.socket.close()
        os.close(self.pidfd)


class NoRequest(Exception):
    """The launcher has ended, or does not need this child."""


class Launcher:
    """Serves `listener`, an AF_UNIX SOCK_SEQPACKET socket, which becomes this object's.

    `rehearse()` runs in the spare child, which lets go afterwards of what it has opened; after it `make_ahead(last)`, with the
    arguments of the last machine, whose result is in the attachment later. `start(arguments, attachment)` runs in the child
    when it has its request, and returns the machine's exit status, or ends the process itself.
    `soft_limit` is how many files a machine may have open, `idle` after how many seconds without one `on_idle` is called
    (0: never).
    """

    def __init__(self, loop: EventLoop, listener: _socket.socket, start: Callable[[list[str], Attachment], int],
                 soft_limit: int, idle: float = 0.0, on_idle: Callable[[], None] = lambda: None,
                 rehearse: Callable[[], None] = lambda: None,
                 make_ahead: Callable[[list[str]], KvmAhead | None] = lambda last: None) -> None:
        self._loop = loop
        self._listener = listener
        self._start = start
        self._soft_limit = soft_limit
        self._idle = idle
        self._on_idle = on_idle
        self._rehearse = rehearse
        self._make_ahead = make_ahead
        self._last: list[str] = []
        self._spare: Spare | None = None
        self._closed = False
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
        self._make_spare()

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
            self._last = read_request(bytes(self._view[:length]), received, self._soft_limit).arguments
        except RequestError as error:
            _close_all(received)
            _refuse(connection, str(error))
            return True
        request = bytes(self._view[:length])
        if not self._hand_over(request, received, connection):
            _refuse(connection, "no process could be made for the machine")
        _close_all(received)
        if self._spare is None:
            # For the next, when this machine has had time to start: until then they would take processors from each other.
            self._loop.call_later(SPARE_SECONDS, self._make_spare)
        return True

    # -- machines

    def _hand_over(self, request: bytes, received: list[int], connection: _socket.socket) -> bool:
        """Make the spare child the machine of `request`, and say so."""
        for _ in range(2):  # a spare may have been killed
            self._make_spare()
            spare, self._spare = self._spare, None
            if spare is None:
                return False
            rights = struct.pack(f"{len(received) + 1}i", connection.fileno(), *received)
            try:
                spare.socket.sendmsg([request], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
            except OSError as error:
                log.warn(f"the process that was ready for the next machine is gone: {error.strerror}")
                spare.close()
                continue
            try:
                connection.sendmsg([b"pid %d" % spare.pid],
                                   [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("i", spare.pidfd))])
            except OSError as error:
                log.debug(f"a client went away: {error.strerror}")  # and the machine learns it by itself
            spare.close()
            self._machines[spare.pid] = connection.detach()
            if self._idle_timer is not None:
                self._idle_timer.cancel()
                self._idle_timer = None
            return True
        return False

    def _make_spare(self) -> None:
        """Fork the child that waits for the next request, unless there is one."""
        if self._spare is not None or self._closed:
            return
        try:
            ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        except OSError as error:
            log.warn(f"socketpair: {error.strerror}")
            return
        _signal.pthread_sigmask(_signal.SIG_BLOCK, RESET_SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                self._become_machine(theirs, ours)
            # Nobody but this loop, later, waits for the child: the number is its, even if it has ended by now.
            self._spare = Spare(pid, os.pidfd_open(pid), ours)
        except OSError as error:
            log.warn(f"fork: {error.strerror}")
            ours.close()  # a child that has begun ends, for nobody is left at the other side
        finally:
            _signal.pthread_sigmask(_signal.SIG_UNBLOCK, RESET_SIGNALS)
            theirs.close()

    def _become_machine(self, requests: _socket.socket, launchers: _socket.socket) -> None:
        """In the child, and it does not return."""
        status = 1
        attachment = None
        try:
            self._loop.close()
            for socket in (self._listener, launchers, *(silent for silent, _ in self._silent.values())):
                socket.detach()  # the number will be somebody else's: no object shall close it
            source = detach(requests.detach())
            self._rehearse()
            # Whoever is waiting already is served sooner by a VM that is made in its usual order.
            ahead = None if _is_waiting(source) else self._make_ahead(self._last)
            message, received = _await_request(source)
            os.close(source)
            request = read_request(message, received[1:], self._soft_limit)
            attachment = settle(request, received[0], self._soft_limit, ahead)
            status = self._start(request.arguments, attachment)
        except NoRequest:
            status = 0
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
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if self._spare is not None and self._spare.pid == pid:
                log.warn("the process that was ready for the next machine has ended")
                self._spare.close()
                self._spare = None
                continue
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
        """Stop serving. Machines run on, and tell their clients themselves how they end."""
        self._closed = True
        if self._spare is not None:
            self._spare.close()  # and so it ends
            self._spare = None
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


def _is_waiting(source: int) -> bool:
    """Is there a request, or will there never be one?"""
    poll = select.poll()
    poll.register(source, READ)
    return bool(poll.poll(0))


def _await_request(source: int) -> tuple[bytes, list[int]]:
    """A request and what came with it, the connection first. Raises: NoRequest, OSError."""
    socket = _socket.socket(fileno=source)
    message, ancillary, _, _ = socket.recvmsg(wire.MAX_REQUEST, _ROOM_FOR_RIGHTS, _socket.MSG_CMSG_CLOEXEC)
    socket.detach()
    if not message:
        raise NoRequest
    return message, _descriptors(ancillary)


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
