"""Pages that machines write to: told from those that the launcher writes to, and copied in another child, as they are."""

from __future__ import annotations

import mmap
import os
import signal
import struct
from collections.abc import Callable, Iterator

import pytest

from stratovirt import hostmap
from stratovirt.launcher.written import Written

PAGE = hostmap.PAGE_SIZE
PAGES = 64
OWN = 1 << 56


@pytest.fixture
def region() -> Iterator[tuple[mmap.mmap, int]]:
    """Private pages with something in them, and their address."""
    memory = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = bytes(number for number in range(PAGES) for _ in range(PAGE))
    view = memoryview(memory)
    address = hostmap.address_of_view(view)
    view.release()
    yield memory, address
    memory.close()


@pytest.fixture
def fork() -> Iterator[Callable[[Callable[[], None]], int]]:
    """A child that has done something and waits for its end."""
    children: list[int] = []

    def child(act: Callable[[], None]) -> int:
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                act()
                os.write(write_end, b"1")
                signal.pause()
            finally:
                os._exit(1)
        children.append(pid)
        os.close(write_end)
        assert os.read(read_end, 1) == b"1"
        os.close(read_end)
        return pid

    yield child
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def own(pid: int | str, address: int) -> list[int]:
    """Numbers of the pages that no other process has."""
    with open(f"/proc/{pid}/pagemap", "rb", 0) as pagemap:
        states = struct.unpack(f"{PAGES}Q", os.pread(pagemap.fileno(), PAGES * 8, address // PAGE * 8))
    return [number for number, state in enumerate(states) if state & OWN]


def nothing() -> None:
    pass


def writes(memory: mmap.mmap, *numbers: int) -> Callable[[], None]:
    def act() -> None:
        for number in numbers:
            memory[number * PAGE] = 0xFF

    return act


def test_what_a_machine_has_written_to_is_copied_in_the_next(region, fork) -> None:
    memory, address = region
    fork(nothing)
    machine = fork(writes(memory, 3, 4, 10))
    writes(memory, 20, 21)()  # which the two still share
    written = Written()
    assert written.learn(machine) >= 3
    ready = fork(written.copy)
    assert own(ready, address) == [3, 4, 10]
    with open(f"/proc/{ready}/mem", "rb", 0) as content:
        assert [os.pread(content.fileno(), PAGE, address + number * PAGE) for number in (3, 4, 10)] == [
            bytes([number]) * PAGE for number in (3, 4, 10)]


def test_nothing_is_copied_before_it_is_known_what(region, fork) -> None:
    _memory, address = region
    assert own(fork(Written().copy), address) == []


def test_what_is_not_there_any_more_is_passed_over(region, fork) -> None:
    memory, address = region
    gone = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    gone[:] = b"\1" * len(gone)

    def both() -> None:
        gone[0] = 2
        memory[7 * PAGE] = 2

    fork(nothing)
    written = Written()
    written.learn(fork(both))
    gone.close()
    assert own(fork(written.copy), address) == [7]


def test_what_only_the_machine_has_is_not_looked_for(region, fork) -> None:
    """Its guest's memory, for example."""
    own_memory: list[mmap.mmap] = []

    def act() -> None:
        own_memory.append(mmap.mmap(-1, 1000 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        own_memory[0][:] = b"\1" * (1000 * PAGE)

    fork(nothing)
    before = Written().learn(fork(nothing))
    assert Written().learn(fork(act)) < before + 1000


def test_a_process_that_is_gone(fork) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    with pytest.raises(OSError):
        Written().learn(pid)
