"""Bad input to the program itself: status 1, one line on stderr that names it, nothing on stdout, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"


def stratovirt(work: Path, *arguments: str | bytes) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    return subprocess.run([sys.executable, "-m", "stratovirt", *arguments], cwd=work, env=environment, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=60)


# (arguments, what the error must hold); files are made by `work`. With "kvm" in the first place: only where there is KVM.
CASES: list[tuple[list[str | bytes], tuple[str, ...]]] = [
    ([], ("-kernel", "kernel file is required")),
    (["-kernel", "k", "-colour", "red"], ("-colour", "wasn't expected")),
    (["-kernel", "k", "-m", "1G", "-m", "2G"], ("-m", "2G", "more than once")),
    (["-kernel", "k", "-m", "64M"], ("-m", "64M", "too small", "128M")),
    (["-kernel", "k", "-smp", "255"], ("-smp", "255", "254")),
    (["-kernel", "k", "-device", "virtio-blk-device,id=a,drive=b"], ("drive", "b")),
    (["-kernel", b"\xff\nk", "-foo"], ("-foo",)),
    (["-kernel", b"\xff\n\x1b[2J"], ("-kernel",)),
    (["kvm", "-kernel", "missing"], ("-kernel missing", "No such file or directory")),
    (["kvm", "-kernel", "directory"], ("-kernel directory", "directory")),
    (["kvm", "-kernel", "empty"], ("-kernel empty",)),
    (["kvm", "-kernel", "text"], ("-kernel text",)),
    (["-kernel", "k", "-qmp", f"unix:{'q' * 200},server,nowait"], ("-qmp", "too long")),
    (["-kernel", "k", "-qmp", "unix:missing/q,server,nowait"], ("-qmp missing/q", "No such file or directory")),
    (["-kernel", "k", "-qmp", "unix:text,server,nowait"], ("-qmp text", "taken")),
    (["-kernel", "k", "-pidfile", "text"], ("-pidfile text", "exists already")),
    (["-kernel", "k", "-D", "missing/log"], ("missing/log", "No such file or directory")),
    (["-kernel", "k", "-daemonize", "-pidfile", "missing/pid"], ("-pidfile missing/pid", "No such file or directory")),
    (["kvm", "-kernel", "missing", "-qmp", "unix:q,server,nowait", "-pidfile", "pid", "-daemonize"], ("-kernel missing",)),
    (["-device", "nonsense,help"], ("nonsense",)),
    (["run", "--kernel", "k", "--cpus", "many"], ("-smp many",)),
]


@pytest.mark.parametrize(("arguments", "parts"), CASES, ids=[repr(case[0])[:60] for case in CASES])
def test_one_error_and_nothing_left(arguments: list[str | bytes], parts: tuple[str, ...], tmp_path: Path) -> None:
    if arguments[:1] == ["kvm"]:
        if not os.access("/dev/kvm", os.R_OK | os.W_OK):
            pytest.skip("no /dev/kvm to use")
        arguments = arguments[1:]
    (tmp_path / "directory").mkdir()
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_bytes(b"no kernel at all\n" * 1000)
    before = sorted(os.listdir(tmp_path))
    done = stratovirt(tmp_path, *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("stratovirt: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.strip("\n").isprintable()
    for part in parts:
        assert part in done.stderr
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "text").stat().st_size == 17_000


def test_version_and_help(tmp_path: Path) -> None:
    done = stratovirt(tmp_path, "--version")
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    assert done.stdout.startswith("StratoVirt ")
    done = stratovirt(tmp_path, "-kernel", "k", "-help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "-kernel FILE" in done.stdout


def test_help_goes_to_an_ascii_terminal_and_a_closed_pipe(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONIOENCODING": "ascii"}
    line = [sys.executable, "-m", "stratovirt", "-h"]
    assert subprocess.run(line, env=environment, capture_output=True, check=True).stderr == b""
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(line, env=environment, stdout=write_end, stderr=subprocess.PIPE, check=False)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, b"")
