"""The cache of built assets: one directory per entry, named after a hash of everything the entry was made from.

An entry is built in a temporary directory and renamed into place, under a lock of its own: it is complete or absent, and
two processes that want it at once build it once. Nothing that is in the cache needs the network.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path


def root() -> Path:
    """The cache directory: `$STRATOVIRT_CACHE`, else `stratovirt` under `$XDG_CACHE_HOME` or `~/.cache`."""
    own = os.environ.get("STRATOVIRT_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "stratovirt"


def say(text: str) -> None:
    """One line of progress, on stderr: stdout belongs to the command that the user asked for."""
    print(f"stratovirt: {text}", file=sys.stderr, flush=True)


def digest(inputs: Mapping[str, str | bytes]) -> str:
    """A short name for a set of inputs; the order does not matter, every name and every byte does."""
    total = hashlib.sha256()
    for name in sorted(inputs):
        value = inputs[name]
        data = value.encode() if isinstance(value, str) else value
        total.update(f"{name}\0{len(data)}\0".encode() + data)
    return total.hexdigest()[:16]


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock of one name, machine-wide for this cache; the kernel drops it when the process ends."""
    folder = root() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "a", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def entry(name: str, inputs: Mapping[str, str | bytes], build: Callable[[Path], None], what: str = "") -> Path:
    """The directory of one entry, built now if it is not there.

    `build` gets an empty directory to fill; `what` is said on stderr before it starts. An exception in `build` leaves
    nothing behind.
    """
    target = root() / f"{name}-{digest(inputs)}"
    if target.is_dir():
        return target
    with locked(target.name):
        if target.is_dir():
            return target
        if what:
            say(what)
        started = time.monotonic()
        partial = root() / f"partial.{target.name}.{os.getpid()}"
        _remove(partial)
        partial.mkdir(parents=True)
        try:
            build(partial)
            partial.rename(target)
        finally:
            _remove(partial)
        if what:
            say(f"{name} is ready after {time.monotonic() - started:.0f} s")
    return target


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file so that a reader sees the old or the new content, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
