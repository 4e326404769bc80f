"""The scripts that build guest assets: archives, kernels taken out of bzImages, and a cache that is whole or absent."""

from __future__ import annotations

import bz2
import lzma
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from guest import bootport, bzimage, cache  # noqa: E402
from guest.cpio import Archive  # noqa: E402
from guest.microvm_kernel import unmet  # noqa: E402

from stratovirt.cli.guest_console import command_archive  # noqa: E402

ELF = b"\x7fELF" + bytes(range(256)) * 64


def unpack(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Name → (mode, content) of a newc archive, or of several that follow each other."""
    found = {}
    position = 0
    while position < len(archive):
        if archive[position : position + 1] == b"\0":
            position += 1
            continue
        assert archive[position : position + 6] == b"070701", position
        fields = [int(archive[position + 6 + 8 * n : position + 14 + 8 * n], 16) for n in range(13)]
        start = position + 110
        name = archive[start : start + fields[11] - 1].decode()
        start += fields[11]
        start += -start % 4
        data = archive[start : start + fields[6]]
        position = start + fields[6]
        position += -position % 4
        if name != "TRAILER!!!":
            found[name] = (fields[1], data)
    return found


def image(payload: bytes, *, setup_sectors: int = 4, magic: bytes = b"HdrS", version: int = 0x20F) -> bytes:
    header = bytearray((setup_sectors + 1) * 512)
    header[0x1F1] = setup_sectors
    header[0x202:0x206] = magic
    struct.pack_into("<H", header, 0x206, version)
    struct.pack_into("<II", header, 0x248, 64, len(payload))
    return bytes(header) + bytes(64) + payload + bytes(512)


def test_an_archive_holds_what_was_put_in_with_its_directories() -> None:
    archive = Archive()
    archive.file("a/b/run", b"#!/bin/sh\n", 0o755)
    archive.symlink("a/link", "b/run")
    archive.character_device("dev/console", 5, 1)
    archive.directory("a/b")
    data = archive.finish()
    assert len(data) % 512 == 0
    found = unpack(data)
    assert list(found) == ["a", "a/b", "a/b/run", "a/link", "dev", "dev/console"]
    assert found["a/b/run"] == (0o100755, b"#!/bin/sh\n")
    assert found["a/link"] == (0o120777, b"b/run")
    assert found["dev/console"][0] == 0o020600


def test_a_command_archive_may_follow_an_initramfs() -> None:
    first = Archive()
    first.file("init", b"odd")
    found = unpack(first.finish() + command_archive("echo hello"))
    assert found["init"][1] == b"odd"
    assert found["cmd"] == (0o100644, b"echo hello")


@pytest.mark.parametrize(
    "payload",
    [
        zlib.compress(ELF, wbits=31) + struct.pack("<I", len(ELF)),
        lzma.compress(ELF, lzma.FORMAT_XZ) + struct.pack("<I", len(ELF)),
        lzma.compress(ELF, lzma.FORMAT_ALONE) + struct.pack("<I", len(ELF)),
        bz2.compress(ELF) + struct.pack("<I", len(ELF)),
    ],
    ids=["gzip", "xz", "lzma", "bzip2"],
)
def test_the_kernel_comes_out_of_a_bzimage(payload: bytes) -> None:
    assert bzimage.extract_elf(image(payload)) == ELF


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (image(b"", magic=b"XXXX"), "not a bzImage"),
        (b"short", "not a bzImage"),
        (image(zlib.compress(ELF, wbits=31), version=0x203), "2.03"),
        (image(b"??????"), "unknown kernel compression"),
        (image(zlib.compress(b"text", wbits=31)), "not ELF"),
        (image(zlib.compress(ELF, wbits=31))[:3000], "after the end"),
    ],
)
def test_what_is_no_bzimage_is_told(data: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        bzimage.extract_elf(data)


def test_the_boot_port_program_is_a_runnable_executable(tmp_path: Path) -> None:
    path = tmp_path / "bootport"
    path.write_bytes(bootport.program())
    path.chmod(0o755)
    # 0 where it may use I/O ports (0x3ff is a serial port's scratch register, if anything), else EPERM or ENOSYS.
    assert subprocess.run([str(path)], check=False).returncode in (0, 1, 38)


def test_a_cache_entry_is_built_once_and_named_after_its_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRATOVIRT_CACHE", str(tmp_path / "cache"))
    calls = []

    def build(target: Path) -> None:
        calls.append(target)
        (target / "file").write_text("content")

    first = cache.entry("thing", {"a": "1", "b": b"2"}, build)
    assert cache.entry("thing", {"b": "2", "a": b"1"}, build) == first
    assert cache.entry("thing", {"a": "12", "b": b""}, build) != first
    assert len(calls) == 2
    assert (first / "file").read_text() == "content"


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRATOVIRT_CACHE", str(tmp_path / "cache"))

    def fail(target: Path) -> None:
        (target / "half").write_text("")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        cache.entry("thing", {}, fail)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["locks"]


def test_two_processes_build_an_entry_once(tmp_path: Path) -> None:
    script = (
        "import sys, os; from pathlib import Path; from guest import cache\n"
        "def build(target):\n"
        "    with open(sys.argv[1], 'a') as log: log.write('built\\n')\n"
        "    os.sched_yield(); (target / 'file').write_text('x' * 100000)\n"
        "folder = cache.entry('thing', {}, build)\n"
        "assert len((folder / 'file').read_text()) == 100000\n"
    )
    environment = {**os.environ, "STRATOVIRT_CACHE": str(tmp_path / "cache")}
    log = tmp_path / "log"
    running = [subprocess.Popen([sys.executable, "-c", script, str(log)], env=environment, cwd=ROOT) for _ in range(4)]
    assert [process.wait(60) for process in running] == [0, 0, 0, 0]
    assert log.read_text() == "built\n"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"STRATOVIRT_CACHE": "/own", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/own"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/stratovirt"),
        ({"HOME": "/h"}, "/h/.cache/stratovirt"),
        ({"STRATOVIRT_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/stratovirt"),
    ],
)
def test_where_the_cache_is(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STRATOVIRT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache.root() == Path(expected)


def test_lines_of_a_fragment_that_had_no_effect_are_found() -> None:
    fragment = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=3\n# words\nCONFIG_D=y\n"
    assert unmet(fragment, "CONFIG_A=y\nCONFIG_C=3\nCONFIG_D=y\n") == []
    assert unmet(fragment, "CONFIG_A=m\nCONFIG_B=y\nCONFIG_D=y\n") == ["CONFIG_A=y", "CONFIG_B=n", "CONFIG_C=3"]


def test_the_applets_of_a_busybox_are_read_from_its_table() -> None:
    from guest import initramfs

    names = [b"[", b"[[", b"acpid", b"cat", b"run-parts", b"xz_2.0+x"]
    program = ELF + b"zz\0" + b"".join(name + b"\0" for name in names) + b"\0" + ELF
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"busybox.{os.getpid()}"
    path.write_bytes(program)
    try:
        assert initramfs.applets(path) == [name.decode() for name in names]
        path.write_bytes(ELF)
        with pytest.raises(ValueError, match="table of applets"):
            initramfs.applets(path)
    finally:
        path.unlink()
