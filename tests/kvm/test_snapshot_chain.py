"""Incremental snapshots with tiny guests: what is restored from a chain is what a whole snapshot would have had."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvm.conftest import SOURCE, Program
from kvm.guests import DATA, Asm
from kvm.memories import KINDS, arguments
from kvm.test_snapshot import MARK, RNG, TICKS, connect, counter, serial, spoil
from stratovirt.errors import StratoVirtError
from stratovirt.hypervisor.kvm import _uapi as uapi
from stratovirt.snapshot import difference, state_file
from stratovirt.snapshot.chain import Chain

FAR = 0x500_0000  # where the guest itself never is


def chain_of(directory: Path) -> Chain:
    return Chain(str(directory), state_file.read(str(directory)))


def differing(one: Path, other: Path) -> list[tuple[int, int]]:
    chains = chain_of(one), chain_of(other)
    try:
        return difference.between(*chains)
    finally:
        for chain in chains:
            chain.close()


def go_on(guest: Any, ticks: int = 20) -> None:
    if guest.vm.state == "paused":
        guest.vm.resume()
    wanted = guest.word(TICKS) + ticks
    guest.run_until(lambda: guest.word(TICKS) > wanted)


@pytest.fixture
def three(machine: Callable[..., Any], tmp_path: Path) -> tuple[Path, Any]:
    """a, whole; b on a; c on b; and the machine, paused where c was taken."""
    first = machine(counter(), *serial(tmp_path / "first"), *RNG).start()
    for name, base in (("a", None), ("b", "a"), ("c", "b")):
        go_on(first)
        first.memory.store_u32(FAR + 0x3000 * ord(name), ord(name))
        first.vm.snapshot(str(tmp_path / name), str(tmp_path / base) if base else None)
    return tmp_path, first


def test_a_chain_is_what_a_whole_one_would_be(three, machine) -> None:
    folder, first = three
    first.vm.snapshot(str(folder / "whole"))
    assert differing(folder / "c", folder / "whole") == []
    sizes = {name: (folder / name / "memory").stat().st_blocks * 512 for name in ("a", "b", "c", "whole")}
    assert sizes["b"] < 16 << 12 and sizes["c"] < 16 << 12 and sizes["whole"] > sizes["b"], sizes
    ticks = first.word(TICKS)
    for more in ("", ",mapped=false"):
        again = machine(counter(), *serial(folder / f"again-{len(more)}"), *RNG, "-incoming", f"file:{folder / 'c'}{more}")
        assert [again.word(FAR + 0x3000 * ord(name)) for name in "abc"] == [ord(name) for name in "abc"]
        assert again.word(TICKS) == ticks
        again.start()
        go_on(again)
        assert again.word(MARK) == 0x5EED
    again.vm.snapshot(str(folder / "d"), str(folder / "c"))  # what was restored goes on with the chain
    assert len(chain_of(folder / "d").links) == 4
    again.vm.snapshot(str(folder / "e"), str(folder / "a"))  # or with an older part of it
    assert differing(folder / "d", folder / "e") == []


@pytest.mark.parametrize("kind", KINDS)
def test_into_every_kind_of_memory(three, machine, kind) -> None:
    folder, first = three
    more = [word for word in arguments(kind, folder) if word not in ("-smp", "2")]
    if kind == "file":
        (folder / "memory").write_bytes(b"\xff" * (128 << 20))
    again = machine(counter(), *serial(folder / "again"), *RNG, *more, "-incoming", f"file:{folder / 'c'}")
    ticks = again.word(TICKS)
    assert ticks == first.word(TICKS)
    again.start()
    go_on(again)


# -- with what is written counted


BASE, PAGES = 0x100_0000, 1024


def scribbler() -> bytes:
    """Adds one to a word in each of so many pages, over and over, and counts the rounds in the timer's place."""
    asm = Asm().set_stack().store(MARK, 0x5EED).text("up\n")
    again = asm.label()
    asm.mov(7, BASE)
    inner = asm.label()
    asm.raw(b"\xff\x07", b"\x81\xc7", (4096).to_bytes(4, "little"))  # inc dword [edi]; add edi, 4096
    asm.raw(b"\x81\xff", (BASE + PAGES * 4096).to_bytes(4, "little")).jb(inner)  # cmp edi, the end
    asm.inc(TICKS).load_eax(TICKS).raw(0x25, b"\xff\x0f\0\0").cmp_eax(0).jnz(again).text(".").jmp(again)
    return asm.kernel()


@pytest.mark.parametrize("manual", [True, False])
@pytest.mark.parametrize("kind", ["anonymous", "mem-share", "file"])
def test_what_is_counted_is_all_that_changes(machine, tmp_path, monkeypatch, kind, manual) -> None:
    if not manual:  # as on a KVM whose log is cleared by reading it
        monkeypatch.setattr(uapi, "KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE", 0)
    compared: list[object] = []
    real = difference.from_memory
    monkeypatch.setattr(difference, "from_memory", lambda *words: compared.append(words) or real(*words))
    guest = machine(scribbler(), *serial(tmp_path / "out"), *RNG, *arguments(kind, tmp_path)).start()

    def diff(name: str, base: str) -> int:
        """What it wrote; and a whole one of the same moment has the same memory."""
        guest.vm.snapshot(str(tmp_path / name), str(tmp_path / base))
        state = state_file.read(str(tmp_path / name))
        guest.vm.snapshot(str(tmp_path / f"all-{name}"))
        assert differing(tmp_path / name, tmp_path / f"all-{name}") == []
        return sum(state["base"]["ranges"][1::2]) // 4096

    go_on(guest)
    guest.vm.snapshot(str(tmp_path / "a"), track=True)
    assert guest.vm.dirty.written() == []
    go_on(guest)
    guest.memory.store_u32(FAR, 1)
    written = diff("b", "a")
    assert PAGES < written < PAGES + 16 and not compared
    go_on(guest)
    assert diff("c", "all-b") in range(PAGES, PAGES + 16) and not compared
    before = guest.vm.dirty.since
    go_on(guest)
    with monkeypatch.context() as patched, pytest.raises(StratoVirtError):
        patched.setattr(os, "fdatasync", lambda fd: os.close(-1))
        guest.vm.snapshot(str(tmp_path / "failed"), str(tmp_path / "all-c"))
    assert guest.vm.dirty.since == before
    guest.vm.pause()
    # what was read from KVM for a snapshot that failed is not forgotten
    assert diff("d", "all-c") in range(PAGES, PAGES + 16) and not compared
    go_on(guest)
    diff("e", "a")  # of an older base nobody has counted
    assert len(compared) == 1
    go_on(guest)
    guest.vm.reset(False)
    go_on(guest)
    guest.vm.snapshot(str(tmp_path / "f"), str(tmp_path / "all-e"))
    assert len(compared) == 2, "nor through a reset"
    guest.vm.snapshot(str(tmp_path / "g"), str(tmp_path / "f"))
    assert len(compared) == 2 and state_file.read(str(tmp_path / "g"))["base"]["ranges"][1::2] in ([], [4096], [8192])
    guest.vm.snapshot(str(tmp_path / "h"), track=False)
    guest.vm.snapshot(str(tmp_path / "i"), str(tmp_path / "h"))
    assert len(compared) == 3
    go_on(guest)


def test_counting_from_a_restore_on(three, machine, monkeypatch) -> None:
    folder, _first = three
    again = machine(counter(), *serial(folder / "again"), *RNG, "-incoming", f"file:{folder / 'c'},track=true")
    monkeypatch.setattr(difference, "from_memory", lambda *words: pytest.fail("nothing needs to be compared"))
    again.start()
    go_on(again)
    again.vm.snapshot(str(folder / "d"), str(folder / "c"))
    again.vm.snapshot(str(folder / "whole"))
    assert differing(folder / "d", folder / "whole") == []
    assert len(chain_of(folder / "d").links[0].ranges) < 16


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: shutil.rmtree(folder / "a"), "no such directory"),
    "truncated": (lambda folder: os.truncate(folder / "b" / "memory", 5 << 20), "it is not whole"),
    "replaced": (lambda folder: shutil.copytree(folder / "c", folder / "a", dirs_exist_ok=True), "another snapshot"),
    "beyond": (lambda folder: spoil(folder / "c", lambda state: state["base"].update(ranges=[128 << 20, 4096])), "base.ranges"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_chain_that_is_damaged(three, machine, case) -> None:
    folder, first = three
    change, problem = BAD[case]
    change(folder)
    words = ["-machine", "microvm", "-m", "128", "-serial", "stdio", *RNG, "-incoming", f"file:{folder / 'c'}"]
    status, out, error = Program(words).finish()
    assert (status, out) == (1, "")
    assert error.startswith("stratovirt: -incoming file:") and error.count("\n") == 1 and problem in error, error
    with pytest.raises(StratoVirtError, match=problem):
        first.vm.snapshot(str(folder / "new"), str(folder / "c"))
    assert not (folder / "new").exists()
    go_on(first)


def test_bases_that_are_none(three, machine, tmp_path) -> None:
    folder, first = three
    first.vm.resume()
    other = machine(counter(), *serial(tmp_path / "other"), *RNG).start()
    for guest, base, directory, problem in (
        (first, "nothing", "new", "no such directory"), (other, "a", "new", "neither saved there nor restored"),
        (first, "c", "a", "would stand on this one"), (first, "a", "a", "would stand on this one"),
    ):
        before = sorted((folder / "a").iterdir())
        with pytest.raises(StratoVirtError, match=problem):
            guest.vm.snapshot(str(folder / directory), str(folder / base))
        assert guest.vm.state == "running" and guest.vm.migration == "failed" and sorted((folder / "a").iterdir()) == before


def test_over_qmp_and_behind_the_filters(launch, tmp_path) -> None:
    first = launch(counter(), *RNG, "-qmp", f"unix:{tmp_path / 'qmp'},server,nowait")
    first.wait_for("up\n")
    client = connect(tmp_path / "qmp")
    assert client.ask("migrate", uri=f"file:{tmp_path / 'a'}") == {}
    for name, base, track in (("b", "a", True), ("c", "b", None), ("c2", "c", False)):
        client.ask("cont")
        first.wait_for(".")
        more = {} if track is None else {"track": track}
        assert client.ask("migrate", uri=f"file:{tmp_path / name}", base=str(tmp_path / base), **more) == {}
    assert client.ask("migrate", uri=f"file:{tmp_path / 'd'}", track=1)["desc"].startswith("invalid type: `track`")
    assert client.ask("migrate", uri=f"file:{tmp_path / 'd'}", base="/nowhere")["desc"].startswith("the base /nowhere: ")
    assert client.ask("migrate", uri=f"file:{tmp_path / 'd'}", base="")["desc"] == "invalid value: `base` must be a directory"
    assert client.ask("migrate", uri=f"file:{tmp_path / 'd'}", base=5)["desc"].startswith("invalid type: `base`")
    client.close()
    second = Program(["-machine", "microvm", "-m", "128", "-serial", "stdio", *RNG, "-incoming", f"file:{tmp_path / 'c2'}"])
    try:
        for _ in range(3):
            assert second.wait_for(".") == "."
    finally:
        second.close()


def test_by_hand(launch, tmp_path) -> None:
    """As people do it: two snapshots of a running machine, compared, merged, and gone on from."""
    def snapshot(*words: object) -> subprocess.CompletedProcess[str]:
        code = f"import sys; sys.path.insert(0, {str(SOURCE)!r}); from stratovirt.__main__ import main; sys.exit(main())"
        return subprocess.run([sys.executable, "-IS", "-c", code, "snapshot", *map(str, words)], capture_output=True, text=True,
                              timeout=60, check=False)

    first = launch(counter(), *RNG, "-qmp", f"unix:{tmp_path / 'qmp'},server,nowait")
    first.wait_for("up\n")
    to = ("--qmp", tmp_path / "qmp")
    assert snapshot("create", tmp_path / "a", *to).returncode == 0
    first.wait_for(".")  # it runs on
    made = snapshot("create", tmp_path / "b", *to, "--diff", "--base", tmp_path / "a", "--paused")
    assert (made.returncode, made.stdout, made.stderr) == (0, "", "")
    bad = snapshot("create", tmp_path / "c", *to, "--diff", "--base", tmp_path)
    assert bad.returncode == 1 and "`state` is missing" in bad.stderr and bad.stderr.count("\n") == 1
    compared = snapshot("diff", tmp_path / "a", tmp_path / "b")
    assert compared.returncode == 1 and "processors.clock: " in compared.stdout and f"memory {DATA:#x} to " in compared.stdout
    assert snapshot("merge", tmp_path / "b").stdout == "2 merged\n"
    shutil.rmtree(tmp_path / "a")
    second = Program(["-machine", "microvm", "-m", "128", "-serial", "stdio", *RNG, "-incoming", f"file:{tmp_path / 'b'}"])
    try:
        for _ in range(3):
            assert second.wait_for(".") == "."
    finally:
        second.close()
