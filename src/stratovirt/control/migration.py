"""QMP commands about snapshots, which the interface calls migrations to a file."""

from __future__ import annotations

from stratovirt.control.protocol import QmpError
from stratovirt.control.table import Command
from stratovirt.control.types import BOOL, STR, Enum, Member, record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from stratovirt.control.table import MachineView


def _migrate(machine: MachineView, arguments: dict[str, Any]) -> object:
    uri = arguments["uri"]
    scheme, colon, rest = uri.partition(":")
    if not colon or not rest or "\0" in rest or scheme not in ("file", "unix", "tcp"):
        raise QmpError(f"Invalid uri: {uri}")
    if scheme != "file":
        raise QmpError("MicroVM does not support migration")
    base = arguments.get("base")
    if base is not None and (not base or "\0" in base):
        raise QmpError("invalid value: `base` must be a directory")
    machine.snapshot(rest, base, arguments.get("track"))
    return {}


def _query_migrate(machine: MachineView, _arguments: dict[str, Any]) -> object:
    return {"status": machine.migration}


def _migrate_cancel(_machine: MachineView, _arguments: dict[str, Any]) -> object:
    return {}


COMMANDS = (
    Command("migrate", _migrate, "Save a snapshot in a directory and leave the machine paused; answers when that is done.",
            arguments=(
                Member("uri", STR, "Where to: file:DIR. A microVM takes neither unix:PATH nor tcp:IP:PORT."),
                Member("base", STR, "A directory with an earlier snapshot of this machine: the memory file then has what "
                       "differs from that, and a restore needs both.", optional=True),
                Member("track", BOOL, "Count from here on which pages are written, so that the next one with this as its base "
                       "need not compare all memory; or do not any more.", optional=True)),
            strict=False),
    Command("query-migrate", _query_migrate, "How the last snapshot went.",
            returns=record({"status": Enum("none", "active", "completed", "failed")})),
    Command("migrate_cancel", _migrate_cancel, "Nothing to cancel: a snapshot is done when `migrate` answers."),
)
