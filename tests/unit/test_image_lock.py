"""Image locks: one writer or any number of readers, in the bytes that QEMU's tools look at too."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from stratovirt.backends import image_lock
from stratovirt.backends.block import RawImage
from stratovirt.config.vm import DriveConfig
from stratovirt.errors import ConfigError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    return path


def image(path: Path, readonly: bool = False, direct: bool | None = False) -> RawImage:
    return RawImage(DriveConfig("d", str(path), readonly, direct))


def test_readers_share_and_a_writer_does_not(path: Path) -> None:
    readers = [image(path, readonly=True) for _ in range(3)]
    with pytest.raises(ConfigError, match=f"Failed to get write lock on file: {path}"):
        image(path)
    for reader in readers:
        reader.close()
    writer = image(path)
    with pytest.raises(ConfigError, match="Failed to get write lock"):
        image(path)
    with pytest.raises(ConfigError, match="Failed to get read lock"):
        image(path, readonly=True)
    writer.close()
    image(path, readonly=True).close()


def test_an_attempt_that_failed_leaves_no_lock_and_no_descriptor(path: Path) -> None:
    writer = image(path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(ConfigError):
            image(path)
    assert len(os.listdir("/proc/self/fd")) == before
    writer.close()
    image(path).close()


@pytest.mark.parametrize("direct", [False, None])
def test_another_descriptor_that_is_closed_takes_no_lock_with_it(path: Path, direct: bool | None) -> None:
    writer = image(path, direct=direct)
    os.close(os.open(path, os.O_RDWR))
    with pytest.raises(ConfigError):
        image(path)
    writer.close()


def locked_bytes(path: Path) -> set[int]:
    """The bytes that somebody has locked, as another process's descriptor finds them."""
    fd = os.open(path, os.O_RDWR)
    found = set()
    for byte in range(90, 220):
        answer = fcntl.fcntl(fd, 36, struct.pack("=hh4xqqi4x", fcntl.F_WRLCK, 0, byte, 1, 0))
        if struct.unpack_from("=h", answer)[0] != fcntl.F_UNLCK:
            found.add(byte)
    os.close(fd)
    return found


def test_the_bytes_are_qemus(path: Path) -> None:
    writer = image(path)
    assert locked_bytes(path) == {100, 101, 201, 203}
    writer.close()
    reader = image(path, readonly=True)
    assert locked_bytes(path) == {100, 201, 203}
    reader.close()
    assert locked_bytes(path) == set()


@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="no qemu-io on this machine: apt-get install qemu-utils")
def test_qemu_respects_our_locks(path: Path) -> None:
    def qemu(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["qemu-io", "-f", "raw", *options, "-c", "read 0 512", str(path)], capture_output=True, text=True,
                              check=False)

    writer = image(path)
    assert 'Failed to get "write" lock' in qemu().stderr
    assert qemu("-r").returncode == 0  # qemu-io does not mind a writer when it only reads, and so are its own locks
    writer.close()
    reader = image(path, readonly=True)
    assert 'Failed to get "write" lock' in qemu().stderr
    assert qemu("-r").returncode == 0
    reader.close()
    assert qemu().returncode == 0


@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="no qemu-io on this machine: apt-get install qemu-utils")
def test_we_respect_qemus_locks(path: Path) -> None:
    command = ["qemu-io", "-f", "raw", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as qemu:
        assert qemu.stdin is not None and qemu.stdout is not None
        qemu.stdin.write("read 0 512\n")
        qemu.stdin.flush()
        while "read 512/512" not in qemu.stdout.readline():
            assert qemu.poll() is None
        with pytest.raises(ConfigError, match="Failed to get write lock"):
            image(path)
        with pytest.raises(ConfigError, match="Failed to get read lock"):
            image(path, readonly=True)
        qemu.stdin.write("quit\n")
        qemu.stdin.close()
        assert qemu.wait(30) == 0
    image(path).close()


def test_an_exclusive_lock_of_a_stranger_counts(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    fcntl.fcntl(fd, 37, struct.pack("=hh4xqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
    with pytest.raises(ConfigError, match="Failed to get write lock"):
        image(path)
    os.close(fd)


def test_a_file_system_without_locks_gives_a_warning(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def refuse(*_: object) -> bytes:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(image_lock.fcntl, "fcntl", refuse)
    monkeypatch.setattr(image_lock.log, "warn", said.append)
    image(path).close()
    assert len(said) == 1 and str(path) in said[0] and "No locks available" in said[0]


def test_other_failures_are_errors(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(image_lock.fcntl, "fcntl", refuse)
    with pytest.raises(ConfigError, match="cannot be locked: Input/output error"):
        image(path)
