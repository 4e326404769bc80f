"""QMP on the wire, without any I/O: bytes in, requests out; values in, bytes out.

A request is one JSON object, `{"execute": NAME, "arguments": {...}, "id": ANY}`. Documents may follow each other with or
without white space in between, and arrive in pieces of any size. Their extent is found by a small scanner that looks at
every byte once, however the client cuts them; only then does the JSON parser see them, so its work and its recursion are
bounded by MAX_DOCUMENT and MAX_DEPTH.

After something that cannot be JSON the rest of the line (or of the burst, when it has no line end) is skipped, and the
client gets one error. A document that is too long or too deep is skipped up to its end.

Lines to the client end in CR LF. Members within `return` are sorted.
"""

from __future__ import annotations

import json
import re

from stratovirt.errors import StratoVirtError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_DOCUMENT = 64 << 10
MAX_DEPTH = 64
MAX_DIGITS = 100

QEMU_VERSION = (5, 0, 1)  # major, minor, micro: what clients of StratoVirt expect to be told
PACKAGE = "StratoVirt-2.5.0"

GENERIC_ERROR = "GenericError"
COMMAND_NOT_FOUND = "CommandNotFound"
DEVICE_NOT_FOUND = "DeviceNotFound"
DEVICE_NOT_ACTIVE = "DeviceNotActive"
KVM_MISSING_CAP = "KVMMissingCap"
OPERATION_THROTTLED = "OperationThrottled"

TOO_LONG = "The socket message is too long."


class _Absent:
    """The id of a request that has none. None will not do: null is an id."""


ABSENT = _Absent()


class QmpError(StratoVirtError):
    """What a command answers instead of a value."""

    def __init__(self, description: str, error_class: str = GENERIC_ERROR) -> None:
        self.description = description
        self.error_class = error_class
        super().__init__(description)


class Request:
    """A well-formed request. `arguments` is None when there was no such member."""

    __slots__ = ("arguments", "execute", "id")

    def __init__(self, execute: str, arguments: dict[str, Any] | None, id: object) -> None:
        self.execute = execute
        self.arguments = arguments
        self.id = id


class Malformed:
    """What arrived instead of a request, and the id if that much could be read."""

    __slots__ = ("description", "id")

    def __init__(self, description: str, id: object = ABSENT) -> None:
        self.description = description
        self.id = id


# -- from the client

_STRUCTURE = re.compile(rb'["{}\[\]]')
_IN_STRING = re.compile(rb'["\\\x00-\x1f]')
_NOT_SPACE = re.compile(rb"[^ \t\r\n]")
_CLOSING = {ord("{"): ord("}"), ord("["): ord("]")}
_QUOTE, _BACKSLASH = ord('"'), ord("\\")


class Decoder:
    """Cuts a client's byte stream into documents and makes requests of them. Holds at most MAX_DOCUMENT bytes."""

    def __init__(self) -> None:
        self._document = bytearray()
        self._closers = bytearray()  # the brackets that are still to come, the next one last
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._skipping = False  # within a document that has been refused

    def feed(self, data: bytes) -> list[Request | Malformed]:
        """Requests that `data` completes, and what is wrong with the rest, in order."""
        found: list[Request | Malformed] = []
        position = 0
        while position < len(data):
            scan = self._inside if self._depth else self._between
            position = scan(data, position, found)
        return found

    def _between(self, data: bytes, position: int, found: list[Request | Malformed]) -> int:
        start = _NOT_SPACE.search(data, position)
        if start is None:
            return len(data)
        position = start.start()
        if data[position] not in _CLOSING:
            found.append(Malformed("expected a JSON object"))
            return self._resynchronize(data, position)
        return self._open(data, position, position, found)

    def _open(self, data: bytes, position: int, start: int, found: list[Request | Malformed]) -> int:
        self._depth = 1
        self._closers.append(_CLOSING[data[position]])
        return self._inside(data, position + 1, found, start)

    def _inside(self, data: bytes, position: int, found: list[Request | Malformed], start: int | None = None) -> int:
        start = position if start is None else start
        if self._escaped:
            self._escaped = False
            position += 1
        while True:
            match = (_IN_STRING if self._in_string else _STRUCTURE).search(data, position)
            if match is None:
                self._keep(data[start:], found)
                return len(data)
            position = match.end()
            byte = data[position - 1]
            if byte == _QUOTE:
                self._in_string = not self._in_string
            elif self._in_string:
                if byte != _BACKSLASH:
                    self._refuse(f"control character {byte:#04x} in a string", found)
                    return self._resynchronize(data, position - 1)
                self._escaped = position == len(data)
                position += 1
            elif byte in _CLOSING:
                self._depth += 1
                if self._depth > MAX_DEPTH:
                    self._refuse(f"JSON nested deeper than {MAX_DEPTH} levels", found)
                if not self._skipping:
                    self._closers.append(_CLOSING[byte])
            else:
                if not self._skipping and byte != self._closers.pop():
                    self._refuse(f"unexpected {chr(byte)}", found)
                    return self._resynchronize(data, position)
                self._depth -= 1
                if not self._depth:
                    self._keep(data[start:position], found)
                    self._complete(found)
                    return position

    def _keep(self, piece: bytes, found: list[Request | Malformed]) -> None:
        if self._skipping:
            return
        if len(self._document) + len(piece) > MAX_DOCUMENT:
            self._refuse(TOO_LONG, found)
        else:
            self._document += piece

    def _refuse(self, description: str, found: list[Request | Malformed]) -> None:
        if not self._skipping:
            found.append(Malformed(description))
        self._skipping = True
        self._document.clear()
        self._closers.clear()

    def _complete(self, found: list[Request | Malformed]) -> None:
        if not self._skipping:
            found.append(parse_request(bytes(self._document)))
        self._start_afresh()

    def _resynchronize(self, data: bytes, position: int) -> int:
        self._start_afresh()
        line_end = data.find(b"\n", position)
        return len(data) if line_end < 0 else line_end + 1

    def _start_afresh(self) -> None:
        self._document.clear()
        self._closers.clear()
        self._depth = 0
        self._in_string = self._escaped = self._skipping = False


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"member {next(name for name in names if names.count(name) > 1)!r} appears twice")
    return members


def _bounded_integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _finite_number(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError("a number out of range")
    return number


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


_JSON = json.JSONDecoder(object_pairs_hook=_object_without_duplicates, parse_int=_bounded_integer,
                         parse_float=_finite_number, parse_constant=_no_constant)


def parse_request(document: bytes) -> Request | Malformed:
    """The request in one JSON document, whose nesting is bounded."""
    try:
        value = _JSON.decode(document.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Malformed(f"invalid UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return Malformed(f"{error.msg}, at line {error.lineno} column {error.colno}")
    except ValueError as error:
        return Malformed(f"not a valid request: {error}")
    if not isinstance(value, dict):
        return Malformed("expected a JSON object")
    request_id = value.get("id", ABSENT)
    for name in value:
        if name not in ("execute", "arguments", "id"):
            return Malformed(f"unexpected member {name!r}, a request has execute, arguments and id", request_id)
    if "execute" not in value:
        return Malformed("missing member 'execute'", request_id)
    execute, arguments = value["execute"], value.get("arguments")
    if not isinstance(execute, str):
        return Malformed("invalid type: 'execute' must be a string", request_id)
    if "arguments" in value and not isinstance(arguments, dict):
        return Malformed("invalid type: 'arguments' must be an object", request_id)
    return Request(execute, arguments, request_id)


# -- to the client


def _compact(value: object, sort: bool = False) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=sort, allow_nan=False)


def _line(*members: str) -> bytes:
    return ("{" + ",".join(members) + "}\r\n").encode("ascii")


def _with_id(member: str, request_id: object) -> bytes:
    return _line(member) if request_id is ABSENT else _line(member, f'"id":{_compact(request_id)}')


def encode_greeting() -> bytes:
    major, minor, micro = QEMU_VERSION
    qemu = {"micro": micro, "minor": minor, "major": major}
    return _line('"QMP":' + _compact({"version": {"qemu": qemu, "package": PACKAGE}, "capabilities": []}))


def encode_return(value: object, request_id: object = ABSENT) -> bytes:
    return _with_id('"return":' + _compact(value, sort=True), request_id)


def encode_error(error_class: str, description: str, request_id: object = ABSENT) -> bytes:
    return _with_id('"error":' + _compact({"class": error_class, "desc": description}), request_id)


def encode_event(name: str, data: dict[str, Any], seconds: int, microseconds: int) -> bytes:
    timestamp = {"seconds": seconds, "microseconds": microseconds}
    return _line(f'"event":{_compact(name)}', f'"data":{_compact(data, sort=True)}',
                 f'"timestamp":{_compact(timestamp)}')
