"""The types of what QMP carries: what a value must be, how the reference page writes it, and its entry in the schema.

A type checks a JSON value as the parser made it (`check`), and describes itself twice: `text` for people, and for
`query-qmp-schema` through `control/schema.py`. Error texts name the member by its path, `file.filename`.
"""

from __future__ import annotations

from stratovirt.control.protocol import QmpError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


class Type:
    """`name` is the type's name in the schema; "" for one that gets it from where it stands."""

    name = ""

    def check(self, value: object, path: str) -> None:
        """Raises: QmpError naming `path` when `value` is not of this type."""
        raise NotImplementedError

    @property
    def text(self) -> str:
        raise NotImplementedError


class Scalar(Type):
    """A string, a truth value or an integer within bounds. `json_type` is the schema's word for it."""

    def __init__(self, name: str, kind: type, json_type: str, called: str, bounds: tuple[int, int] | None = None) -> None:
        self.name = name
        self.kind = kind
        self.json_type = json_type
        self.called = called
        self.bounds = bounds

    def check(self, value: object, path: str) -> None:
        if type(value) is not self.kind:  # exactly: JSON's true is no integer
            raise QmpError(f"invalid type: `{path}` must be {self.called}")
        if self.bounds is not None and isinstance(value, int) and not self.bounds[0] <= value <= self.bounds[1]:
            raise QmpError(f"invalid value: `{path}` must be {self.called}")

    @property
    def text(self) -> str:
        return self.name


class _Any(Type):
    name = "any"
    json_type = "value"

    def check(self, value: object, path: str) -> None:
        """Everything is of this type."""

    @property
    def text(self) -> str:
        return "any"


STR = Scalar("str", str, "string", "a string")
BOOL = Scalar("bool", bool, "boolean", "true or false")
INT = Scalar("int", int, "int", "a 64-bit integer", (-(1 << 63), (1 << 63) - 1))
UINT8 = Scalar("uint8", int, "int", "an integer from 0 to 255", (0, (1 << 8) - 1))
UINT16 = Scalar("uint16", int, "int", "an integer from 0 to 65535", (0, (1 << 16) - 1))
UINT64 = Scalar("uint64", int, "int", "an unsigned 64-bit integer", (0, (1 << 64) - 1))
ANY = _Any()


class Enum(Type):
    """One of a few words."""

    def __init__(self, *values: str) -> None:
        self.values = values

    def check(self, value: object, path: str) -> None:
        STR.check(value, path)
        if value not in self.values:
            raise QmpError(f"unknown variant `{value}` of `{path}`, expected one of {names(self.values)}")

    @property
    def text(self) -> str:
        return " \\| ".join(f'"{value}"' for value in self.values)


class Array(Type):
    def __init__(self, element: Type) -> None:
        self.element = element

    def check(self, value: object, path: str) -> None:
        if not isinstance(value, list):
            raise QmpError(f"invalid type: `{path}` must be an array")
        for number, element in enumerate(value):
            self.element.check(element, f"{path}[{number}]")

    @property
    def text(self) -> str:
        return f"[{self.element.text}, …]"


class Member:
    """One member of an object, or one argument of a command."""

    __slots__ = ("name", "optional", "summary", "type")

    def __init__(self, name: str, type: Type, summary: str = "", optional: bool = False) -> None:
        self.name = name
        self.type = type
        self.summary = summary
        self.optional = optional


class Object(Type):
    """An object with these members and, unless `open`, no others."""

    def __init__(self, *members: Member, open: bool = False) -> None:
        self.members = members
        self.open = open
        self._known = {member.name: member for member in members}

    def check(self, value: object, path: str) -> None:
        if not isinstance(value, dict):
            raise QmpError(f"invalid type: `{path}` must be an object")
        prefix = f"{path}." if path else ""
        for member in self.members:
            if member.name in value:
                member.type.check(value[member.name], prefix + member.name)
            elif not member.optional:
                raise QmpError(f"missing field `{prefix}{member.name}`")
        if self.open:
            return
        for name in value:
            if name not in self._known:
                expected = f"expected one of {names(self._known)}" if self._known else "there are no fields"
                raise QmpError(f"unknown field `{prefix}{name}`, {expected}")

    @property
    def text(self) -> str:
        inner = ", ".join(f'"{member.name}"{"?" if member.optional else ""}: {member.type.text}' for member in self.members)
        return "{" + inner + "}"


NOTHING = Object()


def record(members: Mapping[str, Type]) -> Object:
    """An object whose members need no explanation; a name that ends in `?` may be left out."""
    return Object(*(Member(name.removesuffix("?"), type, optional=name.endswith("?")) for name, type in members.items()))


def names(words: Mapping[str, object] | tuple[str, ...]) -> str:
    return ", ".join(f"`{word}`" for word in words)
