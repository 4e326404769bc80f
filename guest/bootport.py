"""A 150-byte static program that writes 2 ("boot complete") to where the machine measures a boot.

On x86_64 that is I/O port 0x3ff, and the program exists because /dev/port needs PCI or ISA in the kernel, which a microVM's
has not, and because a shell takes longer to open a file than this takes to run. It ends with status 0, or with ioperm's
error number. On arm64 it is the physical address 0x9000f00, in the page of the serial port's registers; the status is 0, or
the number of the error, which is EPERM in a kernel that keeps programs from devices that it drives itself.
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


_EM_X86_64, _EM_AARCH64 = 62, 183

_ARM64_CODE = struct.pack(
    "<23I",
    0x92800C60,  # mov x0, #-100            openat(AT_FDCWD,
    0x10000001 | (0x58 >> 2) << 5,  # adr x1, path              "/dev/mem",
    0xD2820042,  # mov x2, #0x1002
    0xF2A00202,  # movk x2, #0x10, lsl #16    O_RDWR | O_SYNC)
    0xD2800708,  # mov x8, #56
    0xD4000001,  # svc #0
    0xAA0003E4,  # mov x4, x0               mmap(…, the descriptor,
    0xB7F801A0,  # tbnz x0, #63, out
    0xD2800000,  # mov x0, #0
    0xD2820001,  # mov x1, #0x1000
    0xD2800062,  # mov x2, #3                 PROT_READ | PROT_WRITE,
    0xD2800023,  # mov x3, #1                 MAP_SHARED,
    0xD2A12005,  # mov x5, #0x9000000         the serial port's page)
    0xD2801BC8,  # mov x8, #222
    0xD4000001,  # svc #0
    0xB140041F,  # cmn x0, #1, lsl #12
    0x54000088,  # b.hi out                 an error number
    0x52800041,  # mov w1, #2
    0x393C0001,  # strb w1, [x0, #0xf00]
    0xD2800000,  # mov x0, #0
    0xCB0003E0,  # out: neg x0, x0
    0xD2800BA8,  # mov x8, #93              exit
    0xD4000001,  # svc #0
)


def program() -> bytes:
    """The executable for x86_64."""
    return _executable(_EM_X86_64, _CODE)


def arm64_program() -> bytes:
    """The executable for arm64."""
    return _executable(_EM_AARCH64, _ARM64_CODE + b"/dev/mem\0")


def _executable(machine: int, code: bytes) -> bytes:
    headers = 64 + 56
    entry = _BASE + headers
    size = headers + len(code)
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, machine, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x10000)
    return header + segment + code
