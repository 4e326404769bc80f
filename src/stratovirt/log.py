"""The program's log: one line per message, on stderr or in the file that `-D` names.

    2026-03-01T09:30:12.123456789: [4711][4713][microvm.py:88]:INFO: the guest asked for a reboot

Times are UTC. The file is opened for appending with mode 0640; at 100 MiB or at a change of day it becomes `path1`, that
one `path2`, and so on to `path6`. What a guest can cause goes through `guest_warn`, which lets one line a second per
source pass and counts the rest: a guest cannot fill the host's disk. Control characters are escaped, because a log is
read on terminals. A reader of stderr that is stuck costs lines, which are counted, and never the machine's time: no line
is longer than what a pipe takes at once, and none but an error waits for room.

Importing this module opens nothing and formats nothing; the level comes from STRATOVIRT_LOG_LEVEL when first needed.
"""

from __future__ import annotations

import _thread
import posix
import select
import sys
import time

from stratovirt.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType

ERROR, WARN, INFO, DEBUG, TRACE = range(1, 6)
LEVEL_NAMES = ("", "ERROR", "WARN", "INFO", "DEBUG", "TRACE")

FILE_MODE = 0o640
ROTATE_SIZE = 100 << 20
FILES_KEPT = 7
MAX_MESSAGE = 2048
MAX_LINE = 4096  # PIPE_BUF: a pipe that polls writable takes it without blocking
ERROR_WAIT_MS = 100
GUEST_INTERVAL_NS = 1_000_000_000

_DAY_NS = 86_400 * 1_000_000_000


def level_from_name(name: str | None) -> int:
    """The level of that name in any case; INFO for None and for anything unknown."""
    name = (name or "").strip().upper()
    return LEVEL_NAMES.index(name) if name in LEVEL_NAMES[1:] else INFO


def escape(text: str) -> str:
    """`text` on one line and safe to show on a terminal: control characters as \\xNN, at most MAX_MESSAGE characters."""
    if len(text) > MAX_MESSAGE:
        text = text[:MAX_MESSAGE] + "..."
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else f"\\x{ord(c):02x}" if ord(c) < 0x100 else f"\\u{{{ord(c):x}}}" for c in text
    )


def _base_name(code: CodeType) -> str:
    return code.co_filename.rpartition("/")[2]


class Log:
    """One destination. Thread: any. `clock` gives nanoseconds since the epoch."""

    def __init__(self, level: int | None = None, clock: Callable[[], int] = time.time_ns) -> None:
        self._clock = clock
        self._level = level
        self._lock = _thread.allocate_lock()
        self._fd = 2
        self._path = ""
        self._size = 0
        self._day = 0
        self._lost = 0
        self._hand_over: Callable[[Callable[[], None]], None] | None = None
        self._moved: Callable[[int], None] | None = None
        self._handed_over = False
        self._owner = 0
        self._guest_sources: dict[str, tuple[int, int]] = {}  # source -> (time of the last line, lines held back since)

    @property
    def level(self) -> int:
        if self._level is None:
            self._level = level_from_name(posix.environ.get(b"STRATOVIRT_LOG_LEVEL", b"").decode("ascii", "replace") or None)
        return self._level

    @level.setter
    def level(self, level: int) -> None:
        self._level = level

    # -- where it goes

    def open(self, path: str) -> None:
        """Log to the file `path` from now on. Raises: ConfigError naming `-D`."""
        fd = self._open_file(path)
        with self._lock:
            old, self._fd, self._path = self._fd, fd, path
            status = posix.fstat(fd)
            self._size = status.st_size
            self._day = (status.st_mtime_ns if status.st_size else self._clock()) // _DAY_NS
        if old != 2:
            posix.close(old)

    def close(self) -> None:
        """Back to stderr."""
        with self._lock:
            old, self._fd, self._path = self._fd, 2, ""
        if old != 2:
            posix.close(old)

    @property
    def fd(self) -> int:
        """The descriptor it goes to."""
        return self._fd

    def rotate_through(self, hand_over: Callable[[Callable[[], None]], None], moved: Callable[[int], None]) -> None:
        """From now on only the calling thread begins a new file; others let `hand_over` call it there. They go on writing
        to the old one until then: what opens and renames files need be allowed to one thread only. `moved` is told the
        descriptor of a new file.
        """
        with self._lock:
            self._hand_over, self._moved = hand_over, moved
            self._owner = _thread.get_ident()

    @staticmethod
    def _open_file(path: str) -> int:
        try:
            flags = posix.O_WRONLY | posix.O_APPEND | posix.O_CREAT | posix.O_CLOEXEC | posix.O_NOCTTY
            return posix.open(path, flags, FILE_MODE)
        except (OSError, ValueError) as error:
            why = posix.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
            raise ConfigError(f"cannot open the log file: {why}", option="-D", value=path,
                              accepted="the path of a file that can be appended to") from error

    def _is_due(self, length: int, day: int) -> bool:
        return bool(self._path and self._size and (self._size + length > ROTATE_SIZE or day != self._day))

    def _rotate_or_ask(self, day: int) -> None:
        if self._hand_over is None or _thread.get_ident() == self._owner:
            self._rotate(day)
        elif not self._handed_over:
            self._handed_over = True
            self._hand_over(self._rotate_if_due)

    def _rotate_if_due(self) -> None:
        day = self._clock() // _DAY_NS
        with self._lock:
            self._handed_over = False
            try:
                if self._is_due(MAX_LINE, day):
                    self._rotate(day)
            except (OSError, ConfigError):
                return  # the next line tries again

    def _rotate(self, day: int) -> None:
        """Move the files up by one and start afresh. A file that cannot be moved goes on growing, rather than being lost."""
        for number in range(FILES_KEPT - 2, -1, -1):
            source = f"{self._path}{number or ''}"
            try:
                posix.rename(source, f"{self._path}{number + 1}")
            except FileNotFoundError:
                continue
        fd = self._open_file(self._path)
        old, self._fd, self._size, self._day = self._fd, fd, 0, day
        if self._moved is not None:
            self._moved(fd)
        posix.close(old)

    # -- what goes there

    def write(self, level: int, message: str, depth: int = 1) -> None:
        """Log `message` at `level`, blamed on the caller `depth` frames up."""
        if level > self.level:
            return
        now = self._clock()
        frame = sys._getframe(depth)
        where = f"{_base_name(frame.f_code)}:{frame.f_lineno}"
        seconds, nanoseconds = divmod(now, 1_000_000_000)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        line = (
            f"{stamp}.{nanoseconds:09d}: [{posix.getpid()}][{_thread.get_native_id()}][{where}]:{LEVEL_NAMES[level]}: "
            f"{escape(message)}"
        ).encode("utf-8", "backslashreplace")[: MAX_LINE - 1] + b"\n"
        with self._lock:
            self._emit(line, now // _DAY_NS, ERROR_WAIT_MS if level == ERROR else 0)

    def _emit(self, line: bytes, day: int, wait: int) -> None:
        try:
            if not self._path and not self._writable(wait):
                self._lost += 1
                return
            if self._path:
                if self._is_due(len(line), day):
                    self._rotate_or_ask(day)
                self._size += len(line)
            if self._lost:
                line = f"({self._lost} lines lost) ".encode() + line
            posix.write(self._fd, line[-MAX_LINE:])
            self._lost = 0
        except (OSError, ConfigError):
            self._lost += 1  # a full disk must not end the machine; the count is told when there is room again

    def _writable(self, wait: int) -> bool:
        poller = select.poll()
        poller.register(self._fd, select.POLLOUT)
        return bool(poller.poll(wait))

    def guest_write(self, level: int, source: str, message: str, depth: int = 1) -> None:
        """Log what a guest caused: at most one line a second for each `source`, which is a name from our own code."""
        if level > self.level:
            return
        now = self._clock()
        with self._lock:
            last, held_back = self._guest_sources.get(source, (now - GUEST_INTERVAL_NS, 0))
            if 0 <= now - last < GUEST_INTERVAL_NS:
                self._guest_sources[source] = (last, held_back + 1)
                return
            self._guest_sources[source] = (now, 0)
        suffix = f" ({held_back} more since the last such line)" if held_back else ""
        self.write(level, f"{source}: {escape(message)}{suffix}", depth + 1)


LOG = Log()
"""The process has one log, as it has one stderr."""


def error(message: str) -> None:
    LOG.write(ERROR, message, 2)


def warn(message: str) -> None:
    LOG.write(WARN, message, 2)


def info(message: str) -> None:
    LOG.write(INFO, message, 2)


def debug(message: str) -> None:
    LOG.write(DEBUG, message, 2)


def trace(message: str) -> None:
    LOG.write(TRACE, message, 2)


def guest_warn(source: str, message: str) -> None:
    """A guest (or a client) did something wrong: warn, at most once a second per `source`."""
    LOG.guest_write(WARN, source, message, 2)


def defect() -> None:
    """The exception that is being handled is a defect of ours: log where it came from. Imports nothing and opens no file, so
    it works on every thread at any time; for the lines of the source one has to look.
    """
    kind, value, place = sys.exc_info()
    LOG.write(ERROR, f"a defect of this program: {kind.__name__ if kind else None}: {value}", 2)
    while place is not None:
        code = place.tb_frame.f_code
        LOG.write(ERROR, f"  {_base_name(code)}:{place.tb_lineno} in {code.co_name}", 2)
        place = place.tb_next
