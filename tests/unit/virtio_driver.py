"""The guest's side of virtio: memory with rings in it, and a driver that speaks to the registers as a kernel does.

Written from the specification and independent of `stratovirt.virtio`, so that the two check each other.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Sequence

from stratovirt.errors import GuestError
from stratovirt.hostmap import HostMapping
from stratovirt.memory import GuestMemory, RamRegion
from stratovirt.virtio.device import VirtioDevice
from stratovirt.virtio.mmio import VirtioMmio, Window

NEXT, WRITE, INDIRECT = 1, 2, 4
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
VERSION_1, INDIRECT_DESC, EVENT_IDX = 1 << 32, 1 << 28, 1 << 29

MAGIC, VERSION, DEVICE_ID, VENDOR_ID = 0x000, 0x004, 0x008, 0x00C
DEVICE_FEATURES, DEVICE_FEATURES_SEL, DRIVER_FEATURES, DRIVER_FEATURES_SEL = 0x010, 0x014, 0x020, 0x024
QUEUE_SEL, QUEUE_NUM_MAX, QUEUE_NUM, QUEUE_READY, QUEUE_NOTIFY = 0x030, 0x034, 0x038, 0x044, 0x050
INTERRUPT_STATUS, INTERRUPT_ACK, STATUS, CONFIG_GENERATION, CONFIG = 0x060, 0x064, 0x070, 0x0FC, 0x100
QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE = 0x080, 0x090, 0x0A0

RAM_SIZE = 1 << 20
RINGS = 0x1000  # queue number n has its rings at RINGS * (1 + 8 * n)
DATA = 0x4_0000  # buffers of tests start here
HIGH_RAM = 0x1_0000_0000


def guest_memory(size: int = RAM_SIZE, high: int = 0) -> GuestMemory:
    """RAM at 0, and with `high` as many bytes at 4 GiB."""
    regions = [RamRegion(0, HostMapping(size))]
    if high:
        regions.append(RamRegion(HIGH_RAM, HostMapping(high)))
    return GuestMemory(regions)


class Line:
    """An interrupt line that counts, what others signal as well."""

    def __init__(self) -> None:
        self._fd = -1
        self._count = 0

    @property
    def fd(self) -> int:
        if self._fd < 0:
            self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        return self._fd

    @property
    def count(self) -> int:
        if self._fd >= 0:
            with contextlib.suppress(BlockingIOError):
                self._count += os.eventfd_read(self._fd)
        return self._count

    def trigger(self) -> None:
        self._count += 1

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class GuestQueue:
    """The driver's half of a split virtqueue at `base`: descriptor table, available ring, used ring, one page each or more."""

    def __init__(self, memory: GuestMemory, base: int, size: int) -> None:
        self.memory = memory
        self.size = size
        self.desc = base
        self.avail = base + 16 * size
        self.used = (self.avail + 6 + 2 * size + 3) & -4
        self.end = self.used + 6 + 8 * size
        self.avail_index = 0
        self.used_index = 0
        self.free = list(range(size))
        memory.write(base, bytes(self.end - base))

    def describe(self, index: int, address: int, length: int, flags: int = 0, following: int = 0) -> None:
        """Fill in one descriptor, sensible or not."""
        self.memory.write(self.desc + 16 * index, struct.pack("<QIHH", address, length, flags, following))

    def publish(self, head: int, move: int = 1) -> None:
        """Make `head` available; `move` is how far avail.idx jumps."""
        self.memory.write(self.avail + 4 + 2 * (self.avail_index % self.size), struct.pack("<H", head))
        self.avail_index = (self.avail_index + move) & 0xFFFF
        self.memory.write(self.avail + 2, struct.pack("<H", self.avail_index))

    def add(self, buffers: Sequence[tuple[int, int, bool]], indirect_at: int = 0) -> int:
        """Make a chain of (address, length, device writes) available; with `indirect_at` through a table there."""
        if indirect_at:
            head = self.free.pop(0)
            table = b"".join(
                struct.pack("<QIHH", address, length, (WRITE if writable else 0) | (NEXT if number + 1 < len(buffers) else 0),
                            number + 1 if number + 1 < len(buffers) else 0)
                for number, (address, length, writable) in enumerate(buffers))
            self.memory.write(indirect_at, table)
            self.describe(head, indirect_at, len(table), INDIRECT)
        else:
            taken = [self.free.pop(0) for _ in buffers]
            head = taken[0]
            for number, (address, length, writable) in enumerate(buffers):
                more = number + 1 < len(buffers)
                self.describe(taken[number], address, length, (WRITE if writable else 0) | (NEXT if more else 0),
                              taken[number + 1] if more else 0)
        self.publish(head)
        return head

    def used_idx(self) -> int:
        return int(struct.unpack("<H", self.memory.read(self.used + 2, 2))[0])

    def collect(self) -> list[tuple[int, int]]:
        """(head, bytes written) of every chain that was returned since the last call."""
        returned = []
        while self.used_index != self.used_idx():
            slot = self.used + 4 + 8 * (self.used_index % self.size)
            returned.append(struct.unpack("<II", self.memory.read(slot, 8)))
            self.used_index = (self.used_index + 1) & 0xFFFF
        return returned

    def release_all(self) -> None:
        self.free = list(range(self.size))

    def set_no_interrupt(self, on: bool) -> None:
        self.memory.write(self.avail, struct.pack("<H", int(on)))

    def set_used_event(self, index: int) -> None:
        self.memory.write(self.avail + 4 + 2 * self.size, struct.pack("<H", index & 0xFFFF))

    def avail_event(self) -> int:
        return int(struct.unpack("<H", self.memory.read(self.used + 4 + 8 * self.size, 2))[0])

    def used_flags(self) -> int:
        return int(struct.unpack("<H", self.memory.read(self.used, 2))[0])


class Driver:
    """A driver over one window of a device's transport."""

    def __init__(self, device: VirtioDevice, memory: GuestMemory | None = None) -> None:
        self.device = device
        self.memory = memory or guest_memory()
        self.line = Line()
        self.errors: list[GuestError] = []
        self.transport = VirtioMmio(device, self.memory, self.line, self.errors.append)
        self.window: Window = self.transport.windows[0]
        self.queues: list[GuestQueue] = []

    def close(self) -> None:
        self.line.close()
        for fd in self.transport.notify_fds:
            os.close(fd)

    # -- registers

    def read(self, register: int, size: int = 4) -> int:
        return self.window.read(register, size)

    def write(self, register: int, value: int, size: int = 4) -> None:
        self.window.write(register, size, value)

    @property
    def status(self) -> int:
        return self.read(STATUS)

    def add_status(self, bits: int) -> int:
        self.write(STATUS, self.status & ~NEEDS_RESET | bits)
        return self.status

    # -- initialization, in the order of VIRTIO 1.2, 3.1.1

    def offered(self) -> int:
        features = 0
        for half in (0, 1):
            self.write(DEVICE_FEATURES_SEL, half)
            features |= self.read(DEVICE_FEATURES) << 32 * half
        return features

    def choose(self, features: int) -> None:
        for half in (0, 1):
            self.write(DRIVER_FEATURES_SEL, half)
            self.write(DRIVER_FEATURES, features >> 32 * half & 0xFFFF_FFFF)

    def negotiate(self, features: int | None = None) -> int:
        """Up to FEATURES_OK; `features` None takes all. The status after it."""
        self.write(STATUS, 0)
        self.add_status(ACKNOWLEDGE)
        self.add_status(DRIVER)
        self.choose(self.offered() if features is None else features)
        return self.add_status(FEATURES_OK)

    def set_up_queue(self, number: int, size: int = 0) -> GuestQueue:
        self.write(QUEUE_SEL, number)
        size = size or self.read(QUEUE_NUM_MAX)
        queue = GuestQueue(self.memory, RINGS * (1 + 8 * number), size)
        self.write(QUEUE_NUM, size)
        for register, address in ((QUEUE_DESC, queue.desc), (QUEUE_DRIVER, queue.avail), (QUEUE_DEVICE, queue.used)):
            self.write(register, address & 0xFFFF_FFFF)
            self.write(register + 4, address >> 32)
        self.write(QUEUE_READY, 1)
        return queue

    def start(self, features: int | None = None, size: int = 0) -> GuestQueue:
        """All of it; the first queue."""
        self.negotiate(features)
        self.queues = [self.set_up_queue(number, size) for number in range(len(self.device.queue_sizes))]
        self.add_status(DRIVER_OK)
        return self.queues[0]

    # -- work

    def notify(self, queue: int = 0) -> None:
        """Write QueueNotify, and let the device's loop serve the notification for as long as it asks for more turns."""
        self.write(QUEUE_NOTIFY, queue)
        self.serve()

    def serve(self, rounds: int = 1000) -> int:
        """Serve pending notifications as the loop would; how many. Fails when they do not end."""
        served = 0
        for _ in range(rounds):
            pending = [number for number, fd in enumerate(self.transport.notify_fds) if _readable(fd)]
            if not pending:
                return served
            for number in pending:
                self.transport.on_notify(number)
                served += 1
        raise AssertionError("notifications do not end")

    def request(self, buffers: Sequence[tuple[int, int, bool]], indirect_at: int = 0) -> int:
        """One chain there and back on the first queue: the number of bytes written into it."""
        queue = self.queues[0]
        head = queue.add(buffers, indirect_at)
        self.notify()
        returned = queue.collect()
        assert [entry[0] for entry in returned] == [head], returned
        queue.release_all()
        return returned[0][1]


def _readable(fd: int) -> bool:
    import select

    return bool(select.select([fd], [], [], 0)[0])


DriverFactory = Callable[[], Driver]
