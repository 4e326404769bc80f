"""The form in which QMP commands and events are declared, and the one place where arguments are checked.

A command family is a module with a tuple of Command; `commands.py` joins them. Dispatch, validation, `query-commands` and
the reference page follow from the declaration, so a command that is listed works and one that works is listed.
"""

from __future__ import annotations

from stratovirt.control.protocol import COMMAND_NOT_FOUND, QmpError, Request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any, Protocol

    from stratovirt.config.vm import VmConfig
    from stratovirt.loop import EventLoop

    EventCallback = Callable[[str, dict[str, Any], int, int], None]

    class CharDeviceView(Protocol):
        @property
        def filename(self) -> str: ...

    class EventSource(Protocol):
        def subscribe(self, callback: EventCallback) -> None: ...

        def unsubscribe(self, callback: EventCallback) -> None: ...

    class MachineView(Protocol):
        """A machine as far as QMP needs it. Thread: all calls are made on the thread of `loop`."""

        @property
        def loop(self) -> EventLoop: ...

        @property
        def config(self) -> VmConfig: ...

        @property
        def state(self) -> str: ...

        @property
        def events(self) -> EventSource: ...

        @property
        def chardevs(self) -> Mapping[str, CharDeviceView]:
            """Character devices in use, by label."""

        def vcpu_thread_ids(self) -> list[int]: ...

        def pause(self) -> None: ...

        def resume(self) -> None: ...

        def reset(self, guest: bool) -> None: ...

        def powerdown(self) -> None: ...

        def shutdown(self, guest: bool, reason: str) -> None: ...

    Handler = Callable[[MachineView, dict[str, Any]], object]


_SIGNED_64 = (-(1 << 63), (1 << 63) - 1)
_UNSIGNED_64 = (0, (1 << 64) - 1)

# type of an argument -> (class of the JSON value, bounds, how it is called in an error)
ARGUMENT_TYPES: dict[str, tuple[type, tuple[int, int] | None, str]] = {
    "str": (str, None, "a string"),
    "bool": (bool, None, "true or false"),
    "int": (int, _SIGNED_64, "a 64-bit integer"),
    "uint": (int, _UNSIGNED_64, "an unsigned 64-bit integer"),
    "object": (dict, None, "an object"),
    "list": (list, None, "an array"),
}


class Argument:
    """One argument of a command. `type` is a key of ARGUMENT_TYPES."""

    __slots__ = ("name", "optional", "summary", "type")

    def __init__(self, name: str, type: str, summary: str, optional: bool = False) -> None:
        self.name = name
        self.type = type
        self.summary = summary
        self.optional = optional

    def check(self, value: object) -> None:
        """Raises QmpError naming the argument when `value` is not of its type."""
        kind, bounds, called = ARGUMENT_TYPES[self.type]
        if type(value) is not kind:  # exactly: JSON's true is no integer
            raise QmpError(f"invalid type: {self.name!r} must be {called}")
        if bounds is not None and isinstance(value, int) and not bounds[0] <= value <= bounds[1]:
            raise QmpError(f"invalid value: {self.name!r} must be {called}")


class Command:
    """One QMP command. `handler(machine, arguments)` gives the value to return or raises a StratoVirtError.

    `strict` says whether arguments that are not declared are an error; `returns` is for the reference page.
    """

    __slots__ = ("arguments", "handler", "name", "returns", "strict", "summary")

    def __init__(self, name: str, handler: Handler, summary: str, returns: str = "{}",
                 arguments: tuple[Argument, ...] = (), strict: bool = True) -> None:
        self.name = name
        self.handler = handler
        self.summary = summary
        self.returns = returns
        self.arguments = arguments
        self.strict = strict

    def check(self, arguments: dict[str, Any] | None) -> dict[str, Any]:
        """The arguments, when they are as declared. Raises: QmpError naming the first that is not."""
        if arguments is None:
            if any(not argument.optional for argument in self.arguments):
                raise QmpError("missing field 'arguments'")
            return {}
        for argument in self.arguments:
            if argument.name in arguments:
                argument.check(arguments[argument.name])
            elif not argument.optional:
                raise QmpError(f"missing field {argument.name!r}")
        if self.strict:
            known = [argument.name for argument in self.arguments]
            for name in arguments:
                if name not in known:
                    expected = f"expected one of {', '.join(known)}" if known else "there are no fields"
                    raise QmpError(f"unknown field {name!r}, {expected}")
        return arguments


class Event:
    """One event: its name, what `data` holds, and when it is sent."""

    __slots__ = ("data", "name", "summary")

    def __init__(self, name: str, data: str, summary: str) -> None:
        self.name = name
        self.data = data
        self.summary = summary


class CommandTable:
    """All commands, in the order in which `query-commands` lists them."""

    def __init__(self, commands: tuple[Command, ...]) -> None:
        self._commands = {command.name: command for command in commands}
        if len(self._commands) != len(commands):
            raise ValueError("a QMP command is declared twice")

    def __iter__(self) -> Iterator[Command]:
        return iter(self._commands.values())

    def dispatch(self, machine: MachineView, request: Request) -> object:
        """Carry out `request`. Raises: QmpError, or whatever StratoVirtError the machine raises."""
        command = self._commands.get(request.execute)
        if command is None:
            raise QmpError(f"The command {request.execute} has not been found", COMMAND_NOT_FOUND)
        return command.handler(machine, command.check(request.arguments))
