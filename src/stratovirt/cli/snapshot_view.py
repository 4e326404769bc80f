"""Snapshots for people: `snapshot show`, one value a line, and `snapshot diff`."""

from __future__ import annotations

import os
import time

from stratovirt.snapshot import difference, state_file
from stratovirt.snapshot.chain import Chain
from stratovirt.snapshot.saved import SnapshotError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

_WIDTH = 64  # of a value, after which it is cut
_OF_ITSELF = ("id", "created")  # in these any two differ


def show(directory: str) -> None:
    """Raises: SnapshotError when there is no state to be read; what is wrong with the memory is shown."""
    state = state_file.read(directory)
    created = state.get("created")
    if isinstance(created, int) and 0 <= created < 1 << 40:
        print(f"# created {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime(created))}")
    try:
        status = os.stat(os.path.join(directory, state_file.MEMORY))
        print(f"# memory: {status.st_size} bytes, {status.st_blocks * 512} of them on disk")
    except OSError as error:
        print(f"# memory: {os.strerror(error.errno or 0)}")
    try:
        chain = Chain(directory, state)
    except SnapshotError as error:
        print(f"# it cannot be restored: {_printable(str(error))}")
    else:
        for link in chain.links[1:]:
            print(f"# stands on {_printable(link.directory)}")
        chain.close()
    for place, value in _values(state):
        print(f"{place} = {value}")


def differ(one: str, other: str) -> bool:
    """Show in what two snapshots differ; whether they do. Raises: SnapshotError."""
    states = [state_file.read(directory) for directory in (one, other)]
    chains: list[Chain] = []
    found = False
    try:
        for directory, state in zip((one, other), states, strict=True):
            try:
                chains.append(Chain(directory, state))
            except SnapshotError as error:
                raise SnapshotError(f"{directory}: {error}") from error
        for line in _different_values(*states):
            found = True
            print(line)
        if states[0].get("memory") != states[1].get("memory"):
            print("memory: of machines with different RAM, not compared")
            return True
        for line in _different_memory(chains, states[0]["memory"]):
            found = True
            print(line)
    finally:
        for chain in chains:
            chain.close()
    return found


def _different_values(*states: dict[str, Any]) -> Iterator[str]:
    one, other = ({place: value for place, value in state_file.fields(state)
                   if place not in _OF_ITSELF and not place.startswith("base")} for state in states)
    for place in dict.fromkeys((*one, *other)):
        if one.get(place, state_file) != other.get(place, state_file):
            yield f"{place}: {_text(one[place]) if place in one else '(not there)'} -> " \
                  f"{_text(other[place]) if place in other else '(not there)'}"


def _different_memory(chains: list[Chain], runs: list[dict[str, int]]) -> Iterator[str]:
    """Guest-physical addresses, and a sum."""
    total = count = 0
    ranges = difference.between(*chains)
    for run in runs:
        shift, end = run["base"] - run["offset"], run["offset"] + run["size"]
        for start, stop in ranges:
            start, stop = max(start, run["offset"]), min(stop, end)
            if start < stop:
                yield f"memory {start + shift:#x} to {stop + shift:#x}: {stop - start} bytes"
                total, count = total + stop - start, count + 1
    if count:
        yield f"memory: {total} bytes in {count} ranges of pages differ"


def _values(state: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for place, value in state_file.fields(state):
        if place == "base.ranges" and isinstance(value, list):
            numbers = [number for number in value[1::2] if isinstance(number, int)]
            yield place, f"{len(numbers)} ranges, {sum(numbers)} bytes"
        else:
            yield place, _text(value)


def _text(value: object) -> str:
    shown = _printable(value if isinstance(value, str) else ascii(value))
    if isinstance(value, str) and len(shown) > _WIDTH:
        return f"{shown[:_WIDTH]}… ({len(shown) // 2} bytes)"
    return shown


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
