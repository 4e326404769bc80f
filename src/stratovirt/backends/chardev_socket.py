"""The `socket` character device: a listening unix or TCP socket, one client at a time.

Further clients wait in the listen backlog until the one being served has gone. Output without a client is dropped.
"""

from __future__ import annotations

import os

from stratovirt import log
from stratovirt.backends.chardev_host import DescriptorCharDevice
from stratovirt.backends.listen import Listener, listen_tcp, listen_unix
from stratovirt.errors import ConfigError
from stratovirt.loop import READ

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket

    from stratovirt.config.vm import CharDeviceConfig
    from stratovirt.loop import EventLoop

ACCEPT_RETRY_SECONDS = 1.0


class SocketCharDevice(DescriptorCharDevice):
    def __init__(self, loop: EventLoop, id: str, config: CharDeviceConfig, option: str) -> None:
        super().__init__(loop, id)
        if not config.server:
            raise ConfigError("only listening sockets are supported here", option=f"{option} socket",
                              accepted="server,nowait")
        self._client: _socket.socket | None = None
        self._listener: Listener
        if config.path:
            self._listener = listen_unix(config.path, f"{option} socket,path")
            self.filename = f"unix:{config.path},server=on"
        else:
            self._listener = listen_tcp(config.host or "0.0.0.0", config.port, f"{option} socket")
            self.filename = f"tcp:{config.host or '0.0.0.0'}:{config.port},server=on"
        self._listen()

    @property
    def connected(self) -> bool:
        return self._client is not None

    def _listen(self) -> None:
        if not self._closed and self._client is None:
            self.loop.add(self._listener.fd, READ, self._on_connect)

    def _on_connect(self, _events: int) -> None:
        try:
            client = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionError):
            return  # it has gone again
        except OSError as error:
            # Out of descriptors: the listener stays readable, so look away for a while instead of spinning.
            log.warn(f"{self.filename}: cannot accept a client: {error.strerror}")
            self.loop.remove(self._listener.fd)
            self.loop.call_later(ACCEPT_RETRY_SECONDS, self._listen)
            return
        self.loop.remove(self._listener.fd)
        self._client = client
        self._watches_input = self._receive is not None
        self._attach(client.fileno())
        if self._connection_changed is not None:
            self._connection_changed(True)

    def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is None:
            return
        self._waits_writable = False
        self._detach()
        client.close()
        self._listen()
        if self._connection_changed is not None:
            self._connection_changed(False)

    def _end_of_input(self) -> None:
        self._disconnect()
        self._flush()  # what the client did not take is dropped; a port that waits for room is told

    def _send(self, chunk: bytes) -> int:
        client = self._client
        if client is None:
            return len(chunk)
        try:
            return os.write(client.fileno(), chunk)
        except (BlockingIOError, InterruptedError):
            return -1
        except OSError:
            self._disconnect()
            return len(chunk)

    def _release(self) -> None:
        self._disconnect()
        self.loop.remove(self._listener.fd)
        self._listener.close()
