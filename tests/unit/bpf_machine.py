"""A machine for seccomp's programs of classic BPF: one call in, the filter's answer out. Written from the kernel's rules
(Documentation/networking/filter.rst, kernel/seccomp.c), not from the assembler's.
"""

from __future__ import annotations

import struct


class InvalidProgramError(Exception):
    """The kernel would refuse it."""


def run(program: bytes, number: int, *arguments: int, arch: int = 0xC000_003E, address: int = 0x7F00_0000_0000) -> int:
    """What SECCOMP_RET_* the program answers a system call with."""
    data = struct.pack("<IIQ6Q", number & 0xFFFF_FFFF, arch, address,
                       *(value & (1 << 64) - 1 for value in (*arguments, *(0,) * (6 - len(arguments)))))
    code = list(struct.iter_unpack("<HBBI", program))
    accumulator, at = 0, 0
    while at < len(code):
        operation, jt, jf, k = code[at]
        at += 1
        if operation == 0x20:  # BPF_LD | BPF_W | BPF_ABS, of seccomp_data: whole words inside it
            if k % 4 or k + 4 > len(data):
                raise InvalidProgramError(f"load from {k}")
            (accumulator,) = struct.unpack_from("<I", data, k)
        elif operation == 0x06:  # BPF_RET | BPF_K
            return k
        elif operation == 0x05:  # BPF_JMP | BPF_JA
            at += k
        elif operation in (0x15, 0x25, 0x35, 0x45):  # BPF_JMP | BPF_K with JEQ, JGT, JGE, JSET
            holds = {0x15: accumulator == k, 0x25: accumulator > k, 0x35: accumulator >= k, 0x45: accumulator & k != 0}
            at += jt if holds[operation] else jf
        else:
            raise InvalidProgramError(f"operation {operation:#x}")
    raise InvalidProgramError("the program runs off its end")


def check(program: bytes) -> None:
    """What the kernel checks before it takes a program. Raises: InvalidProgramError."""
    if len(program) % 8 or not 0 < len(program) // 8 <= 4096:
        raise InvalidProgramError("its length")
    code = list(struct.iter_unpack("<HBBI", program))
    for at, (operation, jt, jf, k) in enumerate(code):
        if operation not in (0x20, 0x06, 0x05, 0x15, 0x25, 0x35, 0x45):
            raise InvalidProgramError(f"operation {operation:#x} at {at}")
        furthest = k if operation == 0x05 else max(jt, jf) if operation & 7 == 5 else 0
        if at + 1 + furthest >= len(code) and operation != 0x06:
            raise InvalidProgramError(f"a jump out of the program at {at}")
    if code[-1][0] != 0x06:
        raise InvalidProgramError("no return at the end")
