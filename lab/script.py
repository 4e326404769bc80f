"""A shell without a terminal does what any shell does: it runs what comes on its standard input."""

from __future__ import annotations

import sys

MAX_SCRIPT = 64 << 10  # it travels in an argument of a command, of which Linux takes 128 KiB


def standard_input(program: str) -> str:
    """Standard input as a shell script; an empty one does nothing. Ends the program when it is no script."""
    data = sys.stdin.buffer.read(MAX_SCRIPT + 1)
    where = f"{program}: standard input, which is run as a shell script where there is no terminal,"
    if len(data) > MAX_SCRIPT:
        sys.exit(f"{where} has more than {MAX_SCRIPT >> 10} KiB")
    try:
        script = data.decode()
    except UnicodeDecodeError:
        sys.exit(f"{where} is not UTF-8 text")
    if "\0" in script:
        sys.exit(f"{where} has a NUL byte")
    return script or ":"
