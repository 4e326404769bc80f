"""`query-qmp-schema`: the declarations of commands and events in the form of QEMU's qapi/introspect.json.

Types without a name of their own are called after where they stand, `blockdev-add-arg.file`; an array is `[element]`.
"""

from __future__ import annotations

from stratovirt.control.types import ANY, Array, Enum, Object, Scalar, Type

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from stratovirt.control.table import Command, Event

EMPTY = "empty"


class _Types:
    """Entries of types, each once."""

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, Any]] = {}

    def use(self, type: Type, place: str) -> str:
        """The name of `type`, which is described from now on; `place` is its name when it has none."""
        if isinstance(type, Array):
            element = self.use(type.element, place)
            return self._enter(f"[{element}]", {"meta-type": "array", "element-type": element})
        if isinstance(type, Enum):
            return self._enter(place, {"meta-type": "enum", "values": list(type.values)})
        if isinstance(type, Object):
            if not type.members:
                return self._enter(EMPTY, {"meta-type": "object", "members": []})
            members = []
            for member in type.members:
                entry: dict[str, object] = {"name": member.name, "type": self.use(member.type, f"{place}.{member.name}")}
                if member.optional:
                    entry["default"] = None
                members.append(entry)
            return self._enter(place, {"meta-type": "object", "members": members})
        json_type = type.json_type if isinstance(type, Scalar) else ANY.json_type
        return self._enter(type.name, {"meta-type": "builtin", "json-type": json_type})

    def _enter(self, name: str, entry: dict[str, Any]) -> str:
        self.entries[name] = {"name": name, **entry}
        return name


def describe(commands: Iterable[Command], events: Iterable[Event]) -> list[dict[str, Any]]:
    """Commands, events and the types they use: a SchemaInfo each."""
    types = _Types()
    described: list[dict[str, Any]] = []
    for command in commands:
        described.append({
            "name": command.name, "meta-type": "command", "allow-oob": False,
            "arg-type": types.use(command.arguments, f"{command.name}-arg"),
            "ret-type": types.use(command.returns, f"{command.name}-ret"),
        })
    for event in events:
        described.append({"name": event.name, "meta-type": "event", "arg-type": types.use(event.data, f"{event.name}-arg")})
    return described + list(types.entries.values())
