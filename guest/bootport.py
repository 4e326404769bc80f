"""A 150-byte static x86_64 program that writes 2 ("boot complete") to the boot-time port, I/O port 0x3ff.

It exists because /dev/port needs PCI or ISA in the kernel, which a microVM's has not, and because a shell takes longer to
open a file than this takes to run. It ends with status 0, or with ioperm's error number.
"""

from __future__ import annotations

import struct

_BASE = 0x400000
_CODE = bytes.fromhex(
    "bf ff030000"  # mov edi, 0x3ff   first port
    "be 01000000"  # mov esi, 1       how many
    "89 f2      "  # mov edx, esi     on
    "b8 ad000000"  # mov eax, 173     ioperm(2)
    "0f 05      "  # syscall
    "89 c7      "  # mov edi, eax
    "f7 df      "  # neg edi          the error number, or 0
    "85 c0      "  # test eax, eax
    "75 07      "  # jnz exit
    "66ba ff03  "  # mov dx, 0x3ff
    "b0 02      "  # mov al, 2
    "ee         "  # out dx, al
    "b8 3c000000"  # exit: mov eax, 60   exit(2)
    "0f 05      "  # syscall
)


def program() -> bytes:
    """The executable."""
    headers = 64 + 56
    entry = _BASE + headers
    size = headers + len(_CODE)
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)
    return header + segment + _CODE
