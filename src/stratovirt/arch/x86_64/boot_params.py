"""What the 64-bit Linux boot protocol hands to a kernel: the zero page, page tables and a GDT.

Everything is a list of (address, bytes) to be written to zeroed RAM. The kernel is entered in long mode with RSI on the
zero page. Spec: Linux, Documentation/arch/x86/boot.rst and zero-page.rst.
"""

from __future__ import annotations

import struct

from stratovirt.arch.x86_64 import layout
from stratovirt.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    Piece = tuple[int, bytes | bytearray]

ZERO_PAGE_SIZE = 4096

# Offsets in struct boot_params, from the start of the page.
_ACPI_RSDP_ADDR = 0x070
_E820_ENTRIES = 0x1E8
_SETUP_HEADER = 0x1F1
_BOOT_FLAG = 0x1FE
_HEADER = 0x202  # "HdrS", then u16 version
_TYPE_OF_LOADER = 0x210
_LOADFLAGS = 0x211
_RAMDISK = 0x218  # u32 ramdisk_image, u32 ramdisk_size
_CMD_LINE_PTR = 0x228
_INITRD_ADDR_MAX = 0x22C  # u32 initrd_addr_max, u32 kernel_alignment
_SETUP_DATA = 0x250
_SETUP_HEADER_END = 0x290  # the next member; a longer header in the file is cut off here
_E820_TABLE = 0x2D0
_E820_MAX = 128

_BOOT_FLAG_MAGIC = 0xAA55
_HEADER_MAGIC = b"HdrS"
_PROTOCOL_VERSION = 0x020C  # the first with a 64-bit entry
_LOADER_UNDEFINED = 0xFF
_LOADED_HIGH = 0x01

# struct boot_e820_entry { __u64 addr; __u64 size; __u32 type; } __attribute__((packed));
_E820 = struct.Struct("<QQI")
assert _E820.size == 20

_GDT = (
    0,
    0,
    0x00AF_9B00_0000_FFFF,  # selector 10: 64-bit code
    0x00CF_9300_0000_FFFF,  # selector 18: data
)
GDT_LIMIT = 8 * len(_GDT) - 1
IDT_LIMIT = 7  # one empty entry
CODE_SELECTOR = 0x10
DATA_SELECTOR = 0x18

_TABLE_ENTRY = 0x03  # present, writable
_LARGE_PAGE = 0x83  # present, writable, 2 MiB


def command_line(text: str, limit: int) -> bytes:
    """The kernel command line with its terminator, as it goes to layout.COMMAND_LINE.

    `limit` is the longest line that the kernel reads, without the terminator.
    Raises: ConfigError when it is longer: a cut line would boot another machine than the one asked for.
    """
    data = text.encode("utf-8", "surrogateescape")
    limit = min(limit, layout.COMMAND_LINE_END - layout.COMMAND_LINE - 1)
    if len(data) > limit:
        raise ConfigError(f"the kernel command line is {len(data)} bytes long with what the machine adds, "
                          f"and this kernel reads {limit}", option="-append")
    if 0 in data:
        raise ConfigError("the kernel command line contains a zero byte", option="-append")
    return data + b"\0"


def zero_page(setup_header: bytes, e820: list[tuple[int, int, int]], initrd: tuple[int, int] = (0, 0), rsdp: int = 0,
              initrd_addr_max: int = layout.INITRD_LIMIT) -> bytearray:
    """struct boot_params, to be written to layout.ZERO_PAGE.

    `setup_header` is what the bzImage has from offset 1F1 on, or empty for other kernels, which get a fresh one; `initrd` is
    (address, size); `rsdp` the address of the ACPI root pointer, 0 for none.
    """
    page = bytearray(ZERO_PAGE_SIZE)
    pack_into = struct.pack_into
    if setup_header:
        header = setup_header[: _SETUP_HEADER_END - _SETUP_HEADER]
        page[_SETUP_HEADER : _SETUP_HEADER + len(header)] = header
        pack_into("<Q", page, _SETUP_DATA, 0)
    else:
        pack_into("<H", page, _BOOT_FLAG, _BOOT_FLAG_MAGIC)
        pack_into("<4sH", page, _HEADER, _HEADER_MAGIC, _PROTOCOL_VERSION)
        page[_LOADFLAGS] = _LOADED_HIGH
        pack_into("<II", page, _INITRD_ADDR_MAX, initrd_addr_max, 2 * layout.MIB)
    page[_TYPE_OF_LOADER] = _LOADER_UNDEFINED
    pack_into("<II", page, _RAMDISK, *initrd)
    pack_into("<I", page, _CMD_LINE_PTR, layout.COMMAND_LINE)
    pack_into("<Q", page, _ACPI_RSDP_ADDR, rsdp)
    if len(e820) > _E820_MAX:
        raise ValueError(f"{len(e820)} e820 entries: the zero page holds {_E820_MAX}")
    page[_E820_ENTRIES] = len(e820)
    offset = _E820_TABLE
    for entry in e820:
        _E820.pack_into(page, offset, *entry)
        offset += _E820.size
    return page


def descriptor_tables() -> list[Piece]:
    """The GDT; the IDT at layout.IDT is one empty entry, which zeroed RAM holds already."""
    return [(layout.GDT, struct.pack("<4Q", *_GDT))]


def page_tables() -> list[Piece]:
    """Identity map of the first GiB: one entry in each upper table, 512 pages of 2 MiB."""
    return [
        (layout.PML4, struct.pack("<Q", layout.PDPT | _TABLE_ENTRY)),
        (layout.PDPT, struct.pack("<Q", layout.PAGE_DIRECTORY | _TABLE_ENTRY)),
        (layout.PAGE_DIRECTORY, struct.pack("<512Q", *range(_LARGE_PAGE, layout.IDENTITY_MAPPED, 2 * layout.MIB))),
    ]
