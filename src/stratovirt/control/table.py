"""The form in which QMP commands and events are declared, and the one place where arguments are checked.

A command family is a module with a tuple of Command; `commands.py` joins them. Dispatch, validation, `query-commands`,
`query-qmp-schema` and docs/reference/qmp.md follow from the declaration, so a command that is listed works and one that works
is listed.
"""

from __future__ import annotations

from stratovirt.control.protocol import COMMAND_NOT_FOUND, QmpError, Request
from stratovirt.control.types import NOTHING, Member, Object, Type

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any, Protocol

    from stratovirt.config.vm import VmConfig
    from stratovirt.control.descriptors import Descriptors
    from stratovirt.iothread import IoThread
    from stratovirt.loop import EventLoop
    from stratovirt.machine.hotplug import HotPlug

    EventCallback = Callable[[str, dict[str, Any], int, int], None]

    class CharDeviceView(Protocol):
        @property
        def filename(self) -> str: ...

    class EventSource(Protocol):
        def subscribe(self, callback: EventCallback) -> None: ...

        def unsubscribe(self, callback: EventCallback) -> None: ...

    class BalloonView(Protocol):
        @property
        def guest_bytes(self) -> int:
            """The memory that the guest has left."""

        def set_target(self, guest_bytes: int) -> None:
            """Ask the guest to make do with as much."""

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

        @property
        def iothreads(self) -> Mapping[str, IoThread]: ...

        @property
        def hotplug(self) -> HotPlug:
            """Disks and network interfaces, and the slots that they come into and go out of."""

        @property
        def balloon(self) -> BalloonView | None: ...

        @property
        def interrupt_controller(self) -> str:
            """What the machine's tables call it, "gicv3-its" for example; "" for a PC's."""

        def vcpu_thread_ids(self) -> list[int]: ...

        def pause(self) -> None: ...

        def resume(self) -> None: ...

        def reset(self, guest: bool) -> None: ...

        @property
        def migration(self) -> str:
            """How the last snapshot went."""

        def snapshot(self, directory: str, base: str | None = None, track: bool | None = None) -> None: ...

        def powerdown(self) -> None: ...

        def shutdown(self, guest: bool, reason: str) -> None: ...

    Handler = Callable[[MachineView, dict[str, Any]], object]
    DescriptorHandler = Callable[[MachineView, dict[str, Any], Descriptors], object]


class Command:
    """One QMP command. `handler(machine, arguments)` gives the value to return or raises a StratoVirtError.

    `arguments` are its members; with `strict` any other is an error. Unless `may_omit` says otherwise, the request may leave
    out `arguments` altogether when none of them is required.
    """

    __slots__ = ("arguments", "handler", "may_omit", "name", "returns", "strict", "summary")

    def __init__(self, name: str, handler: Handler, summary: str, returns: Type = NOTHING,
                 arguments: tuple[Member, ...] = (), strict: bool = True, may_omit: bool | None = None) -> None:
        self.name = name
        self.handler = handler
        self.summary = summary
        self.returns = returns
        self.arguments = Object(*arguments, open=not strict)
        self.strict = strict
        self.may_omit = all(member.optional for member in arguments) if may_omit is None else may_omit

    def check(self, arguments: dict[str, Any] | None) -> dict[str, Any]:
        """The arguments, when they are as declared. Raises: QmpError naming the first that is not."""
        if arguments is None:
            if not self.may_omit:
                raise QmpError("missing field `arguments`")
            return {}
        self.arguments.check(arguments, "")
        return arguments

    def run(self, machine: MachineView, arguments: dict[str, Any], descriptors: Descriptors) -> object:
        return self.handler(machine, arguments)


class DescriptorCommand(Command):
    """A command that deals with file descriptors: its handler is given those that its client has passed as well."""

    __slots__ = ("descriptor_handler",)

    def __init__(self, name: str, handler: DescriptorHandler, summary: str, arguments: tuple[Member, ...]) -> None:
        super().__init__(name, _never, summary, arguments=arguments)
        self.descriptor_handler = handler

    def run(self, machine: MachineView, arguments: dict[str, Any], descriptors: Descriptors) -> object:
        return self.descriptor_handler(machine, arguments, descriptors)


def _never(_machine: MachineView, _arguments: dict[str, Any]) -> object:
    raise NotImplementedError("a command of descriptors")


class Event:
    """One event: its name, what `data` holds, and when it is sent."""

    __slots__ = ("data", "name", "summary")

    def __init__(self, name: str, summary: str, data: Object = NOTHING) -> None:
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

    def dispatch(self, machine: MachineView, request: Request, descriptors: Descriptors) -> object:
        """Carry out `request`. Raises: QmpError, or whatever StratoVirtError the machine raises."""
        command = self._commands.get(request.execute)
        if command is None:
            raise QmpError(f"The command {request.execute} has not been found", COMMAND_NOT_FOUND)
        return command.run(machine, command.check(request.arguments), descriptors)
