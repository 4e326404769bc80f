"""All QMP commands and events there are, from all families, and the commands that list them."""

from __future__ import annotations

from stratovirt.control import inquiry, power
from stratovirt.control.protocol import PACKAGE, QEMU_VERSION, QmpError
from stratovirt.control.table import Argument, Command, CommandTable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from stratovirt.control.table import MachineView


def _qmp_capabilities(_machine: MachineView, arguments: dict[str, Any]) -> object:
    for name in arguments.get("enable", ()):
        raise QmpError(f"capability {name!r} is not offered" if isinstance(name, str)
                       else "invalid type: 'enable' must be an array of strings")
    return {}


def _query_version(_machine: MachineView, _arguments: dict[str, Any]) -> object:
    major, minor, micro = QEMU_VERSION
    return {"package": PACKAGE, "qemu": {"major": major, "micro": micro, "minor": minor}}


def _query_commands(_machine: MachineView, _arguments: dict[str, Any]) -> object:
    return [{"name": command.name} for command in COMMANDS]


def _query_events(_machine: MachineView, _arguments: dict[str, Any]) -> object:
    return [{"name": event.name} for event in EVENTS]


EVENTS = power.EVENTS

COMMANDS = CommandTable((
    Command("qmp_capabilities", _qmp_capabilities, "End the negotiation; not needed, may be repeated.",
            arguments=(Argument("enable", "list", "Capabilities to use; none is offered.", optional=True),)),
    *power.COMMANDS,
    *inquiry.COMMANDS,
    Command("query-version", _query_version, "The version of QEMU's interface that is spoken.",
            returns='{"package": str, "qemu": {"major": int, "micro": int, "minor": int}}', strict=False),
    Command("query-commands", _query_commands, "This list.", returns='[{"name": str}]', strict=False),
    Command("query-events", _query_events, "The events that can be sent.", returns='[{"name": str}]', strict=False),
))
