"""The files of a snapshot: what is written is read back, what is damaged is named, and nothing is ever there by half."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratovirt.hostmap import PAGE_SIZE, HostMapping, is_zero
from stratovirt.memory import RamRegion
from stratovirt.snapshot import memory_file, state_file
from stratovirt.snapshot.saved import Saved, SnapshotError

HEAD = {"magic": "STRATOVIRT", "version": state_file.VERSION}
ID = "0123456789abcdef" * 2
MIB = 1 << 20


# -- the reader


READS: tuple[Callable[[Saved], object], ...] = (
    lambda saved: saved.integer("x", 3, 9), lambda saved: saved.boolean("x"), lambda saved: saved.text("x", 4),
    lambda saved: saved.data("x", 2), lambda saved: saved.data("x", limit=3), lambda saved: saved.integers("x", 0, 5, 3),
    lambda saved: saved.section("x"), lambda saved: saved.sections("x", 2), lambda saved: saved.optional_section("x"),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=3)), max_leaves=6)


@given(VALUES, st.sampled_from(READS))
@settings(max_examples=300, deadline=None)
def test_a_value_is_taken_or_named(value: object, read: Callable[[Saved], object]) -> None:
    saved = Saved({"x": value}, "a.b[2]")
    try:
        read(saved)
    except SnapshotError as error:
        assert str(error).startswith("a.b[2].x") and len(str(error)) < 250
    else:
        saved.end()


@pytest.mark.parametrize(("value", "read", "taken"), [
    (9, READS[0], 9), (True, READS[1], True), ("abcd", READS[2], "abcd"), ("0aFF", READS[3], b"\x0a\xff"), ("", READS[4], b""),
    ([0, 5], READS[5], [0, 5]), (None, READS[8], None),
])
def test_what_is_right_is_taken(value: object, read: Callable[[Saved], object], taken: object) -> None:
    saved = Saved({"x": value})
    assert read(saved) == taken
    saved.end()


@pytest.mark.parametrize(("value", "read"), [
    (True, READS[0]), (2, READS[0]), (10, READS[0]), (3.0, READS[0]), (1, READS[1]), ("abcde", READS[2]), ("0", READS[3]),
    ("0a", READS[3]), ("00112233", READS[4]), ([True], READS[5]), ([0] * 4, READS[5]), ([], READS[6]), ([{}, 1], READS[7]),
    (0, READS[8]),
])
def test_what_is_wrong_is_not(value: object, read: Callable[[Saved], object]) -> None:
    with pytest.raises(SnapshotError, match=r"^x(\[\d\])?: "):
        read(Saved({"x": value}))


def test_missing_and_unknown_fields() -> None:
    for read in READS:
        with pytest.raises(SnapshotError, match=r"^here\.x: missing"):
            read(Saved({}, "here"))
    with pytest.raises(SnapshotError, match=r"^here\.y: unknown"):
        Saved({"y": 1}, "here").end()


# -- the state file


def test_a_state_is_read_back(tmp_path: Path) -> None:
    state = {**HEAD, "a": [1, {"b": "c"}], "big": (1 << 64) - 1, "nothing": None}
    assert state_file.decode(state_file.encode(state)) == state
    assert state_file.encode(state).count(b"\n") > 8, "one value a line, for diff"


@pytest.mark.parametrize(("data", "problem"), [
    (b"", "not JSON"), (b"\xff\xfe", "not JSON"), (b"[]", "not a snapshot's"), (b"{}", "magic: missing"),
    (b'{"magic": "QEVM"}', "magic: not STRATOVIRT"), (b'{"magic": "STRATOVIRT"}', "version: missing"),
    (b'{"magic": "STRATOVIRT", "version": 0}', "version: 0 is unknown"),
    (b'{"magic": "STRATOVIRT", "version": 3}', "version: 3 is newer"),
    (b'{"magic": "STRATOVIRT", "version": true}', "version: True"),
    (b'{"a": 1, "a": 2}', "stands twice"), (b'{"a": 1', "only the beginning"), (b"9" * 5000, "not JSON"),
    (b'{"a":' * 100_000, "nested too deeply"), (b'{"magic": "STRATOVIRT", "version": 1e999}', "version: inf"),
])
def test_other_files_are_called_so(data: bytes, problem: str) -> None:
    with pytest.raises(SnapshotError, match=problem):
        state_file.decode(data)


def test_every_beginning_of_a_state_is_refused() -> None:
    whole = state_file.encode({**HEAD, "a": [1, {"b": "c"}]})
    for length in range(len(whole) - 2):
        with pytest.raises(SnapshotError):
            state_file.decode(whole[:length])


def test_older_states_are_brought_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_file, "VERSION", 3)
    monkeypatch.setattr(state_file, "UPGRADES", {
        1: lambda state: {**state, "second": state["first"]}, 2: lambda state: {**state, "third": state["second"] + 1}})
    state = state_file.decode(b'{"magic": "STRATOVIRT", "version": 1, "first": 5}')
    assert state == {"magic": "STRATOVIRT", "version": 3, "first": 5, "second": 5, "third": 6}
    for damaged in (b'{"magic": "STRATOVIRT", "version": 1}', b'{"magic": "STRATOVIRT", "version": 2, "second": "x"}'):
        with pytest.raises(SnapshotError, match="damaged"):
            state_file.decode(damaged)


def test_places_without_a_state(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "state")
    with pytest.raises(SnapshotError, match="not a regular file"):
        state_file.read(str(tmp_path))
    for place, problem in (("missing", "no such directory"), ("a\0b", "null"), ("state", "Not a directory")):
        with pytest.raises(SnapshotError, match=problem):
            state_file.read(str(tmp_path / place))


def test_a_start_loads_none_of_it_and_a_restore_not_the_slow_modules() -> None:
    source = Path(state_file.__file__).parents[2]
    code = f"""
import sys; sys.path.insert(0, {str(source)!r})
import stratovirt.__main__, stratovirt.cli.command, stratovirt.machine.microvm, stratovirt.virtio.mmio
import stratovirt.virtio.block, stratovirt.virtio.net, stratovirt.virtio.console, stratovirt.virtio.vsock
assert not [name for name in sys.modules if "snapshot" in name]
import stratovirt.machine.snapshot, stratovirt.machine.x86_64.saved_processors
from stratovirt.snapshot import state_file
state_file.decode(b'{{"magic": "STRATOVIRT", "version": 1}}')
loaded = set(sys.modules)
for bad in (b'{{"a": "', b'{{"a" 1}}', b'[1,'):
    try:
        state_file.decode(bad)
    except Exception as error:
        assert type(error).__name__ == "SnapshotError" and "not JSON" in str(error), error
    else:
        raise AssertionError(bad)
print(*sorted({{"json", "re", "enum", "contextlib", "collections", "typing"}} & loaded))
"""
    done = subprocess.run([sys.executable, "-IS", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "\n", done.stdout


# -- writing: whole or not at all


class KilledError(BaseException):
    """The process is gone: nothing is caught, nothing cleaned up."""


CALLS = ("mkdir", "open", "write", "pwritev", "fdatasync", "unlink", "rename", "close")


def write(directory: Path, number: int) -> None:
    writer = state_file.Writer(str(directory))
    try:
        os.pwritev(writer.memory_fd, [bytes((number,)) * 64], 0)
    except OSError:
        writer.abandon()
        raise
    writer.commit({**HEAD, "number": number})


def fail_at(patched: pytest.MonkeyPatch, step: int, failure: BaseException) -> set[int]:
    """Let the call number `step` fail, of those that are made from now on. The descriptors that are open at any time."""
    left = [step]
    opened: set[int] = set()

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            if isinstance(failure, OSError) and name in ("close", "unlink"):
                return real(*arguments, **more)  # these fail for no lack of room
            left[0] -= 1
            if left[0] == -1:
                raise failure
            result = real(*arguments, **more)
            if name == "open":
                opened.add(result)
            elif name == "close":
                opened.discard(*arguments)
            return result

        return call

    for name in CALLS:
        patched.setattr(os, name, wrap(name, getattr(os, name)))
    return opened


def check(directory: Path, *allowed: int) -> bool:
    """Is there a snapshot? It must be one of those, and whole."""
    try:
        state = state_file.read(str(directory))
    except SnapshotError as error:
        assert "missing" in str(error) or "no such directory" in str(error)
        return False
    assert state["number"] in allowed
    assert (directory / "memory").read_bytes() == bytes((state["number"],)) * 64
    return True


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("failure", [KilledError(), OSError(28, "full")], ids=["killed", "full"])
def test_at_any_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool, failure: BaseException) -> None:
    outcomes = set()
    for step in range(40):
        directory = tmp_path / str(step)
        if old:
            write(directory, 1)
        with monkeypatch.context() as patched:
            opened = fail_at(patched, step, failure)
            try:
                write(directory, 2)
                done = True
            except (KilledError, SnapshotError, OSError):
                done = False
        for fd in opened if isinstance(failure, KilledError) else ():
            os.close(fd)  # as the end of a process does
        outcomes.add((done, check(directory, *((2,) if done else (1, 2)))))
        if not done and isinstance(failure, OSError) and directory.exists():
            assert {path.name for path in directory.iterdir()} <= {"state", "memory"} or step < 3, "nothing is left lying about"
        write(directory, 3)  # what was left does not stand in the way
        assert check(directory, 3)
        assert sorted(path.name for path in directory.iterdir()) == ["memory", "state"]
    assert (True, True) in outcomes and (True, False) not in outcomes


def test_two_writers_of_one_place(tmp_path: Path) -> None:
    writer = state_file.Writer(str(tmp_path / "a"))
    with pytest.raises(SnapshotError, match="another snapshot is just being written there"):
        state_file.Writer(str(tmp_path / "a"))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [".memory.new", ".state.new"]
    os.pwritev(writer.memory_fd, [bytes((1,)) * 64], 0)
    writer.commit({**HEAD, "number": 1})
    assert check(tmp_path / "a", 1)
    write(tmp_path / "a", 2)
    assert check(tmp_path / "a", 2)


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), os.mkfifo, lambda path: path.symlink_to("elsewhere"),
                                  lambda path: path.symlink_to("nowhere")])
def test_strange_things_in_the_place(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / ".state.new")
    (tmp_path / "elsewhere").write_text("keep")
    try:
        write(tmp_path, 1)
    except SnapshotError as error:
        assert (tmp_path / ".state.new").is_dir() or "File exists" in str(error)
    else:
        assert check(tmp_path, 1)
    assert (tmp_path / "elsewhere").read_text() == "keep"


# -- the memory file


def region(size: int, blocks: dict[int, bytes]) -> RamRegion:
    made = RamRegion(0, HostMapping(size))
    for at, data in blocks.items():
        made.u8[at : at + len(data)] = data
    return made


BLOCKS = st.dictionaries(st.integers(0, 4 * MIB - 64), st.binary(min_size=1, max_size=64), max_size=8)


@given(BLOCKS, st.booleans())
@settings(max_examples=60, deadline=None)
def test_memory_is_read_back(tmp_path_factory: pytest.TempPathFactory, blocks: dict[int, bytes], mapped: bool) -> None:
    path = tmp_path_factory.mktemp("m") / "memory"
    low, high = region(4 * MIB, blocks), region(MIB, {MIB - 1: b"\x01"})
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    assert memory_file.write(fd, [low, high], ID) == [0, 4 * MIB]
    os.close(fd)
    assert path.stat().st_size == 5 * MIB + PAGE_SIZE
    assert path.stat().st_blocks * 512 <= (2 * len(blocks) + 3) * (64 << 10)
    fd = memory_file.open_file(str(path), 5 * MIB, ID)
    again, second = region(4 * MIB, {}), region(MIB, {})
    memory_file.load(fd, again, 0, mapped)
    memory_file.load(fd, second, 4 * MIB, mapped)
    os.close(fd)
    assert bytes(again.u8) == bytes(low.u8) and bytes(second.u8) == bytes(high.u8)
    again.u8[0] ^= 0xFF
    assert path.read_bytes()[0] == low.u8[0], "copy-on-write"
    if mapped:
        again.host.unmap_files()
        assert is_zero(again.u8)


def test_memory_with_a_file_of_its_own_is_overwritten(tmp_path: Path) -> None:
    source = os.open(tmp_path / "memory", os.O_RDWR | os.O_CREAT)
    memory_file.write(source, [region(2 * MIB, {MIB: b"here"})], ID)
    own = os.memfd_create("own")
    os.ftruncate(own, 2 * MIB)
    os.pwrite(own, b"\xff" * (2 * MIB), 0)
    target = RamRegion(0, HostMapping(2 * MIB, own, 0, True))
    memory_file.load(source, target, 0, True)
    assert bytes(target.u8) == bytes(MIB) + b"here" + bytes(MIB - 4)
    assert os.pread(own, 4, MIB) == b"here"


@pytest.mark.parametrize(("change", "problem"), [
    (lambda path: path.unlink(), "is missing"), (lambda path: os.truncate(path, MIB), "not whole"),
    (lambda path: os.truncate(path, 4 * MIB), "not whole"), (lambda path: path.write_bytes(bytes(MIB + PAGE_SIZE)), "another"),
])
def test_another_file_is_not_taken(tmp_path: Path, change: Callable[[Path], object], problem: str) -> None:
    path = tmp_path / "memory"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    memory_file.write(fd, [region(MIB, {})], ID)
    os.close(fd)
    os.close(memory_file.open_file(str(path), MIB, ID))
    change(path)
    with pytest.raises(SnapshotError, match=problem):
        memory_file.open_file(str(path), MIB, ID)


def shared_region(size: int, offset: int = 0) -> RamRegion:
    fd = os.memfd_create("own")
    os.ftruncate(fd, size + offset)
    return RamRegion(0, HostMapping(size, fd, offset, True))


def test_memory_that_others_map_keeps_its_holes_both_ways(tmp_path: Path) -> None:
    first, second = shared_region(64 * MIB, MIB), shared_region(64 * MIB, MIB)
    for at in (0, 5 * MIB + 12, 64 * MIB - 1):
        os.pwrite(first.fd, b"\x01", MIB + at)
    used = os.fstat(first.fd).st_blocks
    fd = os.open(tmp_path / "memory", os.O_RDWR | os.O_CREAT)
    memory_file.write(fd, [first], ID)
    assert os.fstat(first.fd).st_blocks == used, "looking at it has not filled it"
    before = (tmp_path / "memory").read_bytes()
    memory_file.load(fd, second, 0, True)
    assert os.fstat(second.fd).st_blocks * 512 < MIB
    second.u8[1] = 7
    assert os.pread(second.fd, 1, MIB + 1) == b"\x07" and os.pread(second.fd, 1, 6 * MIB + 12) == b"\x01"
    assert second.u8[64 * MIB - 1] == 1 and (tmp_path / "memory").read_bytes() == before


def test_memory_is_not_loaded_into_itself(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "memory", os.O_RDWR | os.O_CREAT)
    memory_file.write(fd, [region(MIB, {0: b"here"})], ID)
    with pytest.raises(SnapshotError, match="memory of this machine"):
        memory_file.load(fd, RamRegion(0, HostMapping(MIB, os.open(tmp_path / "memory", os.O_RDWR), 0, True)), 0, True)


def test_a_place_for_memory_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = os.open(tmp_path / "memory", os.O_RDWR | os.O_CREAT)
    memory_file.write(fd, [region(MIB, {0: b"here"})], ID)

    def full(*_arguments: object) -> int:
        raise OSError(28, "full")

    monkeypatch.setattr(os, "sendfile", full)
    with pytest.raises(SnapshotError, match="into the guest's memory: No space left"):
        memory_file.load(fd, shared_region(MIB), 0, True)
