"""Writes cpio archives in the "newc" format, the one the kernel unpacks as initramfs.

Archives may be appended to each other: the kernel unpacks one after the other, each padded to 4 bytes.
Spec: Linux Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


class Archive:
    """A cpio archive in memory. Directories above a file are added by themselves; times and owners are all zero."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._seen: set[str] = set()
        self._inode = 1

    def directory(self, path: str, mode: int = 0o755) -> None:
        path = path.strip("/")
        if path and path not in self._seen:
            self._parents(path)
            self._add(path, stat.S_IFDIR | mode, b"", links=2)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        self._parents(path)
        self._add(path, stat.S_IFREG | mode, data)

    def copy(self, path: str, source: Path) -> None:
        """A host file, with its permission bits."""
        self.file(path, source.read_bytes(), stat.S_IMODE(source.stat().st_mode))

    def symlink(self, path: str, target: str) -> None:
        self._parents(path)
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        self._parents(path)
        self._add(path, stat.S_IFCHR | mode, b"", device=(major, minor))

    def finish(self) -> bytes:
        """The whole archive, trailer included, padded to 512 bytes."""
        self._add("TRAILER!!!", 0, b"")
        data = b"".join(self._parts)
        return data + bytes(-len(data) % 512)

    def _parents(self, path: str) -> None:
        above = os.path.dirname(path.strip("/"))
        if above:
            self.directory(above)

    def _add(self, path: str, mode: int, data: bytes, *, links: int = 1, device: tuple[int, int] = (0, 0)) -> None:
        path = path.strip("/")
        self._seen.add(path)
        name = path.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(name), 0)
        self._inode += 1
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + name
        self._parts += [head, bytes(-len(head) % 4), data, bytes(-len(data) % 4)]
