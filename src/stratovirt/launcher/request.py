"""A request as the launcher reads it: every field is checked before anything is done with it."""

from __future__ import annotations

import os

from stratovirt.launcher import wire

MAX_NUMBER = 1 << 20
RUN, CLONE, TEMPLATE = KINDS = ("run", "clone", "template")


class RequestError(Exception):
    """The request is not one; the text goes to the client."""


class Request:
    """What a machine is to be started with. `descriptors` maps its numbers to what they are in this process.

    All descriptors of the request are the owner's to close: `close` does.
    """

    __slots__ = ("arguments", "descriptors", "directory", "environment", "kind", "umask")

    def __init__(self, kind: str, arguments: list[str], environment: dict[str, str], umask: int, directory: int,
                 descriptors: dict[int, int]) -> None:
        self.kind = kind  # one of KINDS
        self.arguments = arguments
        self.environment = environment
        self.umask = umask
        self.directory = directory
        self.descriptors = descriptors

    def close(self) -> None:
        for fd in (self.directory, *self.descriptors.values()):
            os.close(fd)


def read_request(message: bytes, received: list[int], limit: int) -> Request:
    """`limit` is the first descriptor number that a machine cannot have. Raises: RequestError, with `received` still open."""
    fields = message.split(b"\0")
    if fields[0] != wire.GREETING or len(fields) < 5:
        raise RequestError(f"not a request of this version (accepted: one that begins with {wire.GREETING.decode()!r})")
    kind = fields[1].decode("latin-1")
    if kind not in KINDS:
        raise RequestError(f"no such request: {_shown(fields[1])} (accepted: {', '.join(KINDS)})")
    umask = _number(fields[2], 8, 0o777, "umask")
    count = _number(fields[4], 10, len(fields) - 5, "count of arguments")
    numbers = [_number(text, 10, MAX_NUMBER, "descriptor number") for text in fields[3].split(b",")]
    if numbers[:3] != [0, 1, 2] or len(set(numbers)) != len(numbers):
        raise RequestError("descriptor numbers begin with 0,1,2 and each comes once")
    if len(received) != len(numbers) + 1:
        raise RequestError(f"{len(received)} descriptors came, and {len(numbers) + 1} were announced: "
                           "the working directory and those with a number")
    if max(numbers) >= limit:
        raise RequestError(f"descriptor {max(numbers)} is beyond this launcher's limit of {limit} open files")
    environment = {}
    for field in fields[5 + count :]:
        name, equals, value = field.partition(b"=")
        if not equals or not name:
            raise RequestError(f"not a variable of an environment: {_shown(field)} (accepted: NAME=VALUE)")
        environment[os.fsdecode(name)] = os.fsdecode(value)
    arguments = [os.fsdecode(word) for word in fields[5 : 5 + count]]
    return Request(kind, arguments, environment, umask, received[0], dict(zip(numbers, received[1:], strict=True)))


def with_arguments(message: bytes, arguments: list[str]) -> bytes:
    """A message that `read_request` has taken, with other arguments."""
    fields = message.split(b"\0")
    count = int(fields[4])
    fields[4 : 5 + count] = [b"%d" % len(arguments), *map(os.fsencode, arguments)]
    return b"\0".join(fields)


def _number(text: bytes, base: int, most: int, what: str) -> int:
    if text.isdigit() and len(text) < 10:
        try:
            value = int(text, base)
        except ValueError:
            value = most + 1
        if value <= most:
            return value
    raise RequestError(f"{what}: {_shown(text)} (accepted: 0 to {most:o})" if base == 8 else
                       f"{what}: {_shown(text)} (accepted: 0 to {most})")


def _shown(data: bytes) -> str:
    return ascii(data[:40].decode("latin-1"))
