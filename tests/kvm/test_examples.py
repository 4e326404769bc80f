"""Every example of README and docs that starts a machine, or asks the program something, as it stands there.

Files that an example names are made for it; `/run` and `/srv` lie in the test's directory.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvm.guests import Asm

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
DEADLINE = 60.0
PROSE = re.compile(r"`(stratovirt (?:-h|-version|-seccomp-report|-device [^`…]*help|doctor))`")


def blocks(text: str) -> Iterator[str]:
    """The indented blocks, without their indentation."""
    block: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("    "):
            block.append(line[4:])
        elif block:
            yield "\n".join(block)
            block = []


MACHINES = [(path.name, block) for path in DOCUMENTS for block in blocks(path.read_text())
            if re.search(r"^stratovirt .*-?-kernel ", block.replace("\\\n", " "), re.MULTILINE)]
QUESTIONS = sorted({match for path in DOCUMENTS for match in PROSE.findall(path.read_text())})


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with what examples name, and `stratovirt` for their path."""
    (tmp_path / "vmlinuz").write_bytes(Asm().text("it runs\n").power_off().kernel())
    (tmp_path / "initrd.img").write_bytes(bytes(4096))
    (tmp_path / "root.img").write_bytes(bytes(1 << 20))
    for name in ("bin", "run", "srv/shared"):
        (tmp_path / name).mkdir(parents=True)
    program = tmp_path / "bin/stratovirt"
    program.write_text(f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {str(ROOT / 'src')!r})\n"
                       "from stratovirt.__main__ import main\nsys.exit(main())\n")
    program.chmod(0o755)
    return tmp_path


def run(place: Path, script: str, accepted: tuple[int, ...] = (0,)) -> str:
    environment = {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "XDG_RUNTIME_DIR": str(place / "run")}
    done = subprocess.run(["sh", "-ec", script], cwd=place, env=environment, capture_output=True, text=True, timeout=DEADLINE,
                          stdin=subprocess.DEVNULL, check=False)
    assert done.returncode in accepted and "Traceback" not in done.stderr, (script, done.stdout, done.stderr)
    return done.stdout


@pytest.mark.parametrize(("document", "block"), MACHINES, ids=[f"{name}-{number}" for number, (name, _) in enumerate(MACHINES)])
def test_an_example_starts_a_machine(place: Path, document: str, block: str) -> None:
    script = re.sub(r"(?<![\w.])/(run|srv)/", rf"{place}/\1/", block)
    beside, ampersand, rest = script.partition(" &\n")
    if not ampersand:
        assert "it runs" in run(place, script)
        return
    socket = Path(re.search(r"--socket-path=(\S+)", beside)[1])  # type: ignore[index]
    if not os.access(beside.split()[0], os.X_OK):
        pytest.skip(f"no {beside.split()[0]}: Debian's qemu-system-common")
    if os.geteuid():
        pytest.skip("virtiofsd wants root")
    with subprocess.Popen(beside, shell=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + DEADLINE
        while not socket.exists():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        assert "it runs" in run(place, rest)
        process.wait(DEADLINE)  # it ends with its front end


@pytest.mark.parametrize("command", QUESTIONS)
def test_a_command_in_the_text_answers(place: Path, command: str) -> None:
    # the doctor has a status of its own for a machine that cannot run Linux guests
    assert run(place, command, (0, 1) if command == "stratovirt doctor" else (0,)).count("\n") > 3


def test_the_examples_are_found() -> None:
    assert {name for name, _ in MACHINES} >= {"README.md"} and len(MACHINES) >= 3
    assert "stratovirt -h" in QUESTIONS
