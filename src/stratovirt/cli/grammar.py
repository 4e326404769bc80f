"""The outer grammar: the process arguments as options and their values.

Options have one dash and any order; what does not begin with a dash is a value of the option before it. Hence a value
never begins with a dash. A bare `--` ends the options, and nothing after it is read.
"""

from __future__ import annotations

from stratovirt.cli.options import FLAG, MANY, OPTIONAL, OPTIONS
from stratovirt.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.cli.options import Option

ASK_HELP = "the options that stratovirt -h lists"


def split_arguments(arguments: list[str]) -> dict[str, list[str]]:
    """The values of each option that occurs, by its name without the dash. Raises: ConfigError."""
    found: dict[str, list[str]] = {}
    position = 0
    count = len(arguments)
    while position < count:
        word = arguments[position]
        if word == "--":
            break
        name = word[1:]
        option = OPTIONS.get(name)
        if option is None or word[:1] != "-":
            name = word[1:] if word[:1] == "-" else word
            raise ConfigError(f"Found argument '{name}' which wasn't expected, or isn't valid in the context",
                              option=word or "''", accepted=ASK_HELP)
        position += 1
        start = position
        while position < count and arguments[position][:1] != "-":
            position += 1
        values = arguments[start:position]
        _check_values(option, values, name in found)
        found.setdefault(name, []).extend(values)
    return found


def _check_values(option: Option, values: list[str], repeated: bool) -> None:
    title = "-" + option.name
    if option.takes is FLAG and values:
        raise ConfigError(f"The value '{values[0]}' is illegal for argument '{option.name}'", option=title, value=values[0],
                          accepted="no value")
    if option.takes is MANY:
        if not values:
            raise ConfigError(f"The argument '{option.name}' requires a value, but none was supplied", option=title,
                              accepted=option.value)
        return
    if repeated:
        raise ConfigError(f"The argument '{option.name}' was provided more than once", option=title,
                          value=values[0] if values else None, accepted="once")
    if len(values) > 1:
        raise ConfigError(f"The argument '{option.name}' only needs one value", option=title, value=" ".join(values),
                          accepted=option.value)
    if not values and option.takes is not FLAG and option.takes is not OPTIONAL:
        raise ConfigError(f"The argument '{option.name}' requires a value, but none was supplied", option=title,
                          accepted=option.value)
