"""Makes `tables.py`: the filters of `rules.py` as bytes, and the assembled handler of SIGSYS.

    python -m stratovirt.sandbox.generate

The handler needs GNU as and objcopy (binutils); without them it stays as it is. A test holds the file to its sources.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import textwrap
from pathlib import Path

from stratovirt.sandbox import KINDS, tables
from stratovirt.sandbox.bpf import compile_filter
from stratovirt.sandbox.calls import by_number, numbers
from stratovirt.sandbox.rules import rules_of

HERE = Path(__file__).parent
_WIDTH = 120


def filters() -> tuple[bytes, ...]:
    return tuple(compile_filter(rules_of(kind), numbers(), kind) for kind in KINDS)


def can_assemble() -> bool:
    return shutil.which("as") is not None and shutil.which("objcopy") is not None


def assemble() -> bytes:
    """The bytes of handler_x86_64.S."""
    with tempfile.TemporaryDirectory() as folder:
        object_file, binary = Path(folder) / "handler.o", Path(folder) / "handler.bin"
        subprocess.run(["as", "--64", "-o", object_file, HERE / "handler_x86_64.S"], check=True)
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", object_file, binary], check=True)
        return binary.read_bytes()


def text_of(programs: tuple[bytes, ...], handler: bytes) -> str:
    """The file's text."""
    return f'''"""Filters and handler as bytes, for x86_64. Made by `python -m stratovirt.sandbox.generate`: do not edit.

    FILTERS    programs of classic BPF, by kind of thread, from rules.py
    HANDLER    machine code, from handler_x86_64.S
    CALL_NAMES names of system calls by number, with a space between two
"""

from __future__ import annotations

FILTERS = tuple(map(bytes.fromhex, (
{"".join(_quoted(program) for program in programs)})))

HANDLER = bytes.fromhex(
{_quoted(handler).rstrip().removesuffix(",")}
)

CALL_NAMES = (
{_in_lines(" ".join(by_number()))}
)
'''


def _quoted(data: bytes) -> str:
    lines = textwrap.wrap(data.hex(), _WIDTH)
    return "".join(f'    "{line}"\n' for line in lines).rstrip() + ",\n"


def _in_lines(text: str) -> str:
    return "\n".join(f'    "{text[at : at + _WIDTH]}"' for at in range(0, len(text), _WIDTH))


def main() -> None:
    handler = assemble() if can_assemble() else tables.HANDLER
    (HERE / "tables.py").write_text(text_of(filters(), handler), encoding="utf-8")


if __name__ == "__main__":
    main()
