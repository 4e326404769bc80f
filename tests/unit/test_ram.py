"""Guest memory that is a file: what is made, what is refused, and who sees what."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from stratovirt.cli.command import parse
from stratovirt.config.vm import RamConfig, VmConfig
from stratovirt.errors import ConfigError, HostError
from stratovirt.hostmap import PAGE_SIZE, HostMapping, release
from stratovirt.machine import ram
from stratovirt.machine.ram import create_regions
from stratovirt.memory import GuestMemory, RamRegion

MIB = 1 << 20
RANGES = [(0, 2 * MIB), (1 << 32, MIB)]


def create(config: RamConfig, threads: int = 1) -> list[RamRegion]:
    return create_regions(config, RANGES, threads)


def other_process(region: RamRegion) -> mmap.mmap:
    """What somebody sees who was given descriptor and offset."""
    return mmap.mmap(region.fd, region.size, flags=mmap.MAP_SHARED, offset=region.fd_offset)


def config_of(line: str) -> VmConfig:
    return parse(["-kernel", "k", *line.split()])


def test_a_memfd_is_one_file_with_the_regions_behind_each_other() -> None:
    low, high = create(RamConfig("memfd", share=True))
    assert low.fd == high.fd >= 0
    assert (low.fd_offset, high.fd_offset) == (0, 2 * MIB)
    assert os.fstat(low.fd).st_size == 3 * MIB
    assert not os.get_inheritable(low.fd)
    for region, word in ((low, b"low"), (high, b"high")):
        seen = other_process(region)
        region.host.view[5 : 5 + len(word)] = word
        assert seen[5 : 5 + len(word)] == word
        seen[PAGE_SIZE] = 7
        assert region.host.view[PAGE_SIZE] == 7
    assert GuestMemory([low, high]).shared


def test_a_discard_of_shared_memory_is_seen_by_all_and_gives_the_pages_back() -> None:
    low, _ = create(RamConfig("memfd", share=True))
    seen = other_process(low)
    low.host.view[:] = b"x" * low.size
    used = os.fstat(low.fd).st_blocks
    low.host.discard()
    assert os.fstat(low.fd).st_blocks < used
    assert not any(seen[:])


def test_a_released_part_of_shared_memory_leaves_the_rest(tmp_path: Path) -> None:
    low, _ = create(RamConfig("file", path=str(tmp_path), share=True))
    low.host.view[: 4 * PAGE_SIZE] = b"x" * 4 * PAGE_SIZE
    release(low.host.view[PAGE_SIZE : 3 * PAGE_SIZE], True)
    assert bytes(low.host.view[: 4 * PAGE_SIZE : PAGE_SIZE]) == b"x\0\0x"


def test_no_part_of_a_huge_page_is_released() -> None:
    host = HostMapping(4 * MIB, page_size=2 * MIB)
    host.view[:] = b"x" * host.size
    release(host.view[:PAGE_SIZE], page_size=MIB)
    assert host.view[0] == ord("x")


def test_where_holes_cannot_be_made_zeroes_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    from stratovirt import hostmap

    low, _ = create(RamConfig("memfd", share=True))
    low.host.view[:] = b"x" * low.size
    monkeypatch.setattr(hostmap, "_libc_madvise", lambda *_: hostmap._MAP_FAILED)
    monkeypatch.setattr(hostmap._ctypes, "get_errno", lambda: 95)
    low.host.discard()
    assert not any(low.host.view)
    monkeypatch.setattr(hostmap._ctypes, "get_errno", lambda: 12)
    with pytest.raises(HostError, match="MADV_REMOVE"):
        low.host.discard()


def test_a_directory_gets_a_temporary_file_without_a_name(tmp_path: Path) -> None:
    low, _ = create(RamConfig("file", path=str(tmp_path)))
    assert os.listdir(tmp_path) == []
    assert os.readlink(f"/proc/self/fd/{low.fd}").endswith(" (deleted)")
    assert os.fstat(low.fd).st_mode & 0o777 == 0o600
    assert not low.shared


@pytest.mark.parametrize("before", [None, 0, 3 * MIB, 4 * MIB])
def test_a_file_is_made_or_extended_when_empty_and_used_as_it_is_otherwise(tmp_path: Path, before: int | None) -> None:
    path = tmp_path / "memory"
    if before is not None:
        path.write_bytes(b"\x5a" * before)
    low, high = create(RamConfig("file", path=str(path), share=True))
    assert low.host.view[0] == high.host.view[0] == (0x5A if before else 0)
    assert path.stat().st_size == max(3 * MIB, before or 0)
    high.host.view[1] = 1
    with path.open("rb") as file:
        file.seek(2 * MIB + 1)
        assert file.read(1) == b"\1"


def test_private_memory_of_a_file_shows_it_and_never_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(b"\x5a" * 3 * MIB)
    low, _ = create(RamConfig("file", path=str(path)))
    assert low.host.view[9] == 0x5A
    low.host.view[9] = 1
    assert path.read_bytes()[9] == 0x5A
    low.host.discard()
    assert low.host.view[9] == 0x5A


def test_a_file_that_is_too_small_is_an_error_that_says_what_would_do(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"-mem-path .*memory: the file has 1 bytes.*at least 3 MiB, or an empty one"):
        create(RamConfig("file", path=str(path)))


@pytest.mark.parametrize(("path", "problem"), [
    ("/nowhere/at/all", "No such file"), ("/dev/null", "not a regular file"), ("a\0b", "null")])
def test_what_cannot_be_memory_is_refused(path: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        create(RamConfig("file", path=path, option="-object memory-backend-file,mem-path"))
    assert caught.value.option == "-object memory-backend-file,mem-path"


def test_a_fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="not a regular file"):
        create(RamConfig("file", path=str(tmp_path / "fifo")))


def test_no_file_is_laid_over_memory_that_has_one() -> None:
    low, _ = create(RamConfig("memfd", share=True))
    with pytest.raises(ValueError, match="map_file"):
        low.host.map_file(0, low.fd, 0, PAGE_SIZE)


def resident(host: HostMapping) -> int:
    """KiB of the mapping that are there."""
    found = False
    with open("/proc/self/smaps", encoding="utf-8") as lines:
        for line in lines:
            words = line.split()
            if "-" in words[0] and not words[0].endswith(":"):
                start, _, end = words[0].partition("-")
                found = int(start, 16) <= host.address < int(end, 16)
            elif found and words[0] == "Rss:":
                return int(words[1])
    raise AssertionError("the mapping is not in smaps")


@pytest.mark.parametrize("threads", [1, 3, 64])
@pytest.mark.parametrize("kind", ["ram", "memfd"])
def test_preallocated_memory_is_there(kind: str, threads: int) -> None:
    for region in create(RamConfig(kind, share=kind == "memfd", prealloc=True), threads):
        assert resident(region.host) >= region.size >> 10


def test_preallocation_by_an_old_kernel_keeps_what_is_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stratovirt import hostmap

    path = tmp_path / "memory"
    path.write_bytes(b"\x5a" * 3 * MIB)
    low, _ = create(RamConfig("file", path=str(path), share=True))
    monkeypatch.setattr(hostmap, "_libc_madvise", lambda *_: hostmap._MAP_FAILED)
    monkeypatch.setattr(hostmap._ctypes, "get_errno", lambda: 22)
    ram.populate(low.host, 2)
    assert resident(low.host) >= low.size >> 10
    assert bytes(low.host.view[: 2 * PAGE_SIZE]) == b"\x5a" * 2 * PAGE_SIZE


def test_memory_that_cannot_be_allocated_is_an_error_of_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    from stratovirt import hostmap

    low, _ = create(RamConfig("memfd", share=True))
    monkeypatch.setattr(hostmap, "_libc_madvise", lambda *_: hostmap._MAP_FAILED)
    monkeypatch.setattr(hostmap._ctypes, "get_errno", lambda: 14)
    with pytest.raises(HostError, match="too few huge pages"):
        ram.populate(low.host, 4)


def test_huge_pages_need_memory_of_whole_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ram, "file_system", lambda _device: "hugetlbfs")
    monkeypatch.setattr(os, "fstatvfs", lambda _fd: os.statvfs_result((2 * MIB, *[0] * 9)))
    with pytest.raises(ConfigError, match="-m 3M: the pages of this file system have 2048 KiB"):
        create(RamConfig("file", path=str(tmp_path)))


def test_the_file_system_is_found_by_its_device() -> None:
    assert ram.file_system(os.stat("/proc").st_dev) == "proc"
    assert ram.file_system(os.makedev(4000, 1)) == ""


def test_memory_of_a_node_that_this_host_has_not() -> None:
    create(RamConfig("ram", host_nodes=(0,), policy="bind"))
    with pytest.raises(ConfigError, match="host-nodes 127"):
        create(RamConfig("ram", host_nodes=(127,), policy="bind", option="-object memory-backend-ram"))


# -- the command line


def test_plain_memory_is_nothing_special() -> None:
    assert config_of("-m 1G").ram is None


@pytest.mark.parametrize(("line", "kind", "share", "prealloc"), [
    ("-machine microvm,mem-share=on", "memfd", True, False),
    ("-mem-prealloc", "ram", False, True),
    ("-mem-path /dev/hugepages", "file", False, False),
    ("-mem-path /m -machine mem-share=on -mem-prealloc", "file", True, True),
    ("-object memory-backend-ram,id=m,size=256M -machine memory-backend=m", "ram", False, False),
    ("-object memory-backend-ram,id=m,size=256M,share=on,prealloc=on -machine memory-backend=m", "ram", True, True),
    ("-object memory-backend-memfd,id=m,size=256M -machine memory-backend=m,mem-share=on", "memfd", True, False),
    ("-object memory-backend-memfd,id=m,size=256M,share=off -machine memory-backend=m", "memfd", False, False),
    ("-object memory-backend-file,id=m,size=256M,mem-path=/m -machine memory-backend=m", "file", True, False),
])
def test_what_memory_is_made_of(line: str, kind: str, share: bool, prealloc: bool) -> None:
    made = config_of(line).ram
    assert made is not None
    assert (made.kind, made.share, made.prealloc) == (kind, share, prealloc)
    assert bool(made.path) == (kind == "file")


def test_the_size_of_the_object_is_that_of_the_machine() -> None:
    config = config_of("-object memory-backend-ram,id=m,size=1G,dump-guest-core=off,host-nodes=0-1:3,policy=bind "
                       "-machine memory-backend=m")
    assert config.memory_size == 1 << 30
    assert not config.dump_guest_core
    assert config.ram is not None
    assert (config.ram.host_nodes, config.ram.policy) == ((0, 1, 3), "bind")


def test_an_object_that_nothing_refers_to_is_accepted() -> None:
    config = config_of("-object memory-backend-ram,id=m,size=1G")
    assert config.ram is None
    assert config.memory_size == 256 * MIB


@pytest.mark.parametrize(("line", "option"), [
    ("-machine memory-backend=x", "-machine memory-backend"),
    ("-object memory-backend-ram,id=m,size=1G -m 2G -machine memory-backend=m", "-object memory-backend-ram,size"),
    ("-object memory-backend-ram,id=m,size=1M -machine memory-backend=m", "-object memory-backend-ram,size"),
    ("-object memory-backend-ram,id=m,size=1024G -machine memory-backend=m", "-object memory-backend-ram,size"),
    ("-object memory-backend-ram,id=m,size=200001K -machine memory-backend=m", "-object memory-backend-ram,size"),
    ("-object memory-backend-ram,id=m,size=1G -machine memory-backend=m -mem-path /x", "-mem-path"),
    ("-object memory-backend-ram,id=m,size=1G -machine memory-backend=m,mem-share=on", "-machine mem-share"),
    ("-object memory-backend-ram,id=m,size=1G,policy=bind -machine memory-backend=m", "-object memory-backend-ram,policy"),
    ("-object memory-backend-file,id=m,size=1G", "-object memory-backend-file,mem-path"),
    ("-object memory-backend-ram,id=m,size=1G,host-nodes=128", "-object memory-backend-ram,host-nodes"),
    ("-object memory-backend-ram,id=m,size=1G -object iothread,id=m", "-object id"),
])
def test_contradictions_are_errors_that_name_the_option(line: str, option: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(line)
    assert caught.value.option == option
    assert caught.value.accepted
