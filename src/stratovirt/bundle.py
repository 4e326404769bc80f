"""The modules of a start in one file, so that importing them costs little more than running them.

The way of the standard import to a module is long: it looks into directories, opens, checks and reads a file for each, and that
is three quarters of the time that a start spends on imports. Here the code of all modules is read at once, from a file next to
the compiled ones, and a module comes out of it if its source has the size and the time that it had when the file was written,
which is what Python itself asks of compiled files. Whatever does not fit is imported as ever, and the file is written anew once
the guest runs (`bundle_writer.py`). Without the right to write there, or with `sys.dont_write_bytecode`, nothing is written,
and nothing else changes.

Layout of the file: the length of what follows as 8 bytes; marshal of (tag, bytes of code, index); the code of the modules, each
marshalled. `index`: name → (path of the source, path of the compiled file, whether it is a package, time, size, offset,
length). The tag names who can read it.

Only modules that are part of the interpreter, and `mmap`, which every start needs: this comes before everything else.
"""

import marshal
import mmap
import posix
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import CodeType, ModuleType

    Entry = tuple[str, str, bool, int, int, int, int]

FORMAT = 2
HEADER = 8  # bytes: the length of what is marshalled first


class Bundle:
    """A finder and loader of modules for `sys.meta_path`. `directory` is that of the package.

    `stale` says that something was asked for which is not, or not any more, in the file.
    """

    def __init__(self, directory: str) -> None:
        tag = sys.implementation.cache_tag
        self.directory = directory
        self.path = f"{directory}/__pycache__/start.{tag}.bundle"
        self.stale = False
        self.tag = (FORMAT, directory, sys.version, sys.flags.optimize)
        self.index: dict[str, Entry] = {}
        self._data = memoryview(b"")
        self._read()

    def _read(self) -> None:
        self.stale = True
        try:
            fd = posix.open(self.path, posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK)
            try:
                # Mapped: only what is imported is looked at, and all who start share it. It is replaced, never changed.
                data = memoryview(mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ))
            finally:
                posix.close(fd)
        except (OSError, ValueError):
            return  # the first start of this version, or nothing of ours
        end = HEADER + int.from_bytes(data[:HEADER], "little")
        try:
            tag, length, index = marshal.loads(data[HEADER:end])
        except (ValueError, EOFError, TypeError):
            return  # it was cut short
        if tag != self.tag or length != len(data) - end:
            return
        self._data = data[end:]
        self.index = index
        self.stale = False

    # -- what the import system asks

    def find_spec(self, name: str, path: object = None, target: object = None) -> "ModuleSpec | None":
        entry = self.index.get(name)
        if entry is None:
            if name[:11] == "stratovirt." and name != "stratovirt.native._native":  # which is no Python code
                self.stale = True
            return None
        source, compiled, is_package, time, size, _, _ = entry
        try:
            status = posix.stat(source)
        except OSError:
            status = None
        if status is None or int(status.st_mtime) != time or status.st_size != size:
            self.stale = True
            return None
        spec: ModuleSpec = sys.modules["_frozen_importlib"].ModuleSpec(name, self, origin=source, is_package=is_package)
        spec.cached = compiled
        spec.has_location = True
        if is_package:
            spec.submodule_search_locations = [source[:-12]]  # without /__init__.py
        return spec

    def create_module(self, spec: "ModuleSpec") -> None:
        """As ever."""

    def exec_module(self, module: "ModuleType") -> None:
        exec(self.get_code(module.__name__), module.__dict__)

    def get_code(self, name: str) -> "CodeType":
        code: CodeType = marshal.loads(self.marshalled(name))
        return code

    def marshalled(self, name: str) -> memoryview:
        _, _, _, _, _, offset, length = self.index[name]
        return self._data[offset : offset + length]


_installed: list[Bundle] = []


def install() -> None:
    """Have modules come from the bundle from now on, if they are files at all."""
    file = sys.modules["stratovirt"].__file__
    if file is not None and file[:1] == "/" and file[-12:] == "/__init__.py":
        bundle = Bundle(file[:-12])
        sys.meta_path.insert(0, bundle)
        _installed.append(bundle)


def refresh() -> None:
    """Write the file anew if it does not have, or not any more, what this process has imported."""
    if _installed and _installed[0].stale and not sys.dont_write_bytecode:
        from stratovirt import bundle_writer

        bundle_writer.write(_installed[0])
