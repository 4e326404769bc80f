"""Reading saved state: every value is asked for by name, kind and range, and nothing may be left over.

Whoever restores something gets a `Saved` and takes out of it what its own `save` put there. What is missing, of another
kind, out of range or unknown is a SnapshotError that names the field by its place in the file: `slots[2].queues[0].size`.
"""

from __future__ import annotations

from stratovirt.errors import StratoVirtError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

U64_MAX = (1 << 64) - 1


class SnapshotError(StratoVirtError):
    """A snapshot cannot be taken or restored. The text says why; of a field of the state file, which."""


class Saved:
    """One object of the state file. `where` is its place there, "" for the whole. Raises: SnapshotError, from everything."""

    __slots__ = ("_left", "_values", "where")

    def __init__(self, values: dict[str, Any], where: str = "") -> None:
        self.where = where
        self._values = values
        self._left = set(values)

    def error(self, name: str, problem: str) -> SnapshotError:
        """The error for one of its fields."""
        return SnapshotError(f"{self._place(name)}: {problem}")

    def _place(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name

    def _take(self, name: str) -> Any:
        if name not in self._values:
            raise self.error(name, "missing")
        self._left.discard(name)
        return self._values[name]

    def integer(self, name: str, low: int = 0, high: int = U64_MAX) -> int:
        value = self._take(name)
        if type(value) is not int or not low <= value <= high:
            raise self.error(name, f"{_shown(value)} is not a number from {low} to {high}")
        return int(value)

    def boolean(self, name: str) -> bool:
        value = self._take(name)
        if type(value) is not bool:
            raise self.error(name, f"{_shown(value)} is neither true nor false")
        return bool(value)

    def text(self, name: str, limit: int = 255) -> str:
        value = self._take(name)
        if type(value) is not str or len(value) > limit:
            raise self.error(name, f"{_shown(value)} is not a text of at most {limit} characters")
        return str(value)

    def data(self, name: str, size: int | None = None, limit: int = 1 << 24) -> bytes:
        """Bytes, written as hexadecimal digits: `size` of them, or at most `limit`."""
        value = self._take(name)
        if type(value) is str:
            try:
                data = bytes.fromhex(value)
            except ValueError:
                data = None
            if data is not None and (len(data) == size if size is not None else len(data) <= limit):
                return data
        many = f"{size} bytes" if size is not None else f"at most {limit} bytes"
        raise self.error(name, f"{_shown(value)} is not {many} in hexadecimal digits")

    def integers(self, name: str, low: int, high: int, limit: int) -> list[int]:
        values = self._take(name)
        if type(values) is not list or len(values) > limit:
            raise self.error(name, f"not a list of at most {limit} numbers")
        for number, value in enumerate(values):
            if type(value) is not int or not low <= value <= high:
                raise self.error(f"{name}[{number}]", f"{_shown(value)} is not a number from {low} to {high}")
        return list(values)

    def texts(self, name: str, limit: int) -> list[str]:
        values = self._take(name)
        if type(values) is not list or len(values) > limit:
            raise self.error(name, f"not a list of at most {limit} texts")
        for number, value in enumerate(values):
            if type(value) is not str:
                raise self.error(f"{name}[{number}]", f"{_shown(value)} is not a text")
        return list(values)

    def section(self, name: str) -> Saved:
        value = self._take(name)
        if type(value) is not dict:
            raise self.error(name, f"{_shown(value)} is not an object")
        return Saved(value, self._place(name))

    def optional_section(self, name: str) -> Saved | None:
        """None where `null` was saved."""
        if self._values.get(name, "") is None:
            self._left.discard(name)
            return None
        return self.section(name)

    def sections(self, name: str, limit: int = 1024) -> list[Saved]:
        values = self._take(name)
        if type(values) is not list or len(values) > limit:
            raise self.error(name, f"not a list of at most {limit} objects")
        for number, value in enumerate(values):
            if type(value) is not dict:
                raise self.error(f"{name}[{number}]", f"{_shown(value)} is not an object")
        return [Saved(value, f"{self._place(name)}[{number}]") for number, value in enumerate(values)]

    def names(self) -> list[str]:
        """The fields there are, for an object whose names are data."""
        return list(self._values)

    def end(self) -> None:
        """Everything has been taken out. Raises: SnapshotError when something has not."""
        if self._left:
            raise self.error(min(self._left), "unknown")


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
