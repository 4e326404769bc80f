"""A client of a machine's QMP socket, for subcommands: one command after the other, events passed over.

Every wait has a deadline. A socket serves one client at a time, and another has to wait for its greeting: after
GREETING_SECONDS that is said.
"""

from __future__ import annotations

import json
import os
import socket
import time

from stratovirt.errors import ConfigError, StratoVirtError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any

GREETING_SECONDS = 10.0
_MAX_LINE = 16 << 20
_ACCEPTED = "the path of a unix socket, unix:PATH or tcp:HOST:PORT"


class QmpError(StratoVirtError):
    """The machine answered with an error; or it did not answer."""


class QmpClient:
    """A connection; `option` and `address` are what the user gave, for messages. Raises: ConfigError, QmpError."""

    def __init__(self, address: str, option: str = "--qmp") -> None:
        self._address = address
        self._data = b""
        try:
            self._socket = _connect(address, option)
        except OSError as error:
            raise ConfigError(os.strerror(error.errno) if error.errno else str(error), option=option, value=address,
                              accepted="the QMP socket of a running machine") from error
        try:
            greeting = self._read(time.monotonic() + GREETING_SECONDS, "it does not greet: another client may be connected")
            if "QMP" not in greeting:
                raise QmpError(f"{address}: this is no QMP socket")
            self.execute("qmp_capabilities", GREETING_SECONDS)
        except BaseException:
            self._socket.close()
            raise

    def execute(self, command: str, seconds: float, **arguments: object) -> Any:
        """What the machine returns, within so many seconds. Raises: QmpError."""
        deadline = time.monotonic() + seconds
        request = {"execute": command, **({"arguments": arguments} if arguments else {})}
        try:
            self._socket.settimeout(seconds)
            self._socket.sendall(json.dumps(request).encode())
        except OSError as error:
            raise QmpError(f"{self._address}: {error}") from error
        while True:
            answer = self._read(deadline, f"no answer to {command} after {seconds:g} seconds; it may still come to that")
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise QmpError(str(answer["error"].get("desc", answer["error"])) if isinstance(answer["error"], dict)
                               else str(answer["error"]))

    def _read(self, deadline: float, late: str) -> dict[str, Any]:
        while b"\n" not in self._data:
            left = deadline - time.monotonic()
            try:
                if left <= 0 or len(self._data) > _MAX_LINE:
                    raise TimeoutError
                self._socket.settimeout(left)
                part = self._socket.recv(1 << 16)
            except TimeoutError:
                raise QmpError(f"{self._address}: {late}") from None
            except OSError as error:
                raise QmpError(f"{self._address}: {error}") from error
            if not part:
                raise QmpError(f"{self._address}: the machine has closed the connection")
            self._data += part
        line, self._data = self._data.split(b"\n", 1)
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise QmpError(f"{self._address}: this is no QMP socket")
        return answer

    def __enter__(self) -> QmpClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.close()


def _connect(address: str, option: str) -> socket.socket:
    scheme, colon, rest = address.partition(":")
    if colon and scheme == "tcp":
        host, _, port = rest.rpartition(":")
        if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigError("not an address", option=option, value=address, accepted=_ACCEPTED)
        return socket.create_connection((host, int(port)), GREETING_SECONDS)
    path = rest if colon and scheme == "unix" else address
    if not path or "\0" in path:
        raise ConfigError("not an address", option=option, value=address, accepted=_ACCEPTED)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.settimeout(GREETING_SECONDS)
        made.connect(path)
    except BaseException:
        made.close()
        raise
    return made
