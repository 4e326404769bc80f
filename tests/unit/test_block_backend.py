"""The raw image behind a disk, and the source behind virtio-rng."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stratovirt.backends.block import RawImage
from stratovirt.backends.rng import RandomSource
from stratovirt.config.vm import DriveConfig, RngBackendConfig
from stratovirt.errors import ConfigError, HostError


def image(path: Path, **options) -> RawImage:
    return RawImage(DriveConfig("d", str(path), **options))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(number & 0xFF for number in range(16 * 512)))
    return path


@pytest.mark.parametrize(("size", "seen"), [(512, 512), (513, 512), (1023, 512), (1024, 1024), (1 << 40, 1 << 40)])
def test_the_size_is_whole_sectors(tmp_path: Path, size: int, seen: int) -> None:
    path = tmp_path / "disk.img"
    with open(path, "wb") as out:
        out.truncate(size)
    disk = image(path)
    assert disk.size == seen
    disk.close()


def test_what_is_no_image_is_refused_by_name(tmp_path: Path) -> None:
    small, fifo = tmp_path / "small", tmp_path / "fifo"
    small.write_bytes(b"x" * 511)
    os.mkfifo(fifo)
    for path, problem in ((small, "smaller than one sector"), (tmp_path, "Is a directory"), (tmp_path / "none", "No such file"),
                          (Path("/dev/null"), "not a disk image"), (small / "x", "Not a directory")):
        with pytest.raises(ConfigError, match=problem) as caught:
            image(path)
        assert caught.value.option == "-drive file"
        assert caught.value.value == str(path)
    with pytest.raises(ConfigError, match="not a disk image"):
        image(fifo)  # and it did not wait for a writer
    with pytest.raises(ConfigError, match="not a disk image"):
        image(fifo, readonly=True)


def test_refused_images_leave_no_descriptor_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for path in (tmp_path, Path("/dev/null"), tmp_path / "none"):
        with pytest.raises(ConfigError):
            image(path, readonly=True)
    assert len(os.listdir("/proc/self/fd")) == before


def test_direct_falls_back_only_when_it_was_not_asked_for(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def no_direct(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", no_direct)
    for choice in (None, False):
        disk = image(file, direct=choice)
        assert not disk.direct
        disk.close()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match="O_DIRECT"):
        image(file, direct=True)
    assert len(os.listdir("/proc/self/fd")) == before


class Trickle:
    """preadv or pwritev that moves a few bytes at a time, as a signal or a full pipe would make it."""

    def __init__(self, real: Callable[[int, Sequence[memoryview], int], int], steps: list[int]) -> None:
        self.real, self.steps, self.calls = real, steps, 0

    def __call__(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        step = self.steps[self.calls % len(self.steps)]
        self.calls += 1
        return self.real(fd, [views[0][:step]], offset)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=8),
       steps=st.lists(st.integers(1, 200), min_size=1, max_size=5),
       offset=st.integers(0, 1000))
def test_short_transfers_are_continued(file: Path, lengths: list[int], steps: list[int], offset: int) -> None:
    content = file.read_bytes()
    disk = image(file, direct=False)
    data = bytearray(sum(lengths))
    views, position = [], 0
    for length in lengths:
        views.append(memoryview(data)[position : position + length])
        position += length
    disk._transfer("read", Trickle(os.preadv, steps), list(views), offset, len(data))
    assert bytes(data) == content[offset : offset + len(data)]
    data[:] = bytes(255 - byte for byte in data)
    disk._transfer("write", Trickle(os.pwritev, steps), list(views), offset, len(data))
    assert file.read_bytes()[offset : offset + len(data)] == bytes(data)
    file.write_bytes(content)
    disk.close()


def test_more_buffers_than_one_system_call_takes(file: Path) -> None:
    disk = image(file, direct=False)
    data = bytearray(3000)
    disk.read([memoryview(data)[number : number + 1] for number in range(3000)], 0)
    assert bytes(data) == file.read_bytes()[:3000]
    disk.close()


def test_errors_name_the_file_and_the_place(file: Path) -> None:
    disk = image(file, direct=False)
    os.truncate(file, 1000)
    with pytest.raises(HostError, match=r"disk\.img at 0x400: the file ends there"):
        disk.read([memoryview(bytearray(512))], 1024)
    disk.close()
    readonly = image(file, readonly=True)
    with pytest.raises(HostError, match=r"write of .*disk\.img at 0x0: Bad file descriptor"):
        readonly.write([memoryview(b"x" * 512)], 0)
    readonly.close()


def test_a_readonly_image_can_be_opened_without_the_right_to_write(file: Path) -> None:
    disk = image(file, readonly=True, direct=None)
    data = bytearray(512)
    disk.read([memoryview(data)], 512)
    assert bytes(data) == file.read_bytes()[512:1024]
    disk.close()


# -- random bytes


def source(path: str) -> RandomSource:
    return RandomSource(RngBackendConfig("r", path))


def test_a_random_source_is_a_character_device(tmp_path: Path) -> None:
    regular, fifo = tmp_path / "file", tmp_path / "fifo"
    regular.write_bytes(b"not random")
    os.mkfifo(fifo)
    before = len(os.listdir("/proc/self/fd"))
    for path in (regular, fifo, tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError) as caught:
            source(str(path))
        assert caught.value.value == str(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_source_gives_what_it_has() -> None:
    random, empty = source("/dev/urandom"), source("/dev/null")
    data = bytearray(64)
    assert random.read_into([memoryview(data)[:32], memoryview(data)[32:]]) == 64
    assert bytes(data) != bytes(64)
    assert empty.read_into([memoryview(data)]) == 0
    random.close()
    empty.close()
