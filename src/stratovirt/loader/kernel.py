"""Which kernel is it: the one way from a file's bytes to a KernelImage."""

from __future__ import annotations

from stratovirt.loader.image import KernelImage, Segment, refuse

FLAT_ADDRESS = 0x100_0000


def identify_kernel(view: memoryview, path: str) -> KernelImage:
    """The kernel in `view`, the whole file as bytes; `path` is for messages.

    A file that nothing recognizes is a flat binary: loaded and entered at 16 MiB.
    Raises: ConfigError when it is recognizably something else, or damaged; it says what it is.
    """
    if len(view) == 0:
        raise refuse(path, "the file is empty")
    if bytes(view[:4]) == b"\x7fELF":
        from stratovirt.loader import elf

        return elf.parse(view, path)
    if bytes(view[0x202:0x206]) == b"HdrS":
        from stratovirt.loader import bzimage

        return bzimage.parse(view, path)
    from stratovirt.loader.foreign import what_is

    found = what_is(view)
    if found is not None:
        raise refuse(path, f"this is {found}")
    return KernelImage(path, "flat", "linux64", [Segment(0, len(view), FLAT_ADDRESS, len(view))], FLAT_ADDRESS)
