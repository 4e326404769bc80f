"""The client: hands the command's argv, environment and descriptors to the launcher, and stands in for the machine.

What is done to this process happens to the machine: signals are passed on, and it ends as the machine does. It is a process of
one thread that imports nothing which is not in the interpreter already, because its start is the largest part of a warm start.
"""

from __future__ import annotations

import _socket
import _struct
import posix
import sys

from stratovirt.launcher import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
else:
    import _signal

ANSWER_SECONDS = 10
_FORWARDED = (_signal.SIGHUP, _signal.SIGINT, _signal.SIGQUIT, _signal.SIGTERM, _signal.SIGUSR1, _signal.SIGUSR2,
              _signal.SIGALRM, _signal.SIGCONT, _signal.SIGWINCH)
_ENOENT, _ECONNREFUSED = 2, 111
_NOBODY = (_ENOENT, _ECONNREFUSED)


class Trouble(Exception):
    """The launcher cannot be used; the text says why."""


def main(arguments: list[str], wish: str) -> int | None:
    """Run the machine of `arguments` in the launcher: the exit status; None when it is to be started without.

    `wish` is "start" (start a launcher if there is none), "on" (use it if there is one) or the path of its socket.
    """
    try:
        return _run(arguments, wish)
    except Trouble as error:
        text = str(error)
        text = text if text.isprintable() else ascii(text)
        sys.stderr.write(f"stratovirt: {text}\n")
        return 1


def _run(arguments: list[str], wish: str) -> int | None:
    if _in_background():
        return None  # a machine elsewhere could not know that the terminal is not its own now
    connection = _connect(wish)
    if connection is None:
        return None
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    # The guest may run before its pidfd is here. A signal that comes meanwhile is for the machine, and waits for it: as long as
    # the launcher may take to answer, and no longer.
    _signal.pthread_sigmask(_signal.SIG_BLOCK, (*_FORWARDED, _signal.SIGTSTP))
    try:
        request(connection, arguments)
        pidfd, status = await_machine(connection)
        _pass_signals_on(pidfd)
    finally:
        _signal.pthread_sigmask(_signal.SIG_UNBLOCK, (*_FORWARDED, _signal.SIGTSTP))
    return _as_it_ended(await_end(connection, status))


def _in_background() -> bool:
    try:
        return posix.tcgetpgrp(0) != posix.getpgrp()
    except OSError:
        return False  # no terminal, or not the one that controls us


# -- reaching it


def _connect(wish: str) -> _socket.socket | None:
    """A connection; None when there is no launcher and none was insisted on. Raises: Trouble."""
    directory = b""
    if wish in ("on", "start"):
        path, directory = wire.default_socket()
    else:
        path = wish.encode(sys.getfilesystemencoding(), "surrogateescape")
    shown = path.decode(sys.getfilesystemencoding(), "replace")
    if directory:
        try:
            trouble = wire.trouble_with(directory)
        except OSError as error:
            trouble = "" if error.errno == _ENOENT else posix.strerror(error.errno or 0)
        if trouble:
            raise Trouble(f"{directory.decode('ascii')}, where the launcher's socket belongs: {trouble}")
    try:
        return connect(path)
    except OSError as error:
        if error.errno not in _NOBODY or wish not in ("on", "start"):
            raise Trouble(f"the launcher at {shown}: {posix.strerror(error.errno or 0)}") from error
    if wish == "on":
        return None
    from stratovirt.launcher import starter

    starter.start()
    try:
        return connect(path)
    except OSError as error:
        raise Trouble(f"the launcher that was just started, at {shown}: {posix.strerror(error.errno or 0)}") from error


def connect(path: bytes) -> _socket.socket:
    """Raises: OSError; Trouble when the launcher is somebody else's."""
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    # Timeouts of the kernel and not of Python, for which a full backlog would be an error at once.
    set_timeouts(connection, ANSWER_SECONDS)
    connection.connect(path)
    credentials = connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
    user = _struct.unpack("iII", credentials)[1]
    if user not in (posix.geteuid(), 0):
        shown = path.decode(sys.getfilesystemencoding(), "replace")
        raise Trouble(f"the launcher at {shown} is user {user}'s: it would get this command's descriptors and environment")
    return connection


def set_timeouts(connection: _socket.socket, seconds: int) -> None:
    timeout = _struct.pack("ll", seconds, 0)
    connection.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, timeout)
    connection.setsockopt(_socket.SOL_SOCKET, _socket.SO_RCVTIMEO, timeout)


def connect_as(wish: str) -> _socket.socket:
    """A connection, with a launcher started for it if need be; `wish` is "start" or a path. Raises: Trouble."""
    connection = _connect(wish)
    if connection is None:
        raise Trouble("there is no launcher")
    return connection


# -- asking


def request(connection: _socket.socket, arguments: list[str], kind: bytes = b"run") -> None:
    """Ask for a machine, or what else `kind` is. Raises: Trouble."""
    encoding = sys.getfilesystemencoding()
    words = [word.encode(encoding, "surrogateescape") for word in arguments]
    numbers = [0, 1, 2]
    for number in named_descriptors(words):
        if number not in numbers and _is_open(number):
            numbers.append(number)
    if len(numbers) >= wire.MAX_DESCRIPTORS:
        raise Trouble(f"the arguments name {len(numbers)} descriptors, and the launcher takes {wire.MAX_DESCRIPTORS - 1}")
    mask = posix.umask(0o077)
    posix.umask(mask)
    message = b"\0".join([
        wire.GREETING, kind, b"%o" % mask, b",".join(b"%d" % number for number in numbers), b"%d" % len(words), *words,
        *[name + b"=" + value for name, value in posix.environ.items()],
    ])
    if len(message) > wire.MAX_REQUEST:
        raise Trouble(f"arguments and environment have {len(message)} bytes, and the launcher takes {wire.MAX_REQUEST}")
    here = posix.open(".", posix.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
    given = [here, *[number if number > 2 or _is_open(number) else posix.open("/dev/null", posix.O_RDWR) for number in numbers]]
    rights = _struct.pack(f"{len(given)}i", *given)
    try:
        connection.sendmsg([message], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
    except BlockingIOError as error:
        raise Trouble(f"the launcher takes no request for {ANSWER_SECONDS} s") from error
    except OSError as error:
        raise Trouble(f"the launcher takes no request: {posix.strerror(error.errno or 0)}") from error
    posix.close(here)


def named_descriptors(words: list[bytes]) -> list[int]:
    """The descriptors that arguments name: `fd=3`, `fds=3:4`, `vhostfd=5` and paths like /dev/fd/6."""
    found: list[bytes] = []
    for word in words:
        if b"fd" not in word:
            continue
        for part in word.split(b","):
            key, _, value = part.rpartition(b"=")
            if key.endswith((b"fd", b"fds")):
                found += value.split(b":")
            elif value.startswith((b"/dev/fd/", b"/proc/self/fd/")):
                found.append(value.rpartition(b"/")[2])
    return [int(text) for text in found if text.isdigit() and len(text) < 8]


def _is_open(number: int) -> bool:
    try:
        posix.fstat(number)
    except OSError:
        return False
    return True


# -- what it says


def await_machine(connection: _socket.socket) -> tuple[int, int]:
    """The pidfd of the machine, once it has a process, and -1, or the wait status that it has announced before that.

    Raises: Trouble.
    """
    status = -1
    while True:
        try:
            data, ancillary, _, _ = connection.recvmsg(wire.MAX_ANSWER, _socket.CMSG_SPACE(4), _socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError as error:
            raise Trouble(f"the launcher did not answer within {ANSWER_SECONDS} s") from error
        except OSError as error:
            raise Trouble(f"the launcher did not answer: {posix.strerror(error.errno or 0)}") from error
        kind, _, text = data.partition(b" ")
        if kind == b"pid" and ancillary:
            set_timeouts(connection, 0)
            return _struct.unpack("i", ancillary[0][2][:4])[0], status
        if kind == b"status":
            status = int(text) << 8
            continue
        if kind == b"error":
            raise Trouble(f"the launcher: {text.decode('utf-8', 'replace')}")
        raise Trouble("the launcher gave an answer of another version" if data else "the launcher went away without an answer")


def _pass_signals_on(pidfd: int) -> None:
    def forward(number: int, _frame: object) -> None:
        try:
            _signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            pass  # it has ended, and we are about to hear how

    def stop(_number: int, _frame: object) -> None:
        # The machine is in no process group of this terminal: the default action would pass it by.
        forward(_signal.SIGSTOP, None)
        posix.kill(posix.getpid(), _signal.SIGSTOP)
        forward(_signal.SIGCONT, None)

    for number in _FORWARDED:
        _signal.signal(number, forward)
    _signal.signal(_signal.SIGTSTP, stop)


def await_end(connection: _socket.socket, status: int) -> int:
    """The wait status of the machine; `status` is what it has announced. Raises: Trouble when nobody can tell it."""
    while True:
        try:
            data = connection.recv(wire.MAX_ANSWER)
        except ConnectionResetError:
            data = b""  # what the machine had not read of us
        kind, _, text = data.partition(b" ")
        if kind == b"ended":
            return int(text)
        if kind == b"status":
            status = int(text) << 8
        elif not data:
            break
    if status < 0:
        raise Trouble("the machine has ended, and the launcher, which would know how, has ended before it")
    return status


def _as_it_ended(status: int) -> int:
    """The exit status for a wait status; a machine that a signal has ended takes this process along."""
    number = status & 0x7F
    if number == 0:
        return status >> 8
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the core worth having is the machine's
    if number != _signal.SIGKILL:
        _signal.signal(number, _signal.SIG_DFL)
    posix.kill(posix.getpid(), number)
    return 128 + number
