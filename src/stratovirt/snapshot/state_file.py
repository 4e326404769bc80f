"""The state file of a snapshot: JSON with a head that says what it is, written so that it is there whole or not at all.

A snapshot is a directory with two files. `memory` is guest RAM (`memory_file.py`), `state` everything else:

    magic "STRATOVIRT"    version    architecture    id (32 hexadecimal digits, in both files)    created (seconds since 1970)
    base        null, or what the memory of an incremental snapshot stands on (`chain.py`)
    machine     what the machine must be started as        processors  vCPUs, interrupt chips, timer, clock
    memory      where each run of RAM lies in `memory`     platform    devices that every machine has
    slots       the virtio devices

Bytes are hexadecimal digits, one value a line, so that two states can be compared with `diff`. Numbers that name something
(a machine's memory, a register) are plain.

A version is raised when an older program would misread the file; `UPGRADES` then gets a function from the version before. An
older file is brought up to date in memory, step by step; a newer one is refused.

Both files are written under temporary names, synced, and renamed, `state` last. While there is no `state` there is no
snapshot, and a snapshot that is replaced loses its `state` before its `memory`. The temporary names are always the same: what a
writer that was killed has left there is taken away by the next one, and a lock, which goes with its process, tells one that
is still at work.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from stratovirt.snapshot.saved import Saved, SnapshotError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

MAGIC = "STRATOVIRT"
VERSION = 2
STATE, MEMORY = "state", "memory"
MAX_STATE = 64 << 20
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_F_OFD_SETLK = 37
_WHOLE_FILE = struct.pack("=hh4xqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock of the 64-bit ABIs
_WHITE = " \t\n\r"
ID_SIZE = 16



def _from_version_1(state: dict[str, Any]) -> dict[str, Any]:
    """Incremental snapshots came with version 2; until then every memory file was whole."""
    upgraded: dict[str, Any] = {}
    for name, value in state.items():
        upgraded[name] = value
        if name == "created":
            upgraded["base"] = None
    return {"base": None, **upgraded}


UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_version_1}
"""From a version to the next: gets the whole state and gives the new one, all but its `version`."""


def random_bytes(count: int) -> bytes:
    """As from os.urandom, by calls that the main thread's filter has. Raises: OSError."""
    fd = os.open("/dev/urandom", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, count)
    finally:
        os.close(fd)


def encode(state: dict[str, Any]) -> bytes:
    import json

    return json.dumps(state, indent=1).encode() + b"\n"


def decode(data: bytes) -> dict[str, Any]:
    """The state, brought up to VERSION. Raises: SnapshotError."""
    try:
        state = _parse(data.decode())
    except RecursionError:
        raise SnapshotError("the state file is nested too deeply") from None
    except ValueError as error:  # also what is no UTF-8, or a number of thousands of digits
        raise SnapshotError(f"the state file is not JSON, or only the beginning of it: {error}") from None
    if type(state) is not dict:
        raise SnapshotError("the state file is not a snapshot's")
    head = Saved(state)
    if head.text("magic") != MAGIC:
        raise head.error("magic", f"not {MAGIC}: this is not the state file of a snapshot")
    version = head.integer("version")
    if version > VERSION:
        raise head.error("version", f"{version} is newer than this program, which knows versions up to {VERSION}")
    while version < VERSION:
        upgrade = UPGRADES.get(version)
        if upgrade is None:
            raise head.error("version", f"{version} is unknown; this program knows {min((*UPGRADES, VERSION))} to {VERSION}")
        try:
            state = upgrade(state)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise SnapshotError(f"a state of version {version} that is damaged: {error!r}") from error
        version += 1
        state["version"] = version
    whole: dict[str, Any] = state
    return whole


class _Scanning:
    """How `_json` is to read. The package around it is left out, whose import takes longer than the reading."""

    strict = True
    object_hook = None
    parse_float, parse_int = float, int

    @staticmethod
    def parse_constant(name: str) -> object:
        raise ValueError(f"{name} is not a number")

    @staticmethod
    def object_pairs_hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return _object(pairs)


def _parse(text: str) -> Any:
    """Raises: ValueError, RecursionError."""
    import _json

    start = len(text) - len(text.lstrip(_WHITE))
    try:
        value, end = _json.make_scanner(_Scanning)(text, start)  # type: ignore[arg-type]  # any object with these names will do
    except StopIteration as error:
        raise ValueError(f"nothing that can be read at character {error.value}") from None
    except SystemError:  # what the scanner raises is defined in json.decoder, and without that it raises nothing
        import json

        json.loads(text)
        raise ValueError("text that cannot be read") from None
    if text[end:].strip(_WHITE):
        raise ValueError(f"something behind the end, at character {end}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def read(directory: str) -> dict[str, Any]:
    """The state of the snapshot in `directory`. Raises: SnapshotError."""
    path = os.path.join(directory, STATE)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise SnapshotError("there is no snapshot: the file `state` is missing" if os.path.isdir(directory)
                            else "there is no such directory") from None
    except (OSError, ValueError) as error:
        raise SnapshotError(f"the file `state`: {_words(error)}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise SnapshotError("the file `state` is not a regular file")
        if status.st_size > MAX_STATE:
            raise SnapshotError(f"the file `state` is larger than {MAX_STATE >> 20} MiB")
        data = bytearray()
        while len(data) <= MAX_STATE and (part := os.read(fd, 1 << 20)):
            data += part
    except OSError as error:
        raise SnapshotError(f"the file `state`: {_words(error)}") from error
    finally:
        os.close(fd)
    return decode(bytes(data))


def _words(error: OSError | ValueError) -> str:
    return os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)


def fields(state: dict[str, object], place: str = "") -> Iterator[tuple[str, object]]:
    """Every value of a state with its place, for people to look at."""
    for name, value in state.items():
        where = f"{place}.{name}" if place else name
        if isinstance(value, dict):
            yield from fields(value, where)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for number, each in enumerate(value):
                yield from fields(each, f"{where}[{number}]")
        else:
            yield where, value


class Writer:
    """Writes a snapshot into `directory`, which is created if need be: `memory_fd` first, then `commit`, or else `abandon`.

    Until `commit`, whatever was in the directory stays. Raises: SnapshotError, from everything.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._temporary = {name: os.path.join(directory, f".{name}.new") for name in (STATE, MEMORY)}
        self._open: dict[str, int] = {}
        try:
            try:
                os.mkdir(directory, 0o700)
            except FileExistsError:
                if not os.path.isdir(directory):
                    raise SnapshotError(f"{directory}: this is not a directory") from None
            self._open[STATE] = _open_alone(self._temporary[STATE])
            _remove(self._temporary[MEMORY])  # of a writer that was killed
            self._open[MEMORY] = os.open(self._temporary[MEMORY], _NEW, 0o600)
        except _BusyError:
            raise SnapshotError(f"{directory}: another snapshot is just being written there") from None
        except (OSError, ValueError) as error:
            self.abandon()
            raise SnapshotError(f"{directory}: {_words(error)}") from error

    @property
    def memory_fd(self) -> int:
        return self._open[MEMORY]

    def scratch(self) -> int:
        """A new file without a name, in the file system of the snapshot."""
        path = os.path.join(self._directory, ".scratch.new")
        try:
            _remove(path)  # of a writer that was killed
            fd = os.open(path, _NEW, 0o600)
            os.unlink(path)
        except OSError as error:
            raise SnapshotError(f"{self._directory}: {_words(error)}") from error
        return fd

    def commit(self, state: dict[str, Any], replaces_itself: bool = False) -> None:
        """Put both files in their places. Raises: SnapshotError: no snapshot is there then, or the old, or all of the new.

        `replaces_itself`: the snapshot there has the same content, and its state goes with the new memory as well.
        """
        final = {name: os.path.join(self._directory, name) for name in (STATE, MEMORY)}
        try:
            fd, rest = self._open[STATE], memoryview(encode(state))
            while rest:
                rest = rest[os.write(fd, rest) :]
            for fd in self._open.values():
                os.fdatasync(fd)
            if not replaces_itself:
                _remove(final[STATE])
            os.rename(self._temporary[MEMORY], final[MEMORY])
            os.rename(self._temporary[STATE], final[STATE])
            _sync_name(self._open[STATE])
        except OSError as error:
            self.abandon()
            raise SnapshotError(f"{self._directory}: {_words(error)}") from error
        self._close()

    def _close(self) -> None:
        """The state file last: its lock is what keeps others away."""
        for name in (MEMORY, STATE):
            fd = self._open.pop(name, -1)
            if fd >= 0:
                os.close(fd)

    def abandon(self) -> None:
        """Leave nothing of it behind. Idempotent; what cannot be removed stays under its temporary name."""
        for name in self._open:
            try:
                os.unlink(self._temporary[name])
            except OSError:
                continue  # renamed, or on a disk that takes no more changes
        self._close()


class _BusyError(Exception):
    """Another process holds the lock."""


def _open_alone(path: str) -> int:
    """A new file, locked by this descriptor; one that nobody has locked any more makes place. Raises: OSError, _BusyError."""
    try:
        fd = os.open(path, _NEW, 0o600)
    except FileExistsError:
        _remove_stale(path)
        fd = os.open(path, _NEW, 0o600)
    try:
        if not _lock(fd) or not _is_named(fd, path):
            raise _BusyError
    except BaseException:
        os.close(fd)
        raise
    return fd


def _remove_stale(path: str) -> None:
    """Raises: OSError, _BusyError when somebody is writing it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    try:
        if not _lock(fd):
            raise _BusyError
        if _is_named(fd, path):
            os.unlink(path)
    finally:
        os.close(fd)


def _lock(fd: int) -> bool:
    """Hold the file for as long as the descriptor is open. True as well where the file system has no locks."""
    try:
        fcntl.fcntl(fd, _F_OFD_SETLK, _WHOLE_FILE)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def _is_named(fd: int, path: str) -> bool:
    """Is it still the file with this name, and has nobody removed or renamed it?"""
    try:
        named = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(fd))


def _remove(path: str) -> None:
    """A file that is there or not."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def _sync_name(fd: int) -> None:
    """The file's new name, and all that was renamed before it, are on disk: the name changed in one transaction with the inode.

    A write that is synced whole (RWF_SYNC) is an fsync, which the main thread's filter does not have.
    """
    size = os.fstat(fd).st_size
    try:
        os.pwritev(fd, [b"\n"], size - 1, os.RWF_SYNC)  # what is there already
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
