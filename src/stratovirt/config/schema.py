"""How an option is declared: once, as data.

A `Key` is one `key=value` of an option: its name, what kind of value it takes, its default, a help sentence and which of
its values work in this version. A `Group` is what stands after one option or device name. From these come the parser
(`cli/suboptions.py`), the error messages, `-device X,help`, the reference page and docs/compatibility.md.

Three things can be said about a value, in this order: it is not what the interface takes (its kind refuses it), the
interface takes it but this version does not have it yet (`works` leaves it out), it works.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    Value = str | int | bool | tuple[int, ...] | None

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
U8_MAX = (1 << 8) - 1
U32_MAX = (1 << 32) - 1
U64_MAX = (1 << 64) - 1

# The status of a key or a group, as docs/compatibility.md shows it.
WORKS = "works"
IGNORED = "accepted, no effect"
NOT_YET = "not supported yet"


def byte_length(text: str) -> int:
    """Bytes of `text` as the operating system sees it. Raises: ValueError for what it cannot hold."""
    if "\0" in text:
        raise ValueError("contains a NUL byte")
    if text.isascii():
        return len(text)
    from os import fsencode

    return len(fsencode(text))


def is_number(text: str) -> bool:
    """Plain decimal digits, few enough to be a 64-bit number. (int() alone would take signs, spaces, underscores.)"""
    return text.isascii() and text.isdigit() and len(text) <= 20


class Kind:
    """A kind of value. `accepted` says in words what it takes; `parse` raises ValueError(problem) for anything else."""

    __slots__ = ("accepted",)

    def __init__(self, accepted: str) -> None:
        self.accepted = accepted

    def parse(self, text: str) -> Value:
        raise NotImplementedError

    def show(self, value: Value) -> str:
        """`value` as a user would type it."""
        return "" if value is None else str(value)


class Flag(Kind):
    """A word without a value, such as `server`. QEMU's spelling with `=on` and `=off` is understood as well."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__("no value, or on, off")

    def parse(self, text: str) -> bool:
        return _boolean(text)

    def show(self, value: Value) -> str:
        return "on" if value else "off"


_TRUE = ("on", "true", "yes", "unmap")
_FALSE = ("off", "false", "no", "ignore")


def _boolean(text: str) -> bool:
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError("not a switch")


class Bool(Kind):
    __slots__ = ()

    def __init__(self) -> None:
        super().__init__("on, true, yes, unmap; off, false, no, ignore")

    def parse(self, text: str) -> bool:
        return _boolean(text)

    def show(self, value: Value) -> str:
        return "on" if value else "off"


class StrictBool(Kind):
    __slots__ = ()

    def __init__(self) -> None:
        super().__init__("true, false")

    def parse(self, text: str) -> bool:
        if text not in ("true", "false"):
            raise ValueError("not a switch")
        return text == "true"

    def show(self, value: Value) -> str:
        return "true" if value else "false"


class Int(Kind):
    """A decimal number, `low` to `high` inclusive."""

    __slots__ = ("high", "low")

    def __init__(self, low: int = 0, high: int = U64_MAX) -> None:
        super().__init__(f"a number from {low} to {high}")
        self.low = low
        self.high = high

    def parse(self, text: str) -> int:
        if not is_number(text):
            raise ValueError("not a number" if text else "empty")
        number = int(text)
        if not self.low <= number <= self.high:
            raise ValueError("out of range")
        return number


class PowerOfTwo(Int):
    __slots__ = ()

    def __init__(self, low: int, high: int) -> None:
        super().__init__(low, high)
        self.accepted = f"a power of two from {low} to {high}"

    def parse(self, text: str) -> int:
        number = super().parse(text)
        if number & (number - 1):
            raise ValueError("not a power of two")
        return number


_UNITS = {"K": KIB, "M": MIB, "G": GIB}


def size_text(size: int) -> str:
    """`size` bytes with the largest unit that divides it; a number of bytes if none does."""
    for letter in ("G", "M", "K"):
        if size and size % _UNITS[letter] == 0:
            return f"{size // _UNITS[letter]}{letter}"
    return f"{size} bytes" if size else "0"


class Size(Kind):
    """Bytes: a number with K, M or G behind it; without, it counts MiB."""

    __slots__ = ("high", "low")

    def __init__(self, low: int = 0, high: int = U64_MAX) -> None:
        span = f", from {size_text(low)} to {size_text(high)}" if high < U64_MAX else ""
        super().__init__(f"a size with K, M or G, or a number of MiB{span}")
        self.low = low
        self.high = high

    def parse(self, text: str) -> int:
        unit = _UNITS.get(text[-1:].upper(), 0)
        digits = text[:-1] if unit else text
        if not is_number(digits):
            raise ValueError("not a size" if text else "empty")
        size = int(digits) * (unit or MIB)
        if not self.low <= size <= self.high:
            raise ValueError("too large" if size > self.high else "too small")
        return size

    def show(self, value: Value) -> str:
        return size_text(value) if isinstance(value, int) else ""


class String(Kind):
    """Text of 1 to `high` bytes."""

    __slots__ = ("high",)

    def __init__(self, high: int = 255) -> None:
        super().__init__(f"1 to {high} bytes of text")
        self.high = high

    def parse(self, text: str) -> str:
        length = byte_length(text)
        if not length:
            raise ValueError("empty")
        if length > self.high:
            raise ValueError(f"{length} bytes are too long")
        return text


class Path(String):
    """A path on the host. Whether it exists is found out by the one who opens it."""

    __slots__ = ()

    def __init__(self, high: int = 4096) -> None:
        super().__init__(high)
        self.accepted = f"a path of at most {high} bytes"


class SocketPath(Path):
    """A unix socket's path: sun_path holds 108 bytes, the last of them a NUL."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(107)


class Choice(Kind):
    __slots__ = ("fold", "words")

    def __init__(self, *words: str, fold: bool = False) -> None:
        super().__init__(", ".join(words))
        self.words = words
        self.fold = fold  # case does not matter

    def parse(self, text: str) -> str:
        word = text.lower() if self.fold else text
        if word not in self.words:
            raise ValueError("unknown")
        return word


class Mac(Kind):
    __slots__ = ()

    def __init__(self) -> None:
        super().__init__("six pairs of hexadecimal digits, xx:xx:xx:xx:xx:xx")

    def parse(self, text: str) -> str:
        pairs = text.split(":")
        if len(pairs) != 6 or any(len(pair) != 2 or pair.strip("0123456789abcdefABCDEF") for pair in pairs):
            raise ValueError("not a MAC address")
        return text.lower()


class Ipv4(Kind):
    __slots__ = ()

    def __init__(self) -> None:
        super().__init__("an IPv4 address such as 127.0.0.1; host names are not looked up")

    def parse(self, text: str) -> str:
        parts = text.split(".")
        if len(parts) != 4 or not all(is_number(part) and len(part) <= 3 and int(part) <= U8_MAX for part in parts):
            raise ValueError("not an IPv4 address")
        return text


class IntList(Kind):
    """Numbers and increasing ranges joined by colons, in brackets or not: `0-3:5`. Values below `limit`."""

    __slots__ = ("limit",)

    def __init__(self, limit: int = 1 << 10) -> None:
        super().__init__(f"numbers below {limit} and increasing ranges a-b, joined by colons")
        self.limit = limit

    def parse(self, text: str) -> tuple[int, ...]:
        if text.startswith("[") and text.endswith("]"):
            text = text[1:-1]
        numbers: list[int] = []
        for part in text.split(":"):
            first, dash, last = part.partition("-")
            if not is_number(first) or (dash and not is_number(last)):
                raise ValueError("not a list of numbers")
            low, high = int(first), int(last or first)
            if dash and high <= low:
                raise ValueError(f"the range {part} does not increase")
            if high >= self.limit:
                raise ValueError(f"{high} is too large")
            numbers.extend(range(low, high + 1))
        if len(numbers) > self.limit:
            raise ValueError("too many numbers")
        return tuple(numbers)

    def show(self, value: Value) -> str:
        return ":".join(map(str, value)) if isinstance(value, tuple) else ""


class Key:
    """One `key=value`.

    `works` holds the values that this version has, None for all that the kind takes and () for none. `refusal` is what is
    said about the others. `ignored`: the value is checked and then means nothing on this machine.
    """

    __slots__ = ("aliases", "default", "help", "ignored", "kind", "name", "refusal", "required", "works")

    def __init__(self, name: str, kind: Kind, help: str, default: Value = None, required: bool = False,
                 works: tuple[Value, ...] | None = None, refusal: str = NOT_YET, ignored: bool = False,
                 aliases: tuple[str, ...] = ()) -> None:
        self.name = name
        self.kind = kind
        self.help = help
        self.default = default
        self.required = required
        self.works = works
        self.refusal = refusal
        self.ignored = ignored
        self.aliases = aliases

    @property
    def status(self) -> str:
        if self.works is None:
            return IGNORED if self.ignored else WORKS
        if not self.works:
            return self.refusal
        return f"{', '.join(self.kind.show(value) for value in self.works)}: {WORKS}; other values: {self.refusal}"


class Group:
    """What stands after an option or a device name.

    `title` is how errors call it (`-device virtio-blk-device`). `first` names the key that the first word sets when it has no
    `=`: `-smp 2` is `-smp cpus=2`. `works` False: the whole option or device is not supported yet.
    """

    __slots__ = ("first", "help", "keys", "title", "works")

    def __init__(self, title: str, help: str, keys: tuple[Key, ...], first: str = "", works: bool = True) -> None:
        self.title = title
        self.help = help
        self.keys = keys
        self.first = first
        self.works = works

    def find(self, name: str) -> Key | None:
        for key in self.keys:
            if name == key.name or name in key.aliases:
                return key
        return None

    @property
    def status(self) -> str:
        return WORKS if self.works else NOT_YET


class OptionValues:
    """The values of one group by key name, defaults filled in. An accessor of the wrong type is a TypeError."""

    __slots__ = ("_values", "given")

    def __init__(self, values: dict[str, Value], given: frozenset[str] = frozenset()) -> None:
        self._values = values
        self.given = given  # the keys that the user wrote

    def __getitem__(self, key: str) -> Value:
        return self._values[key]

    def with_value(self, key: str, value: Value) -> OptionValues:
        """The same but for one value."""
        return OptionValues({**self._values, key: value}, self.given | {key})

    def string(self, key: str) -> str:
        value = self._values[key]
        if not isinstance(value, str):
            raise TypeError(f"{key} is {value!r}, not text")
        return value

    def integer(self, key: str) -> int:
        value = self._values[key]
        if not isinstance(value, int):
            raise TypeError(f"{key} is {value!r}, not a number")
        return value

    def boolean(self, key: str) -> bool:
        value = self._values[key]
        if not isinstance(value, bool):
            raise TypeError(f"{key} is {value!r}, not a switch")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        value = self._values[key]
        if not isinstance(value, tuple):
            raise TypeError(f"{key} is {value!r}, not a list of numbers")
        return value

    def optional_string(self, key: str) -> str | None:
        return None if self._values[key] is None else self.string(key)

    def optional_integer(self, key: str) -> int | None:
        return None if self._values[key] is None else self.integer(key)

    def optional_boolean(self, key: str) -> bool | None:
        return None if self._values[key] is None else self.boolean(key)
