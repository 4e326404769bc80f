"""`stratovirt snapshot show DIR`: what is in a snapshot, one value a line, for people and for `diff`."""

from __future__ import annotations

import os
import sys
import time

from stratovirt.errors import ConfigError
from stratovirt.snapshot import state_file
from stratovirt.snapshot.saved import SnapshotError

_USAGE = "stratovirt snapshot show DIR"
_WIDTH = 64  # of a value, after which it is cut


def main(arguments: list[str]) -> int:
    """Raises: ConfigError."""
    if len(arguments) != 2 or arguments[0] != "show":
        raise ConfigError("this is not how it is used", option="snapshot", value=" ".join(arguments), accepted=_USAGE)
    directory = arguments[1]
    try:
        state = state_file.read(directory)
    except SnapshotError as error:
        raise ConfigError(str(error), option="snapshot show", value=directory, accepted="a directory of a snapshot") from error
    try:
        _show(directory, state)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever reads has seen enough
    return 0


def _show(directory: str, state: dict[str, object]) -> None:
    created = state.get("created")
    if isinstance(created, int) and 0 <= created < 1 << 40:
        print(f"# created {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime(created))}")
    try:
        status = os.stat(os.path.join(directory, state_file.MEMORY))
        print(f"# memory: {status.st_size} bytes, {status.st_blocks * 512} of them on disk")
    except OSError as error:
        print(f"# memory: {os.strerror(error.errno or 0)}")
    for place, value in state_file.fields(state):
        text = value if isinstance(value, str) else ascii(value)
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        cut = f"… ({len(shown) // 2} bytes)" if isinstance(value, str) and len(shown) > _WIDTH else ""
        print(f"{place} = {shown[:_WIDTH] + cut if cut else shown}")
