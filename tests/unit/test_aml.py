"""The AML encoder, byte for byte against ACPI chapter 20."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratovirt.firmware import aml


@pytest.mark.parametrize(("path", "encoded"), [
    ("_HID", b"_HID"),
    ("COM", b"COM_"),
    ("\\", b"\\\0"),
    ("\\_SB_", b"\\_SB_"),
    ("^A", b"^A___"),
    ("^^B1", b"^^B1__"),
    ("\\_SB.COM1", b"\\\x2e_SB_COM1"),
    ("A.B.C", b"\x2f\x03A___B___C___"),
])
def test_names(path, encoded):
    assert aml.name_string(path) == encoded


@pytest.mark.parametrize("path", ["", "TOOLONG", "low", "1ABC", "A..B", "A B", "Ä"])
def test_names_that_are_none(path):
    if path == "":
        assert aml.name_string(path) == b"\0"  # NullName
        return
    with pytest.raises(ValueError, match="AML name"):
        aml.name_string(path)


@pytest.mark.parametrize(("value", "encoded"), [
    (0, b"\0"), (1, b"\1"), (2, b"\x0a\2"), (255, b"\x0a\xff"), (256, b"\x0b\0\1"), (0xFFFF, b"\x0b\xff\xff"),
    (0x10000, b"\x0c\0\0\1\0"), (1 << 32, b"\x0e\0\0\0\0\1\0\0\0"),
])
def test_integers(value, encoded):
    assert aml.integer(value) == encoded


def test_eisa_ids():
    assert aml.eisa_id("PNP0501") == b"\x0c\x41\xd0\x05\x01"
    assert aml.eisa_id("PNP0A08") == b"\x0c\x41\xd0\x0a\x08"
    for text in ("LNRO0005", "pnp0501", "PN10501", "PNP05"):
        with pytest.raises(ValueError, match="EISA"):
            aml.eisa_id(text)


def test_strings_packages_and_methods():
    assert aml.string("LNRO0005") == b"\x0dLNRO0005\0"
    assert aml.package(aml.integer(5), aml.integer(0)) == b"\x12\x05\x02\x0a\x05\0"
    assert aml.method("_STA", 0, aml.returns(aml.integer(15))) == b"\x14\x09_STA\0\xa4\x0a\x0f"
    assert aml.method("X", 2, serialized=True) == b"\x14\x06X___\x0a"
    assert aml.device("D", aml.name("N", aml.integer(1))) == b"\x5b\x82\x0bD___\x08N___\1"


def test_resources():
    assert aml.memory32_fixed(0xF020_0000, 0x200) == b"\x86\x09\0\x01\0\0\x20\xf0\0\x02\0\0"
    assert aml.io(0x3F8, 8) == b"\x47\x01\xf8\x03\xf8\x03\x01\x08"
    assert aml.irq(4) == b"\x22\x10\0"
    assert aml.interrupt(5) == b"\x89\x06\0\x03\x01\x05\0\0\0"
    assert aml.resource_template(aml.irq(4)) == b"\x11\x08\x0a\x05\x22\x10\0\x79\0"


@given(st.integers(0, (1 << 20) - 16))
def test_package_lengths_decode_to_the_whole_package(size):
    content = bytes(size)
    data = aml._package(b"\x10", content)
    lead = data[1]
    extra = lead >> 6
    length = lead & 0x3F if extra == 0 else lead & 0xF | int.from_bytes(data[2 : 2 + extra], "little") << 4
    assert length == len(data) - 1
    assert extra == 0 or lead & 0x30 == 0
    assert len(data) == 1 + 1 + extra + size


def test_a_package_beyond_28_bits_is_a_mistake():
    class Long(bytes):
        def __len__(self) -> int:
            return 1 << 28

    with pytest.raises(ValueError, match="AML package"):
        aml._package(b"\x10", Long())
