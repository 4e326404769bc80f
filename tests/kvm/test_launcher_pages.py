"""Machines that give pages back to what they share with their launcher: memory becomes less, and everything goes on."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from benches import ring_guest

from kvm.conftest import SOURCE, Program
from kvm.test_launcher import Warm, until
from kvm.test_qmp import Client
from kvm.test_snapshot import counter
from stratovirt.arch.x86_64 import layout
from stratovirt.native import compiled

pytestmark = pytest.mark.skipif(compiled is None or sys.version_info[:2] > (3, 13), reason="no compiled module that can")
GAVE = re.compile(r"gave back (\d+) pages")


@pytest.fixture
def usual(tmp_path: Path) -> Iterator[Warm]:
    launcher = Warm(tmp_path / "launcher.sock")
    yield launcher
    launcher.close()


@pytest.fixture
def hurried(tmp_path: Path) -> Iterator[Warm]:
    """A launcher whose machines do it all the time."""
    code = (f"import sys; sys.path.insert(0, {str(SOURCE)!r}); from stratovirt.launcher import pages; "
            "pages.FIRST_SECONDS = pages.LONGEST_SECONDS = pages._SLICE_SECONDS = 0.0005; "
            "from stratovirt.__main__ import main; sys.exit(main())")
    launcher = Warm(tmp_path / "launcher.sock", [sys.executable, "-IS", "-c", code])
    yield launcher
    launcher.close()


def given(log: Path) -> list[int]:
    return [int(count) for count in GAVE.findall(log.read_text())] if log.exists() else []


def own_pages(pid: int) -> int:
    """Of what is shared with the launcher, how many KiB are this process's own."""
    total, here = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-", line):
            here = "stratovirt-launcher" in line and " rw-p " in line
        elif here and line.startswith("Private_Dirty"):
            total += int(line.split()[1])
    return total


def test_a_launcher_learns_from_its_first_machines(tmp_path: Path) -> None:
    """Their answers need the launcher's own loop, and so nothing there may wait for them."""
    result = tmp_path / "result"
    code = f"""import sys; sys.path.insert(0, {str(SOURCE)!r})
from stratovirt.launcher import sample
end = sample.FirstMachines._end
def note(self, copies, problem=""):
    with open({str(result)!r}, "w") as file:
        file.write(problem or f"{{len(self._pids)}} machines")
    end(self, copies, problem)
sample.FirstMachines._end = note
from stratovirt.__main__ import main
sys.exit(main())"""
    launcher = Warm(tmp_path / "launcher.sock", [sys.executable, "-IS", "-c", code])
    try:
        until(result.exists)
    finally:
        launcher.close()
    assert result.read_text() == "3 machines"


def test_a_machine_at_rest_has_fewer_pages_of_its_own_and_does_everything(kernel, usual: Warm, tmp_path: Path) -> None:
    log, qmp, snap = tmp_path / "log", tmp_path / "qmp", tmp_path / "snap"
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    program = Program(["-machine", "microvm", "-m", "128", "-kernel", kernel(counter()), "-serial", "stdio", "-D", str(log),
                       "-qmp", f"unix:{qmp},server,nowait", "-drive", f"id=d,file={tmp_path / 'disk'},direct=off", "-device",
                       "virtio-blk-device,id=b,drive=d", "-object", "iothread,id=t"],
                      (*usual.prefix, "STRATOVIRT_LOG_LEVEL=debug"))
    try:
        program.wait_for("up\n..")
        until(lambda: len(given(log)) >= 2)
        assert given(log)[0] > 50, "an interpreter that has come back to where it was"
        (machine,) = usual.machines()
        shared = sum(int(line.split()[1]) for line in Path(f"/proc/{machine}/smaps_rollup").read_text().splitlines()
                     if line.startswith("Shared_"))
        assert 0 < own_pages(machine) < shared
        client = Client(qmp)
        assert client.ask("qmp_capabilities") == {}
        assert client.ask("stop") == {} and client.ask("query-status")["running"] is False
        assert client.ask("migrate", uri=f"file:{snap}") == {}
        assert client.ask("query-migrate")["status"] == "completed"
        assert client.ask("cont") == {}
        assert client.ask("system_reset") == {}
        client.wait_event("RESET")
        program.wait_for("up\n..")
        before = len(given(log))
        until(lambda: len(given(log)) > before)
        assert client.ask("quit") == {}
        client.close()
        assert program.finish()[0] == 0
    finally:
        program.close()
    assert sorted(path.name for path in snap.iterdir()) == ["memory", "state"]


@pytest.mark.parametrize("where", ["main loop", "iothread"])
def test_machines_at_work_lose_nothing(kernel, hurried: Warm, tmp_path: Path, where: str) -> None:
    """With all of them giving pages back as fast as they can."""
    (tmp_path / "disk").write_bytes(os.urandom(1 << 20))
    image = kernel(ring_guest.image(layout.slot(0).base, 8, 4096, 200, True))  # waits until all 8 have come, 200 times
    thread = ["-object", "iothread,id=t"] if where == "iothread" else []
    words = ["-machine", "microvm", "-m", "128", "-kernel", image, *thread, "-drive",
             f"id=d,file={tmp_path / 'disk'},readonly=on,direct=off", "-device",
             "virtio-blk-device,id=b,drive=d" + (",iothread=t" if thread else "")]
    for _ in range(3):
        programs = [Program([*words, "-D", str(tmp_path / f"log{number}")], (*hurried.prefix, "STRATOVIRT_LOG_LEVEL=debug"))
                    for number in range(4)]
        for program in programs:
            assert program.finish() == (0, "", "")
    assert sum(sum(given(tmp_path / f"log{number}")) for number in range(4)) > 0


def test_a_background_machine_gives_back_as_well(kernel: Callable[..., str], usual: Warm, tmp_path: Path) -> None:
    log, qmp = tmp_path / "log", tmp_path / "qmp"
    program = Program(["-machine", "microvm", "-m", "128", "-kernel", kernel(counter()), "-daemonize", "-D", str(log), "-qmp",
                       f"unix:{qmp},server,nowait"], (*usual.prefix, "STRATOVIRT_LOG_LEVEL=debug"))
    assert program.finish()[0] == 0
    until(lambda: len(given(log)) >= 1)
    client = Client(qmp)
    client.ask("qmp_capabilities")
    assert client.ask("quit") == {}
    client.close()
    assert given(log)[0] > 50
