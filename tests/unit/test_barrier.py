"""The queue of a weakly ordered processor: the barrier is where it has to be, and everything else is as on x86."""

from __future__ import annotations

import inspect
import platform

import pytest

from stratovirt import barrier, hostmap
from stratovirt.virtio.queue import OrderedVirtqueue
from unit import test_queue
from unit.virtio_driver import DATA, RINGS, GuestQueue, guest_memory


class Watched(OrderedVirtqueue):
    """Notes what the driver would see at each barrier."""

    def barrier(self) -> None:  # type: ignore[override]
        guest.seen.append((guest.memory.load_u16(guest.used + 2), guest.memory.read(guest.used + 4, 16)))


class Driver(GuestQueue):
    def __init__(self) -> None:
        super().__init__(guest_memory(), RINGS, 8)
        self.seen: list[tuple[int, bytes]] = []


@pytest.fixture(autouse=True)
def driver() -> None:
    global guest
    guest = Driver()


def watched() -> Watched:
    return Watched("queue", guest.memory, 8, guest.desc, guest.avail, guest.used)


def test_entries_are_written_before_the_barrier_and_the_index_behind_it() -> None:
    queue = watched()
    queue.push(3, 0x55)
    queue.push_all([(4, 1), (5, 2)])
    (before, first), (middle, _) = guest.seen
    assert (before, middle) == (0, 1)  # the index of what was pushed before, but not yet of what is being pushed
    assert first[:8] == bytes.fromhex("03000000 55000000".replace(" ", ""))
    assert guest.memory.load_u16(guest.used + 2) == 3


def test_the_entry_is_read_behind_the_barrier_that_follows_the_index() -> None:
    queue = watched()
    assert queue.pop() is None and guest.seen == []  # nothing was announced: nothing is read
    guest.add([(DATA, 4, False)])
    late = guest.memory.load_u16(guest.avail + 4)
    guest.memory.store_u16(guest.avail + 4, 7)  # what an early read would find

    class Late(Watched):
        def barrier(self) -> None:  # type: ignore[override]
            guest.memory.store_u16(guest.avail + 4, late)

    chain = Late("queue", guest.memory, 8, guest.desc, guest.avail, guest.used).pop()
    assert chain is not None and chain.head == late


@pytest.mark.parametrize("name", [name for name, function in inspect.getmembers(test_queue, inspect.isfunction)
                                  if name.startswith("test_") and not getattr(function, "pytestmark", None)])
def test_all_that_holds_for_a_queue_holds_for_this_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_queue, "Virtqueue", OrderedVirtqueue)
    getattr(test_queue, name)()


def test_the_barrier_by_system_call_works_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(barrier, "uses_system_call", False)
    fence = barrier.by_system_call()
    for _ in range(10):
        assert fence() == 0


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the machine code is x86_64's")
def test_machine_code_is_called() -> None:
    function = hostmap.machine_code(bytes.fromhex("b82a000000 0fae f0 c3".replace(" ", "")))  # mov eax, 42; mfence; ret
    assert function() == 42


def test_without_executable_memory_the_system_call_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(code: bytes) -> None:
        raise PermissionError(1, "no executable mapping here")

    monkeypatch.setattr(barrier, "ARCHITECTURE", "aarch64")
    monkeypatch.setattr(barrier, "machine_code", refuse)
    assert barrier.create()() == 0


def test_a_host_without_pages_of_code_is_told_to_do_without_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    from stratovirt.config.vm import VmConfig
    from stratovirt.errors import HostError
    from stratovirt.lockdown import Lockdown
    from stratovirt.loop import EventLoop

    monkeypatch.setattr(barrier, "uses_system_call", True)
    loop = EventLoop()
    with pytest.raises(HostError, match=r"membarrier.*-disable-seccomp"):
        Lockdown(VmConfig(), loop)
    loop.close()
