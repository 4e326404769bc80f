"""The program around a guest: signals, the background, and one line for everything that cannot be."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from kvm.guests import Asm, hello


def busy() -> bytes:
    """Says that it runs, and runs."""
    asm = Asm().text("running\n")
    again = asm.label()
    return asm.jmp(again).kernel()


def idle() -> bytes:
    """Says that it runs, and sleeps with interrupts on."""
    return Asm().set_stack().text("running\n").sti().halt_forever().kernel()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 30
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("guest", [busy, idle])
def test_a_signal_ends_the_program_cleanly(launch, tmp_path: Path, number: int, guest) -> None:
    socket, pid = tmp_path / "qmp", tmp_path / "pid"
    program = launch(guest(), "-qmp", f"unix:{socket},server,nowait", "-pidfile", str(pid))
    program.wait_for("running\n")
    assert int(pid.read_text()) == program.process.pid
    assert socket.exists()
    program.process.send_signal(number)
    status, _, error = program.finish()
    assert status == 0
    assert "Traceback" not in error
    assert not socket.exists()
    assert not pid.exists()


def test_a_signal_before_the_guest_runs(launch) -> None:
    program = launch(idle(), "-S")
    time.sleep(0.3)
    program.process.send_signal(signal.SIGTERM)
    status, out, error = program.finish()
    assert (status, out) in ((0, ""), (-signal.SIGTERM, ""))
    assert "Traceback" not in error


# -- the background


def test_daemonize_returns_when_the_guest_runs(launch, tmp_path: Path) -> None:
    console, pid_file, log = tmp_path / "console", tmp_path / "pid", tmp_path / "log"
    started = launch(idle(), "-daemonize", "-pidfile", str(pid_file), "-D", str(log), serial=f"file,path={console}")
    status, out, error = started.finish()
    assert (status, out, error) == (0, "", "")
    pid = int(pid_file.read_text())
    try:
        assert pid != started.process.pid
        assert is_alive(pid)
        assert pid_file.stat().st_mode & 0o777 == 0o600
        assert os.getsid(pid) != os.getsid(0)
        for fd in (0, 1, 2):
            assert os.readlink(f"/proc/{pid}/fd/{fd}") == "/dev/null"
        deadline = time.monotonic() + 30
        while console.read_bytes() != b"running\n":
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_for_end(pid)
    assert not pid_file.exists()


def test_daemonize_tells_why_there_is_no_guest(launch, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    launched = launch(None, "-kernel", str(tmp_path / "none"), "-daemonize", "-pidfile", str(pid_file), serial="")
    status, out, error = launched.finish()
    assert (status, out) == (1, "")
    assert "-kernel" in error
    assert "No such file" in error
    assert error.count("\n") == 1
    assert not pid_file.exists()


def test_a_pid_file_that_exists_is_left_alone(launch, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    pid_file.write_text("1")
    status, out, error = launch(hello(), "-pidfile", str(pid_file)).finish()
    assert (status, out) == (1, "")
    assert "-pidfile" in error
    assert pid_file.read_text() == "1"


# -- what cannot be


def expect_error(launched, *words: str) -> None:
    status, out, error = launched.finish()
    assert (status, out) == (1, ""), error
    assert error.startswith("stratovirt: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error


@pytest.mark.parametrize(("content", "words"), [
    (None, ("No such file",)),
    (b"", ("empty",)),
    (b"#!/bin/sh\necho hello\n", ()),
    (b"\x7fELF" + bytes(10), ()),
    (hello()[:100], ()),
    (hello()[:0x1001], ()),
    (b"\x1f\x8b\x08" + bytes(100), ()),
])
def test_kernels_that_are_none(launch, tmp_path: Path, content: bytes | None, words: tuple[str, ...]) -> None:
    path = tmp_path / "image"
    if content is not None:
        path.write_bytes(content)
    expect_error(launch(None, "-kernel", str(path)), "-kernel", str(path), *words)


def test_a_directory_is_no_kernel_and_no_disk(launch, tmp_path: Path) -> None:
    expect_error(launch(None, "-kernel", str(tmp_path)), "-kernel", "a directory")
    expect_error(launch(hello(), "-drive", f"file={tmp_path},id=d,if=none", "-device", "virtio-blk-device,drive=d,id=b"),
                 "-drive file", "directory")


def test_a_fifo_does_not_hang(launch, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    expect_error(launch(None, "-kernel", str(tmp_path / "fifo")), "not a regular file")


def test_a_kernel_larger_than_memory(launch, tmp_path: Path) -> None:
    image = bytearray(Asm().raw(bytes(64)).kernel())
    load = image.index((1).to_bytes(4, "little") + (5).to_bytes(4, "little"))
    image[load + 40 : load + 48] = (200 << 20).to_bytes(8, "little")  # p_memsz
    expect_error(launch(bytes(image)), "-kernel")


def test_an_initrd_larger_than_memory(launch, tmp_path: Path) -> None:
    path = tmp_path / "initrd"
    with open(path, "wb") as file:
        file.write(b"070701")
        file.truncate(200 << 20)
    expect_error(launch(hello(), "-initrd", str(path)), "-initrd")


def test_more_memory_than_the_host_can_map(launch) -> None:
    image = hello()
    status, out, error = launch(image, "-m", "500G").finish()
    assert status in (0, 1)  # the host decides; it may well map that much and use none of it
    assert (status == 0) == (out == "hello\n")
    assert "Traceback" not in error


def without_kvm(command: str) -> tuple[str, ...]:
    """A name space of its own in which /dev/kvm is something else."""
    return ("unshare", "--mount", "sh", "-c", f'{command} && exec "$@"', "sh")


def can_unshare() -> bool:
    command = [*without_kvm("mount --bind /dev/null /dev/kvm"), "true"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(("command", "words"), [
    ("mount -t tmpfs none /dev", ("cannot open /dev/kvm: No such file or directory", "doctor")),
    ("mount --bind /dev/null /dev/kvm", ("not a KVM device",)),
])
def test_without_kvm_there_is_one_line_that_helps(launch, command: str, words: tuple[str, ...]) -> None:
    if not can_unshare():
        pytest.skip("no right to make a mount name space")
    expect_error(launch(hello(), prefix=without_kvm(command), serial=""), *words)


def test_without_the_right_to_open_kvm(launch) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become somebody else")
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    if subprocess.run([*nobody, "test", "-r", __file__], check=False).returncode:
        pytest.skip("others cannot read the source")
    with tempfile.TemporaryDirectory() as folder:  # those of pytest are closed to others
        os.chmod(folder, 0o755)
        path = Path(folder, "kernel")
        path.write_bytes(hello())
        expect_error(launch(None, "-kernel", str(path), prefix=nobody, serial=""), "/dev/kvm: Permission denied", "group")
