"""Pages that were written are counted, whoever wrote them, and never forgotten before a snapshot has them."""

from __future__ import annotations

import errno
import itertools
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratovirt.errors import HostError
from stratovirt.hypervisor.kvm import _uapi as uapi
from stratovirt.hypervisor.kvm.dirty_log import DirtyLog
from stratovirt.hypervisor.kvm.vm import KvmVm
from stratovirt.machine.snapshot import count_devices
from stratovirt.memory import GuestMemory
from stratovirt.snapshot import dirty as dirty_module
from stratovirt.snapshot.chain import PAGE
from stratovirt.snapshot.dirty import DirtyPages
from stratovirt.vhost.net import VhostNet
from unit.test_snapshot_devices import BalloonDriver
from unit.test_vhost import Kernel, VsockDriver
from unit.virtio_devices import SECTOR, BlockDriver, NetDriver, RngDriver
from unit.virtio_driver import DATA, HIGH_RAM, RAM_SIZE, Driver, guest_memory

LOG_ALL = 1 << 26
SET_FEATURES, SET_LOG_BASE = (0x4008AF00, 0x4008AF04)


class Hypervisor:
    """What KVM would count: `bits` are page numbers of each region. With `manual` reading does not clear."""

    def __init__(self, memory: GuestMemory, manual: bool = True) -> None:
        self.memory = memory
        self.manual = manual
        self.bits: list[set[int]] = [set() for _ in memory.regions]
        self.read_bits: list[set[int]] = [set() for _ in memory.regions]
        self.calls: list[str] = []
        self.refuse = ""

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.refuse:
            raise HostError(name, errno.EINVAL)

    def start(self) -> None:
        self._call("start")
        self.bits = [set() for _ in self.memory.regions]

    def stop(self) -> None:
        self._call("stop")

    def read(self, slot: int) -> bytearray:
        self._call("read")
        bitmap = bytearray(-(-self.memory.regions[slot].size // PAGE // 64) * 8)
        for page in self.bits[slot]:
            bitmap[page // 8] |= 1 << page % 8
        self.read_bits[slot] = set(self.bits[slot])
        if not self.manual:
            self.bits[slot].clear()
        return bitmap

    def clear(self) -> None:
        self._call("clear")
        for bits, read in zip(self.bits, self.read_bits, strict=True):
            bits -= read


def pages_of(dirty: DirtyPages) -> set[int]:
    """Page numbers in the memory file."""
    ranges = dirty.written()
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(ranges)), "ascending, and joined"
    return {page // PAGE for start, end in ranges for page in range(start, end, PAGE)}


def started(memory: GuestMemory, manual: bool = True) -> tuple[DirtyPages, Hypervisor]:
    hypervisor = Hypervisor(memory, manual)
    dirty = DirtyPages(memory, hypervisor)
    dirty.start()
    dirty.begin("a")
    assert pages_of(dirty) == set()
    return dirty, hypervisor


LOW, HIGH = RAM_SIZE // PAGE, 16
PAGES = st.sets(st.integers(0, LOW + HIGH - 1), max_size=20)


@given(PAGES, PAGES, PAGES, st.booleans(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_whoever_writes_is_counted(ours: set[int], theirs: set[int], vhosts: set[int], manual: bool, fails: bool) -> None:
    memory = guest_memory(RAM_SIZE, HIGH * PAGE)
    dirty, hypervisor = started(memory, manual)

    def address(page: int) -> int:
        return page * PAGE if page < LOW else HIGH_RAM + (page - LOW) * PAGE

    for page in ours:
        memory.write(address(page) + 5, b"x")
    for page in theirs:
        hypervisor.bits[page >= LOW].add(page - LOW if page >= LOW else page)
    for page in vhosts:
        number = address(page) // PAGE
        dirty._vhost.view[number // 8] |= 1 << number % 8
    everybody = ours | theirs | vhosts
    assert pages_of(dirty) == everybody
    if fails:  # the snapshot came to nothing, and the guest went on
        hypervisor.bits[0].add(7)
        everybody = everybody | {7}
    assert pages_of(dirty) == everybody, "read twice, and still there"
    dirty.begin("b")
    assert (pages_of(dirty), dirty.since) == (set(), "b")


def test_a_write_marks_every_page_it_touches() -> None:
    memory = guest_memory(RAM_SIZE, HIGH * PAGE)
    dirty, _ = started(memory)
    memory.writable(3 * PAGE - 1, PAGE + 2)[0] = 1
    memory.store_u16(8 * PAGE, 1)
    memory.store_u32(9 * PAGE, 1)
    memory.store_u64(HIGH_RAM + HIGH * PAGE - 8, 1)
    assert pages_of(dirty) == {2, 3, 4, 8, 9, LOW + HIGH - 1}
    dirty.begin("b")
    dirty.mark_view(memory.slice(HIGH_RAM + PAGE, 2 * PAGE))
    assert pages_of(dirty) == {LOW + 1, LOW + 2}


def test_large_pages_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dirty_module, "PAGE_SIZE", 4 * PAGE)
    memory = guest_memory()
    dirty, hypervisor = started(memory)
    hypervisor.bits[0] = {0, 5}
    assert pages_of(dirty) == {0, 1, 2, 3, 20, 21, 22, 23}


def test_stopped_and_lost() -> None:
    memory = guest_memory()
    dirty, hypervisor = started(memory)
    dirty.lose("somebody")
    assert dirty.since == ""
    dirty.begin("c")
    assert dirty.since == "c"
    dirty.start()
    dirty.stop()
    dirty.stop()
    assert (dirty.since, memory.tracker, memory.writable) == ("", None, memory.slice)
    assert hypervisor.calls.count("start") == hypervisor.calls.count("stop") == 1
    hypervisor.refuse = "start"
    with pytest.raises(HostError):
        dirty.start()
    assert memory.tracker is None and not dirty.running
    hypervisor.refuse = ""
    dirty.start()
    hypervisor.refuse = "clear"
    with pytest.raises(HostError):
        dirty.begin("d")
    assert dirty.since == "", "then nothing is known"


# -- devices


@pytest.fixture
def tracked(tmp_path: Path) -> Iterator[Callable[[Callable[[], Any]], tuple[Any, DirtyPages]]]:
    """A driver whose own writes, which are the guest's, nobody counts here, and the device's are."""
    made: list[Driver] = []

    def make(factory: Callable[[], Any]) -> tuple[Any, DirtyPages]:
        driver = factory()
        made.append(driver)
        seen = GuestMemory(driver.memory.regions)
        driver.transport.memory = seen
        for owner in (driver.device, getattr(driver.device, "_backend", None)):
            for name in ("_memory", "memory"):
                if getattr(owner, name, None) is driver.memory:
                    setattr(owner, name, seen)
        return driver, started(seen)[0]

    yield make
    for driver in made:
        driver.close()


def used(driver: Driver) -> set[int]:
    return {page for queue in driver.queues for page in range(queue.used // PAGE, (queue.end - 1) // PAGE + 1)}


def test_a_disk_read(tracked: Any, tmp_path: Path) -> None:
    driver, dirty = tracked(lambda: BlockDriver(tmp_path))
    driver.start()
    assert pages_of(dirty) == used(driver), "rings that are new"
    dirty.begin("b")
    count_devices(dirty, [driver.device])
    assert pages_of(dirty) == used(driver), "and those that were there"
    driver.memory.write(DATA, struct.pack("<IIQ", 0, 0, 7))
    assert driver.request([(DATA, 16, False), (DATA + 2 * PAGE, SECTOR, True), (DATA + 5 * PAGE, 1, True)]) == SECTOR + 1
    page = DATA // PAGE
    assert pages_of(dirty) == used(driver) | {page + 2, page + 5}
    driver.request([(DATA, 16, False), (DATA + 8 * PAGE, SECTOR, True), (DATA + 9 * PAGE, 1, True)], indirect_at=DATA + PAGE)
    assert pages_of(dirty) == used(driver) | {page + 2, page + 5, page + 8, page + 9}


def test_random_bytes_that_are_late(tracked: Any) -> None:
    driver, dirty = tracked(lambda: RngDriver(rate=16.0))
    queue = driver.start()
    queue.add([(DATA, 16, True)])
    queue.add([(DATA + 3 * PAGE, 16, True)])
    driver.notify()
    assert driver.device._waiting is not None or len(queue.collect()) == 1
    driver.device.pause()
    dirty.begin("b")
    count_devices(dirty, [driver.device])
    driver.device.resume()
    before = bytes(driver.memory.read(0, RAM_SIZE))
    for _ in range(4):
        driver.advance(1)
    after = bytes(driver.memory.read(0, RAM_SIZE))
    changed = {page for page in range(LOW) if before[page * PAGE : (page + 1) * PAGE] != after[page * PAGE : (page + 1) * PAGE]}
    assert DATA // PAGE + 3 in changed and changed <= pages_of(dirty)


def test_a_frame_into_a_buffer_that_was_at_hand(tracked: Any) -> None:
    driver, dirty = tracked(NetDriver)
    queue = driver.start()
    for number in range(4):
        queue.add([(DATA + 2 * PAGE * number, 2048, True)])
    driver.notify()
    driver.device.pause()
    dirty.begin("b")
    count_devices(dirty, [driver.device])
    driver.device.resume()
    driver.network.send(bytes(12) + bytes.fromhex("525400123456") + bytes(6) + b"\x08\x00" + b"hello".ljust(50))
    for _ in range(5):
        driver.loop.run_once(0.01)
        driver.serve()
    assert len(queue.collect()) == 1
    assert pages_of(dirty) >= used(driver) | {DATA // PAGE}


def test_a_balloon_that_takes_pages(tracked: Any) -> None:
    driver, dirty = tracked(BalloonDriver)
    queue = driver.start()
    frames = (DATA // PAGE + 8, DATA // PAGE + 9, DATA // PAGE + 20)
    driver.memory.write(DATA, struct.pack("<3I", *frames))
    queue.add([(DATA, 12, False)])
    driver.notify()
    assert pages_of(dirty) == used(driver) | set(frames)
    dirty.begin("b")
    driver.queues[1].add([(DATA, 12, False)])
    driver.notify(1)
    assert pages_of(dirty) == set(), "deflating writes nothing"


def test_packets_over_a_socket_are_nobodys_to_count(tracked: Any) -> None:
    def again() -> None:
        driver.device.pause()
        dirty.begin("b")
        driver.device.resume()

    driver, dirty = tracked(VsockDriver)
    driver.start()
    again()
    driver.device.pause()
    assert dirty.since == "b", "nothing has come"
    driver.device.resume()
    again()
    driver.kernel.bases = {0: 0, 1: 5}
    driver.device.pause()
    assert dirty.since == "", "something has, or was sent"
    driver.device.resume()
    again()
    driver.write(0x070, 0)
    assert dirty.since == "", "a reset: who knows"
    log_bases = driver.kernel.arguments(SET_LOG_BASE)
    assert log_bases and set(log_bases) == {struct.pack("<Q", dirty.vhost_log)}


def test_vhost_net_keeps_a_log() -> None:
    memory, kernel = guest_memory(), Kernel()
    from stratovirt.vhost.kernel import KernelVhost

    vhost = VhostNet(KernelVhost(0, "/dev/vhost-net", memory, kernel))
    rings = tuple(type("Ring", (), {"size": 8, "descriptor_table": at, "avail_ring": at + 256, "used_ring": at + 512,
                                    "position": 0})() for at in (0x1000, 0x2000))
    vhost.start(1 << 32, rings, [1, 2], 3, 4, 5)  # type: ignore[arg-type]
    assert kernel.arguments(SET_FEATURES) == [struct.pack("<Q", 1 << 32)] and not kernel.arguments(SET_LOG_BASE)
    dirty, _ = started(memory)
    kernel.calls.clear()
    vhost.start(1 << 32, rings, [1, 2], 3, 4, 5)  # type: ignore[arg-type]
    requests = [request for request, _ in kernel.calls]
    assert kernel.arguments(SET_FEATURES) == [struct.pack("<Q", 1 << 32 | LOG_ALL)]
    assert requests.index(SET_LOG_BASE) < requests.index(SET_FEATURES)
    assert kernel.arguments(SET_LOG_BASE) == [struct.pack("<Q", dirty.vhost_log)]


# -- what KVM is asked


class FakeSystem:
    def __init__(self, manual: int) -> None:
        self.manual = manual

    def create_vm(self, _kind: int) -> int:
        return -1

    def check_extension(self, capability: int) -> int:
        assert capability == 168  # KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
        return self.manual


@pytest.mark.parametrize("manual", [0, 1, 3])
def test_kvm_is_asked(monkeypatch: pytest.MonkeyPatch, manual: int) -> None:
    calls: list[tuple[str, int, bytes]] = []
    vm = KvmVm(FakeSystem(manual))  # type: ignore[arg-type]
    monkeypatch.setattr(vm, "_ioctl", lambda name, request, argument: calls.append((name, request, bytes(argument))) or 0)
    memory = guest_memory(RAM_SIZE, 65 * PAGE)
    for region in memory.regions:
        vm.add_memory(region)
    calls.clear()
    log = DirtyLog(vm)
    log.start()
    assert [len(log.read(slot)) for slot in (0, 1)] == [LOW // 8, 16], "whole words of 64 bits"
    log.clear()
    log.clear()
    log.stop()
    names = [name.removeprefix("KVM_") for name, _, _ in calls]
    cap, clear = (["ENABLE_CAP"], ["CLEAR_DIRTY_LOG"] * 2) if manual else ([], [])
    assert names == [*cap, *["SET_USER_MEMORY_REGION"] * 2, *["GET_DIRTY_LOG"] * 2, *clear, *["SET_USER_MEMORY_REGION"] * 2]
    flags = [struct.unpack_from("<II", argument) for name, _, argument in calls if name == "KVM_SET_USER_MEMORY_REGION"]
    assert flags == [(0, 1), (1, 1), (0, 0), (1, 0)]
    for name, request, argument in calls:
        assert (request >> 16) & 0x3FFF == len(argument), name
    if manual:
        assert calls[0][2][:16] == struct.pack("<IIQ", 168, 0, 1)
        cleared = [struct.unpack_from("<IIQ", argument) for name, _, argument in calls if "CLEAR" in name]
        assert cleared == [(0, LOW, 0), (1, 65, 0)]
    assert (uapi.KVM_GET_DIRTY_LOG, uapi.KVM_CLEAR_DIRTY_LOG) == (1 << 30 | 16 << 16 | 0xAE42, 3 << 30 | 24 << 16 | 0xAEC0)
