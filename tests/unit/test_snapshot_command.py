"""`stratovirt snapshot`: what people see of snapshots, and a chain made whole."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stratovirt.cli import qmp_client
from stratovirt.cli.snapshot import main
from stratovirt.errors import ConfigError, StratoVirtError
from stratovirt.snapshot import state_file
from stratovirt.snapshot.chain import PAGE
from stratovirt.snapshot.merge import merge
from stratovirt.snapshot.saved import SnapshotError
from unit.snapshot_files import MIB, SIZES, chain_of, content, loaded, regions, save, spoil
from unit.test_snapshot import KilledError, fail_at


@pytest.fixture
def three(tmp_path: Path) -> tuple[Path, bytes]:
    """a, whole; b on a; c on b, and the memory of c."""
    memory = regions()
    memory[0].u8[:MIB] = b"x" * MIB
    save(tmp_path / "a", memory, 1)
    memory[0].u8[PAGE] = 1
    memory[0].u8[5 * PAGE : 7 * PAGE] = bytes(2 * PAGE)
    save(tmp_path / "b", memory, 2, tmp_path / "a")
    memory[1].u8[SIZES[1] - 1] = 3
    save(tmp_path / "c", memory, 3, tmp_path / "b")
    return tmp_path, content(memory)


# -- merge


@pytest.mark.parametrize("into", ["c", "d"])
def test_a_chain_made_whole(three: tuple[Path, bytes], into: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder, expected = three
    save(folder / "e", regions(), 5, folder / "c")  # something that stands on it
    assert main(["merge", str(folder / "c"), *([str(folder / into)] if into != "c" else [])]) == 0
    assert capsys.readouterr().out == "3 merged\n"
    state = state_file.read(str(folder / into))
    assert (state["base"], state["id"], state["number"]) == (None, f"{3:032x}", 3)
    assert loaded(folder / into, True) == loaded(folder / into, False) == expected
    assert (folder / into / "memory").stat().st_blocks * 512 <= MIB + 3 * 65536 + 2 * PAGE
    if into == "c":
        for name in "ab":
            os.rename(folder / name, folder / f"gone-{name}")
    assert loaded(folder / "e", True) == bytes(sum(SIZES)), "what stood on it still does"
    assert main(["merge", str(folder / into)]) == 0
    assert capsys.readouterr().out == "it stands on no other\n"


def test_merging_into_what_is_stood_on(three: tuple[Path, bytes]) -> None:
    folder, expected = three
    for into in ("a", "b"):
        with pytest.raises(ConfigError, match="would stand on this one"):
            main(["merge", str(folder / "c"), str(folder / into)])
    assert loaded(folder / "c", True) == expected
    spoil(folder / "a", lambda state: state.update(id="f" * 32))
    with pytest.raises(ConfigError, match="the base"):
        main(["merge", str(folder / "c")])


@pytest.mark.parametrize("failure", [KilledError(), OSError(28, "full")], ids=["killed", "full"])
def test_a_merge_in_place_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
    outcomes = set()
    for step in range(40):
        folder = tmp_path / str(step)
        folder.mkdir()
        memory = regions()
        memory[0].u8[0] = 1
        save(folder / "a", memory, 1)
        memory[0].u8[PAGE] = 2
        save(folder / "b", memory, 2, folder / "a")
        with monkeypatch.context() as patched:
            opened = fail_at(patched, step, failure)
            try:
                merge(str(folder / "b"), str(folder / "b"))
                done = True
            except (KilledError, SnapshotError, OSError):
                done = False
        for fd in opened if isinstance(failure, KilledError) else ():
            os.close(fd)
        outcomes.add((done, chain_of(folder / "b").links[0].ranges is None))
        assert loaded(folder / "b", True) == content(memory)
    assert {(True, True), (False, False)} <= outcomes


# -- show and diff


def test_show_tells_of_the_chain(three: tuple[Path, bytes], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = three
    assert main(["show", str(folder / "c")]) == 0
    shown = capsys.readouterr().out
    assert f"# stands on {folder / 'c' / '..' / 'b'}" in shown and shown.count("# stands on ") == 2
    assert "base.directory = ../b\n" in shown and f"base.ranges = 1 ranges, {PAGE} bytes\n" in shown
    (folder / "a" / "memory").unlink()
    assert main(["show", str(folder / "c")]) == 0
    assert "# it cannot be restored: the base " in capsys.readouterr().out
    spoil(folder / "c", lambda state: state["base"].update(ranges="\x1b[31m"))
    assert main(["show", str(folder / "c")]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_diff(three: tuple[Path, bytes], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = three

    def diff(one: str, other: str) -> tuple[int, list[str], str]:
        status = main(["diff", str(folder / one), str(folder / other)])
        out, error = capsys.readouterr()
        return status, out.splitlines(), error

    assert diff("a", "a") == (0, [], "")
    assert diff("a", "c") == (1, [
        "number: 1 -> 3", f"memory 0x1000 to 0x2000: {PAGE} bytes", f"memory 0x5000 to 0x7000: {2 * PAGE} bytes",
        f"memory {(1 << 32) + SIZES[1] - PAGE:#x} to {(1 << 32) + SIZES[1]:#x}: {PAGE} bytes",
        f"memory: {4 * PAGE} bytes in 3 ranges of pages differ"], "")
    spoil(folder / "c", lambda state: state.update(more="\x1b" * 100, number=1))
    status, lines, _ = diff("a", "c")
    assert status == 1 and lines[0].startswith(r"more: (not there) -> \x1b") and "…" in lines[0] and len(lines) == 5
    (folder / "b" / "state").unlink()
    status, lines, error = diff("a", "c")
    assert (status, lines) == (2, []) and error.startswith("stratovirt: snapshot diff: ") and error.count("\n") == 1
    assert diff("a", "nowhere")[0] == 2


@pytest.mark.parametrize("words", [
    [], ["hide"], ["show"], ["diff", "a"], ["merge"], ["create", "a"], ["create", "a", "--qmp", "x", "--timeout", "0"],
    ["create", "a", "--qmp", "x", "--diff"], ["create", "a", "--qmp", "x", "--base", "b"], ["show", "a", "b"],
    ["create", "a", "--qmp", "x", "--pau"],
    ["create", "a", "--qmp", "tcp:x"], ["create", "a", "--qmp", "unix:"], ["create", "a", "--qmp", "/nowhere/qmp"],
])
def test_wrong_words(words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        main(words)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(("snapshot", "--qmp")), caught.value


# -- create, against a machine that is a script


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Callable[..., list[Any]]]:
    """`machine(*answers)` serves one client at `tmp_path / "qmp"`: what it sends first, then an answer a request."""
    threads: list[threading.Thread] = []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "qmp"))
    listener.listen()

    def start(*answers: bytes) -> list[Any]:
        asked: list[Any] = []

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as file:
                connection.sendall(answers[0])
                decoder = json.JSONDecoder()
                for answer in answers[1:]:
                    data = b""
                    while True:
                        byte = file.read(1)
                        if not byte:
                            return
                        data += byte
                        try:
                            asked.append(decoder.raw_decode(data.decode())[0])
                        except ValueError:
                            continue
                        break
                    connection.sendall(answer)

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return asked

    yield start
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    listener.close()


GREETING, OK = b'{"QMP": {}}\r\n', b'{"return": {}}\r\n'
RUNNING = b'{"return": {"running": true}}\n'
EVENT = b'{"event": "STOP", "data": {}}\r\n'


@pytest.mark.parametrize(("running", "words", "more", "then"), [
    (True, [], {}, ["cont"]), (False, [], {}, []), (True, ["--paused"], {}, []),
    (True, ["--diff", "--base", "base"], {"base": "BASE"}, ["cont"]),
])
def test_create(machine: Callable[..., list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, running: bool,
                words: list[str], more: dict[str, str], then: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    status = json.dumps({"return": {"running": running, "status": "x"}}).encode() + b"\r\n"
    asked = machine(GREETING, EVENT + OK, status, EVENT + OK, EVENT + OK)
    assert main(["create", "new", "--qmp", f"unix:{tmp_path / 'qmp'}", *words]) == 0
    arguments = {"uri": f"file:{tmp_path / 'new'}", **{name: str(tmp_path / "base") for name in more}}
    assert asked == [{"execute": "qmp_capabilities"}, {"execute": "query-status"},
                     {"execute": "migrate", "arguments": arguments}, *({"execute": name} for name in then)]


@pytest.mark.parametrize(("answers", "problem"), [
    ((GREETING, OK, RUNNING, b'{"error": {"class": "GenericError", "desc": "No room"}}\n'), "No room"),
    ((GREETING, OK, RUNNING, b""), "closed the connection"),
    ((b"220 mail\n",), "no QMP socket"), ((b'{"a": 1}\n',), "no QMP socket"), ((b"",), "closed the connection"),
])
def test_machines_that_fail(machine: Callable[..., list[Any]], tmp_path: Path, answers: tuple[bytes, ...],
                            problem: str) -> None:
    machine(*answers)
    with pytest.raises(StratoVirtError, match=problem):
        main(["create", str(tmp_path / "new"), "--qmp", str(tmp_path / "qmp")])


def test_a_socket_that_another_client_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp_client, "GREETING_SECONDS", 0.05)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "qmp"))
        listener.listen()
        with pytest.raises(StratoVirtError, match="another client"):
            main(["create", str(tmp_path / "new"), "--qmp", str(tmp_path / "qmp")])
