"""Character devices: a stream of bytes between a guest's port and something on the host.

Output. vCPU threads append to a buffer; the first byte of a burst wakes the loop, which waits a millisecond and then writes
all that has gathered: one system call per millisecond instead of one per byte. The buffer is bounded. When it is nearly
full `can_write` goes false, so that the port can hold its transmitter busy, and `writable` is called when there is room.

Input. The source is read only as far as the port has room, and not watched at all while it has none; the port asks for
more with `resume_input`. Nothing is dropped, nothing piles up.

Thread: `write`, `can_write` and `resume_input` from any thread; all else on the loop's thread. The callbacks of
`set_receiver` are made on the loop's thread, without a lock held.
"""

from __future__ import annotations

import _thread
import posix
import select
import time

from stratovirt import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from stratovirt.config.vm import CharDeviceConfig
    from stratovirt.loop import EventLoop

OUTPUT_LIMIT = 64 << 10
OUTPUT_HIGH_WATER = OUTPUT_LIMIT - (4 << 10)  # a port told "full" may still send what its own FIFO holds
OUTPUT_LOW_WATER = OUTPUT_LIMIT // 2
GATHER_SECONDS = 0.001
CLOSE_SECONDS = 1.0
READ_SIZE = 4096


class CharDevice:
    """A character device that leads nowhere: output vanishes, input never comes. The kinds below derive from it.

    `filename` is what `query-chardev` shows. A kind sets `_out_fd`, `_in_fd` (-1: none) and `_write_size`.
    """

    filename = "null"
    _write_size = OUTPUT_LIMIT

    def __init__(self, loop: EventLoop, id: str = "") -> None:
        self.loop = loop
        self.id = id
        self.can_write = True
        self.dropped = 0  # bytes of output that a port sent although it was told to wait
        self._lock = _thread.allocate_lock()  # guards the three below
        self._output = bytearray()
        self._flush_due = False
        self._in_fd = -1
        self._out_fd = -1
        self._waits_writable = False
        self._watches_input = False
        self._closed = False
        self._receive: Callable[[bytes], None] | None = None
        self._can_receive: Callable[[], int] = int
        self._writable: Callable[[], None] | None = None
        self._connection_changed: Callable[[bool], None] | None = None

    @property
    def connected(self) -> bool:
        """Is there another side? Only a socket without a client says no."""
        return True

    def watch_connection(self, changed: Callable[[bool], None]) -> None:
        """Call `changed(connected)` when the other side comes or goes."""
        self._connection_changed = changed

    # -- output

    def write(self, data: bytes) -> None:
        """Queue output. What exceeds the limit is dropped and counted. Thread: any; makes at most one system call."""
        with self._lock:
            room = OUTPUT_LIMIT - len(self._output)
            if len(data) > room:
                self.dropped += len(data) - room
                data = data[:room]
            self._output += data
            if len(self._output) >= OUTPUT_HIGH_WATER:
                self.can_write = False
            wake = not self._flush_due
            self._flush_due = True
        if wake and not self._closed:
            self.loop.call_soon(self._gather)

    def _gather(self) -> None:
        self.loop.call_later(GATHER_SECONDS, self._flush_burst)

    def _flush_burst(self) -> None:
        with self._lock:
            self._flush_due = False
        if not self._waits_writable and not self._closed:
            self._flush()

    def _flush(self) -> None:
        """Write what has gathered until it is all out or would block."""
        while True:
            with self._lock:
                chunk = bytes(self._output[: self._write_size])
            if not chunk:
                self._wait_writable(False)
                return
            written = self._send(chunk)
            if written < 0:
                self._wait_writable(True)
                return
            self._consume(written)

    def _consume(self, count: int) -> None:
        with self._lock:
            del self._output[:count]
            drained = not self.can_write and len(self._output) <= OUTPUT_LOW_WATER
            if drained:
                self.can_write = True
        if drained and self._writable is not None:
            self._writable()

    def _send(self, chunk: bytes) -> int:
        """Write some of `chunk`: the count that is done with, or -1 when it would block."""
        return len(chunk)

    def _wait_writable(self, wanted: bool) -> None:
        """Have `_flush` called when the other side takes more, or not any longer."""
        self._waits_writable = wanted

    def _write_fd(self, chunk: bytes) -> int:
        try:
            return posix.write(self._out_fd, chunk)
        except BlockingIOError:
            return -1
        except OSError as error:
            # A broken pipe or a full disk: the guest's console is lost from here, the guest is not.
            log.guest_warn(self.filename, f"{len(chunk)} bytes of output lost: {error.strerror}")
            return len(chunk)

    # -- input

    def set_receiver(self, receive: Callable[[bytes], None], can_receive: Callable[[], int],
                     writable: Callable[[], None] | None = None) -> None:
        """Connect the port: `receive(data)` takes input, at most as much as `can_receive()` has just allowed;
        `writable()` is called when `can_write` becomes true again."""
        self._receive = receive
        self._can_receive = can_receive
        self._writable = writable
        self._watch_input(True)

    def resume_input(self) -> None:
        """The port has room again. Thread: any."""
        if not self._closed:
            self.loop.call_soon(self._resume)

    def _resume(self) -> None:
        if not self._closed:
            self._watch_input(True)

    def _watch_input(self, wanted: bool) -> None:
        """Have `_read_input` called when there is input, or not any longer."""

    def _read_input(self) -> bool:
        """Take what there is, as far as there is room. False at the end of the input."""
        if self._receive is None:
            self._watch_input(False)
            return True
        room = self._can_receive()
        if room <= 0:
            self._watch_input(False)
            return True
        try:
            data = posix.read(self._in_fd, min(room, READ_SIZE))
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False  # EIO of a terminal whose other side is gone, ECONNRESET of a socket
        if not data:
            return False
        self._receive(data)
        return True

    # -- the end

    def close(self) -> None:
        """Write out what is queued, waiting at most a second for a reader that is stuck, and let go. Idempotent."""
        if self._closed:
            return
        self._drain(CLOSE_SECONDS)
        self._closed = True
        self._wait_writable(False)
        self._watch_input(False)
        self._release()

    def _drain(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            self._flush()
            with self._lock:
                left = len(self._output)
            remaining = deadline - time.monotonic()
            if not left or self._out_fd < 0:
                return
            if remaining <= 0:
                log.warn(f"{self.filename}: {left} bytes of output lost: nobody reads them")
                return
            poller = select.poll()
            poller.register(self._out_fd, select.POLLOUT)
            poller.poll(max(1, int(remaining * 1000)))

    def _release(self) -> None:
        """Give back what the kind holds."""


class LogCharDevice(CharDevice):
    """`redirect-to-log`: every line of output becomes a line of the log."""

    filename = "redirect-to-log"

    def __init__(self, loop: EventLoop, id: str = "") -> None:
        super().__init__(loop, id)
        self._line = b""

    def _send(self, chunk: bytes) -> int:
        *lines, self._line = (self._line + chunk).split(b"\n")
        if len(self._line) > log.MAX_MESSAGE:
            lines.append(self._line)
            self._line = b""
        for line in lines:
            log.info(line.rstrip(b"\r").decode("utf-8", "backslashreplace"))
        return len(chunk)

    def _release(self) -> None:
        if self._line:
            self._send(b"\n")


def create(config: CharDeviceConfig, loop: EventLoop, option: str = "-chardev") -> CharDevice:
    """The character device that `config` describes. Raises: ConfigError naming `option`."""
    if config.kind == "stdio":
        from stratovirt.backends.chardev_stdio import StdioCharDevice

        return StdioCharDevice(loop, config.id)
    if config.kind == "file":
        from stratovirt.backends.chardev_host import FileCharDevice

        return FileCharDevice(loop, config.id, config.path, f"{option} file,path")
    if config.kind == "pty":
        from stratovirt.backends.chardev_host import PtyCharDevice

        return PtyCharDevice(loop, config.id, option)
    if config.kind == "socket":
        from stratovirt.backends.chardev_socket import SocketCharDevice

        return SocketCharDevice(loop, config.id, config, option)
    if config.kind == "redirect-to-log":
        return LogCharDevice(loop, config.id)
    from stratovirt.errors import ConfigError

    raise ConfigError("no such kind of character device", option=option, value=config.kind,
                      accepted="stdio, pty, file, socket, redirect-to-log")
