"""The smallest guest that starts and ends under either monitor: an ELF file with a PVH note and a few instructions.

It writes a letter to the serial port, whether or not there is one; then to port 0xf4, which ends QEMU with an
`isa-debug-exit` there and is an unclaimed port to us; then the reset command to the keyboard controller, which ends us.
"""

from __future__ import annotations

import struct

from stratovirt.arch.x86_64 import layout

LETTER = b"A"
EXIT_PORT = 0xF4
_EXIT_VALUE = 0x15
QEMU_STATUS = _EXIT_VALUE << 1 | 1  # what isa-debug-exit makes of the value: no other end of QEMU has this status

_LOAD = 0x100000
_NOTE_PVH_ENTRY = 18  # XEN_ELFNOTE_PHYS32_ENTRY
_CODE = bytes([
    0x66, 0xBA, 0xF8, 0x03,  # mov dx, 0x3f8
    0xB0, LETTER[0], 0xEE,   # mov al, 'A'; out dx, al
    0xB0, _EXIT_VALUE, 0xE6, EXIT_PORT,
    0xB0, 0xFE, 0xE6, 0x64,  # reset through the keyboard controller
    0xF4, 0xEB, 0xFD,        # hlt, for ever
])  # fmt: skip


_IDLE = bytes([
    0x66, 0xBA, 0xF8, 0x03,  # mov dx, 0x3f8
    0xB0, LETTER[0], 0xEE,   # mov al, 'A'; out dx, al
    0xFB, 0xF4, 0xEB, 0xFC,  # sti; hlt, for ever
])  # fmt: skip


def idle() -> bytes:
    """A guest that writes its letter and sleeps until it is ended from outside."""
    return image(_IDLE)


def cloned() -> bytes:
    """A guest that waits until its generation ID has changed, which is when it has been restored, and goes on as `image`."""
    there, kept = struct.pack("<I", layout.GENERATION_ID), struct.pack("<I", 0x200000)
    wait = b"\xa1" + there + b"\x3b\x05" + kept + b"\x74\xf3"  # mov eax, [there]; cmp eax, [kept]; je back
    return image(b"\xa1" + there + b"\xa3" + kept + wait + _CODE)


def writing(count: int) -> bytes:
    """A guest that writes `count` times to a port that nobody has, and ends us."""
    loop = b"\xb9" + struct.pack("<I", count) + bytes([0xE6, EXIT_PORT, 0x49, 0x75, 0xFB])  # mov ecx; out; dec ecx; jnz
    return image(loop + bytes([0xB0, 0xFE, 0xE6, 0x64, 0xF4, 0xEB, 0xFD]))


def image(code: bytes = _CODE) -> bytes:
    """The file's content."""
    note = struct.pack("<III4sI", 4, 4, _NOTE_PVH_ENTRY, b"Xen\0", _LOAD)
    note_offset = 64 + 2 * 56
    code_offset = 0x1000
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, _LOAD, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 5, code_offset, _LOAD, _LOAD, len(code), len(code), 0x1000)
    notes = struct.pack("<IIQQQQQQ", 4, 4, note_offset, 0, 0, len(note), len(note), 4)
    return (header + load + notes + note).ljust(code_offset, b"\0") + code
