"""Snapshots of older versions of the format, as they were written then: each is brought up to date, and its guest goes on.

`data/snapshot-N` has the state file as the program of version N wrote it, for the guest of `test_snapshot.counter` with a
random number device, and the pages of its memory that are not zero. When the version is raised, one of the version before is
added: a snapshot of that guest, taken by the program as it was.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest

from kvm.test_snapshot import MARK, RNG, TICKS, counter, serial, spoil
from stratovirt.snapshot import state_file

DATA = Path(__file__).parent / "data"
VERSIONS = range(1, state_file.VERSION)
# What another processor than the one that it was taken on does not take.
OF_THE_HOST = ("cpuid", "msrs", "xsave", "xcrs", "tsc_khz")


def unpack(version: int, directory: Path) -> dict[str, Any]:
    """The stored snapshot as a directory; its state as it is stored."""
    source = DATA / f"snapshot-{version}"
    shutil.copytree(source, directory, ignore=lambda _folder, _names: ["pages.json"])
    pages = {int(at, 16): zlib.decompress(base64.b64decode(text))
             for at, text in json.loads((source / "pages.json").read_text()).items()}
    with open(directory / "memory", "wb") as file:
        for at, page in pages.items():
            os.pwrite(file.fileno(), page, at)
    state: dict[str, Any] = json.loads((directory / "state").read_text())
    assert state["version"] == version
    return state


def test_every_version_is_stored() -> None:
    assert {path.name for path in DATA.iterdir()} == {f"snapshot-{version}" for version in VERSIONS}
    assert set(state_file.UPGRADES) == set(VERSIONS)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_older_state_says_the_same(tmp_path, version) -> None:
    stored = unpack(version, tmp_path / "old")
    state = state_file.read(str(tmp_path / "old"))
    assert state["version"] == state_file.VERSION
    assert {name: state[name] for name in stored if name != "version"} == {
        name: value for name, value in stored.items() if name != "version"}
    assert state["base"] is None


@pytest.mark.parametrize("version", VERSIONS)
def test_an_older_guest_goes_on(machine, tmp_path, version) -> None:
    first = machine(counter(), *serial(tmp_path / "first"), *RNG).start()
    first.run_until(lambda: first.word(TICKS) > 2)
    first.vm.snapshot(str(tmp_path / "new"))
    fresh = state_file.read(str(tmp_path / "new"))["processors"]["vcpus"][0]
    unpack(version, tmp_path / "old")
    spoil(tmp_path / "old", lambda state: state["processors"]["vcpus"][0].update(
        {name: fresh[name] for name in OF_THE_HOST}))
    second = machine(counter(), *serial(tmp_path / "second"), *RNG, "-incoming", f"file:{tmp_path / 'old'}")
    ticks = second.word(TICKS)
    assert ticks > 20 and second.word(MARK) == 0x5EED
    second.start().run_until(lambda: second.word(TICKS) > ticks + 20)
    second.vm.snapshot(str(tmp_path / "diff"), str(tmp_path / "old"))  # and may be stood on
