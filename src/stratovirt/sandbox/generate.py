"""Makes `tables_x86_64.py` and `tables_aarch64.py`: the filters of `rules.py` as bytes, and the assembled handlers of SIGSYS.

    python -m stratovirt.sandbox.generate

A handler needs GNU as and objcopy for its architecture (binutils, binutils-aarch64-linux-gnu); without them it stays as it
is. A test holds the files to their sources.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import textwrap
from importlib import import_module
from pathlib import Path

from stratovirt.sandbox import KINDS
from stratovirt.sandbox.bpf import compile_filter
from stratovirt.sandbox.calls import by_number, numbers
from stratovirt.sandbox.rules import rules_of

ARCHITECTURES = ("x86_64", "aarch64")
HERE = Path(__file__).parent
_WIDTH = 120


def file_of(architecture: str) -> Path:
    return HERE / f"tables_{architecture}.py"


def filters(architecture: str) -> tuple[bytes, ...]:
    return tuple(compile_filter(rules_of(kind, architecture), numbers(architecture), kind, architecture) for kind in KINDS)


def _tool(name: str, architecture: str) -> str:
    """The path of that architecture's GNU as or objcopy, "" when there is none here."""
    native = os.uname().machine == architecture
    return shutil.which(name if native else f"{architecture}-linux-gnu-{name}") or ""


def can_assemble(architecture: str) -> bool:
    return bool(_tool("as", architecture) and _tool("objcopy", architecture))


def assemble(architecture: str) -> bytes:
    """The bytes of handler_*.S."""
    with tempfile.TemporaryDirectory() as folder:
        object_file, binary = Path(folder) / "handler.o", Path(folder) / "handler.bin"
        subprocess.run([_tool("as", architecture), "-o", object_file, HERE / f"handler_{architecture}.S"], check=True)
        subprocess.run([_tool("objcopy", architecture), "-O", "binary", "-j", ".text", object_file, binary], check=True)
        return binary.read_bytes()


def text_of(architecture: str, programs: tuple[bytes, ...], handler: bytes) -> str:
    """The file's text."""
    return f'''"""Filters and handler as bytes, for {architecture}. By `python -m stratovirt.sandbox.generate`: do not edit.

    FILTERS    programs of classic BPF, by kind of thread, from rules.py
    HANDLER    machine code, from handler_{architecture}.S
    CALL_NAMES names of system calls by number, with a space between two
"""

from __future__ import annotations

FILTERS = tuple(map(bytes.fromhex, (
{"".join(_quoted(program) for program in programs)})))

HANDLER = bytes.fromhex(
{_quoted(handler).rstrip().removesuffix(",")}
)

CALL_NAMES = (
{_in_lines(" ".join(by_number(architecture)))}
)
'''


def _quoted(data: bytes) -> str:
    lines = textwrap.wrap(data.hex(), _WIDTH)
    return "".join(f'    "{line}"\n' for line in lines).rstrip() + ",\n"


def _in_lines(text: str) -> str:
    return "\n".join(f'    "{text[at : at + _WIDTH]}"' for at in range(0, len(text), _WIDTH))


def main() -> None:
    for architecture in ARCHITECTURES:
        if can_assemble(architecture):
            handler = assemble(architecture)
        else:
            handler = import_module(f"stratovirt.sandbox.tables_{architecture}").HANDLER
        file_of(architecture).write_text(text_of(architecture, filters(architecture), handler), encoding="utf-8")


if __name__ == "__main__":
    main()
