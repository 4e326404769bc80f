"""The QMP server: clients of one endpoint, their requests, and the events that go to all of them.

Any number of clients up to MAX_CLIENTS is served at once; more wait in the backlog. Requests are carried out one at a time on
the machine's loop. A reply always precedes the events that its command caused. One leaky bucket per endpoint lets 100
requests a second through. No client can make us hold more than OUTPUT_LIMIT: one that does not read is not read from
either, and is disconnected when the events alone overflow it.

Thread: the loop's, but for `_on_event`, which the machine may call on any.
"""

from __future__ import annotations

import _socket
import _thread
import posix
import select
import sys
import time

from stratovirt import log
from stratovirt.control.commands import COMMANDS
from stratovirt.control.descriptors import MAX_IN_A_MESSAGE, Descriptors
from stratovirt.control.protocol import (
    GENERIC_ERROR,
    OPERATION_THROTTLED,
    Decoder,
    Malformed,
    QmpError,
    Request,
    encode_error,
    encode_event,
    encode_greeting,
    encode_return,
)
from stratovirt.errors import StratoVirtError
from stratovirt.loop import ERROR, HANGUP, READ, WRITE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from stratovirt.backends.listen import Listener
    from stratovirt.control.table import MachineView

MAX_CLIENTS = 64
REQUESTS_PER_SECOND = 100
EVENT_QUEUE = 50
OUTPUT_LIMIT = 1 << 20
OUTPUT_HIGH_WATER = 64 << 10  # no further request of a client is carried out while it has so much to read
READ_SIZE = 64 << 10
ACCEPT_RETRY_SECONDS = 1.0
_FD_SIZE = 4  # an int of C
_SCM_RIGHTS, _MSG_CMSG_CLOEXEC = 1, 0x4000_0000

THROTTLED = f"More than {REQUESTS_PER_SECOND} requests received during 1 second"


def _descriptors_in(control: list[tuple[int, int, bytes]]) -> list[int]:
    fds: list[int] = []
    for level, kind, data in control:
        if (level, kind) == (_socket.SOL_SOCKET, _SCM_RIGHTS):
            usable = len(data) // _FD_SIZE * _FD_SIZE
            fds += [int.from_bytes(data[at : at + _FD_SIZE], sys.byteorder) for at in range(0, usable, _FD_SIZE)]
    return fds


class LeakyBucket:
    """Lets `rate` requests a second through, all of them at once if need be."""

    def __init__(self, rate: int, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._clock = clock
        self._level = 0.0
        self._last = clock()

    def take(self) -> bool:
        now = self._clock()
        self._level = max(0.0, self._level - (now - self._last) * self._rate)
        self._last = now
        if self._level + 1 > self._rate:
            return False
        self._level += 1
        return True


class Client:
    """One connection."""

    __slots__ = ("decoder", "descriptors", "ended", "fd", "interest", "output", "requests", "socket")

    def __init__(self, socket: _socket.socket) -> None:
        self.socket = socket
        self.fd = socket.fileno()
        self.decoder = Decoder()
        self.descriptors = Descriptors()
        self.requests: list[Request | Malformed] = []
        self.output = bytearray()
        self.ended = False  # it will send no more, but may still read
        self.interest = 0


class QmpServer:
    """Serves `listener` for `machine`, from construction to `close`."""

    def __init__(self, listener: Listener, machine: MachineView) -> None:
        self._listener = listener
        self._machine = machine
        self._loop = machine.loop
        self._bucket = LeakyBucket(REQUESTS_PER_SECOND, self._loop.clock)
        self._clients: dict[int, Client] = {}
        self._accepting = False
        self._closed = False
        self._lock = _thread.allocate_lock()  # guards the two below
        self._events: list[bytes] = []
        self._delivery_due = False
        machine.events.subscribe(self._on_event)
        self._accept_more()

    # -- clients come and go

    def _accept_more(self) -> None:
        if not self._closed and not self._accepting and len(self._clients) < MAX_CLIENTS:
            self._accepting = True
            self._loop.add(self._listener.fd, READ, self._on_connect)

    def _accept_no_more(self) -> None:
        if self._accepting:
            self._accepting = False
            self._loop.remove(self._listener.fd)

    def _on_connect(self, _events: int) -> None:
        try:
            client = Client(self._listener.accept())
        except (BlockingIOError, InterruptedError, ConnectionError):
            return  # it has gone again
        except OSError as error:
            # Out of descriptors: the listener stays readable, so look away for a while instead of spinning.
            log.warn(f"QMP: cannot accept a client: {error.strerror}")
            self._accept_no_more()
            self._loop.call_later(ACCEPT_RETRY_SECONDS, self._accept_more)
            return
        self._clients[client.fd] = client
        if len(self._clients) >= MAX_CLIENTS:
            self._accept_no_more()
        self._queue(client, encode_greeting())

    def _disconnect(self, client: Client) -> None:
        if self._clients.pop(client.fd, None) is None:
            return
        if client.interest:
            self._loop.remove(client.fd)
        client.socket.close()
        client.descriptors.close()
        client.requests.clear()
        client.output.clear()
        self._accept_more()

    def _alive(self, client: Client) -> bool:
        return self._clients.get(client.fd) is client

    def _update_interest(self, client: Client) -> None:
        if not self._alive(client):
            return
        wants_input = not client.ended and not client.requests and len(client.output) < OUTPUT_HIGH_WATER
        interest = (READ if wants_input else 0) | (WRITE if client.output else 0)
        if interest == client.interest:
            return
        if not client.interest:
            self._loop.add(client.fd, interest, lambda events: self._on_ready(client, events))
        elif interest:
            self._loop.modify(client.fd, interest)
        else:
            self._loop.remove(client.fd)
        client.interest = interest

    def _on_ready(self, client: Client, events: int) -> None:
        if client.output and events & (WRITE | HANGUP | ERROR):
            self._send(client)
        elif events & (READ | HANGUP | ERROR):
            self._read(client)
        self._carry_out(client)
        if client.ended and not client.output and not client.requests:
            self._disconnect(client)
        self._update_interest(client)

    # -- bytes

    def _read(self, client: Client) -> None:
        """Take what the client has sent. Descriptors come with the last bytes of what one call gives."""
        try:
            data, control, _, _ = client.socket.recvmsg(
                READ_SIZE, _socket.CMSG_SPACE(MAX_IN_A_MESSAGE * _FD_SIZE), _MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._disconnect(client)
            return
        fds = _descriptors_in(control)
        if fds:
            client.descriptors.arrive(fds)
        if data:
            client.requests += client.decoder.feed(data)
        else:
            client.ended = True

    def _queue(self, client: Client, data: bytes) -> None:
        """Send `data`, or keep it until the client reads."""
        if not self._alive(client):
            return
        if len(client.output) + len(data) > OUTPUT_LIMIT:
            log.guest_warn("QMP", f"a client that does not read is disconnected ({len(client.output)} bytes waiting)")
            self._disconnect(client)
            return
        idle = not client.output
        client.output += data
        if idle:
            self._send(client)
        self._update_interest(client)

    def _send(self, client: Client) -> None:
        while client.output:
            try:
                sent = posix.write(client.fd, client.output[:READ_SIZE])
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self._disconnect(client)
                return
            del client.output[:sent]

    # -- requests

    def _carry_out(self, client: Client) -> None:
        asked = bool(client.requests)
        while client.requests and len(client.output) < OUTPUT_HIGH_WATER:
            reply = self._answer(client, client.requests.pop(0))
            self._queue(client, reply)
            self._deliver_events()
        if asked and not client.requests:
            client.descriptors.forget_arrived()

    def _answer(self, client: Client, request: Request | Malformed) -> bytes:
        if not self._bucket.take():
            return encode_error(OPERATION_THROTTLED, THROTTLED, request.id)
        if isinstance(request, Malformed):
            return encode_error(GENERIC_ERROR, request.description, request.id)
        log.debug(f"QMP: {request.execute}")
        try:
            return encode_return(COMMANDS.dispatch(self._machine, request, client.descriptors), request.id)
        except QmpError as error:
            return encode_error(error.error_class, error.description, request.id)
        except (StratoVirtError, OSError) as error:
            return encode_error(GENERIC_ERROR, str(error), request.id)

    # -- events

    def _on_event(self, name: str, data: dict[str, Any], seconds: int, microseconds: int) -> None:
        """Keep the event for delivery, at the cost of the oldest when there are too many. Thread: any."""
        line = encode_event(name, data, seconds, microseconds)
        with self._lock:
            if len(self._events) >= EVENT_QUEUE:
                del self._events[0]
            self._events.append(line)
            wake = not self._delivery_due
            self._delivery_due = True
        if wake and not self._closed:
            self._loop.call_soon(self._deliver_events)

    def _deliver_events(self) -> None:
        with self._lock:
            lines, self._events = self._events, []
            self._delivery_due = False
        for line in lines:
            for client in list(self._clients.values()):
                self._queue(client, line)

    # -- the end

    def flush(self, seconds: float) -> None:
        """Deliver what is queued, waiting at most `seconds` for clients that are slow to read."""
        deadline = time.monotonic() + seconds
        self._deliver_events()
        while waiting := [client for client in self._clients.values() if client.output]:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                log.warn(f"QMP: {len(waiting)} clients did not read the last events")
                return
            poller = select.poll()
            for client in waiting:
                poller.register(client.fd, select.POLLOUT)
            poller.poll(max(1, int(remaining * 1000)))
            for client in waiting:
                self._send(client)

    def close(self) -> None:
        """Let all clients go. The listener is the caller's. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._machine.events.unsubscribe(self._on_event)
        self._accept_no_more()
        for client in list(self._clients.values()):
            self._disconnect(client)
