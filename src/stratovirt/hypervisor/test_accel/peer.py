"""The socket of the test accelerator: lines in, replies out, on the main loop.

Nothing piles up: a line is bounded, and while the peer does not take its replies no further command is carried out or read.
"""

from __future__ import annotations

import os

from stratovirt.errors import ConfigError
from stratovirt.hypervisor.test_accel.commands import MAX_LINE
from stratovirt.loop import READ, WRITE

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket as _socket
    from collections.abc import Callable

    from stratovirt.loop import EventLoop
else:
    import _socket

CONNECT_SECONDS = 10.0
_READ_SIZE = 1 << 16
_OUTPUT_LIMIT = 1 << 16  # with more than that to send, replies go out before the next command
_TURN = 64  # commands before the loop serves others


class Peer:
    """A connection to the unix stream socket `path`; `on_hang_up` is called once, when the other side is gone.

    Raises: ConfigError when nobody listens there.
    """

    def __init__(self, path: str, loop: EventLoop, on_hang_up: Callable[[], None]) -> None:
        self._loop = loop
        self._on_hang_up = on_hang_up
        self._execute: Callable[[bytes], str] | None = None
        self._input = bytearray()
        self._scanned = 0  # bytes of the input that hold no end of line
        self._too_long = False  # the line that is coming in: it is thrown away
        self._output = bytearray()
        self._interest = 0
        self._ended = False  # it sends no more, but may still read
        self._closed = False
        self._socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        self._socket.settimeout(CONNECT_SECONDS)
        try:
            self._socket.connect(path)
        except (OSError, ValueError) as error:
            self._socket.close()
            errno = error.errno if isinstance(error, OSError) else None
            raise ConfigError(f"cannot connect: {os.strerror(errno) if errno else error}", option="-mod-test", value=path,
                              accepted="a unix stream socket that somebody listens on") from error
        self._socket.settimeout(0.0)

    def serve(self, execute: Callable[[bytes], str]) -> None:
        """From now on answer every line with `execute(line)`."""
        self._execute = execute
        self._interest = READ
        self._loop.add(self._socket.fileno(), READ, self._on_ready)

    def close(self) -> None:
        """Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove(self._socket.fileno())
        self._socket.close()

    def _on_ready(self, _events: int) -> None:
        if self._closed:
            return
        if self._interest == READ:
            try:
                self._receive(os.read(self._socket.fileno(), _READ_SIZE))
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self._hang_up()
                return
        self._work()

    def _receive(self, data: bytes) -> None:
        if not data:
            self._ended = True
        if self._too_long:
            _, end, data = data.partition(b"\n")
            self._too_long = not end
        self._input += data
        if len(self._input) > MAX_LINE and self._input.find(b"\n", self._scanned) < 0:
            self._input.clear()
            self._scanned = 0
            self._too_long = True
            self._output += b"ERR the line is too long\n"

    def _next_line(self) -> bytes | None:
        end = self._input.find(b"\n", self._scanned)
        if end < 0:
            self._scanned = len(self._input)
            return None
        line = bytes(self._input[:end])
        del self._input[: end + 1]
        self._scanned = 0
        return line

    def _work(self) -> None:
        """Carry out what has come in, as far as replies go out and others get their turn."""
        if self._closed or self._execute is None:
            return
        for _ in range(_TURN):
            if len(self._output) >= _OUTPUT_LIMIT and not self._flush():
                break
            line = self._next_line()
            if line is None:
                if self._flush() and self._ended:
                    self._hang_up()
                break
            self._output += self._execute(line).encode() + b"\n"
        else:
            if self._flush():
                self._loop.call_soon(self._work)
                self._watch(0)
                return
        if not self._closed:
            self._watch(WRITE if self._output else READ)

    def _flush(self) -> bool:
        """Is everything out? A peer that is gone takes everything."""
        while self._output:
            try:
                del self._output[: os.write(self._socket.fileno(), self._output)]
            except (BlockingIOError, InterruptedError):
                return False
            except OSError:
                self._output.clear()
                self._hang_up()
        return True

    def _watch(self, interest: int) -> None:
        if interest != self._interest and not self._closed:
            self._interest = interest
            self._loop.modify(self._socket.fileno(), interest)

    def _hang_up(self) -> None:
        if not self._closed:
            self.close()
            self._on_hang_up()
