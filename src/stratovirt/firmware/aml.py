"""AML: the byte code that ACPI's DSDT is made of. One function per term, each returns its bytes; nesting is calling.

    aml.scope("\\\\_SB_", aml.device("COM1", aml.name("_HID", aml.eisa_id("PNP0501"))))

Spec: ACPI 6.3, chapter 20 (encoding) and section 6.4 (resource descriptors).
"""

from __future__ import annotations

import struct

_ZERO_OP = b"\x00"
_ONE_OP = b"\x01"
_NAME_OP = b"\x08"
_BYTE_PREFIX = b"\x0a"
_WORD_PREFIX = b"\x0b"
_DWORD_PREFIX = b"\x0c"
_STRING_PREFIX = b"\x0d"
_QWORD_PREFIX = b"\x0e"
_SCOPE_OP = b"\x10"
_BUFFER_OP = b"\x11"
_PACKAGE_OP = b"\x12"
_METHOD_OP = b"\x14"
_DUAL_NAME_PREFIX = b"\x2e"
_MULTI_NAME_PREFIX = b"\x2f"
_NOTIFY_OP = b"\x86"
_DEVICE_OP = b"\x5b\x82"
_RETURN_OP = b"\xa4"

_END_TAG = b"\x79\x00"  # checksum 0: not checked

# Small resource: tag, irq mask. Two-byte form: edge-triggered, active high, exclusive.
_IRQ_NO_FLAGS = struct.Struct("<BH")
# Small resource: tag, flags (decodes 16 bits), minimum, maximum, alignment, length.
_IO = struct.Struct("<BBHHBB")
# Large resource: tag, length, flags, base, size.
_MEMORY32_FIXED = struct.Struct("<BHBII")
# Large resource: tag, length, flags, count of interrupts, one interrupt.
_EXTENDED_INTERRUPT = struct.Struct("<BHBBI")

_CONSUMER = 0x01
_EDGE = 0x02


def _package_length(size: int) -> bytes:
    """PkgLength of a package whose content is `size` bytes; the length counts itself (20.2.4)."""
    if size + 1 < 1 << 6:
        return bytes([size + 1])
    for extra in (1, 2, 3):
        total = size + 1 + extra
        if total < 1 << (4 + 8 * extra):
            return bytes([extra << 6 | total & 0xF]) + (total >> 4).to_bytes(extra, "little")
    raise ValueError(f"an AML package of {size} bytes")


def _package(op: bytes, content: bytes) -> bytes:
    return op + _package_length(len(content)) + content


def name_string(path: str) -> bytes:
    """`path` as in ASL: `\\\\` or `^` in front, segments of up to four characters between dots."""
    relative = path.lstrip("\\^")
    prefix = path[: len(path) - len(relative)].encode("ascii")
    if not relative:
        return prefix + b"\0"
    segments = relative.split(".")
    for segment in segments:
        if not (1 <= len(segment) <= 4 and segment.replace("_", "A").isalnum() and segment.isascii()
                and segment == segment.upper() and not segment[0].isdigit()):
            raise ValueError(f"{segment!r} is no AML name")
    encoded = b"".join(segment.ljust(4, "_").encode("ascii") for segment in segments)
    if len(segments) == 1:
        return prefix + encoded
    if len(segments) == 2:
        return prefix + _DUAL_NAME_PREFIX + encoded
    return prefix + _MULTI_NAME_PREFIX + bytes([len(segments)]) + encoded


def integer(value: int) -> bytes:
    """The shortest encoding of `value`, 0 to 2**64 - 1."""
    if value == 0:
        return _ZERO_OP
    if value == 1:
        return _ONE_OP
    if value < 1 << 8:
        return _BYTE_PREFIX + value.to_bytes(1, "little")
    if value < 1 << 16:
        return _WORD_PREFIX + value.to_bytes(2, "little")
    if value < 1 << 32:
        return _DWORD_PREFIX + value.to_bytes(4, "little")
    return _QWORD_PREFIX + value.to_bytes(8, "little")


def string(text: str) -> bytes:
    return _STRING_PREFIX + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """`PNP0501` as the compressed 32-bit integer of EISA: three letters of five bits, four hexadecimal digits."""
    if len(text) != 7 or not text[:3].isalpha() or not text[:3].isupper():
        raise ValueError(f"{text!r} is no EISA id")
    a, b, c = (ord(letter) - 0x40 for letter in text[:3])
    return _DWORD_PREFIX + struct.pack(">HH", a << 10 | b << 5 | c, int(text[3:], 16))


def name(path: str, value: bytes) -> bytes:
    return _NAME_OP + name_string(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    return _package(_SCOPE_OP, name_string(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    return _package(_DEVICE_OP, name_string(path) + b"".join(terms))


def method(path: str, arguments: int, *terms: bytes, serialized: bool = False) -> bytes:
    return _package(_METHOD_OP, name_string(path) + bytes([arguments | serialized << 3]) + b"".join(terms))


def returns(value: bytes) -> bytes:
    return _RETURN_OP + value


def notify(path: str, value: int) -> bytes:
    """Notify (path, value): tell the operating system about a device."""
    return _NOTIFY_OP + name_string(path) + integer(value)


def package(*elements: bytes) -> bytes:
    return _package(_PACKAGE_OP, bytes([len(elements)]) + b"".join(elements))


def buffer(data: bytes) -> bytes:
    return _package(_BUFFER_OP, integer(len(data)) + data)


def resource_template(*descriptors: bytes) -> bytes:
    return buffer(b"".join(descriptors) + _END_TAG)


def memory32_fixed(base: int, size: int) -> bytes:
    """Memory32Fixed (ReadWrite, base, size)."""
    return _MEMORY32_FIXED.pack(0x86, 9, 1, base, size)


def io(base: int, size: int) -> bytes:
    """IO (Decode16, base, base, 1, size)."""
    return _IO.pack(0x47, 1, base, base, 1, size)


def irq(number: int) -> bytes:
    """IRQNoFlags () {number}: an ISA interrupt, edge-triggered and active high."""
    return _IRQ_NO_FLAGS.pack(0x22, 1 << number)


def interrupt(gsi: int) -> bytes:
    """Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) {gsi}."""
    return _EXTENDED_INTERRUPT.pack(0x89, 6, _CONSUMER | _EDGE, 1, gsi)
