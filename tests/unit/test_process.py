"""The process around a machine: pid file, signals, going to the background. What forks or is killed is a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stratovirt import process
from stratovirt.errors import ConfigError, HostError
from stratovirt.process import PidFile

SOURCE = Path(__file__).resolve().parents[2] / "src"


def run(code: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SOURCE)}, text=True, timeout=30,
                          capture_output=True, check=False, **options)


# -- pid file


def test_the_pid_file_holds_the_number_alone_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    pid_file = PidFile(str(path))
    assert path.read_text() == str(os.getpid())
    assert path.stat().st_mode & 0o777 == 0o600
    pid_file.remove()
    assert not path.exists()
    pid_file.remove()  # somebody else removed it: said in the log, no more


def test_a_pid_file_must_not_exist(tmp_path: Path) -> None:
    path, link = tmp_path / "pid", tmp_path / "link"
    path.write_text("4711")
    link.symlink_to(tmp_path / "elsewhere")
    for taken in (path, link):
        with pytest.raises(ConfigError, match="exists already") as caught:
            PidFile(str(taken))
        assert caught.value.option == "-pidfile"
    assert path.read_text() == "4711"
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(ConfigError, match="No such file"):
        PidFile(str(tmp_path / "none" / "pid"))
    with pytest.raises(ConfigError):
        PidFile("nul\0byte")


def test_a_pid_file_that_cannot_be_written_is_an_error_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pid"
    real = os.open
    monkeypatch.setattr(process.posix, "open", lambda name, flags, mode: (os.close(real(name, flags, mode)),
                                                                       real("/dev/full", os.O_WRONLY))[1])
    with pytest.raises(ConfigError, match="No space left"):
        PidFile(str(path))
    assert not path.exists()


def test_a_forked_child_does_not_remove_its_parents_pid_file(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    done = run(f"""
import os
from stratovirt.process import PidFile
pid_file = PidFile({str(path)!r})
if os.fork() == 0:
    pid_file.remove()
    os._exit(0)
os.wait()
assert os.path.exists({str(path)!r})
pid_file.remove()
""")
    assert (done.returncode, done.stderr) == (0, "")
    assert not path.exists()


# -- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_hits_another_thread_still_wakes_the_loop(number: int) -> None:
    done = run(f"""
import os, signal, sys, threading
from stratovirt.loop import EventLoop
from stratovirt.process import handle_signals
loop = EventLoop()
def end(number):
    print("ended by", number)
    loop.stop()
handle_signals(loop, end)
thread = threading.Thread(target=threading.Event().wait, daemon=True)
thread.start()
loop.call_soon(lambda: signal.pthread_kill(thread.ident, {int(number)}))
loop.run()
sys.stdout.flush()
os._exit(0)
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"ended by {int(number)}\n", "")


def test_a_broken_pipe_is_an_error_of_the_write(tmp_path: Path) -> None:
    done = run("""
import os
from stratovirt.loop import EventLoop
from stratovirt.process import handle_signals
handle_signals(EventLoop(), lambda number: None)
read, write = os.pipe()
os.close(read)
try:
    os.write(write, b"x")
except BrokenPipeError:
    print("told")
""")
    assert (done.returncode, done.stdout) == (0, "told\n")


# -- the background


BACKGROUND = """
import os, sys, time
from stratovirt.process import daemonize
parent = os.getpid()
report = daemonize()
with open(sys.argv[1], "w") as out:
    out.write(f"{os.getpid()} {os.getsid(0)} {os.getpgid(0)} {parent}")
{then}
"""


def background(tmp_path: Path, then: str) -> tuple[subprocess.CompletedProcess[str], list[int]]:
    out = tmp_path / "out"
    code = BACKGROUND.replace("{then}", then)
    done = subprocess.run([sys.executable, "-c", code, str(out)], env={**os.environ, "PYTHONPATH": str(SOURCE)}, text=True,
                          timeout=30, capture_output=True, check=False)
    return done, [int(word) for word in out.read_text().split()]


def test_the_parent_waits_until_the_guest_runs(tmp_path: Path) -> None:
    done, (pid, session, group, parent) = background(tmp_path, "report('')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert pid != parent
    assert session == group != pid  # a session of its own, which it does not lead: no terminal ever


def test_the_parent_tells_why_the_guest_does_not_run(tmp_path: Path) -> None:
    done, _ = background(tmp_path, "report('stratovirt: no such kernel\\n')")
    assert (done.returncode, done.stderr) == (1, "stratovirt: no such kernel\n")


@pytest.mark.parametrize("then", ["os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_the_parent_notices_a_silent_death(tmp_path: Path, then: str) -> None:
    done, _ = background(tmp_path, then)
    assert done.returncode == 1
    assert "ended before the guest ran" in done.stderr


def test_the_background_process_lets_go_of_its_callers_files(tmp_path: Path) -> None:
    """The caller's pipes close although the process lives on: otherwise whoever reads them waits for ever."""
    done, (pid, *_) = background(tmp_path, "report(''); time.sleep(60)")
    os.kill(pid, signal.SIGKILL)
    assert done.returncode == 0


def test_no_second_process_left_is_told_to_the_caller(tmp_path: Path) -> None:
    done = run("""
import posix
from stratovirt.process import daemonize
real, calls = posix.fork, []
def fork():
    calls.append(1)
    if len(calls) == 2:
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return real()
posix.fork = fork
daemonize()
""")
    assert done.returncode == 1
    assert done.stderr == "stratovirt: fork for -daemonize: Resource temporarily unavailable\n"


def test_no_process_left_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(process.posix, "fork", refuse)
    with pytest.raises(HostError, match="fork for -daemonize"):
        process.daemonize()
