"""Character devices on one descriptor of our own, nonblocking: `file`, `pty`, and the base of `socket`."""

from __future__ import annotations

import os
import select

from stratovirt import log
from stratovirt.backends.chardev import CharDevice
from stratovirt.errors import ConfigError, HostError
from stratovirt.loop import ERROR, HANGUP, READ, WRITE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.loop import EventLoop


class DescriptorCharDevice(CharDevice):
    """A character device that reads and writes one nonblocking descriptor, `_fd`; -1 while there is none."""

    _edge_triggered = 0

    def __init__(self, loop: EventLoop, id: str = "") -> None:
        super().__init__(loop, id)
        self._registered = 0

    def _attach(self, fd: int) -> None:
        self._in_fd = self._out_fd = fd
        self._update_interest()

    def _detach(self) -> None:
        """Forget the descriptor; the caller closes it."""
        if self._registered:
            self.loop.remove(self._in_fd)
            self._registered = 0
        self._in_fd = self._out_fd = -1

    def _update_interest(self, rearm: bool = False) -> None:
        events = 0
        if self._in_fd >= 0:
            events = (READ if self._watches_input else 0) | (WRITE if self._waits_writable else 0)
        if events == self._registered and not rearm:
            return
        # Nothing to wait for means no registration at all: with an empty one, a hang-up would wake the loop for ever.
        if not events:
            self.loop.remove(self._in_fd)
        elif self._registered:
            self.loop.modify(self._in_fd, events | self._edge_triggered)
        else:
            self.loop.add(self._in_fd, events | self._edge_triggered, self._on_ready)
        self._registered = events

    def _wait_writable(self, wanted: bool) -> None:
        self._waits_writable = wanted
        self._update_interest()

    def _watch_input(self, wanted: bool) -> None:
        self._watches_input = wanted
        self._update_interest()

    def _on_ready(self, events: int) -> None:
        if self._waits_writable and events & (WRITE | HANGUP | ERROR):
            self._flush()
        if self._watches_input and events & (READ | HANGUP | ERROR) and self._in_fd >= 0:
            if self._read_input():
                if self._edge_triggered and self._watches_input:
                    self._update_interest(rearm=True)
            else:
                self._end_of_input()

    def _end_of_input(self) -> None:
        self._watch_input(False)

    def _send(self, chunk: bytes) -> int:
        return self._write_fd(chunk)


class FileCharDevice(DescriptorCharDevice):
    """`file`: output is appended to a file, which is created with mode 0600 if need be; there is no input.

    A named pipe will do, too; regular files are written directly, since they never block and epoll refuses them.
    """

    def __init__(self, loop: EventLoop, id: str, path: str, option: str) -> None:
        super().__init__(loop, id)
        self.filename = path
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            self._fd = os.open(path, flags, 0o600)
        except (OSError, ValueError) as error:
            why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
            raise ConfigError(f"cannot open it: {why}", option=option, value=path,
                              accepted="the path of a file that can be written to") from error
        self._attach(self._fd)

    def _watch_input(self, wanted: bool) -> None:
        """Output only."""

    def _release(self) -> None:
        self._detach()
        os.close(self._fd)


class PtyCharDevice(DescriptorCharDevice):
    """`pty`: a new pseudo-terminal, for `screen`, `virsh console` and the like; its name is logged and in `query-chardev`.

    Output while nobody has it open is dropped. Linux facts: a master without an open slave polls HANGUP and reads EIO,
    and nothing wakes the poller when a slave is opened; so registration is edge-triggered, and writes look first.
    """

    _edge_triggered = select.EPOLLET

    def __init__(self, loop: EventLoop, id: str, option: str) -> None:
        super().__init__(loop, id)
        from stratovirt.backends.chardev_stdio import make_raw

        try:
            master, slave = os.openpty()
        except OSError as error:
            raise HostError.from_os(f"{option} pty: cannot open a pseudo-terminal", error) from error
        make_raw(slave, output_processing=False)
        self.path = os.ttyname(slave)
        os.close(slave)
        os.set_blocking(master, False)
        self.filename = f"pty:{self.path}"
        self._poller = select.poll()
        self._poller.register(master, select.POLLOUT)
        self._fd = master
        self._attach(master)
        log.info(f"character device {id or 'serial0'} is {self.path}")

    def _send(self, chunk: bytes) -> int:
        ready = self._poller.poll(0)
        if not ready:
            return -1
        return len(chunk) if ready[0][1] & select.POLLHUP else self._write_fd(chunk)

    def _end_of_input(self) -> None:
        """The last user has closed it. Keep watching: the next one's first input is an edge."""

    def _release(self) -> None:
        self._detach()
        os.close(self._fd)
