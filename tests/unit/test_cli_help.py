"""Help, version, and the switch between a machine and everything else."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from stratovirt import __version__
from stratovirt.cli import command, help
from stratovirt.cli.options import OPTIONS
from stratovirt.config import later, options
from stratovirt.errors import ConfigError

SOURCE = Path(__file__).resolve().parents[2] / "src"


@pytest.mark.parametrize("word", ["-h", "-help", "--help"])
def test_help_lists_every_option(word: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert command.special(["-kernel", "k", word]) == 0
    printed = capfd.readouterr().out
    for option in OPTIONS.values():
        if option.section:
            assert f"\n  -{option.name}" in printed, option.name
    assert max(map(len, printed.splitlines())) <= 130


@pytest.mark.parametrize("word", ["-V", "-version", "--version"])
def test_version(word: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert command.special([word]) == 0
    assert capfd.readouterr().out == f"StratoVirt {__version__}\n"


def test_help_on_a_device_comes_from_its_declaration(capfd: pytest.CaptureFixture[str]) -> None:
    assert command.special(["-device", "virtio-blk-device,help"]) == 0
    printed = " ".join(capfd.readouterr().out.split())
    for key in options.DEVICES["virtio-blk-device"].keys:
        assert f"{key.name}=… {key.help}" in printed
    assert "a power of two from 4 to 1024; default 256" in printed


def test_lists_of_devices_and_objects(capfd: pytest.CaptureFixture[str]) -> None:
    assert command.special(["-device", "help"]) == 0
    printed = capfd.readouterr().out
    assert all(name in printed for name in (*options.DEVICES, *later.DEVICES))
    assert command.special(["-kernel", "k", "-object", "help"]) == 0
    printed = capfd.readouterr().out
    assert all(name in printed for name in (*options.OBJECTS, *later.OBJECTS))


def test_help_on_every_group(capfd: pytest.CaptureFixture[str]) -> None:
    for option, kinds in (("-device", {**options.DEVICES, **later.DEVICES}), ("-object", options.OBJECTS),
                          ("-chardev", options.CHARDEVS)):
        for kind in kinds:
            assert command.special([option, f"{kind},help"]) == 0
            assert capfd.readouterr().out.startswith(f"{option} {kind}: ")
    for option in ("-machine", "-drive"):
        assert command.special([option, "help"]) == 0
        assert capfd.readouterr().out.startswith(f"{option}: ")


def test_help_on_nonsense_is_an_error() -> None:
    with pytest.raises(ConfigError, match="nonsense"):
        command.special(["-device", "nonsense,help"])


@pytest.mark.parametrize("line", [[], ["-kernel", "k"], ["-append", "help"], ["-kernel", "k", "--", "-h"], ["-name", "run"],
                                  ["-drive", "file=,help=1"]])
def test_a_machine_is_not_special(line: list[str]) -> None:
    assert command.special(line) is None


def test_starting_a_machine_imports_no_help_and_no_subcommand() -> None:
    line = shlex.split(
        "-kernel k -smp 2 -m 1G -append a -initrd i -serial stdio -qmp unix:/q,server,nowait -drive id=d,file=f "
        "-device virtio-blk-device,id=b,drive=d -object rng-random,id=r,filename=/dev/urandom "
        "-device virtio-rng-device,id=g,rng=r")
    code = ("import sys\nfrom stratovirt.cli import command\n"
            f"assert command.special({line!r}) is None\ncommand.parse({line!r})\nprint(*sorted(sys.modules))")
    done = subprocess.run([sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(SOURCE)!r})\n{code}"],
                          capture_output=True, text=True, check=True)
    ours = {name for name in done.stdout.split() if name.startswith("stratovirt.")}
    assert ours == {"stratovirt.cli", "stratovirt.cli.command", "stratovirt.cli.grammar", "stratovirt.cli.health",
                    "stratovirt.cli.options", "stratovirt.cli.suboptions", "stratovirt.config", "stratovirt.config.options",
                    "stratovirt.config.schema", "stratovirt.config.vm", "stratovirt.errors"}


def test_value_text_says_default_and_status() -> None:
    group = options.DRIVE
    by_name = {key.name: help.value_text(key) for key in group.keys}
    assert by_name["file"] == "a path of at most 4096 bytes; required"
    assert by_name["format"] == "raw, qcow2; default raw; raw: works; other values: not supported yet"
    assert by_name["unit"] == "a number from 0 to 1; not supported yet"
