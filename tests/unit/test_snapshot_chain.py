"""Incremental snapshots as files: the memory of a chain is what was saved, and what does not fit together is called so."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratovirt.memory import RamRegion
from stratovirt.snapshot import chain as chains
from stratovirt.snapshot import difference, state_file
from stratovirt.snapshot.chain import PAGE, check_place, coarsen
from stratovirt.snapshot.saved import SnapshotError
from unit.snapshot_files import MIB, SIZES, chain_of, content, loaded, regions, save, spoil

TOTAL = sum(SIZES)


def write_some(memory: list[RamRegion], chance: random.Random) -> None:
    for _ in range(chance.randrange(12)):
        region = chance.choice(memory)
        at = chance.randrange(region.size // PAGE) * PAGE
        length = min(chance.choice((1, PAGE, 5 * PAGE, 200 << 10)), region.size - at)
        region.u8[at : at + length] = bytes((chance.randrange(3),)) * length


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_a_chain_has_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped: bool, seed: int) -> None:
    if seed % 2:
        monkeypatch.setattr(chains, "_WORTH_MAPPING", PAGE)
        monkeypatch.setattr(chains, "_MAX_MAPPED", 5)
    chance, memory, expected = random.Random(seed), regions(), []
    for number in range(5):
        write_some(memory, chance)
        save(tmp_path / str(number), memory, number, tmp_path / str(number - 1) if number else None)
        expected.append(content(memory))
    for number, each in enumerate(expected):
        assert loaded(tmp_path / str(number), mapped) == each
    for number in range(1, 5):
        one, other = chain_of(tmp_path / str(number - 1)), chain_of(tmp_path / str(number))
        differing = difference.between(one, other)
        pages = {page for start, end in differing for page in range(start, end, PAGE)}
        assert pages == {page for page in range(0, TOTAL, PAGE)
                         if expected[number - 1][page : page + PAGE] != expected[number][page : page + PAGE]}
        assert differing == other.links[0].ranges, "no more is in the file than what differs"
        one.close()
        other.close()


def test_only_what_differs_is_in_the_file(tmp_path: Path) -> None:
    memory = regions()
    memory[0].u8[:MIB] = b"x" * MIB
    save(tmp_path / "a", memory, 1)
    memory[0].u8[8 * PAGE] = 1
    memory[0].u8[64 * PAGE : 65 * PAGE] = bytes(PAGE)
    save(tmp_path / "b", memory, 2, tmp_path / "a")
    save(tmp_path / "c", memory, 3, tmp_path / "b")
    assert [(tmp_path / name / "memory").stat().st_blocks * 512 for name in "abc"] == [MIB + PAGE, 2 * PAGE, PAGE]
    assert state_file.read(str(tmp_path / "b"))["base"]["ranges"] == [8 * PAGE, PAGE, 64 * PAGE, PAGE]
    assert loaded(tmp_path / "c", True) == content(memory)


def test_a_chain_may_move_as_a_whole(tmp_path: Path) -> None:
    memory = regions()
    (tmp_path / "here").mkdir()
    save(tmp_path / "here" / "a", memory, 1)
    memory[0].u8[5] = 5
    save(tmp_path / "here" / "b", memory, 2, tmp_path / "here" / "a")
    (tmp_path / "here").rename(tmp_path / "there")
    assert loaded(tmp_path / "there" / "b", True) == content(memory)


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(1, 40)), max_size=60), st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_coarser_ranges_hold_the_finer_ones(pieces: list[tuple[int, int]], limit: int) -> None:
    pages = sorted({page for start, length in pieces for page in range(start, start + length)})
    ranges: list[tuple[int, int]] = []
    for page in pages:
        if ranges and ranges[-1][1] == page * PAGE:
            ranges[-1] = (ranges[-1][0], (page + 1) * PAGE)
        else:
            ranges.append((page * PAGE, (page + 1) * PAGE))
    coarse = coarsen(list(ranges), limit)
    assert len(coarse) <= limit or not ranges
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(coarse))
    assert {page * PAGE for page in pages} <= {at for start, end in coarse for at in range(start, end, PAGE)}
    assert coarse == ranges or len(ranges) > limit


# -- what does not fit together


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """`base`, and `top` that stands on it."""
    memory = regions()
    memory[0].u8[MIB] = 1
    save(tmp_path / "base", memory, 1)
    memory[0].u8[0] = memory[1].u8[SIZES[1] - 1] = 2
    save(tmp_path / "top", memory, 2, tmp_path / "base")
    return tmp_path


def replace_base(folder: Path) -> None:
    save(folder / "base", regions(), 7)


def other_machine(folder: Path) -> None:
    spoil(folder / "base", lambda state: state["machine"].update(memory=5))


def loop(folder: Path) -> None:
    save(folder / "third", regions(), 3, folder / "top")
    spoil(folder / "base", lambda state: state.update(base={"id": f"{3:032x}", "directory": "../third", "ranges": []}))


def ranges(*numbers: object) -> Callable[[Path], None]:
    return lambda folder: spoil(folder / "top", lambda state: state["base"].update(ranges=list(numbers)))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: shutil.rmtree(folder / "base"), r"the base .*base: there is no such directory"),
    "no memory": (lambda folder: (folder / "base" / "memory").unlink(), r"the base .*base: the file `memory` is missing"),
    "truncated base": (lambda folder: os.truncate(folder / "base" / "memory", MIB), r"the base .*not whole"),
    "truncated": (lambda folder: os.truncate(folder / "top" / "memory", MIB), r"^the file `memory` has .*not whole"),
    "replaced": (replace_base, r"the base .*another snapshot \(0*7\) than the one that was there \(0*1\)"),
    "other machine": (other_machine, r"the base .*of another machine: the two differ in `machine`"),
    "damaged base": (lambda folder: (folder / "base" / "state").write_text("{"), r"the base .*not JSON"),
    "itself": (lambda folder: spoil(folder / "top", lambda state: state["base"].update(id=state["id"])), "stands on itself"),
    "loop": (loop, "stands on itself"),
    "half a range": (ranges(0), r"base\.ranges: a start without"),
    "beyond": (ranges(TOTAL - PAGE, 2 * PAGE), r"base\.ranges: .*beyond"),
    "far beyond": (ranges(1 << 60, PAGE), r"base\.ranges\[0\]"),
    "part of a page": (ranges(0, 100), r"base\.ranges: 0, 100: not whole pages"),
    "nothing": (ranges(PAGE, 0), r"base\.ranges"),
    "backwards": (ranges(2 * PAGE, PAGE, PAGE, PAGE), r"base\.ranges"),
    "overlapping": (ranges(0, 2 * PAGE, PAGE, PAGE), r"base\.ranges"),
    "negative": (ranges(-PAGE, PAGE), r"base\.ranges\[0\]"),
    "words": (ranges("a", "b"), r"base\.ranges\[0\]"),
    "unknown field": (lambda folder: spoil(folder / "top", lambda state: state["base"].update(more=1)), r"base\.more: unknown"),
    "no field": (lambda folder: spoil(folder / "top", lambda state: state["base"].pop("id")), r"base\.id: missing"),
    "nul": (lambda folder: spoil(folder / "top", lambda state: state["base"].update(directory="a\0b")), "null"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(pair: Path, case: str) -> None:
    change, problem = BAD[case]
    change(pair)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SnapshotError, match=problem):
        chain_of(pair / "top")
    assert len(os.listdir("/proc/self/fd")) == before, "nothing stays open"


PAGES = st.integers(0, TOTAL // PAGE).map(lambda page: page * PAGE)
VALUES = st.one_of(st.none(), st.integers(), st.text(max_size=40), st.just("../base"), st.just(f"{1:032x}"),
                   st.lists(st.one_of(st.integers(-PAGE, TOTAL + PAGE), PAGES), max_size=8), st.lists(PAGES, max_size=4))


@given(st.dictionaries(st.sampled_from(("id", "directory", "ranges", "more")), VALUES))
@settings(max_examples=200, deadline=None)
def test_whatever_a_base_says(tmp_path_factory: pytest.TempPathFactory, changes: dict[str, object]) -> None:
    folder = tmp_path_factory.mktemp("s")
    memory = regions()
    save(folder / "base", memory, 1)
    save(folder / "top", memory, 2, folder / "base")
    spoil(folder / "top", lambda state: state["base"].update(changes))
    try:
        chain = chain_of(folder / "top")
    except SnapshotError:
        return
    assert sum(end - start for start, end, _ in chain.parts()) == TOTAL
    chain.close()
    assert loaded(folder / "top", True) == loaded(folder / "top", False) == content(memory)


def test_so_many_and_no_more(tmp_path: Path) -> None:
    memory = regions()
    for number in range(chains.MAX_LINKS):
        save(tmp_path / str(number), memory, number, tmp_path / str(number - 1) if number else None)
    last = tmp_path / str(chains.MAX_LINKS - 1)
    chain_of(last).close()
    save(tmp_path / "more", memory, 99, last)
    with pytest.raises(SnapshotError, match="more than 64"):
        chain_of(tmp_path / "more")


def test_a_place_that_is_stood_on(pair: Path) -> None:
    chain = chain_of(pair / "top")
    os.symlink(pair / "base", pair / "link")
    for name in ("base", "top", "link", "top/../base"):
        with pytest.raises(SnapshotError, match="would stand on this one"):
            check_place(chain, str(pair / name))
    check_place(chain, str(pair / "new"))
    chain.close()


def test_the_way_to_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = regions()
    deep = tmp_path / "one" / "two"
    deep.mkdir(parents=True)
    (tmp_path / "short").symlink_to(deep)
    save(deep / "a", memory, 1)
    memory[0].u8[0] = 1
    monkeypatch.chdir(tmp_path)
    for directory, base, way in (
        ("near", "one/two/a", "../one/two/a"), (str(tmp_path / "near"), str(deep / "a"), "../one/two/a"),
        ("short/b", str(deep / "a"), str(deep / "a")), ("one/two/b", str(deep / "a"), str(deep / "a")),
        (str(tmp_path / "short" / "b"), str(tmp_path / "short" / "a"), "../a"),
    ):
        save(Path(directory), memory, 2, Path(base))
        assert state_file.read(directory)["base"]["directory"] == way
        assert loaded(Path(directory), True) == content(memory)
    with pytest.raises(SnapshotError, match="absolute path"):
        save(Path("short/c"), memory, 3, Path("one/two/a"))
