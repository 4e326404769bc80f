"""The kinds of guest memory, as the command line names them; PATH stands for a directory of the test's."""

from __future__ import annotations

from pathlib import Path

KINDS = {
    "anonymous": (),
    "mem-share": ("-machine", "microvm,mem-share=on"),
    "prealloc": ("-mem-prealloc", "-smp", "2"),
    "directory": ("-mem-path", "PATH"),
    "directory, shared": ("-mem-path", "PATH", "-machine", "microvm,mem-share=on", "-mem-prealloc"),
    "file": ("-mem-path", "PATH/memory"),
    "ram object": ("-object", "memory-backend-ram,id=m,size=128M", "-machine", "microvm,memory-backend=m"),
    "memfd object": ("-object", "memory-backend-memfd,id=m,size=128M", "-machine", "microvm,memory-backend=m"),
    "file object": ("-object", "memory-backend-file,id=m,size=128M,mem-path=PATH/memory",
                    "-machine", "microvm,memory-backend=m"),
}


def arguments(kind: str, directory: Path) -> list[str]:
    return [word.replace("PATH", str(directory)) for word in KINDS[kind]]
