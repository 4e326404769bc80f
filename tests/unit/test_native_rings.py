"""Compiled code and the Python version, with the same rings: whatever the driver puts there, the outcome is the same.

Two machines with one device each get the same memory. Descriptors have buffers that do not overlap, since for those that do an
order of writes would be compared which nobody is promised.
"""

from __future__ import annotations

import os
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratovirt import native
from stratovirt.hostmap import address_of_view
from stratovirt.virtio import queue as queue_module
from stratovirt.virtio.block_order import request_of
from stratovirt.virtio.block_request import DiskRequest
from stratovirt.virtio.net import RX, TX
from unit.virtio_devices import SECTOR, BlockDriver, NetDriver
from unit.virtio_driver import (
    DATA,
    INDIRECT,
    NEEDS_RESET,
    NEXT,
    STATUS,
    VERSION_1,
    WRITE,
    Driver,
    GuestQueue,
    guest_memory,
)

pytestmark = pytest.mark.skipif(native.compiled is None, reason=f"the compiled module is not there: {native.why}")

SECTORS = 64
SIZE = 32
SLOT = 0x1000  # for the buffer of each descriptor, of the table or an indirect one
SLOTS = 1000
TABLES = DATA + SLOT * SLOTS
RAM = 8 << 20
EXAMPLES = settings(max_examples=150, deadline=None)
SEEDS = st.integers(0, (1 << 32) - 1)


class Rings:
    """What a hostile driver does, from a seed: the same into every memory."""

    def __init__(self, seed: int) -> None:
        self.generator = random.Random(seed)
        self.buffers = 0

    def pick(self, odds: float) -> bool:
        return self.generator.random() < odds

    def buffer(self, length: int) -> tuple[int, int]:
        """A buffer of its own; now and then one that is none."""
        self.buffers += 1
        if self.pick(0.01):
            return self.generator.choice((RAM - 1, RAM + 8, (1 << 64) - 8)), \
                self.generator.choice((0, length, 0xFFFF_FFFF))
        return DATA + SLOT * (self.buffers % SLOTS), length

    def cut(self, length: int) -> list[int]:
        """A length in pieces."""
        pieces = []
        while length and self.pick(0.3):
            pieces.append(self.generator.randint(1, length))
            length -= pieces[-1]
        return [*pieces, length] if length else pieces

    def chain(self, queue: GuestQueue, readable: bytes, writable: int) -> None:
        """A chain that has these bytes for the device and room for so many; or nearly."""
        memory, generator = queue.memory, self.generator
        entries: list[tuple[int, int, int]] = []
        at = 0
        for length in self.cut(len(readable)):
            address, size = self.buffer(length)
            if address + length <= RAM:
                memory.write(address, readable[at : at + length])
            entries.append((address, size, 0))
            at += length
        entries += [(*self.buffer(length), WRITE) for length in self.cut(writable)]
        if self.pick(0.02):
            generator.shuffle(entries)
        if not entries or len(entries) > len(queue.free):
            return
        through_table = self.pick(0.4)
        taken = list(range(len(entries))) if through_table else [queue.free.pop(0) for _ in entries]
        described = []
        for number, (address, length, flags) in enumerate(entries):
            last = number + 1 == len(entries)
            following = generator.choice((0, 5, 0xFFFF)) if last else taken[number + 1]
            if self.pick(0.01):
                following, flags = generator.choice((taken[0], 0xFFFF, SIZE)), flags | NEXT
            if self.pick(0.01):
                flags |= INDIRECT
            described.append((address, length, flags | (0 if last else NEXT), following))
        if through_table:
            table = TABLES + 0x200 * (self.buffers % SLOTS) + generator.choice((0, 3))
            memory.write(table, b"".join(struct.pack("<QIHH", *entry) for entry in described))
            head = queue.free.pop(0)
            length = 16 * len(described) + (generator.choice((1, 16, -16)) if self.pick(0.02) else 0)
            queue.describe(head, table, max(length, 0), INDIRECT | (NEXT if self.pick(0.01) else 0))
        else:
            head = taken[0]
            for index, entry in zip(taken, described, strict=True):
                queue.describe(index, *entry)
        queue.publish(head if self.pick(0.995) else generator.choice((SIZE, 0xFFFF)))


def outcome(driver: Driver, queue: GuestQueue) -> tuple[object, ...]:
    """What the driver can see; then it begins anew. The order in which chains are returned is the device's affair."""
    broken = bool(driver.status & NEEDS_RESET)
    seen = broken, sorted(queue.collect()), not broken and queue.avail_event(), driver.memory.read(DATA, RAM - DATA)
    queue.release_all()
    if broken:
        driver.write(STATUS, 0)
    return seen



def use(patch: pytest.MonkeyPatch, version: str) -> None:
    patch.setattr(queue_module, "compiled", native.compiled if version == "compiled" else None)


def request(rings: Rings) -> tuple[bytes, int]:
    """A request of a disk: what it says, and how many bytes the device may write."""
    generator = rings.generator
    kind = generator.choice((0, 0, 0, 0, 1, 1, 1, 4, 8, 11, 77)) if rings.pick(0.3) else generator.choice((0, 1))
    sector = generator.randrange(SECTORS - 8) if rings.pick(0.95) else generator.choice(
        (SECTORS - 1, SECTORS, (1 << 64) - 1, (1 << 55) - 1))
    length = SECTOR * generator.randint(1, 4) if rings.pick(0.95) else generator.choice((0, 1, 511, 513, 16))
    if kind == 1:
        sector &= -4  # writes of a batch that overlap in part are done in an order that is the device's affair, too
    header = struct.pack("<IIQ", kind, generator.getrandbits(32), sector)
    if kind == 1:
        request, room = header + generator.randbytes(length), 1
    else:
        request, room = header, length + 1
    if rings.pick(0.01):
        request, room = request[:generator.randrange(len(request))], generator.choice((0, room))
    return request, room


@EXAMPLES
@given(SEEDS)
def test_disks(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    seen = []
    for version in ("compiled", "python"):
        rings, generator = Rings(seed), random.Random(seed)
        with pytest.MonkeyPatch.context() as patch:
            use(patch, version)
            disk = BlockDriver(tmp_path_factory.mktemp("disk"), SECTORS, generator.random() < 0.1, memory=guest_memory(RAM))
            if generator.random() < 0.1:
                os.truncate(disk.path, 40 * SECTOR)
            features = None if generator.random() < 0.8 else VERSION_1 | disk.offered() & generator.getrandbits(64)
            disk.start(features, size=SIZE)
            one: list[object] = []
            for _ in range(3):
                for _ in range(generator.randint(1, 12)):
                    rings.chain(disk.queues[0], *request(rings))
                disk.notify()
                one.append(outcome(disk, disk.queues[0]))
                if not disk.status:
                    break
            one += disk.device.operations, disk.device.bytes, disk.device.failures, len(disk.host_errors)  # type: ignore[attr-defined]
            disk.close()
            one.append(disk.path.read_bytes())
            seen.append(one)
    assert seen[0] == seen[1]


@EXAMPLES
@given(SEEDS)
def test_requests_for_engines(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """What compiled code takes is what Python takes, object by object, up to the first that is not plain."""
    rings = Rings(seed)
    with pytest.MonkeyPatch.context() as patch:
        use(patch, "compiled")
        disk = BlockDriver(tmp_path_factory.mktemp("disk"), SECTORS, memory=guest_memory(RAM))
        disk.start(size=SIZE)
    for _ in range(12):
        rings.chain(disk.queues[0], *request(rings))
    queue = disk.device.queues[0]
    assert queue is not None and queue.ring is not None
    taken = queue.ring.take_requests(DiskRequest, SECTORS, True, queue.positions[0], SIZE, 0, queue)
    assert disk.queues[0].used_idx() == 0
    ours = [fields(made) for made in taken]
    theirs = []
    for chain in queue.pop_batch(len(taken)) if taken else []:
        made = request_of(disk.device, 0, queue, chain, [])  # type: ignore[arg-type]
        theirs.append(fields(made) if made is not None else [])
    assert ours == theirs
    assert len({made.kind for made in taken}) <= 1
    del taken
    disk.close()


def fields(made: DiskRequest) -> list[object]:
    places = [(address_of_view(view), len(view)) for view in (*made.views, made.status)]
    return [made.kind, made.offset, made.length, made.written, made.head, made.index, made.queue, made.durable, made.unmap,
            made.error, places]


def header_of(generator: random.Random) -> bytes:
    """A header of a frame: plain, of a kind that offloads make, or any."""
    if generator.random() < 0.4:
        return bytes(12)
    if generator.random() < 0.7:
        return struct.pack("<BBHHHHH", 1, generator.choice((0, 1, 3, 4)), 54, 500, 34, 16, 0)
    return struct.pack("<BBHHHHH", generator.choice((0, 1, 2, 3)), generator.choice((0, 1, 3, 4, 5, 0x80)),
                       generator.choice((0, 54, 9999)), generator.choice((0, 1, 500)), generator.choice((0, 34, 60, 65535)),
                       generator.choice((0, 16, 65535)), generator.getrandbits(16))


def drain(net: NetDriver) -> list[bytes]:
    frames = []
    while True:
        try:
            frames.append(net.network.recv(1 << 17))
        except BlockingIOError:
            return frames


@EXAMPLES
@given(SEEDS)
def test_sending(seed: int) -> None:
    seen = []
    for version in ("compiled", "python"):
        rings, generator = Rings(seed), random.Random(seed)
        with pytest.MonkeyPatch.context() as patch:
            use(patch, version)
            net = NetDriver(guest_memory(RAM))
            net.start(None if generator.random() < 0.5 else VERSION_1 | net.offered() & generator.getrandbits(64), size=SIZE)
            one: list[object] = []
            for _ in range(3):
                for _ in range(generator.randint(1, 12)):
                    length = generator.choice((60, 200, 1514)) if rings.pick(0.95) else generator.choice((0, 1, 13, 14, 3000))
                    frame = header_of(rings.generator) + rings.generator.randbytes(length)
                    rings.chain(net.queues[TX], frame[:5] if rings.pick(0.01) else frame, 4 if rings.pick(0.02) else 0)
                net.notify(TX)
                one += outcome(net, net.queues[TX]), drain(net), [str(error) for error in net.reported]
                if not net.status:
                    break
            net.close()
            seen.append(one)
    assert seen[0] == seen[1]


@EXAMPLES
@given(SEEDS)
def test_receiving(seed: int) -> None:
    seen = []
    for version in ("compiled", "python"):
        rings, generator = Rings(seed), random.Random(seed)
        with pytest.MonkeyPatch.context() as patch:
            use(patch, version)
            net = NetDriver(guest_memory(RAM))
            net.start(None if generator.random() < 0.5 else VERSION_1 | net.offered() & generator.getrandbits(64), size=SIZE)
            if generator.random() < 0.5:
                net.net.filter.command(0, 0, b"\0")  # no longer promiscuous
            size = generator.choice((100, 700, 1600, 4000))
            one: list[object] = []
            for _ in range(4):
                for _ in range(generator.randint(0, 8)):
                    rings.chain(net.queues[RX], b"x" if rings.pick(0.01) else b"", 8 if rings.pick(0.01) else size)
                net.notify(RX)
                for _ in range(generator.randint(0, 4)):
                    address = generator.choice((b"\x52\x54\x00\x12\x34\x56", b"\xff" * 6, b"\x52\x54\x00\x12\x34\x57",
                                                b"\x01\x00\x5e\x00\x00\x01"))
                    kind = generator.choice((b"\x08\x00", b"\x08\x00", b"\x81\x00"))
                    net.network.send(bytes(12) + address + generator.randbytes(6) + kind +
                                     generator.randbytes(generator.choice((0, 46, 300, 1500, 5000, 20_000))))
                for _ in range(4):
                    net.loop.run_once(0)
                    net.serve()
                queue = net.queues[RX]
                broken = bool(net.status & NEEDS_RESET)
                # what is at hand beside that is written to before it is known whether a frame fits there
                one.append((broken, queue.collect(), [str(error) for error in net.reported]))
                used = one[-1][1]  # type: ignore[index]
                one.append([frames(queue, head, length) for head, length in used] if not broken else None)
                if broken:
                    break
            net.close()
            seen.append(one)
    assert seen[0] == seen[1]


def frames(queue: GuestQueue, head: int, length: int) -> bytes:
    """The first `length` bytes of a chain's buffers."""
    memory, data = queue.memory, b""
    table, index = queue.desc, head
    while True:
        address, size, flags, following = struct.unpack("<QIHH", memory.read(table + 16 * index, 16))
        if flags & INDIRECT:
            table, index = address, 0
            continue
        data += memory.read(address, size)
        if not flags & NEXT:
            return data[:length]
        index = following
