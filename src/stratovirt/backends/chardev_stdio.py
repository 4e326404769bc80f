"""The `stdio` character device: the program's own standard input and output.

The descriptors are shared with the shell that started us, so they are never made nonblocking. Instead every write is
preceded by a poll and is at most PIPE_BUF bytes, which a pipe that polls writable takes at once. A terminal gives no such
promise, so it is opened a second time, with a nonblocking description of our own.

A terminal is put in raw mode, with Ctrl-C, Ctrl-Z and Ctrl-S going to the guest; output processing stays on, so that our own
messages still look right. It is restored at `close`, and by `atexit` should nobody get there.
"""

from __future__ import annotations

import os
import select

from stratovirt.backends.chardev import CharDevice
from stratovirt.loop import READ, WRITE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from stratovirt.loop import EventLoop

PIPE_BUF = 4096


def make_raw(fd: int, output_processing: bool) -> list[Any]:
    """Put the terminal `fd` in raw mode: bytes go through as they are. Returns the attributes it had before."""
    import termios

    before = termios.tcgetattr(fd)
    iflag, oflag, cflag, lflag, ispeed, ospeed, control = termios.tcgetattr(fd)
    iflag &= ~(termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP | termios.INLCR | termios.IGNCR
               | termios.ICRNL | termios.IXON)
    if not output_processing:
        oflag &= ~termios.OPOST
    cflag = cflag & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    lflag &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    control[termios.VMIN], control[termios.VTIME] = 1, 0
    termios.tcsetattr(fd, termios.TCSANOW, [iflag, oflag, cflag, lflag, ispeed, ospeed, control])
    return before


def _in_background(fd: int) -> bool:
    """Whether `fd` is our controlling terminal with another job in front: changing its mode would stop us (SIGTTOU)."""
    try:
        return os.tcgetpgrp(fd) != os.getpgrp()
    except OSError:
        return False  # a terminal, but not our controlling one


class StdioCharDevice(CharDevice):
    """Standard input and output. One to a process. The descriptors are arguments for tests' sake."""

    filename = "stdio"
    _write_size = PIPE_BUF

    def __init__(self, loop: EventLoop, id: str = "", in_fd: int = 0, out_fd: int = 1) -> None:
        super().__init__(loop, id)
        self._in_fd = in_fd
        self._out_fd = out_fd
        self._own_out_fd = -1
        self._saved: list[Any] | None = None
        self._ended = False
        self._pollable = True
        if os.isatty(out_fd):
            try:
                flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                self._own_out_fd = self._out_fd = os.open(f"/proc/self/fd/{out_fd}", flags)
            except OSError:
                self._out_fd = out_fd  # another user's terminal (su): shared and blocking it is
        self._poller = select.poll()
        self._poller.register(self._out_fd, select.POLLOUT)
        if os.isatty(in_fd) and not _in_background(in_fd):
            import atexit

            self._saved = make_raw(in_fd, output_processing=True)
            atexit.register(self._restore_terminal)

    # -- output

    def _send(self, chunk: bytes) -> int:
        return self._write_fd(chunk) if self._poller.poll(0) else -1

    def _wait_writable(self, wanted: bool) -> None:
        if wanted != self._waits_writable:
            self._waits_writable = wanted
            if wanted:
                self.loop.add(self._out_fd, WRITE, self._on_writable)
            else:
                self.loop.remove(self._out_fd)

    def _on_writable(self, _events: int) -> None:
        self._flush()

    # -- input

    def _watch_input(self, wanted: bool) -> None:
        wanted = wanted and not self._ended
        if wanted == self._watches_input:
            return
        self._watches_input = wanted
        if not self._pollable:
            if wanted:
                self.loop.call_soon(self._read_unpollable)
        elif wanted:
            try:
                self.loop.add(self._in_fd, READ, self._on_readable)
            except PermissionError:  # a regular file or /dev/null: always ready
                self._pollable = False
                self.loop.call_soon(self._read_unpollable)
        else:
            self.loop.remove(self._in_fd)

    def _on_readable(self, _events: int) -> None:
        if not self._read_input():
            self._ended = True
            self._watch_input(False)

    def _read_unpollable(self) -> None:
        if self._watches_input:
            self._on_readable(READ)
        if self._watches_input:
            self.loop.call_soon(self._read_unpollable)

    # -- the end

    def _release(self) -> None:
        self._restore_terminal()
        if self._own_out_fd >= 0:
            os.close(self._own_out_fd)
            self._own_out_fd = -1

    def _restore_terminal(self) -> None:
        """Give the terminal back as it was. Idempotent."""
        saved, self._saved = self._saved, None
        if saved is None:
            return
        import atexit
        import termios

        try:
            termios.tcsetattr(self._in_fd, termios.TCSANOW, saved)
        except termios.error:
            return  # the terminal itself is gone
        finally:
            atexit.unregister(self._restore_terminal)
