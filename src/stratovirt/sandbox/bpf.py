"""The assembler of seccomp filters: from rules to a program of classic BPF, as bytes. Pure.

A program is an array of struct sock_filter { u16 code; u8 jt, jf; u32 k; } and runs over struct seccomp_data:

    0   u32 nr                      the system call
    4   u32 arch
    8   u64 instruction_pointer
    16  u64 args[6]                 little-endian: the low half of argument n is at 16 + 8 * n

Arguments that the kernel takes as 32 bits (descriptors, request numbers, flags) are compared by their low half alone, as the
kernel does; a pointer cannot be followed and is never looked at.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from stratovirt.sandbox.rules import Rule, Test

LOAD, JUMP, JUMP_EQUAL, JUMP_GREATER_EQUAL, JUMP_SET, RETURN = 0x20, 0x05, 0x15, 0x35, 0x45, 0x06

ALLOW, TRAP, ERRNO, KILL_PROCESS = 0x7FFF_0000, 0x0003_0000, 0x0005_0000, 0x8000_0000
ARCHITECTURES = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}  # AUDIT_ARCH_*
X32_BIT = 0x4000_0000  # numbers of the x32 ABI: another table of calls behind the same architecture
OTHER_ARGUMENTS = 0x10  # in the data of TRAP: the call would be allowed with other arguments

INSTRUCTION = struct.Struct("<HBBI")
_NR, _ARCH, _ARGUMENTS = 0, 4, 16


def argument_offset(number: int) -> int:
    return _ARGUMENTS + 8 * number


class Program:
    """Instructions in the making. Jumps are counted from the next instruction, and forward only, as BPF has it."""

    def __init__(self) -> None:
        self.code: list[tuple[int, int, int, int]] = []

    def add(self, code: int, k: int, jt: int = 0, jf: int = 0) -> None:
        if not (0 <= jt <= 255 and 0 <= jf <= 255):
            raise ValueError(f"a jump of {max(jt, jf)} instructions: 255 is the limit")
        self.code.append((code, jt, jf, k & 0xFFFF_FFFF))

    def extend(self, other: Program) -> None:
        self.code += other.code

    def pack(self) -> bytes:
        return b"".join(INSTRUCTION.pack(*instruction) for instruction in self.code)


def compile_filter(rules: Sequence[Rule], numbers: dict[str, int], kind: int, architecture: str) -> bytes:
    """The program that allows what `rules` allow, and traps on everything else with `kind` in its data.

    The order of the calls is that of the rules: the frequent ones come first. Several rules for one call are alternatives.
    """
    program = Program()
    program.add(LOAD, _ARCH)
    program.add(JUMP_EQUAL, ARCHITECTURES[architecture], 1, 0)
    program.add(RETURN, KILL_PROCESS)  # another architecture's call: the numbers below do not count, nor does the handler
    program.add(LOAD, _NR)
    if architecture == "x86_64":
        program.add(JUMP_GREATER_EQUAL, X32_BIT, 0, 1)
        program.add(RETURN, TRAP | kind)
    for call in dict.fromkeys(rule.call for rule in rules):
        body = _body([rule for rule in rules if rule.call == call], kind)
        length = len(body.code)
        if length <= 255:
            program.add(JUMP_EQUAL, numbers[call], 0, length)
        else:
            program.add(JUMP_EQUAL, numbers[call], 1, 0)
            program.add(JUMP, length)
        program.extend(body)
    program.add(RETURN, TRAP | kind)
    return program.pack()


def _body(alternatives: Iterable[Rule], kind: int) -> Program:
    """What happens to one call. Ends with a return: the number is not in the accumulator any more."""
    body = Program()
    for rule in alternatives:
        part = Program()
        for test in reversed(rule.tests):
            whole = _test(test, len(part.code) + 1)  # past the rest of this alternative and its return
            whole.extend(part)
            part = whole
        part.add(RETURN, rule.action)
        body.extend(part)
        if not rule.tests:
            return body
    body.add(RETURN, TRAP | kind | OTHER_ARGUMENTS)
    return body


def _test(test: Test, rest: int) -> Program:
    """Falls through when the argument passes, else jumps `rest` instructions further than its own end."""
    program = Program()
    program.add(LOAD, argument_offset(test.argument))
    if test.forbidden_bits:
        program.add(JUMP_SET, test.forbidden_bits, rest, 0)
    count = len(test.values)
    for place, value in enumerate(test.values):
        left = count - 1 - place
        program.add(JUMP_EQUAL, value, left, 0 if left else rest)
    return program
