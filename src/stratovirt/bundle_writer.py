"""Writes the file that `bundle.py` reads. Only after a start that it did not fit.

What goes there is compiled without what only people and type checkers read: docstrings, annotations and what is imported for
them. That is a third of what a start would have to load, and lines keep their numbers.
"""

from __future__ import annotations

import ast
import marshal
import os
import sys

from stratovirt import bundle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.bundle import Bundle, Entry

# Of the standard library: what a start needs and is neither frozen nor part of the interpreter.
_EXTRA = ("struct",)


def write(target: Bundle) -> None:
    """Put into the file what this process has imported, and what is in it already; or nothing, if there is no right to."""
    folder = os.path.dirname(target.path)
    if not os.access(folder, os.W_OK):
        return
    index: dict[str, Entry] = {}
    parts: list[bytes | memoryview] = []
    length = 0
    for name in sorted({*target.index, *(name for name in sys.modules if name.startswith("stratovirt.")), *_EXTRA}):
        found = _module(name, target)
        if found is not None:
            entry, code = found
            index[name] = (*entry, length, len(code))
            parts.append(code)
            length += len(code)
    if index == target.index:
        return
    head = marshal.dumps((target.tag, length, index))
    temporary = f"{target.path}.{os.getpid()}"
    _remove_left(folder, os.path.basename(target.path) + ".")
    try:
        with open(temporary, "xb") as file:
            file.write(len(head).to_bytes(bundle.HEADER, "little") + head + b"".join(parts))
        os.replace(temporary, target.path)
    except OSError:
        # As with Python's own files: a full disk costs the next start some milliseconds, and this one nothing.
        if os.path.exists(temporary):
            os.unlink(temporary)


def _remove_left(folder: str, prefix: str) -> None:
    """What writers have left that were killed: the number at the end is a process that is no more."""
    for name in os.listdir(folder):
        number = name.removeprefix(prefix)
        if number != name and number.isdigit() and not os.path.exists(f"/proc/{number}"):
            try:
                os.unlink(os.path.join(folder, name))
            except OSError:
                continue  # another writer was quicker


def _kept(name: str, target: Bundle) -> tuple[tuple[str, str, bool, int, int], bytes | memoryview] | None:
    """What the bundle has of a module that this process did not need; None when its file has changed, or is no more: the bundle
    may be another version's.
    """
    source, compiled, is_package, time, size, _, _ = target.index[name]
    try:
        status = os.stat(source)
    except OSError:
        return None
    if (int(status.st_mtime), status.st_size) != (time, size):
        return None
    return (source, compiled, is_package, time, size), target.marshalled(name)


def _module(name: str, target: Bundle) -> tuple[tuple[str, str, bool, int, int], bytes | memoryview] | None:
    """(source, compiled file, is a package, time, size) of a module, and its code; None when it is not, or not such, a file."""
    module = sys.modules.get(name)
    if module is None and name not in _EXTRA:
        return _kept(name, target)
    if module is None:
        __import__(name)
        module = sys.modules[name]
    source = module.__file__
    if name == "stratovirt.__main__" or source is None or not source.startswith("/") or not source.endswith(".py"):
        return None
    try:
        status = os.stat(source)
        compiled = sys.modules["_frozen_importlib_external"].cache_from_source(source)
        entry = source, compiled, hasattr(module, "__path__"), int(status.st_mtime), status.st_size
        if target.index.get(name, ())[:5] == entry:
            return entry, target.marshalled(name)
        with open(source, "rb") as file:
            tree = _Slim().visit(ast.parse(file.read(), source))
        return entry, marshal.dumps(compile(tree, source, "exec", dont_inherit=True))
    except (OSError, SyntaxError, ValueError):
        return None  # it is being edited, or has gone


class _Slim(ast.NodeTransformer):
    """Takes out docstrings, annotations with the statement that says how to read them, and what stands under
    `if TYPE_CHECKING`.
    """

    def _body(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        body: list[ast.stmt] = node.body  # type: ignore[attr-defined]
        first = body[0] if body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            del body[0]
        if not body and not isinstance(node, ast.Module):
            at = first or node
            body.append(ast.Pass(lineno=at.lineno, col_offset=0, end_lineno=at.lineno, end_col_offset=0))  # type: ignore[attr-defined]
        return node

    visit_Module = visit_ClassDef = _body

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        for argument in every:
            if argument is not None:
                argument.annotation = None
        return self._body(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        # Without annotations it changes nothing but the flags of the code, and imports a module for it.
        return ast.copy_location(ast.Pass(), node) if node.module == "__future__" else node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is None:
            return ast.copy_location(ast.Pass(), node)
        return ast.copy_location(ast.Assign(targets=[node.target], value=self.visit(node.value)), node)

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return node.orelse or ast.copy_location(ast.Pass(), node)
        return node
