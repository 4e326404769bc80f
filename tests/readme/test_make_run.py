"""`make run`, the first command of the README, as a newcomer types it: on this machine, whatever its KVM can do."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Seconds. The first time it downloads packages; later a microVM takes 10 to 40, and waits for another lab to end.
DEADLINE = 900.0


def make_run(command: str | None = None, script: str | None = None, *more: str) -> subprocess.CompletedProcess[str]:
    words = ["make", "run", *more] if command is None else ["make", "run", *more, f"CMD={command}"]
    return subprocess.run(words, cwd=ROOT, input=script or "", capture_output=True, text=True, timeout=DEADLINE, check=False)


def test_it_prints_exactly_what_the_command_prints_in_a_guest_with_a_disk():
    done = make_run("uname -r && nproc && head -c 16 /dev/vda | od -An -c; echo to stderr >&2")
    assert done.returncode == 0, done.stderr
    release, processors, disk = done.stdout.splitlines()
    assert release != os.uname().release and release.count(".") >= 2
    assert processors == "1"
    assert disk.split() == [*"stratovirt", *"disk", "\\n"]
    assert "to stderr\n" in done.stderr


def test_the_same_on_arm64():
    done = make_run("uname -m && nproc && head -c 16 /dev/vda; echo to stderr >&2", None, "ARCH=aarch64")
    assert (done.returncode, done.stdout) == (0, "aarch64\n1\nstratovirt disk\n"), done.stderr
    assert "to stderr\n" in done.stderr


def test_the_exit_status_is_the_commands():
    # GNU make has one status for every failure, and names the command's in its last line; the script behind it ends with it.
    environment = {**os.environ, "STRATOVIRT_CMD": "echo '$HOME is' \"$HOME\"; exit 7"}
    done = subprocess.run(["lab/stratovirt-run"], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=DEADLINE, check=False)
    assert (done.returncode, done.stdout) == (7, "$HOME is /root\n"), done.stderr
    done = make_run("exit 7")
    assert done.returncode == 2 and "Error 7" in done.stderr and done.stdout == ""


def test_without_a_terminal_standard_input_is_the_script():
    done = make_run(script="read -r word rest </proc/version\necho $word from a guest\n")
    assert (done.returncode, done.stdout) == (0, "Linux from a guest\n"), done.stderr


def test_a_terminal_gets_a_shell():
    # A session of its own, as in a terminal window; the pty becomes its controlling terminal.
    process, terminal = pty.fork()
    if process == 0:
        try:
            os.chdir(ROOT)
            os.execvp("make", ["make", "run"])
        finally:
            os._exit(127)
    seen = b""
    steps = [(b"/ # ", b"echo $((6 * 7))=answer; tty; exit\r")]
    until = time.monotonic() + DEADLINE
    try:
        while time.monotonic() < until:
            if not select.select([terminal], [], [], 5)[0]:
                continue
            try:
                data = os.read(terminal, 1 << 16)
            except OSError:  # EIO: the last process on the terminal has ended
                break
            if not data:
                break
            seen += data
            if steps and steps[0][0] in seen:
                os.write(terminal, steps.pop(0)[1])
        else:
            raise AssertionError(f"no end: {seen!r}")
    except BaseException:
        os.killpg(process, signal.SIGKILL)
        raise
    finally:
        os.close(terminal)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert b"\n42=answer\r" in seen, seen
    assert status == 0, seen
