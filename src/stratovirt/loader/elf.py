"""ELF kernels (vmlinux): program headers become segments; a Xen note in them offers the PVH entry.

The file is not trusted: every count and offset is checked against the file's size or a fixed bound before it is used.
Spec: System V ABI, "Program Loading"; Xen, public/elfnote.h.
"""

from __future__ import annotations

import struct

from stratovirt.loader.image import KernelImage, Segment, refuse

TYPE_CHECKING = False
if TYPE_CHECKING:
    Header = tuple[int, int, int, int, int, int, int, int]

# typedef struct {
#     unsigned char e_ident[16];                       -- magic, class, data, version, OS ABI, padding
#     Elf64_Half e_type; Elf64_Half e_machine; Elf64_Word e_version;
#     Elf64_Addr e_entry; Elf64_Off e_phoff; Elf64_Off e_shoff;
#     Elf64_Word e_flags; Elf64_Half e_ehsize; Elf64_Half e_phentsize; Elf64_Half e_phnum;
#     Elf64_Half e_shentsize; Elf64_Half e_shnum; Elf64_Half e_shstrndx;
# } Elf64_Ehdr;
_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
assert _EHDR.size == 64

# typedef struct {
#     Elf64_Word p_type; Elf64_Word p_flags; Elf64_Off p_offset; Elf64_Addr p_vaddr; Elf64_Addr p_paddr;
#     Elf64_Xword p_filesz; Elf64_Xword p_memsz; Elf64_Xword p_align;
# } Elf64_Phdr;
_PHDR = struct.Struct("<IIQQQQQQ")
assert _PHDR.size == 56

# typedef struct { Elf64_Word n_namesz; Elf64_Word n_descsz; Elf64_Word n_type; } Elf64_Nhdr;
_NHDR = struct.Struct("<III")
assert _NHDR.size == 12

_EI_CLASS, _EI_DATA = 4, 5
_ELFCLASS32, _ELFCLASS64 = 1, 2
_ELFDATA2LSB, _ELFDATA2MSB = 1, 2
_ET_REL, _ET_EXEC, _ET_DYN, _ET_CORE = 1, 2, 3, 4
_EM_X86_64 = 62
_PT_LOAD, _PT_INTERP, _PT_NOTE = 1, 3, 4
_XEN_ELFNOTE_PHYS32_ENTRY = 18
_XEN = b"Xen\0"

_MAX_PROGRAM_HEADERS = 128  # a Linux kernel has 5
_MAX_NOTES = 1024
_MAX_ADDRESS = 1 << 64

EM_AARCH64 = 183
_MACHINES = {2: "SPARC", 3: "32-bit x86", 8: "MIPS", 20: "PowerPC", 21: "64-bit PowerPC", 22: "S/390", 40: "32-bit ARM",
             43: "64-bit SPARC", EM_AARCH64: "arm64 (aarch64)", 243: "RISC-V", 247: "BPF", 258: "LoongArch"}


def machine_name(machine: int) -> str:
    """The processor of a number in an ELF header, for messages."""
    return "x86_64" if machine == _EM_X86_64 else _MACHINES.get(machine, f"machine {machine}")


def parse(view: memoryview, path: str) -> KernelImage:
    """The kernel in an ELF file. Raises: ConfigError naming what is wrong with it."""
    size = len(view)
    if size < 20:
        raise refuse(path, "the file ends inside the ELF header")
    _check_ident(view, path)
    if size < _EHDR.size:
        raise refuse(path, "the file ends inside the ELF header")
    _, e_type, _, _, e_entry, e_phoff, _, _, _, e_phentsize, e_phnum, _, _, _ = _EHDR.unpack_from(view)
    if e_type == _ET_REL:
        raise refuse(path, "this is an ELF object file or kernel module, not a linked kernel")
    if e_type == _ET_CORE:
        raise refuse(path, "this is an ELF core dump")
    if e_type not in (_ET_EXEC, _ET_DYN):
        raise refuse(path, f"the ELF header has type {e_type}, which is not an executable")
    if e_phnum == 0:
        raise refuse(path, "this ELF file has no program headers, so nothing to load")
    if e_phentsize != _PHDR.size:
        raise refuse(path, f"the ELF program headers are {e_phentsize} bytes each instead of {_PHDR.size}")
    if e_phnum > _MAX_PROGRAM_HEADERS:
        raise refuse(path, f"this ELF file has {e_phnum} program headers; more than {_MAX_PROGRAM_HEADERS} is no kernel")
    if e_phoff + e_phnum * _PHDR.size > size:
        raise refuse(path, "the file is truncated: it ends before its ELF program headers do")

    headers: list[Header] = list(_PHDR.iter_unpack(view[e_phoff : e_phoff + e_phnum * _PHDR.size]))
    segments = [_segment(header, size, path) for header in headers if header[0] == _PT_LOAD and header[6]]
    if any(header[0] == _PT_INTERP for header in headers):
        raise refuse(path, "this is a program for Linux, not a kernel")
    if not segments:
        raise refuse(path, "this ELF file has nothing to load")

    pvh_entry = _pvh_entry(view, headers, path)
    if pvh_entry is not None:
        return KernelImage(path, "elf", "pvh", segments, pvh_entry)
    return KernelImage(path, "elf", "linux64", segments, _physical_entry(e_entry, headers, path))


def _check_ident(view: memoryview, path: str) -> None:
    order = view[_EI_DATA]
    if order not in (_ELFDATA2LSB, _ELFDATA2MSB) or view[_EI_CLASS] not in (_ELFCLASS32, _ELFCLASS64):
        raise refuse(path, "the ELF header is damaged: neither 32 nor 64 bits, or of no known byte order")
    machine = struct.unpack_from("<H" if order == _ELFDATA2LSB else ">H", view, 18)[0]
    if order == _ELFDATA2MSB:
        raise refuse(path, f"this is a big-endian ELF file for {machine_name(machine)}")
    if machine != _EM_X86_64:
        raise refuse(path, f"this is an ELF file for {machine_name(machine)}, not for x86_64")
    if view[_EI_CLASS] == _ELFCLASS32:
        raise refuse(path, "this is a 32-bit ELF file")


def _segment(header: Header, size: int, path: str) -> Segment:
    _, _, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, _ = header
    if p_filesz > p_memsz:
        raise refuse(path, f"the ELF segment at {p_paddr:#x} has more bytes in the file than in memory")
    if p_filesz and p_offset + p_filesz > size:
        raise refuse(path, f"the file is truncated: the ELF segment at {p_paddr:#x} ends at file offset "
                           f"{p_offset + p_filesz:#x}, the file at {size:#x}")
    if p_paddr + p_memsz > _MAX_ADDRESS or p_vaddr + p_memsz > _MAX_ADDRESS:
        raise refuse(path, f"the ELF segment at {p_paddr:#x} runs past the end of the address space")
    return Segment(p_offset, p_filesz, p_paddr, p_memsz)


def _physical_entry(e_entry: int, headers: list[Header], path: str) -> int:
    """e_entry, translated when it is a virtual address: Linux gives a physical one, other kernels either."""
    loads = [header for header in headers if header[0] == _PT_LOAD]
    for _, _, _, _, p_paddr, _, p_memsz, _ in loads:
        if p_paddr <= e_entry < p_paddr + p_memsz:
            return e_entry
    for _, _, _, p_vaddr, p_paddr, _, p_memsz, _ in loads:
        if p_vaddr <= e_entry < p_vaddr + p_memsz:
            return p_paddr + e_entry - p_vaddr
    raise refuse(path, f"the ELF entry point {e_entry:#x} lies in no segment")


def _pvh_entry(view: memoryview, headers: list[Header], path: str) -> int | None:
    """The physical address in the note XEN_ELFNOTE_PHYS32_ENTRY, or None when there is no such note."""
    budget = _MAX_NOTES
    for p_type, _, p_offset, _, _, p_filesz, _, p_align in headers:
        if p_type != _PT_NOTE:
            continue
        end = p_offset + p_filesz
        if end > len(view):
            raise refuse(path, "the file is truncated: it ends before its ELF notes do")
        mask = 7 if p_align == 8 else 3
        position = p_offset
        while position + _NHDR.size <= end:
            budget -= 1
            if budget < 0:
                raise refuse(path, f"this ELF file has more than {_MAX_NOTES} notes")
            n_namesz, n_descsz, n_type = _NHDR.unpack_from(view, position)
            name = position + _NHDR.size
            desc = p_offset + ((name + n_namesz - p_offset + mask) & ~mask)
            if desc + n_descsz > end:
                raise refuse(path, "an ELF note runs past the end of the notes")
            if n_type == _XEN_ELFNOTE_PHYS32_ENTRY and view[name : name + n_namesz] == _XEN:
                if n_descsz not in (4, 8):
                    raise refuse(path, f"the PVH entry point in the ELF notes is {n_descsz} bytes long instead of 4 or 8")
                return int.from_bytes(view[desc : desc + n_descsz], "little")
            position = p_offset + ((desc + n_descsz - p_offset + mask) & ~mask)
    return None
