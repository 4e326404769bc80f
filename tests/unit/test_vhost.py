"""vhost in the kernel and virtio-vsock on top of it: what the kernel is told, in which order, and what its answers lead to."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stratovirt.errors import ConfigError, GuestError, HostError
from stratovirt.loop import EventLoop
from stratovirt.vhost.kernel import KernelVhost
from stratovirt.virtio.vsock import VhostVsock, open_backend
from unit.test_virtio_conformance import PARTS
from unit.virtio_driver import (
    CONFIG,
    EVENT_IDX,
    HIGH_RAM,
    INDIRECT_DESC,
    INTERRUPT_ACK,
    INTERRUPT_STATUS,
    NEEDS_RESET,
    RAM_SIZE,
    STATUS,
    VERSION_1,
    Driver,
    guest_memory,
)

GUEST_CID = 0xFFFF_FFF0
SEQPACKET = 1 << 1
KERNEL_FEATURES = VERSION_1 | INDIRECT_DESC | EVENT_IDX | SEQPACKET | 1 << 24 | 1 << 26 | 1 << 27 | 1 << 33

# Numbers as in linux/vhost.h: direction << 30 | size of the argument << 16 | 0xAF << 8 | number
GET_FEATURES, SET_FEATURES = 2 << 30 | 8 << 16 | 0xAF00, 1 << 30 | 8 << 16 | 0xAF00
SET_OWNER, SET_MEM_TABLE = 0xAF01, 1 << 30 | 8 << 16 | 0xAF03
VRING_NUM, VRING_ADDR, VRING_BASE = (1 << 30 | size << 16 | 0xAF00 | nr for size, nr in ((8, 0x10), (40, 0x11), (8, 0x12)))
VRING_KICK, VRING_CALL, VRING_ERR = (1 << 30 | 8 << 16 | 0xAF00 | nr for nr in (0x20, 0x21, 0x22))
GET_VRING_BASE = 3 << 30 | 8 << 16 | 0xAF12
SET_GUEST_CID, SET_RUNNING = 1 << 30 | 8 << 16 | 0xAF60, 1 << 30 | 4 << 16 | 0xAF61


class Kernel:
    """The kernel's side: takes ioctls down, and refuses those it is told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, bytes]] = []
        self.refuse: dict[int, int] = {}
        self.bases: dict[int, int] = {}  # how far it has come in a ring, where that is not 0

    def __call__(self, fd: int, request: int, argument: bytes | bytearray | int) -> int:
        if request in self.refuse:
            raise OSError(self.refuse[request], os.strerror(self.refuse[request]))
        if request == GET_FEATURES:
            assert isinstance(argument, bytearray)
            argument[:] = KERNEL_FEATURES.to_bytes(8, "little")
        if request == GET_VRING_BASE:
            assert isinstance(argument, bytearray)
            (index,) = struct.unpack_from("<I", argument)
            struct.pack_into("<I", argument, 4, self.bases.get(index, 0))
        self.calls.append((request, b"" if isinstance(argument, int) else bytes(argument)))
        return 0

    def arguments(self, request: int) -> list[bytes]:
        return [argument for number, argument in self.calls if number == request]

    @property
    def running(self) -> bool:
        states = self.arguments(SET_RUNNING)
        return bool(states) and states[-1] == struct.pack("<i", 1)


class VsockDriver(Driver):
    def __init__(self, high: int = 0) -> None:
        self.loop = EventLoop()
        self.kernel = Kernel()
        self.host_errors: list[HostError] = []
        memory = guest_memory(RAM_SIZE, high)
        self.backend = KernelVhost(os.dup(0), "/dev/vhost-vsock", memory, self.kernel)
        self.vsock = VhostVsock(self.backend, GUEST_CID, self.loop, self.host_errors.append)
        super().__init__(self.vsock, memory)

    def eventfd_of(self, request: int, ring: int) -> int:
        """The descriptor that the kernel was last given for a ring."""
        rings: dict[int, int] = dict(struct.unpack("<Ii", data) for data in self.kernel.arguments(request))
        return rings[ring]

    def close(self) -> None:
        super().close()
        self.backend.close()
        self.loop.close()


@pytest.fixture
def make() -> Iterator[Callable[..., VsockDriver]]:
    made: list[VsockDriver] = []

    def factory(**options: int) -> VsockDriver:
        made.append(VsockDriver(**options))
        return made[-1]

    yield factory
    for driver in made:
        driver.close()


# The kernel serves its queues, so that it is the kernel that finds out about malformed chains.
IN_THE_KERNEL = ("resets_in_every_state", "every_popped_head_comes_back_once", "heads_outside_the_table_are_fatal")


@pytest.mark.parametrize("part", [part for part in PARTS if part.__name__ not in IN_THE_KERNEL])
def test_it_conforms(make: Callable[..., VsockDriver], part: Callable[[Driver], None]) -> None:
    part(make())


def test_features_are_what_both_can(make: Callable[..., VsockDriver]) -> None:
    assert make().offered() == VERSION_1 | INDIRECT_DESC | EVENT_IDX | SEQPACKET


def test_the_guest_reads_its_address(make: Callable[..., VsockDriver]) -> None:
    driver = make()
    assert driver.read(CONFIG) | driver.read(CONFIG + 4) << 32 == GUEST_CID


def test_the_memory_table_holds_every_region(make: Callable[..., VsockDriver]) -> None:
    driver = make(high=1 << 16)
    driver.backend.set_memory()
    table, = driver.kernel.arguments(SET_MEM_TABLE)
    low, high = driver.memory.regions
    assert table == struct.pack("<IIQQQQQQQQ", 2, 0, 0, RAM_SIZE, low.host.address, 0, HIGH_RAM, 1 << 16, high.host.address, 0)


def test_rings_are_told_before_they_run(make: Callable[..., VsockDriver]) -> None:
    driver = make()
    driver.start(VERSION_1 | EVENT_IDX, 128)
    kernel, base = driver.kernel, driver.memory.regions[0].host.address
    assert kernel.arguments(SET_FEATURES) == [struct.pack("<Q", VERSION_1 | EVENT_IDX)]
    assert kernel.arguments(VRING_NUM) == [struct.pack("<II", ring, 128) for ring in (0, 1)]
    assert kernel.arguments(VRING_BASE) == [struct.pack("<II", ring, 0) for ring in (0, 1)]
    assert kernel.arguments(VRING_ADDR) == [
        struct.pack("<IIQQQQ", ring, 0, base + queue.desc, base + queue.used, base + queue.avail, 0)
        for ring, queue in enumerate(driver.queues[:2])]
    for ring in (0, 1):
        assert driver.eventfd_of(VRING_KICK, ring) == driver.transport.notify_fds[ring]
    assert kernel.calls[-1] == (SET_RUNNING, struct.pack("<i", 1))


def test_the_kernels_interrupts_reach_the_driver(make: Callable[..., VsockDriver]) -> None:
    driver = make()
    driver.start()
    before = driver.line.count
    os.eventfd_write(driver.eventfd_of(VRING_CALL, 0), 1)
    os.eventfd_write(driver.eventfd_of(VRING_CALL, 1), 1)
    assert driver.line.count == before + 2, "straight to the line"
    for _ in range(2):
        assert driver.read(INTERRUPT_STATUS) == 1, "any interrupt may be the kernel's"
        driver.write(INTERRUPT_ACK, 1)


def test_the_last_interrupt_before_a_pause_is_repeated(make: Callable[..., VsockDriver]) -> None:
    """The driver may read InterruptStatus only when the kernel has been stopped, and must not find 0 there."""
    driver = make()
    driver.start()
    before = driver.line.count
    os.eventfd_write(driver.eventfd_of(VRING_CALL, 0), 1)
    driver.vsock.pause()
    assert driver.line.count == before + 2 and driver.read(INTERRUPT_STATUS) == 1
    driver.write(INTERRUPT_ACK, 1)
    assert driver.read(INTERRUPT_STATUS) == 0
    driver.vsock.resume()
    assert driver.read(INTERRUPT_STATUS) == 1
    before = driver.line.count
    driver.write(STATUS, 0)
    assert (driver.read(INTERRUPT_STATUS), driver.line.count) == (0, before), "a reset ends it without a word"


def test_a_broken_ring_stops_the_kernel_and_needs_a_reset(make: Callable[..., VsockDriver]) -> None:
    driver = make()
    driver.start()
    os.eventfd_write(driver.eventfd_of(VRING_ERR, 1), 1)
    driver.loop.run_once(0)
    assert driver.status & NEEDS_RESET
    assert not driver.kernel.running
    assert len(driver.errors) == 1
    driver.start()
    assert driver.kernel.running
    assert not driver.status & NEEDS_RESET


def test_a_reset_stops_the_kernel(make: Callable[..., VsockDriver]) -> None:
    driver = make()
    driver.start()
    assert driver.kernel.running
    driver.write(STATUS, 0)
    assert not driver.kernel.running
    driver.start()
    driver.transport.reset()
    assert not driver.kernel.running
    assert len(driver.kernel.arguments(SET_RUNNING)) == 4
    driver.transport.reset()
    assert len(driver.kernel.arguments(SET_RUNNING)) == 4


def test_a_driver_without_its_queues_is_not_served(make: Callable[..., VsockDriver]) -> None:
    driver = make()
    driver.negotiate()
    driver.set_up_queue(0)
    driver.add_status(4)
    assert driver.kernel.arguments(SET_RUNNING) == []
    assert not driver.status & NEEDS_RESET


@pytest.mark.parametrize("request_number", [SET_FEATURES, VRING_NUM, VRING_ADDR, VRING_KICK, SET_RUNNING])
def test_a_kernel_that_refuses_leaves_a_device_that_needs_a_reset(
    make: Callable[..., VsockDriver], request_number: int
) -> None:
    driver = make()
    driver.kernel.refuse[request_number] = errno.EFAULT
    driver.start()
    assert driver.status & NEEDS_RESET
    assert [error.errno for error in driver.host_errors] == [errno.EFAULT]
    driver.kernel.refuse.clear()
    driver.start()
    assert driver.kernel.running


def test_the_event_queue_keeps_its_buffers(make: Callable[..., VsockDriver]) -> None:
    driver = make()
    driver.start()
    driver.queues[2].add([(0x4_0000, 64, True)])
    driver.notify(2)
    assert driver.queues[2].collect() == []


def test_a_ring_outside_ram_is_never_told(make: Callable[..., VsockDriver]) -> None:
    driver = make()
    with pytest.raises(GuestError):
        driver.backend.set_ring(0, 256, RAM_SIZE - 16, 0x1000, 0x2000, 0, 0, 0)
    assert driver.kernel.arguments(VRING_ADDR) == []


# -- opening


def test_a_host_without_vhost_vsock(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        open_backend(3, None, guest_memory(), str(tmp_path / "vhost-vsock"))
    assert "modprobe vhost_vsock" in str(caught.value)
    assert caught.value.value == "guest-cid=3"


@pytest.mark.parametrize("path", ["/dev/null", "/etc/hostname"])
def test_a_descriptor_of_something_else(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(ConfigError) as caught:
            open_backend(3, fd, guest_memory())
    finally:
        os.close(fd)
    assert caught.value.option.endswith("vhostfd") and caught.value.value == str(fd)


def test_a_descriptor_that_is_not_open() -> None:
    with pytest.raises(ConfigError, match="Bad file descriptor"):
        open_backend(3, 1000, guest_memory())


@pytest.mark.parametrize(("refusals", "inherited", "message"), [
    ({}, False, ""),
    ({SET_OWNER: errno.EBUSY}, True, ""),
    ({SET_GUEST_CID: errno.EADDRINUSE}, True, ""),
    ({SET_GUEST_CID: errno.EADDRINUSE}, False, "another guest on this host has this CID"),
    ({SET_GUEST_CID: errno.EINVAL}, True, "VHOST_VSOCK_SET_GUEST_CID on /dev/vhost-vsock: Invalid argument"),
    ({SET_OWNER: errno.EBUSY}, False, "VHOST_SET_OWNER"),
    ({SET_OWNER: errno.EBUSY, SET_MEM_TABLE: errno.EPERM}, True, "that no other process uses"),
])
def test_what_the_kernel_may_refuse(
    monkeypatch: pytest.MonkeyPatch, refusals: dict[int, int], inherited: bool, message: str
) -> None:
    kernel = Kernel()
    kernel.refuse = refusals
    monkeypatch.setattr("stratovirt.vhost.kernel._ioctl", kernel)
    fd = os.dup(0) if inherited else None
    if message:
        with pytest.raises(ConfigError, match=message):
            open_backend(GUEST_CID, fd, guest_memory(), "/dev/null" if fd is None else "/dev/vhost-vsock")
        return
    open_backend(GUEST_CID, fd, guest_memory(), "/dev/null").close()
    if SET_GUEST_CID not in refusals:
        assert kernel.arguments(SET_GUEST_CID) == [struct.pack("<Q", GUEST_CID)]
