"""The bundle of modules: it is used when it fits, and never when a source is another."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stratovirt.bundle_writer import _Slim

SOURCE = Path(__file__).resolve().parents[2] / "src" / "stratovirt"

# What a start does, in short: modules come through the bundle, which is refreshed afterwards.
START = """if 1:
    import sys
    sys.path.insert(0, sys.argv[1])
    import stratovirt
    from stratovirt import bundle
    bundle.install()
    import stratovirt.errors, stratovirt.machine.lifecycle
    print(*sorted(name for name, module in sys.modules.items()
                  if name.startswith("stratovirt.") and type(module.__loader__) is bundle.Bundle))
    print(stratovirt.errors.HostError("it", 2), stratovirt.errors.__file__, stratovirt.errors.__cached__)
    bundle.refresh()
"""


class Copy:
    """A copy of the package, to write bundles in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(SOURCE, folder / "stratovirt", ignore=shutil.ignore_patterns("__pycache__"))

    def start(self, *flags: str) -> tuple[set[str], str]:
        """Which modules came out of the bundle, and a line of what they do."""
        done = subprocess.run([sys.executable, "-IS", *flags, "-c", START, str(self.folder)], capture_output=True, text=True,
                              timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        names, line = done.stdout.splitlines()
        return set(names.split()), line

    @property
    def bundle(self) -> Path:
        (path,) = (self.folder / "stratovirt" / "__pycache__").glob("start.*.bundle")
        return path


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def test_the_second_start_uses_it(copy: Copy) -> None:
    first, said = copy.start()
    assert first == set()
    written = copy.bundle.stat()
    second, again = copy.start()
    assert {"stratovirt.errors", "stratovirt.machine", "stratovirt.machine.lifecycle"} <= second
    assert again == said
    assert said.startswith("it: No such file or directory ")
    after = copy.bundle.stat()
    assert (after.st_ino, after.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)


def test_a_source_that_was_changed_is_imported_anew(copy: Copy) -> None:
    copy.start()
    source = copy.folder / "stratovirt" / "errors.py"
    source.write_text(source.read_text() + "\nHostError.__str__ = lambda self: 'new'\n")
    names, said = copy.start()
    assert "stratovirt.errors" not in names
    assert "stratovirt.machine.lifecycle" in names
    assert said.startswith("new ")
    names, said = copy.start()
    assert "stratovirt.errors" in names
    assert said.startswith("new ")


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:7], lambda data: data[:100], lambda data: data[:-1],
    lambda data: b"\xff" * 8 + data[8:], lambda data: b"not at all", lambda data: data[:8] + b"z" + data[9:],
])
def test_a_damaged_file_is_not_used_and_is_replaced(copy: Copy, damage) -> None:
    _, said = copy.start()
    whole = copy.bundle.read_bytes()
    copy.bundle.write_bytes(damage(whole))
    assert copy.start() == (set(), said)
    assert copy.bundle.read_bytes() == whole


def test_what_a_killed_writer_has_left_goes_with_the_next_start(copy: Copy) -> None:
    copy.start()
    path = copy.bundle
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    left, others = path.with_name(f"{path.name}.{gone.pid}"), path.with_name(f"{path.name}.{os.getpid()}")
    for file in (left, others):
        file.write_bytes(b"half of it")
    path.write_bytes(b"")
    copy.start()
    assert not left.exists()
    assert others.exists(), "its writer lives"


def test_a_bundle_of_another_place_is_not_used(copy: Copy, tmp_path: Path) -> None:
    copy.start()
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copytree(copy.folder / "stratovirt", moved / "stratovirt", copy_function=shutil.copy2)
    copy.folder = moved
    names, said = copy.start()
    assert names == set()
    assert str(moved) in said


def test_nothing_is_written_where_bytecode_is_not_wanted(copy: Copy) -> None:
    copy.start("-B")
    assert not list(copy.folder.rglob("*.bundle*"))


def test_something_else_in_its_place(copy: Copy) -> None:
    copy.start()
    path = copy.bundle
    path.unlink()
    path.mkdir()
    assert copy.start()[0] == set()
    assert [name for name in os.listdir(path.parent) if name.endswith(tuple("0123456789"))] == []


def test_what_is_taken_out() -> None:
    text = '''"""Module."""
import sys
TYPE_CHECKING = False
if TYPE_CHECKING:
    import typing
else:
    import os
class A(Exception):
    """Only this."""
class B:
    """Class."""
    x: int
    y: int = 3
    def f(self, a: int, *b: str, c: "B" = None, **d: float) -> None:
        """Function."""
        z: int = a
        return z
def g() -> None: "Only this."
'''
    tree = _Slim().visit(ast.parse(text))
    code = compile(tree, "x", "exec")
    space: dict[str, object] = {}
    exec(code, space)
    assert "typing" not in space
    assert "os" in space
    made = space["B"]
    assert isinstance(made, type)
    assert (made.__doc__, made.y, made().f(5)) == (None, 3, 5)  # type: ignore[attr-defined]
    assert made.f.__annotations__ == {}  # type: ignore[attr-defined]
    assert made.f.__code__.co_firstlineno == 14  # type: ignore[attr-defined]


def test_every_module_still_compiles() -> None:
    for path in SOURCE.rglob("*.py"):
        compile(_Slim().visit(ast.parse(path.read_text(), str(path))), str(path), "exec")


def test_a_module_that_another_version_had_is_forgotten(copy: Copy) -> None:
    package = copy.folder / "stratovirt"
    errors = (package / "errors.py").read_text()
    (package / "extra.py").write_text("HERE = True\n")
    (package / "errors.py").write_text(f"{errors}\nimport stratovirt.extra\n")
    copy.start()
    assert b"stratovirt.extra" in copy.bundle.read_bytes()
    (package / "extra.py").unlink()
    (package / "errors.py").write_text(errors)
    copy.start()
    assert b"stratovirt.extra" not in copy.bundle.read_bytes()
