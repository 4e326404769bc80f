"""Kernel images made to order: small, valid unless told otherwise."""

from __future__ import annotations

import struct
from collections.abc import Sequence

PT_LOAD, PT_INTERP, PT_NOTE = 1, 3, 4
EHDR_SIZE = 64
PHDR_SIZE = 56


def note(owner: bytes, kind: int, desc: bytes, align: int = 4) -> bytes:
    """One ELF note. `owner` comes with its terminator."""
    data = struct.pack("<III", len(owner), len(desc), kind) + owner
    data += bytes(-len(data) % align) + desc
    return data + bytes(-len(data) % align)


def xen_note(entry: int, size: int = 4) -> bytes:
    return note(b"Xen\0", 18, entry.to_bytes(size, "little"))


class Load:
    """A PT_LOAD segment; `memory_size` defaults to the length of `data`, `offset` to the next multiple of 4096."""

    def __init__(self, data: bytes, paddr: int, memory_size: int | None = None, vaddr: int | None = None,
                 offset: int | None = None) -> None:
        self.data = data
        self.paddr = paddr
        self.memory_size = len(data) if memory_size is None else memory_size
        self.vaddr = paddr if vaddr is None else vaddr
        self.offset = offset


def elf(loads: Sequence[Load], *, entry: int, notes: bytes = b"", note_align: int = 4, ident: bytes = b"\x7fELF\x02\x01\x01",
        e_type: int = 2, machine: int = 62, phentsize: int = PHDR_SIZE, phnum: int | None = None,
        interp: bool = False) -> bytes:
    """An ELF64 file: header, program headers, notes, then the segments."""
    count = len(loads) + bool(notes) + interp
    position = EHDR_SIZE + PHDR_SIZE * count
    headers = []
    body = b""
    if notes:
        headers.append(struct.pack("<IIQQQQQQ", PT_NOTE, 4, position, 0, 0, len(notes), len(notes), note_align))
        body += notes
    if interp:
        headers.append(struct.pack("<IIQQQQQQ", PT_INTERP, 4, 0, 0, 0, 4, 4, 1))
    for load in loads:
        offset = load.offset
        if offset is None:
            offset = position + len(body) + -(position + len(body)) % 4096
        body += bytes(max(0, offset - position - len(body)))
        headers.append(struct.pack("<IIQQQQQQ", PT_LOAD, 5, offset, load.vaddr, load.paddr, len(load.data),
                                   load.memory_size, 4096))
        body += load.data
    header = struct.pack("<16sHHIQQQIHHHHHH", ident, e_type, machine, 1, entry, EHDR_SIZE, 0, 0, EHDR_SIZE, phentsize,
                         count if phnum is None else phnum, 0, 0, 0)
    return header + b"".join(headers) + body


def pvh_elf(code: bytes = b"\xf4", address: int = 0x10_0000) -> bytes:
    """The smallest PVH kernel: one segment, entered at its start."""
    return elf([Load(code, address)], entry=address, notes=xen_note(address))


def bzimage(payload: bytes = bytes(0x400), *, setup_sects: int = 7, version: int = 0x20F, loadflags: int = 1,
            xloadflags: int = 0x3F, code32_start: int = 0x10_0000, syssize: int | None = None, relocatable: int = 1,
            kernel_alignment: int = 0x20_0000, pref_address: int = 0x100_0000, init_size: int = 0x200_0000,
            cmdline_size: int = 2047, initrd_addr_max: int = 0x7FFF_FFFF, tail: bytes = b"") -> bytes:
    """A bzImage shell: setup header and `payload`; `tail` is what follows the kernel, a signature for example."""
    setup = bytearray(((setup_sects or 4) + 1) * 512)
    payload += bytes(-len(payload) % 16)
    setup[0x1F1] = setup_sects
    struct.pack_into("<I", setup, 0x1F4, len(payload) // 16 if syssize is None else syssize)
    struct.pack_into("<HBB4sH", setup, 0x1FE, 0xAA55, 0xEB, 0x6A, b"HdrS", version)
    setup[0x211] = loadflags
    struct.pack_into("<I", setup, 0x214, code32_start)
    struct.pack_into("<IIBBHI", setup, 0x22C, initrd_addr_max, kernel_alignment, relocatable, 21, xloadflags, cmdline_size)
    struct.pack_into("<QQI", setup, 0x250, 0xDEAD_BEEF, pref_address, init_size)
    return bytes(setup) + payload + tail
