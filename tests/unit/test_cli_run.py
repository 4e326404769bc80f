"""`stratovirt run`: what it makes of its options, and what it passes on."""

from __future__ import annotations

import os
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from stratovirt.cli import guest_console, run
from stratovirt.cli.command import parse
from stratovirt.config.vm import VmConfig
from stratovirt.errors import ConfigError


def made(work: Path, *arguments: str) -> VmConfig:
    own, command = run._split(list(arguments))
    return parse(run.command_line(run._parser().parse_args(own), command, work))


def test_options(tmp_path: Path) -> None:
    config = made(tmp_path, "--kernel", "k", "--initrd", "i", "--disk", "a.img", "--disk", "b.img:ro", "--memory", "1G",
                  "--cpus", "4", "--append", "more words", "--qmp", "/q")
    assert (config.kernel, config.initrd, config.memory_size, config.smp.cpus) == ("k", "i", 1 << 30, 4)
    assert [(drive.file, drive.readonly) for drive in config.drives.values()] == [("a.img", False), ("b.img", True)]
    assert config.kernel_cmdline.endswith("more words")
    assert "root=" not in config.kernel_cmdline
    assert config.qmp[0].path == "/q"
    assert config.serial is not None
    assert config.serial.kind == "stdio"


def test_a_disk_without_an_initrd_is_the_root(tmp_path: Path) -> None:
    assert "root=/dev/vda rw" in made(tmp_path, "--kernel", "k", "--disk", "a").kernel_cmdline
    assert "root=/dev/vda ro" in made(tmp_path, "--kernel", "k", "--disk", "a:ro").kernel_cmdline


@pytest.mark.parametrize(("words", "command"), [(["uname -a"], "uname -a"), (["echo", "a b"], "echo 'a b'")])
def test_a_command_goes_to_the_guest(tmp_path: Path, words: list[str], command: str) -> None:
    assert run._split(["--", *words]) == ([], command)
    config = made(tmp_path, "--kernel", "k", "--initrd", "i", "--", *words)
    assert guest_console.kernel_words(command) in config.kernel_cmdline


def test_a_long_command_goes_into_the_initramfs(tmp_path: Path) -> None:
    initrd = tmp_path / "i"
    initrd.write_bytes(b"12345")
    command = "echo " + "x" * 5000
    config = made(tmp_path, "--kernel", "k", "--initrd", str(initrd), "--", command)
    assert Path(config.initrd).read_bytes() == b"12345\0\0\0" + guest_console.command_archive(command)
    assert len(config.kernel_cmdline) < 2048


def test_without_a_kernel_the_newest_asset_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRATOVIRT_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="make setup"):
        made(tmp_path)
    for name in ("stock-elf-0/vmlinux", "initramfs.stock-0/initramfs.cpio"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    config = made(tmp_path)
    assert (config.kernel, config.initrd) == (f"{tmp_path}/stock-elf-0/vmlinux", f"{tmp_path}/initramfs.stock-0/initramfs.cpio")


@pytest.mark.parametrize("arguments", [
    ["--kernel", "k", "--disk", "a,b"], ["--kernel", "k", "--cpus", "0"], ["--kernel", "k", "--memory", "1"],
    ["--kernel", "k", "--", "x" * 5000], ["--kernel", "k", "--initrd", "/nonexistent/i", "--", "x" * 5000],
])
def test_bad_options(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(ConfigError):
        made(tmp_path, *arguments)


def machine(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a Python program where the machine would be."""
    monkeypatch.setattr(run, "_process", lambda _line, _warm: [sys.executable, "-c", code])


def test_output_and_status_are_the_command_s(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    machine(r"print('console\n\x1eb\n\x1eo b3V0Cg==\n\x1ee ZXJyCg==\n\x1ex 7 8 8\nrest')", monkeypatch)
    assert run.main(["--kernel", "k", "--initrd", "i", "--", "true"]) == 7
    out, err = capfd.readouterr()
    assert out == "out\n"
    assert "err\n" in err
    assert "console" in err


def test_a_machine_that_ends_too_early(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    machine("print('Kernel panic')", monkeypatch)
    assert run.main(["--kernel", "k", "--initrd", "i", "--", "true"]) == run.EXIT_FAILED
    out, err = capfd.readouterr()
    assert out == ""
    assert "the guest ended before it could start the command" in err


def test_a_machine_that_fails_has_said_why(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    machine("import sys; print('stratovirt: no', file=sys.stderr); sys.exit(1)", monkeypatch)
    assert run.main(["--kernel", "k", "--initrd", "i", "--", "true"]) == run.EXIT_FAILED
    assert capfd.readouterr().err == "stratovirt: no\n"


def test_without_a_command_the_status_is_the_machine_s(monkeypatch: pytest.MonkeyPatch) -> None:
    machine("import sys; sys.exit(3)", monkeypatch)
    assert run.main(["--kernel", "k", "--initrd", "i"]) == 3


def test_a_killed_machine_leaves_the_terminal_as_it_was() -> None:
    """A shell's terminal in place of ours, and a machine that sets it to raw and dies."""
    code = ("import os, signal, sys, tty\nfrom stratovirt.cli import run\n"
            "machine = 'import os, signal, tty; tty.setraw(0); os.kill(os.getpid(), signal.SIGKILL)'\n"
            "run._process = lambda line, warm: [sys.executable, '-c', machine]\n"
            "sys.exit(run.main(['--kernel', 'k', '--initrd', 'i']) != -signal.SIGKILL)")
    ours, terminal = os.openpty()
    before = termios.tcgetattr(terminal)
    source = str(Path(run.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], stdin=terminal, env={**os.environ, "PYTHONPATH": source}, check=False)
    after = termios.tcgetattr(terminal)
    os.close(ours)
    os.close(terminal)
    assert done.returncode == 0
    assert after == before
