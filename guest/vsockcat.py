"""Builds vsockcat, a static program that guests talk over vsock with: a disk image that is the executable."""

from __future__ import annotations

import subprocess
from pathlib import Path

from guest import cache

SOURCE = Path(__file__).with_suffix(".c")
SECTOR = 512


def disk(compiler: str = "gcc") -> Path:
    """The executable, padded to whole sectors: given to a guest as a disk, `cp /dev/vda /tmp/vsockcat` makes it a program."""

    def build(target: Path) -> None:
        program = target / "vsockcat"
        subprocess.run([compiler, "-static", "-Os", "-s", "-Wall", "-Werror", "-o", str(program), str(SOURCE)], check=True)
        with open(program, "ab") as file:
            file.write(bytes(-file.tell() % SECTOR))

    return (
        cache.entry("vsockcat", {"source": SOURCE.read_bytes(), "recipe": "1" + compiler.removesuffix("gcc")}, build)
        / "vsockcat"
    )
