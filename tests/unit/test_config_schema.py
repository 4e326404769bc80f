"""Every kind of value: what it takes, and that it takes nothing else."""

from __future__ import annotations

import pytest

from stratovirt.config.schema import (
    GIB,
    KIB,
    MIB,
    U64_MAX,
    Bool,
    Choice,
    Flag,
    Int,
    IntList,
    Ipv4,
    Key,
    Kind,
    Mac,
    OptionValues,
    Path,
    PowerOfTwo,
    Size,
    SocketPath,
    StrictBool,
    String,
)

TAKES = [
    *((Bool(), text, True) for text in ("true", "on", "yes", "unmap")),
    *((Bool(), text, False) for text in ("false", "off", "no", "ignore")),
    (StrictBool(), "true", True),
    (StrictBool(), "false", False),
    (Flag(), "on", True),
    (Int(1, 254), "1", 1),
    (Int(1, 254), "254", 254),
    (Int(), str(U64_MAX), U64_MAX),
    (Int(0, 9), "007", 7),
    (PowerOfTwo(4, 1024), "4", 4),
    (PowerOfTwo(4, 1024), "1024", 1024),
    (Size(), "1", MIB),
    (Size(), "2k", 2 * KIB),
    (Size(), "2K", 2 * KIB),
    (Size(), "3m", 3 * MIB),
    (Size(), "4g", 4 * GIB),
    (Size(), "0", 0),
    (Size(128 * MIB, 512 * GIB), "512G", 512 * GIB),
    (String(), "x" * 255, "x" * 255),
    (String(4), "ä" * 2, "ä" * 2),
    (Path(), "/" * 4096, "/" * 4096),
    (SocketPath(), "s" * 107, "s" * 107),
    (Choice("none", "microvm", fold=True), "MicroVM", "microvm"),
    (Mac(), "02:42:AC:11:00:02", "02:42:ac:11:00:02"),
    (Ipv4(), "255.0.0.1", "255.0.0.1"),
    (IntList(), "0-3:5", (0, 1, 2, 3, 5)),
    (IntList(), "[7]", (7,)),
]
REFUSES = [
    *((Bool(), text) for text in ("", "ON", "1", "0", "enable", "true ")),
    *((StrictBool(), text) for text in ("", "on", "off", "yes", "True")),
    *((Int(1, 254), text) for text in ("", "0", "255", "-1", "+1", " 1", "1_0", "0x1", "1.0", "٣", "9" * 5000)),
    (Int(), str(U64_MAX + 1)),
    *((PowerOfTwo(4, 1024), text) for text in ("0", "2", "3", "12", "1000", "2048")),
    *((Size(), text) for text in ("", "M", "1T", "1.5G", "-1", "1 M", "1MiB", "0x1M", f"{U64_MAX}K", str(U64_MAX), "9" * 5000)),
    *((Size(128 * MIB, 512 * GIB), text) for text in ("127", "0", "513G", "524289M")),
    *((String(), text) for text in ("", "x" * 256, "ä" * 128, "a\0b", "\ud800")),
    *((Path(), text) for text in ("", "/" * 4097, "\0")),
    *((SocketPath(), text) for text in ("", "s" * 108)),
    *((Choice("none", "microvm"), text) for text in ("", "MicroVM", "non", "none ")),
    *((Mac(), text) for text in ("", "02:42:ac", "02:42:ac:11:00:0g", "0242ac110002", "2:42:ac:11:00:02:", "02-42-ac-11-0-2")),
    *((Ipv4(), text) for text in ("", "localhost", "1.2.3", "1.2.3.256", "1.2.3.4.5", "1.2.3.-4", "::1", "1.2.3.0004")),
    *((IntList(), text) for text in ("", "3-1", "1-1", "a", "1:", "1-", "[1", "-1", "0-99999999999", "1,2")),
]


@pytest.mark.parametrize(("kind", "text", "value"), TAKES)
def test_kind_takes(kind: Kind, text: str, value: object) -> None:
    assert kind.parse(text) == value


@pytest.mark.parametrize(("kind", "text"), REFUSES)
def test_kind_refuses(kind: Kind, text: str) -> None:
    with pytest.raises(ValueError):
        kind.parse(text)


def test_every_kind_shows_a_value_as_it_can_be_typed() -> None:
    for kind, _, value in TAKES:
        assert kind.parse(kind.show(value)) == value


def test_status_of_a_key() -> None:
    kind = Choice("raw", "qcow2")
    assert Key("format", kind, "").status == "works"
    assert Key("format", kind, "", works=()).status == "not supported yet"
    assert Key("format", kind, "", works=("raw",)).status == "raw: works; other values: not supported yet"
    assert Key("format", kind, "", ignored=True).status == "accepted, no effect"


def test_accessors_are_typed() -> None:
    values = OptionValues({"text": "a", "number": 1, "switch": True, "list": (1, 2), "nothing": None}, frozenset({"text"}))
    assert (values.string("text"), values.integer("number"), values.boolean("switch")) == ("a", 1, True)
    assert values.integers("list") == (1, 2)
    assert values.optional_string("nothing") is values.optional_integer("nothing") is values.optional_boolean("nothing") is None
    assert values["text"] == "a"
    for wrong in (lambda: values.string("number"), lambda: values.integer("text"), lambda: values.boolean("number"),
                  lambda: values.integers("text"), lambda: values.string("nothing")):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(KeyError):
        values.string("no-such-key")
