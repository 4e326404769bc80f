"""The compiled module: it compiles without a warning, is left out where it cannot be, and nothing needs it."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stratovirt import native
from stratovirt.cli import doctor

TREE = Path(__file__).resolve().parents[2]
FOLDER = TREE / "src" / "stratovirt" / "native"


def run(*arguments: str, cwd: Path = TREE, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env={**os.environ, **environment}, capture_output=True,
                          text=True, timeout=120, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The sources, without what was made of them."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(TREE / "src" / "stratovirt", tmp_path / "src" / "stratovirt", ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(TREE / name, tmp_path)
    return tmp_path


def test_it_compiles_without_a_warning_and_says_what_it_has(copy: Path) -> None:
    assert shutil.which("gcc"), "gcc is missing: lab/setup.sh native"
    done = run("setup.py", "-q", "build_ext", "--inplace", cwd=copy, STRATOVIRT_STRICT="1", CFLAGS="-O2")
    assert done.returncode == 0, done.stderr
    said = run("-c", "from stratovirt.native import _native; print(*sorted(n for n in dir(_native) if n[0] != '_'))", cwd=copy,
               PYTHONPATH=str(copy / "src"))
    stub = ast.parse((FOLDER / "_native.pyi").read_text())
    declared = {node.name for node in stub.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert set(said.stdout.split()) == declared | {"INTERFACE"}


def test_without_a_compiler_everything_else_is_installed(copy: Path) -> None:
    done = run("setup.py", "-q", "build_ext", "--inplace", cwd=copy, CC="/bin/false")
    assert done.returncode == 0, done.stderr
    assert not list(copy.rglob("*.so"))
    said = run("-c", "from stratovirt import native; import stratovirt.virtio.queue; print(native.compiled, native.why)",
               cwd=copy, PYTHONPATH=str(copy / "src"))
    assert said.stdout.startswith("None not compiled for this Python: ")


def test_it_can_be_left_out() -> None:
    said = run("-c", "from stratovirt import native; print(native.compiled, native.why)", STRATOVIRT_NATIVE="off")
    assert said.stdout == "None STRATOVIRT_NATIVE=off\n"


def test_one_of_another_version_of_the_program_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.SWITCH, raising=False)
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    module, why = native._load()
    assert module is None
    assert why.startswith(("it was compiled for another version", "not compiled"))


def test_both_sides_have_the_same_number() -> None:
    number = re.search(r"^#define INTERFACE (\d+)$", (FOLDER / "module.c").read_text(), re.MULTILINE)
    assert number is not None
    assert int(number[1]) == native.INTERFACE


def test_a_machine_without_virtqueues_does_not_load_it() -> None:
    said = run("-c", "import sys, stratovirt.cli.command, stratovirt.machine.microvm, stratovirt.lockdown\n"
                     "print([name for name in sys.modules if 'native' in name or name == 'stratovirt.virtio.queue'])")
    assert said.stdout == "[]\n"


def test_the_bundle_does_not_look_for_it(copy: Path) -> None:
    """It has no Python code: a start that imports it does not find the bundle lacking, and the file stays as it is."""
    text = (f"import sys\nsys.path.insert(0, {str(copy / 'src')!r})\nimport stratovirt\nfrom stratovirt import bundle\n"
            "bundle.install()\nimport stratovirt.native\nprint(bundle._installed[0].stale)\nbundle.refresh()")
    assert run("-I", "-c", text).stdout == "True\n"
    assert run("-I", "-c", text).stdout == "False\n"


def test_the_doctor_says_whether_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "compiled", None)
    monkeypatch.setattr(native, "why", "not compiled for this Python: no such module")
    check = doctor._compiled()
    assert (check.status, check.finding.partition(":")[0]) == (doctor.WARNING, "not compiled for this Python")
    assert "python3-dev" in check.advice
    monkeypatch.setattr(native, "why", "STRATOVIRT_NATIVE=off")
    assert doctor._compiled().status == doctor.OK
