"""A program of this machine for a guest: an archive with it and the libraries it needs, to be appended to an initramfs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from guest.cpio import Archive


def libraries(program: Path) -> list[Path]:
    """What the dynamic linker would load for it, itself included."""
    listing = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout
    return [Path(word) for word in listing.split() if word.startswith("/")]


def archive(name: str) -> bytes:
    """The program as /bin/NAME, its libraries in a directory of their own. Raises: FileNotFoundError when there is none."""
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed")
    program, folder = Path(found), f"opt/{name}"
    contents = Archive()
    contents.file(f"{folder}/{name}", program.read_bytes(), 0o755)
    linker = ""
    for library in libraries(program):
        contents.file(f"{folder}/{library.name}", library.read_bytes(), 0o755)
        linker = library.name if library.name.startswith("ld-") else linker
    start = f'#!/bin/sh\nexec /{folder}/{linker} --library-path /{folder} /{folder}/{name} "$@"\n'
    contents.file(f"bin/{name}", start.encode(), 0o755)
    return contents.finish()
