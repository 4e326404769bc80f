"""What the PVH boot protocol hands to a kernel: struct hvm_start_info, version 1, and the lists it points to.

The kernel is entered in 32-bit protected mode, paging off, with EBX on the structure. Spec: Xen,
public/arch-x86/hvm/start_info.h.
"""

from __future__ import annotations

import struct

from stratovirt.arch.x86_64 import layout

_MAGIC = 0x336E_C578  # "xEn3" with the 0x80 bit of the "E" set
_VERSION = 1

# struct hvm_start_info {
#     uint32_t magic; uint32_t version; uint32_t flags; uint32_t nr_modules;
#     uint64_t modlist_paddr; uint64_t cmdline_paddr; uint64_t rsdp_paddr; uint64_t memmap_paddr;
#     uint32_t memmap_entries; uint32_t reserved;
# };
_START_INFO = struct.Struct("<IIIIQQQQII")
assert _START_INFO.size == 56

# struct hvm_modlist_entry { uint64_t paddr; uint64_t size; uint64_t cmdline_paddr; uint64_t reserved; };
_MODULE = struct.Struct("<QQQQ")
assert _MODULE.size == 32

# struct hvm_memmap_table_entry { uint64_t addr; uint64_t size; uint32_t type; uint32_t reserved; };
_MEMMAP = struct.Struct("<QQII")
assert _MEMMAP.size == 24


def start_info(e820: list[tuple[int, int, int]], initrd: tuple[int, int] = (0, 0), rsdp: int = 0) -> bytes:
    """The structure with its lists behind it, to be written to layout.PVH_START_INFO.

    `e820` is the memory map (PVH uses the same types), `initrd` (address, size) becomes the one module.
    """
    modules = layout.PVH_START_INFO + _START_INFO.size
    count = 1 if initrd[1] else 0
    memmap = modules + _MODULE.size * count
    return b"".join([
        _START_INFO.pack(_MAGIC, _VERSION, 0, count, modules if count else 0, layout.COMMAND_LINE, rsdp, memmap, len(e820), 0),
        _MODULE.pack(*initrd, 0, 0) if count else b"",
        *[_MEMMAP.pack(base, size, kind, 0) for base, size, kind in e820],
    ])
