"""Takes the ELF kernel out of a bzImage.

Spec: Linux Documentation/x86/boot.rst, fields `setup_sects`, `payload_offset`, `payload_length` of the setup header.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import subprocess
import zlib

# magic bytes of the payload, name
_FORMATS = (
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"BZh", "bzip2"),
    (b"\x5d\x00\x00", "lzma"),
    (b"\x02\x21\x4c\x18", "lz4"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
)


def payload(image: bytes) -> bytes:
    """The compressed kernel inside a bzImage. ValueError when `image` is not one."""
    if image[0x202:0x206] != b"HdrS":
        raise ValueError("not a bzImage: the setup header's magic is missing")
    (version,) = struct.unpack_from("<H", image, 0x206)
    if version < 0x208:
        raise ValueError(f"boot protocol {version >> 8}.{version & 255:02d} does not say where the payload is")
    sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (sectors + 1) * 512 + offset
    if start + length > len(image):
        raise ValueError("the payload ends after the end of the file")
    return image[start : start + length]


def extract_elf(image: bytes) -> bytes:
    """The kernel's ELF image. ValueError when the payload's format is unknown or its content is not ELF."""
    packed = payload(image)
    for magic, name in _FORMATS:
        if packed.startswith(magic):
            elf = _decompress(name, packed)
            break
    else:
        raise ValueError(f"unknown kernel compression, magic {packed[:6].hex()}")
    if not elf.startswith(b"\x7fELF"):
        raise ValueError("the decompressed payload is not ELF")
    return elf


def _decompress(name: str, packed: bytes) -> bytes:
    # The kernel's build appends the uncompressed size (4 bytes) to formats that lack it: what follows the stream is
    # ignored, except by lz4, whose legacy format would take the size for the next block's.
    if name == "gzip":
        return zlib.decompressobj(wbits=31).decompress(packed)
    if name == "bzip2":
        return bz2.BZ2Decompressor().decompress(packed)
    if name in ("xz", "lzma"):
        return lzma.LZMADecompressor().decompress(packed)
    body = packed[:-4]
    return subprocess.run([name, "-d", "-c", "-q"], input=body, stdout=subprocess.PIPE, check=True).stdout
