"""The inner grammar: `key=value,key=value` read by a declaration.

A value is split at commas first and at the first `=` then; neither can be part of a value and nothing escapes them. The
first word may stand without its key where the declaration names one. A key without `=` is a flag.
"""

from __future__ import annotations

from stratovirt.config.schema import Flag, Group, Key, OptionValues
from stratovirt.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.config.schema import Value


def read_value(key: Key, text: str, option: str) -> Value:
    """The value of `text` for `key`. Raises: ConfigError when it is not acceptable or not supported yet."""
    try:
        value = key.kind.parse(text)
    except ValueError as error:
        # A UnicodeError's own words are about codecs, not about what the user typed.
        problem = "not valid text" if isinstance(error, UnicodeError) else str(error)
        raise ConfigError(problem, option=option, value=text, accepted=key.kind.accepted) from None
    if key.works is not None and value not in key.works:
        accepted = ", ".join(key.kind.show(good) for good in key.works)
        raise ConfigError(key.refusal, option=option, value=text, accepted=accepted or "leaving it out")
    return value


def read_group(group: Group, text: str) -> OptionValues:
    """All keys of `text`, checked, with defaults. Raises: ConfigError naming the key."""
    values: dict[str, Value] = {key.name: key.default for key in group.keys}
    given: set[str] = set()
    for index, word in enumerate(text.split(",") if text else ()):
        name, equals, value = word.partition("=")
        if not equals and index == 0 and group.first:
            name, equals, value = group.first, "=", word
        key = group.find(name)
        option = _title(group, name)
        if key is None:
            raise _unknown_key(group, name, word)
        if key.name in given:
            raise ConfigError("given more than once", option=option, value=value or None, accepted="each key once")
        if not equals:
            if not isinstance(key.kind, Flag):
                raise ConfigError("has no value", option=option, accepted=key.kind.accepted)
            value = "on"
        values[key.name] = read_value(key, value, option)
        given.add(key.name)
    for key in group.keys:
        if key.required and key.name not in given:
            raise ConfigError("missing", option=_title(group, key.name), accepted=key.kind.accepted)
    if not text:
        raise ConfigError("empty", option=group.title, accepted=", ".join(key.name for key in group.keys))
    if not group.works:
        raise ConfigError("not supported yet", option=group.title, value=text, accepted="leaving it out")
    return OptionValues(values, frozenset(given))


def _title(group: Group, name: str) -> str:
    """How an error calls a key: `-smp`, `-smp cores`, `-device virtio-blk-device,serial`."""
    if name == group.first:
        return group.title
    return f"{group.title},{name}" if " " in group.title else f"{group.title} {name}"


def _unknown_key(group: Group, name: str, word: str) -> ConfigError:
    if name in ("bus", "addr", "multifunction") and group.title.endswith("-device"):
        return ConfigError(f"Should not set {name}: a virtio-mmio device has no place on a bus", option=group.title, value=word,
                           accepted="leaving it out")
    return ConfigError(f"Found argument '{name}' which wasn't expected, or isn't valid in the context" if name else "empty key",
                       option=group.title, value=word, accepted=", ".join(key.name for key in group.keys) or "nothing more")
