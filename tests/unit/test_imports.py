"""Imports point downwards only, devices know nothing of KVM, and the boot path pays for no module it does not need."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "stratovirt"

# From the top down. A part may import from the rows below its own, and from itself; the package itself holds no code.
LAYERS = (
    ("__main__", "launcher", "process", "lockdown"),
    ("cli",),
    ("control",),
    ("machine",),
    ("virtio", "devices"),
    ("backends", "vhost"),
    ("loader", "firmware", "arch", "hypervisor", "snapshot"),
    ("memory", "address_map", "loop", "iothread", "hostmap", "barrier", "sandbox", "sparse"),
    ("log",),
    ("config",),
    ("errors", "bundle", "bundle_writer", "native"),
)
RANK = {part: len(LAYERS) - number for number, parts in enumerate(LAYERS) for part in parts}
# Neighbours on one row that may know each other: RAM is made of host mappings.
NEIGHBOURS = {
    ("memory", "hostmap"),
    ("barrier", "hostmap"),
    ("iothread", "loop"),
    ("memory", "address_map"),
    ("loader", "arch"),
    ("firmware", "arch"),
    ("__main__", "process"),
    ("__main__", "launcher"),
    ("launcher", "__main__"),
    ("bundle_writer", "bundle"),
    ("bundle", "bundle_writer"),
    ("launcher", "process"),
    ("launcher", "lockdown"),
    ("__main__", "lockdown"),
    ("iothread", "sandbox"),
    ("sandbox", "hostmap"),
}

# Bytes and numbers only: no module of the operating system.
PURE = ("arch", "firmware")
SYSTEM_MODULES = {
    "os",
    "mmap",
    "fcntl",
    "select",
    "socket",
    "_socket",
    "signal",
    "_signal",
    "subprocess",
    "threading",
    "_thread",
    "ctypes",
}

# What a process must not import before its guest runs, and why nobody should think it is free: 4 to 50 ms each.
SLOW_MODULES = {
    "argparse",
    "asyncio",
    "collections",
    "ctypes",
    "dataclasses",
    "enum",
    "functools",
    "inspect",
    "json",
    "logging",
    "pathlib",
    "re",
    "signal",
    "socket",
    "subprocess",
    "tempfile",
    "threading",
    "typing",
}
# Imported only once the guest runs, or by subcommands that start no guest.
OFF_BOOT_PATH = (
    "stratovirt.control",
    "stratovirt.bundle_writer",
    "stratovirt.launcher.warm",
    "stratovirt.launcher.asking",
    "stratovirt.launcher.clone",
    "stratovirt.launcher.clone_command",
    "stratovirt.launcher.identity",
    "stratovirt.launcher.server",
    "stratovirt.launcher.template",
    "stratovirt.launcher.template_command",
    "stratovirt.launcher.templates",
    "stratovirt.machine.clone",
    "stratovirt.cli.doctor",
    "stratovirt.cli.run",
    "stratovirt.cli.guest_console",
    "stratovirt.cli.help",
    "stratovirt.cli.reference",
    "stratovirt.cli.qmp_client",
    "stratovirt.cli.snapshot",
    "stratovirt.snapshot",
    "stratovirt.sandbox.generate",
    "stratovirt.sandbox.report",
)

MODULES = sorted(SOURCE.rglob("*.py"))


class Import:
    """One imported module, with where it stands: at module level (paid at import time) or for the type checker alone."""

    def __init__(self, name: str, line: int, at_import: bool, typing_only: bool) -> None:
        self.name = name
        self.line = line
        self.at_import = at_import
        self.typing_only = typing_only


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST, package: str) -> Iterator[Import]:
    yield from _walk(tree, package, at_import=True, typing_only=False)


def _walk(node: ast.AST, package: str, *, at_import: bool, typing_only: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, node.lineno, at_import, typing_only)
        return
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, base]).rstrip(".")
        # `from stratovirt import log` imports stratovirt.log; `from stratovirt.log import x` imports stratovirt.log
        for alias in node.names:
            deeper = f"{base}.{alias.name}"
            yield Import(deeper if is_module(deeper) else base, node.lineno, at_import, typing_only)
        return
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        for child in node.body:
            yield from _walk(child, package, at_import=at_import, typing_only=True)
        for child in node.orelse:
            yield from _walk(child, package, at_import=at_import, typing_only=typing_only)
        return
    inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, package, at_import=at_import and not inside, typing_only=typing_only)


def is_module(name: str) -> bool:
    path = SOURCE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def part_of(name: str) -> str:
    """The part of the package a module belongs to: `stratovirt.virtio.block` → `virtio`; "" for the package itself."""
    return name.split(".")[1] if "." in name else ""


def load(path: Path) -> list[Import]:
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    return list(imports_of(ast.parse(path.read_text(encoding="utf-8"), str(path)), package))


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_downwards(path: Path) -> None:
    own = part_of(module_name(path))
    if not own:
        return
    assert own in RANK, f"{module_name(path)} is in no layer: give it a row in LAYERS"
    for found in load(path):
        if not found.name.startswith("stratovirt."):
            continue
        other = part_of(found.name)
        assert other in RANK, f"{path}:{found.line}: {found.name} is in no layer"
        allowed = RANK[other] < RANK[own] or other == own or (own, other) in NEIGHBOURS
        assert allowed, f"{path}:{found.line}: {own} must not import {found.name}: imports point downwards only"


@pytest.mark.parametrize("path", [path for path in MODULES if part_of(module_name(path)) in PURE], ids=module_name)
def test_pure_parts_import_no_system_module(path: Path) -> None:
    for found in load(path):
        if not found.typing_only:
            assert found.name.split(".")[0] not in SYSTEM_MODULES, f"{path}:{found.line}: {found.name} in a pure part"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_boot_modules_import_nothing_slow(path: Path) -> None:
    name = module_name(path)
    if name.startswith(OFF_BOOT_PATH):
        return
    for found in load(path):
        if found.at_import and not found.typing_only:
            assert found.name.split(".")[0] not in SLOW_MODULES, f"{path}:{found.line}: {found.name} on the boot path"


def test_the_checks_see_every_form_of_import() -> None:
    text = """
from __future__ import annotations
import json
from stratovirt import log
from ..machine import events
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any
class A:
    import re
    def f(self):
        import asyncio
if True:
    import enum
"""
    found = {(one.name, one.at_import, one.typing_only) for one in imports_of(ast.parse(text), "stratovirt.virtio")}
    assert {("json", True, False), ("re", True, False), ("enum", True, False), ("asyncio", False, False)} <= found
    assert ("typing", True, True) in found
    assert any(name.startswith("stratovirt.machine") for name, _, _ in found)
