"""A first machine of a launcher, by which it learns what a machine's memory is like at rest, and where machines write to.

Machines of a launcher come from the same memory and do the same, and so the pages that they write to are mostly equal in the
end. Once that is in the file that they compare their pages with (`pages.py`), they need no copies of those either. And they can
have copied them before they are asked for (`written.py`).

The machine goes the way of any other, with the smallest of guests, before the launcher serves anybody. There are `RUNS` of
them, as the first children of a launcher find its memory in another state than all later ones.
"""

from __future__ import annotations

import _socket
import os
import struct
import time

from stratovirt import log
from stratovirt.launcher import practice, wire
from stratovirt.launcher.child import RESET_SIGNALS
from stratovirt.loop import READ

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable

    from stratovirt.launcher.pages import Copies, Sharing
    from stratovirt.launcher.server import Launcher
    from stratovirt.loop import EventLoop
else:
    import _signal  # see process.py

RUNS = 3
_SECONDS = 2.0
_REST_SECONDS = 0.03
_STEP = 0.005
_KERNEL_FD = 9


class FirstMachines:
    """Runs them on the launcher's loop, then calls `done`. Nobody may be served before: the file changes under all children.

    Without a KVM, or the right to look, there is nothing to be had, and `done` is called all the same.
    """

    def __init__(self, launcher: Launcher, loop: EventLoop, sharing: Sharing, done: Callable[[], None]) -> None:
        self._launcher = launcher
        self._loop = loop
        self._sharing = sharing
        self._done = done
        self._deadline = time.monotonic() + _SECONDS
        self._pids: list[int] = []
        self._connections: list[_socket.socket] = []
        self._used, self._since = -1, 0.0
        self._witness: Witness | None = None
        loop.call_later(0, self._next)

    def _next(self) -> None:
        try:
            if len(self._pids) == RUNS - 1:
                self._launcher.drop_spare()
                self._witness = Witness()
                self._launcher.make_spare()
            ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
            self._connections.append(ours)
            _request(ours)
            self._launcher.serve(theirs)
        except OSError as error:
            self._end(None, error.strerror or "")
            return
        # The answer needs this loop: the launcher waits for the child's word that it has the request.
        self._asked = ours
        self._late = self._loop.call_later(_SECONDS, lambda: self._on_answer(None))
        self._loop.add(ours.fileno(), READ, lambda _events: self._on_answer(ours))

    def _on_answer(self, connection: _socket.socket | None) -> None:
        """There is a machine, or none; None: nobody answers."""
        self._loop.remove(self._asked.fileno())
        self._late.cancel()
        try:
            pid = _pid(connection) if connection is not None else 0
        except OSError as error:
            self._end(None, error.strerror or "")
            return
        if not pid:
            self._end(None, "there is none")
            return
        self._pids.append(pid)
        self._used = -1
        self._loop.call_later(_STEP, self._look)

    def _look(self) -> None:
        """Has it come to rest?"""
        now = time.monotonic()
        try:
            used, threads = _work(self._pids[-1])
            if used != self._used or threads < 2:
                self._used, self._since = used, now
            elif now - self._since > _REST_SECONDS:
                if len(self._pids) < RUNS:
                    self._next()
                else:
                    log.debug(f"a machine writes to {self._launcher.written.learn(self._pids[-1])} pages")
                    self._end(self._sharing.look(self._pids[-1]))
                return
        except (OSError, IndexError, ValueError) as error:
            self._end(None, str(error))
            return
        if now > self._deadline:
            self._end(None, "it does not come to rest")
            return
        self._loop.call_later(_STEP, self._look)

    def _end(self, copies: Copies | None, problem: str = "") -> None:
        if problem:
            log.debug(f"memory of a machine at rest is not known: {problem}")
        for pid in self._pids:
            try:
                os.kill(pid, _signal.SIGKILL)
            except ProcessLookupError:
                continue  # it has ended, and the launcher knows
        for connection in self._connections:
            connection.close()
        if self._witness is not None:
            self._witness.close()
        self._launcher.start_over()
        self._deadline = time.monotonic() + _SECONDS
        self._await_ends(copies)

    def _await_ends(self, copies: Copies | None) -> None:
        """The launcher collects its children; when there are none the file may change."""
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            try:
                if copies is not None:
                    log.debug(f"{self._sharing.take_over(copies)} pages are as a machine at rest has them")
            except OSError as error:
                log.debug(f"pages of a machine at rest: {error.strerror}")
        else:
            if time.monotonic() < self._deadline:
                self._loop.call_later(_STEP, lambda: self._await_ends(copies))
                return
        if copies is not None:
            copies.close()
        self._sharing.seal()
        self._done()


class Witness:
    """A child that does nothing, forked right before the machine that is looked at.

    When the launcher writes to a page afterwards, these two still share the old one. So what the machine has for itself then is
    what it has written to.
    """

    def __init__(self) -> None:
        read_end, self._write_end = os.pipe2(os.O_CLOEXEC)
        _signal.pthread_sigmask(_signal.SIG_BLOCK, RESET_SIGNALS)  # their handlers are the launcher's
        try:
            if os.fork() == 0:
                try:
                    os.close(self._write_end)
                    os.read(read_end, 1)  # until the launcher has closed its end, or has ended
                finally:
                    os._exit(0)  # never as a second launcher
        except OSError:
            os.close(self._write_end)
            raise
        finally:
            _signal.pthread_sigmask(_signal.SIG_UNBLOCK, RESET_SIGNALS)
            os.close(read_end)

    def close(self) -> None:
        os.close(self._write_end)


def _work(pid: int) -> tuple[int, int]:
    """Nanoseconds that a process has worked, and its threads. Raises: OSError, and others where the kernel does not count."""
    used, threads = 0, os.listdir(f"/proc/{pid}/task")
    for thread in threads:
        with open(f"/proc/{pid}/task/{thread}/schedstat", "rb", 0) as file:
            used += int(file.read().split()[0])
    return used, len(threads)


def _request(connection: _socket.socket) -> None:
    kernel = os.memfd_create("practice", os.MFD_CLOEXEC)
    null, directory = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC), os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        os.write(kernel, practice.guest(reset=False))
        words = ["-machine", "microvm", "-m", "128M", "-smp", "1", "-kernel", f"/proc/self/fd/{_KERNEL_FD}"]
        environment = [name + b"=" + value for name, value in os.environb.items()]
        message = b"\0".join([wire.GREETING, b"run", b"22", b"0,1,2,%d" % _KERNEL_FD, b"%d" % len(words),
                              *map(os.fsencode, words), *environment])
        rights = struct.pack("5i", directory, null, null, null, kernel)
        connection.sendmsg([message], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
    finally:
        for fd in (kernel, null, directory):
            os.close(fd)


def _pid(connection: _socket.socket) -> int:
    """0: there is no machine."""
    data, ancillary, _, _ = connection.recvmsg(wire.MAX_ANSWER, _socket.CMSG_SPACE(4))
    for _, _, rights in ancillary:
        os.close(struct.unpack("i", rights[:4])[0])
    kind, _, text = data.partition(b" ")
    return int(text) if kind == b"pid" else 0
