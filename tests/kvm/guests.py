"""Tiny guests: an assembler for the few instructions they need, and kernels made of them.

Code runs in 32-bit protected mode, flat, paging off, as the PVH protocol enters it. Without hardware virtualization KVM
emulates every instruction, and it knows the simple ones only: moves, arithmetic, jumps, port I/O, `hlt`, `lidt`.
"""

from __future__ import annotations

import struct
from itertools import count

from unit.images import Load, elf, xen_note

CODE = 0x10_0000
STACK = 0x9_0000
DATA = 0x20_0000  # what guests and tests share
IDT, GDT = 0x8_0000, 0x8_1000
SERIAL, RESET_PORT, POWER_PORT = 0x3F8, 0x64, 0xCE9

EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI = range(8)


class Asm:
    """Bytes of code that starts at `origin`. Labels are names; jumps are 32 bits long."""

    def __init__(self, origin: int = CODE) -> None:
        self.origin = origin
        self.code = bytearray()
        self._labels: dict[str, int] = {}
        self._fixups: list[tuple[int, str, bool]] = []
        self._names = count()

    # -- the mechanics

    def raw(self, *parts: int | bytes) -> Asm:
        for part in parts:
            self.code += bytes((part,)) if isinstance(part, int) else part
        return self

    def label(self, name: str = "") -> str:
        name = name or f".{next(self._names)}"
        self._labels[name] = self.origin + len(self.code)
        return name

    def _target(self, name: str, absolute: bool = False) -> Asm:
        self._fixups.append((len(self.code), name, absolute))
        return self.raw(bytes(4))

    def build(self) -> bytes:
        code = bytearray(self.code)
        for position, name, absolute in self._fixups:
            target = self._labels[name] - (0 if absolute else self.origin + position + 4)
            struct.pack_into("<I", code, position, target & 0xFFFF_FFFF)
        return bytes(code)

    def kernel(self, *loads: Load) -> bytes:
        """An ELF file with a PVH note: this code, and `loads`."""
        return elf([Load(self.build(), self.origin), *loads], entry=self.origin, notes=xen_note(self.origin))

    # -- instructions

    def mov(self, register: int, value: int) -> Asm:
        return self.raw(0xB8 + register, struct.pack("<I", value & 0xFFFF_FFFF))

    def mov_label(self, register: int, name: str) -> Asm:
        return self.raw(0xB8 + register)._target(name, absolute=True)

    def store(self, address: int, value: int, size: int = 4) -> Asm:
        """[address] = value, an immediate."""
        code = {1: b"\xc6\x05", 2: b"\x66\xc7\x05", 4: b"\xc7\x05"}[size]
        return self.raw(code, struct.pack("<I", address), (value & (1 << 8 * size) - 1).to_bytes(size, "little"))

    def store_eax(self, address: int, size: int = 4) -> Asm:
        return self.raw({1: b"\xa2", 2: b"\x66\xa3", 4: b"\xa3"}[size], struct.pack("<I", address))

    def load_eax(self, address: int, size: int = 4) -> Asm:
        return self.raw({1: b"\xa0", 2: b"\x66\xa1", 4: b"\xa1"}[size], struct.pack("<I", address))

    def out_eax(self, port: int, size: int = 1) -> Asm:
        return self.mov(EDX, port).raw({1: b"\xee", 2: b"\x66\xef", 4: b"\xef"}[size])

    def out(self, port: int, value: int, size: int = 1) -> Asm:
        return self.mov(EAX, value).out_eax(port, size)

    def in_eax(self, port: int, size: int = 1) -> Asm:
        return self.mov(EDX, port).raw({1: b"\xec", 2: b"\x66\xed", 4: b"\xed"}[size])

    def inc(self, address: int) -> Asm:
        return self.raw(0xFF, 0x05, struct.pack("<I", address))

    def cmp_eax(self, value: int) -> Asm:
        return self.raw(0x3D, struct.pack("<I", value & 0xFFFF_FFFF))

    def jmp(self, name: str) -> Asm:
        return self.raw(0xE9)._target(name)

    def jz(self, name: str) -> Asm:
        return self.raw(0x0F, 0x84)._target(name)

    def jnz(self, name: str) -> Asm:
        return self.raw(0x0F, 0x85)._target(name)

    def jb(self, name: str) -> Asm:
        """Jump when the comparison found less, unsigned."""
        return self.raw(0x0F, 0x82)._target(name)

    def cli(self) -> Asm:
        return self.raw(0xFA)

    def sti(self) -> Asm:
        return self.raw(0xFB)

    def hlt(self) -> Asm:
        return self.raw(0xF4)

    # -- what guests do again and again

    def text(self, words: str) -> Asm:
        """Write to the serial port."""
        for letter in words.encode():
            self.out(SERIAL, letter)
        return self

    def halt_forever(self) -> Asm:
        again = self.label()
        return self.hlt().jmp(again)

    def power_off(self) -> Asm:
        return self.out(POWER_PORT, 0x34).halt_forever()

    def reset(self) -> Asm:
        return self.out(RESET_PORT, 0xFE).halt_forever()

    def wait_nonzero(self, address: int) -> Asm:
        """Spin until the word there is not zero."""
        again = self.label()
        return self.load_eax(address).cmp_eax(0).jz(again)

    def set_stack(self) -> Asm:
        return self.mov(ESP, STACK)

    def pic(self, mask_master: int = 0x00, mask_slave: int = 0x00) -> Asm:
        """Initialize both PICs as a PC's firmware does, at vectors 32 and 40, and unmask all but the masks."""
        for port, values in ((0x20, (0x11,)), (0x21, (32, 4, 1, mask_master)), (0xA0, (0x11,)), (0xA1, (40, 2, 1, mask_slave))):
            for value in values:
                self.out(port, value)
        return self

    def gate(self, vector: int, handler: str) -> Asm:
        """An interrupt gate of the table at IDT."""
        self.mov_label(EAX, handler).store_eax(IDT + 8 * vector, 2).store(IDT + 8 * vector + 2, 0x10, 2)
        return self.store(IDT + 8 * vector + 4, 0x8E00, 2).raw(b"\xc1\xe8\x10").store_eax(IDT + 8 * vector + 6, 2)

    def load_idt(self) -> Asm:
        """Take the table at IDT into use, and a GDT with a 32-bit code segment: the one a guest starts with is for 64 bits."""
        for offset, word in ((16, 0x0000FFFF), (20, 0x00CF9B00), (24, 0x0000FFFF), (28, 0x00CF9300)):
            self.store(GDT + offset, word)
        for table, size, register in ((GDT, 32, 0x15), (IDT, 256 * 8, 0x1D)):  # lgdt, lidt
            self.store(table - 8, size - 1, 2).store(table - 6, table).raw(0x0F, 0x01, register, struct.pack("<I", table - 8))
        return self

    def handler(self, name: str) -> Asm:
        """Begin an interrupt handler: EAX and EDX are kept."""
        self.label(name)
        return self.raw(0x50, 0x52)  # push eax; push edx

    def end_of_interrupt(self) -> Asm:
        """Tell both PICs, and go back. KVM does not emulate `iret` in protected mode: the flags first, then `ret 8`."""
        self.out(0xA0, 0x20).out(0x20, 0x20).raw(0x5A, 0x58)
        return self.raw(b"\xff\x74\x24\x08", 0x9D, b"\xc2\x08\x00")  # push [esp + 8]; popfd; ret 8


def hello() -> bytes:
    return Asm().text("hello\n").power_off().kernel()
