"""docs/reference/qmp.md, from the table of commands. Written by `python -m stratovirt.cli.reference docs`."""

from __future__ import annotations

from stratovirt.control.commands import COMMANDS, EVENTS
from stratovirt.control.table import Command
from stratovirt.control.types import Member, Object

_HEAD = """\
# QMP commands and events

Made from the declarations in `control/` by `python -m stratovirt.cli.reference docs`; do not edit.

A request is `{"execute": NAME, "arguments": {…}, "id": ANY}`, an answer `{"return": …, "id": ANY}` or
`{"error": {"class": …, "desc": …}, "id": ANY}`. In the types below `?` marks what may be left out. Unless the text says
otherwise an argument that is not listed is an error, and `arguments` may be left out when nothing in it is required.
"""


def _rows(members: tuple[Member, ...], prefix: str = "") -> list[str]:
    """A line for each member, those of objects within it below it."""
    rows: list[str] = []
    for member in members:
        nested = member.type.members if isinstance(member.type, Object) else ()
        explained = any(inner.summary for inner in nested)
        kind = "object" if explained else member.type.text
        rows.append(f"| `{prefix}{member.name}` | {kind} | {'' if member.optional else 'required'} | {member.summary} |")
        if explained:
            rows += _rows(nested, f"{prefix}{member.name}.")
    return rows


def _command(command: Command) -> str:
    parts = [f"### {command.name}", "", command.summary]
    notes = []
    if not command.strict:
        notes.append("Arguments that are not listed are ignored.")
    if command.arguments.members:
        parts += ["", "| argument | type | | |", "|---|---|---|---|", *_rows(command.arguments.members)]
    if command.returns.text != "{}":
        notes.append(f"Returns `{command.returns.text.replace(chr(92), '')}`.")
    if notes:
        parts += ["", " ".join(notes)]
    return "\n".join(parts)


def page() -> str:
    """The whole page."""
    parts = [_HEAD, "## Commands", ""]
    for command in COMMANDS:
        parts += [_command(command), ""]
    parts += ["## Events", "", "| event | data | when |", "|---|---|---|"]
    parts += [f"| {event.name} | `{event.data.text}` | {event.summary} |" for event in EVENTS]
    return "\n".join(parts) + "\n"
