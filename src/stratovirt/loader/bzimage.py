"""bzImage: the compressed Linux kernel behind its setup header.

The file is a real-mode part of setup_sects + 1 sectors, of which only the header matters here, and the protected-mode
part, which is loaded at code32_start and unpacks the kernel to pref_address. It is entered 200h bytes in, in long mode.
Spec: Linux, Documentation/arch/x86/boot.rst.
"""

from __future__ import annotations

import struct

from stratovirt.loader.image import COMMAND_LINE_LIMIT, INITRD_LIMIT, KernelImage, Segment, refuse

_SIGNATURE_OFFSET = 0x202  # "HdrS"

# struct setup_header {                                -- at 1F1 in the file; fields up to the version of the protocol
#     __u8 setup_sects; __u16 root_flags; __u32 syssize; __u16 ram_size; __u16 vid_mode; __u16 root_dev;
#     __u16 boot_flag; __u16 jump; __u32 header; __u16 version; __u32 realmode_swtch; __u16 start_sys_seg;
#     __u16 kernel_version; __u8 type_of_loader; __u8 loadflags; __u16 setup_move_size; __u32 code32_start;
#     __u32 ramdisk_image; __u32 ramdisk_size; __u32 bootsect_kludge; __u16 heap_end_ptr; __u8 ext_loader_ver;
#     __u8 ext_loader_type; __u32 cmd_line_ptr; __u32 initrd_addr_max; __u32 kernel_alignment;
#     __u8 relocatable_kernel; __u8 min_alignment; __u16 xloadflags; __u32 cmdline_size; __u32 hardware_subarch;
#     __u64 hardware_subarch_data; __u32 payload_offset; __u32 payload_length; __u64 setup_data;
#     __u64 pref_address; __u32 init_size; __u32 handover_offset; __u32 kernel_info_offset;
# } __attribute__((packed));
_SETUP_HEADER = struct.Struct("<BHIHHHHH4sHIHHBBHIIIIHBBIIIBBHIIQIIQQIII")
_SETUP_HEADER_OFFSET = 0x1F1
assert _SETUP_HEADER.size == 0x7B

_SECTOR = 512
_PARAGRAPH = 16
_LOADED_HIGH = 0x01
_XLF_KERNEL_64 = 0x01
_MIN_VERSION = 0x202
_VERSION_64 = 0x20C
_ENTRY_64 = 0x200
_HIGH_MEMORY = 0x10_0000


def parse(view: memoryview, path: str) -> KernelImage:
    """The kernel in a bzImage. Raises: ConfigError naming what is wrong with it."""
    size = len(view)
    if size < _SETUP_HEADER_OFFSET + _SETUP_HEADER.size:
        raise refuse(path, "the file is truncated: it ends inside the kernel's setup header")
    (setup_sects, _, syssize, _, _, _, _, _, _, version, _, _, _, _, loadflags, _, code32_start, _, _, _, _, _, _, _,
     initrd_addr_max, kernel_alignment, relocatable, _, xloadflags, cmdline_size, _, _, _, _, _, pref_address, init_size, _,
     _) = _SETUP_HEADER.unpack_from(view, _SETUP_HEADER_OFFSET)
    protocol = f"{version >> 8}.{version & 0xFF:02d}"
    if version < _MIN_VERSION:
        raise refuse(path, f"this kernel is too old: boot protocol {protocol}")
    if not loadflags & _LOADED_HIGH:
        raise refuse(path, "this is a zImage, a 16-bit kernel that is loaded below 1 MiB")
    if version < _VERSION_64:
        raise refuse(path, f"this kernel has no 64-bit entry point: boot protocol {protocol}, 2.12 is needed")
    if not xloadflags & _XLF_KERNEL_64:
        raise refuse(path, "this is a 32-bit kernel: it has no 64-bit entry point")

    start = ((setup_sects or 4) + 1) * _SECTOR
    available = size - start
    wanted = syssize * _PARAGRAPH
    # syssize counts whole paragraphs; behind it a signature may follow.
    if available <= _ENTRY_64 or available + _PARAGRAPH <= wanted:
        raise refuse(path, f"the file is truncated: the kernel in it is {wanted} bytes long, {max(available, 0)} are there")
    length = min(wanted, available) if wanted else available
    if length <= _ENTRY_64:
        raise refuse(path, f"the kernel's setup header says that the kernel is {length} bytes long")

    load = code32_start or _HIGH_MEMORY
    segment = Segment(start, length, load, length)
    header_end = _SIGNATURE_OFFSET + view[_SIGNATURE_OFFSET - 1]  # the jump's displacement is the header's length
    header_end = max(header_end, _SETUP_HEADER_OFFSET + _SETUP_HEADER.size)
    if relocatable:
        # The kernel unpacks itself where it was loaded, rounded up, but never below its preferred address.
        if kernel_alignment == 0 or kernel_alignment & (kernel_alignment - 1):
            raise refuse(path, f"the kernel's setup header has alignment {kernel_alignment:#x}, which is no power of two")
        pref_address = max(pref_address, (load + kernel_alignment - 1) & -kernel_alignment)
    return KernelImage(
        path, "bzimage", "linux64", [segment], load + _ENTRY_64,
        setup_header=bytes(view[_SETUP_HEADER_OFFSET:header_end]),
        init_size=init_size,
        pref_address=pref_address,
        relocatable=bool(relocatable),
        cmdline_size=cmdline_size or COMMAND_LINE_LIMIT,
        initrd_addr_max=initrd_addr_max or INITRD_LIMIT,
    )
