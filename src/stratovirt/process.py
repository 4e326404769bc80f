"""The process around a machine: signals that end it, going to the background, the pid file, and what is cleaned up.

Facts about signals in CPython: the C handler only notes the signal; the Python handler runs on the main thread, between two
bytecodes or when a system call of it returns EINTR. A signal may be delivered to a vCPU's thread, and then nothing would
wake the main thread out of epoll. `set_wakeup_fd` closes that gap: the C handler writes a byte into a pipe the loop watches.
"""

from __future__ import annotations

import posix

from stratovirt import log
from stratovirt.errors import ConfigError, HostError
from stratovirt.loop import READ

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable

    from stratovirt.loop import EventLoop
else:
    import _signal  # without the enumerations that `signal` wraps around it: their import takes as long as building the VM

TERMINATING = (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP)


def handle_signals(loop: EventLoop, on_terminate: Callable[[int], None]) -> None:
    """From now on TERM, INT and HUP call `on_terminate(signal)` on the main thread, and SIGPIPE is an error of a write."""
    read_fd, write_fd = posix.pipe2(posix.O_NONBLOCK | posix.O_CLOEXEC)

    def drain(_events: int) -> None:
        try:
            posix.read(read_fd, 4096)
        except BlockingIOError:
            return  # an earlier read took it

    loop.add(read_fd, READ, drain)
    _signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    for signal in TERMINATING:
        _signal.signal(signal, lambda number, _frame: on_terminate(number))
    _signal.signal(_signal.SIGPIPE, _signal.SIG_IGN)


class PidFile:
    """`-pidfile`: the process id in decimal, mode 0600; it must not exist before and is removed at the end.

    Raises: ConfigError.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._owner = posix.getpid()
        try:
            fd = posix.open(path, posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | posix.O_CLOEXEC | posix.O_NOFOLLOW, 0o600)
        except FileExistsError as error:
            raise ConfigError("the file exists already; another machine may be using it", option="-pidfile", value=path,
                              accepted="a path that does not exist") from error
        except (OSError, ValueError) as error:
            why = posix.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
            raise ConfigError(why, option="-pidfile", value=path) from error
        try:
            posix.write(fd, str(self._owner).encode())
        except OSError as error:
            posix.unlink(path)
            raise ConfigError(posix.strerror(error.errno or 0), option="-pidfile", value=path) from error
        finally:
            posix.close(fd)

    def remove(self) -> None:
        if posix.getpid() == self._owner:
            try:
                posix.unlink(self._path)
            except FileNotFoundError:
                log.warn(f"{self._path} was removed by somebody else")


def daemonize() -> Callable[[str], None]:
    """Go to the background: only the child returns, in a session of its own.

    The parent stays until the child calls the returned function: with "" it exits with 0, because the guest runs; with a
    message, or when the child dies, it prints the message and exits with 1. So whoever starts a machine learns whether it
    started. Raises: HostError.
    """
    read_fd, write_fd = posix.pipe2(posix.O_CLOEXEC)
    try:
        pid = posix.fork()
    except OSError as error:
        raise HostError.from_os("fork for -daemonize", error) from error
    if pid:
        posix.close(write_fd)
        with open(read_fd, encoding="utf-8", errors="replace") as pipe:
            answer = pipe.read()
        if answer != "ok":
            posix.write(2, (answer or "stratovirt: the background process ended before the guest ran\n").encode())
        posix._exit(0 if answer == "ok" else 1)
    posix.close(read_fd)
    posix.setsid()
    try:
        pid = posix.fork()
    except OSError as error:
        posix.write(write_fd, f"stratovirt: {HostError.from_os('fork for -daemonize', error)}\n".encode())
        posix._exit(1)
    if pid:  # not a session leader any more: it can never get a controlling terminal
        posix._exit(0)

    def report(message: str) -> None:
        posix.write(write_fd, (message or "ok").encode())
        posix.close(write_fd)
        null = posix.open("/dev/null", posix.O_RDWR)
        for fd in (0, 1, 2):
            posix.dup2(null, fd)
        posix.close(null)

    return report
