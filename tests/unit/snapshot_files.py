"""Snapshots without a machine: directories with a state and a memory file, as small as can be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stratovirt.hostmap import HostMapping
from stratovirt.memory import RamRegion
from stratovirt.snapshot import difference, memory_file, state_file
from stratovirt.snapshot.chain import Chain, coarsen, describe_base

MIB = 1 << 20
SIZES = (2 * MIB, MIB)  # two runs of RAM, as a machine of more than 3 GiB has them


def regions() -> list[RamRegion]:
    return [RamRegion(0, HostMapping(SIZES[0])), RamRegion(1 << 32, HostMapping(SIZES[1]))]


def content(memory: list[RamRegion]) -> bytes:
    return b"".join(bytes(region.u8) for region in memory)


def save(directory: Path, memory: list[RamRegion], number: int, base: Path | None = None,
         ranges: list[tuple[int, int]] | None = None) -> None:
    """A snapshot with the id `number`; of what differs from `base`, or of `ranges`."""
    id = f"{number:032x}"
    state: dict[str, Any] = {"magic": state_file.MAGIC, "version": state_file.VERSION, "architecture": "x86_64", "id": id,
                             "created": 0, "base": None, "machine": {"memory": sum(SIZES)}, "number": number}
    writer = state_file.Writer(str(directory))
    if base is not None:
        chain = Chain(str(base), state_file.read(str(base)))
        ranges = coarsen(difference.from_memory(chain, memory)) if ranges is None else ranges
        state["base"] = describe_base(chain, str(directory), ranges)
        chain.close()
    offsets = memory_file.write(writer.memory_fd, memory, id, ranges)
    state["memory"] = [{"base": region.base, "size": region.size, "offset": offset}
                       for region, offset in zip(memory, offsets, strict=True)]
    writer.commit(state)


def chain_of(directory: Path) -> Chain:
    return Chain(str(directory), state_file.read(str(directory)))


def loaded(directory: Path, mapped: bool) -> bytes:
    """The memory of a machine that is restored from there."""
    chain, memory, offset = chain_of(directory), regions(), 0
    for region in memory:
        chain.load(region, offset, mapped)
        offset += region.size
    chain.close()
    return content(memory)


def spoil(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state = json.loads((directory / "state").read_text())
    change(state)
    (directory / "state").write_text(json.dumps(state))
