"""The way of a forked child from the launcher's process to a machine's: nothing of the launcher is left in it but memory."""

from __future__ import annotations

import os
import resource
from fcntl import F_DUPFD_CLOEXEC, fcntl

from stratovirt.launcher import title

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable

    from stratovirt.launcher.request import Request
    from stratovirt.loop import EventLoop
    from stratovirt.machine.kvm import KvmAhead
    from stratovirt.sandbox.kernel import Sandbox
else:
    import _signal  # see process.py

RESET_SIGNALS = (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP, _signal.SIGCHLD)
"""Blocked by the launcher around the fork: none that is meant for the machine meets the launcher's handlers."""


class Attachment:
    """The connection to the client, in the machine's process; and `ahead`, what this process has made before it was asked.

    `arguments` are the machine's.
    """

    def __init__(self, fd: int, ahead: KvmAhead | None = None, arguments: list[str] | None = None) -> None:
        self._fd = fd
        self._ahead = ahead
        self.sandbox: Sandbox | None = None  # made ahead
        self.is_clone = False
        self.detached = False  # the machine goes on without its client
        self._arguments = arguments or []

    def take_ahead(self) -> KvmAhead | None:
        """It is the caller's now."""
        ahead, self._ahead = self._ahead, None
        return ahead

    def watch(self, loop: EventLoop, on_gone: Callable[[], None]) -> None:
        """Call `on_gone` when the client hangs up."""
        if self.detached:
            return

        def gone(_events: int) -> None:
            loop.remove(self._fd)
            on_gone()

        loop.add(self._fd, 0, gone)

    def started(self) -> None:
        """The guest runs."""
        if not self.is_clone:
            return
        try:
            os.write(self._fd, b"running")
        except OSError:
            if not self.detached:
                return  # `watch` hears of it
        if self.detached:
            self.release()
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            os.close(null)

    def finish(self, status: int) -> None:
        """Tell the client how the machine ends: the launcher, which will tell it again, may have ended."""
        self._forget_ahead()
        if self._fd >= 0:
            try:
                os.write(self._fd, b"status %d" % status)
            except OSError:
                return  # nobody is left who wants to know

    def release(self) -> None:
        """Let the client go while the machine goes on, in another process (`-daemonize`)."""
        self._forget_ahead()
        self.show_command_line()
        fd, self._fd = self._fd, -1
        os.close(fd)

    def show_command_line(self) -> None:
        """Have `ps` show the machine's. Thread: main, before its filter."""
        title.show(self._arguments)

    def _forget_ahead(self) -> None:
        ahead = self.take_ahead()
        if ahead is not None:
            ahead.let_go()


def detach(keep: int) -> int:
    """Leave the launcher: its session, its signals, and its descriptors but for the standard ones and `keep`.

    Returns what `keep` is now. Raises: OSError.
    """
    os.setsid()  # what a terminal does to the launcher does not concern the machine
    (keep,) = place_descriptors({0: 0, 1: 1, 2: 2}, [keep], own_limit())
    _signal.set_wakeup_fd(-1)
    for number in RESET_SIGNALS:
        _signal.signal(number, _signal.SIG_DFL)
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, RESET_SIGNALS)
    return keep


def settle(request: Request, connection: int, soft_limit: int, ahead: KvmAhead | None = None,
           own: dict[str, str] | None = None) -> Attachment:
    """Make this process what the client would have started itself; of its own it keeps `ahead`. Raises: OSError.

    `own` is this process's environment, which takes long to look up.
    """
    made = ahead.descriptors() if ahead is not None else []
    directory, connection, *made = place_descriptors(request.descriptors, [request.directory, connection, *made], own_limit())
    if ahead is not None:
        ahead.renumber(made)
    os.fchdir(directory)
    os.close(directory)
    os.umask(request.umask)
    _set_soft_limit(soft_limit)
    adopt(request.environment, dict(os.environ) if own is None else own)
    return Attachment(connection, ahead, request.arguments)


def adopt(environment: dict[str, str], own: dict[str, str]) -> None:
    """Make it this process's; `own` is what this process has."""
    for name in own.keys() - environment.keys():
        del os.environ[name]
    for name, value in environment.items() - own.items():
        os.environ[name] = value


def own_limit() -> int:
    """The first descriptor number that this process cannot have."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _set_soft_limit(limit: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def place_descriptors(targets: dict[int, int], keep: list[int], limit: int) -> list[int]:
    """Give each descriptor in `targets` its number; those in `keep` get numbers of no importance, which are returned.

    Everything else below `limit` is closed. Raises: OSError.
    """
    floor = max(targets, default=2) + 1
    moved = {number: fcntl(fd, F_DUPFD_CLOEXEC, floor) for number, fd in targets.items()}
    kept = [fcntl(fd, F_DUPFD_CLOEXEC, floor) for fd in keep]
    for number, fd in moved.items():
        os.dup2(fd, number)
    start = 0
    for fd in sorted([*targets, *kept, limit]):
        if start < fd:  # os.closerange takes an empty range that begins with 0 for all there is
            os.closerange(start, fd)
        start = fd + 1
    return kept
