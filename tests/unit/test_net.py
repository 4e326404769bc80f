"""virtio-net against a pair of sockets: what the driver gets for a frame, and what a frame of the driver becomes."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from stratovirt.backends.tap import TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6
from stratovirt.errors import HostError
from stratovirt.virtio.net import CTRL, F_CTRL_VLAN, F_MRG_RXBUF, RX, TX
from stratovirt.virtio.net_receive import RX_BATCH, SMALL_FRAME
from unit import virtio_driver as vd
from unit.virtio_devices import NetDriver
from unit.virtio_driver import GuestQueue

pytestmark = pytest.mark.usefixtures("implementation")

MAC = bytes.fromhex("525400123456")
OTHER = bytes.fromhex("020000000001")
BROADCAST = b"\xff" * 6
HEADER = struct.Struct("<BBHHHHH")
HIGH_FEATURES = vd.VERSION_1 | 1 << F_MRG_RXBUF
RX_DATA, TX_DATA, CTRL_DATA = 0x4_0000, 0x8_0000, 0xC_0000
COMMAND_AT, ACK_AT = CTRL_DATA, CTRL_DATA + 0x1_0000


class Interface:
    """A device on a loop, its driver, and the network at the tap's other end."""

    def __init__(self) -> None:
        self.driver = NetDriver()
        self.device, self.tap, self.network = self.driver.net, self.driver.tap, self.driver.network
        self.loop = self.driver.loop
        self.errors = self.driver.reported
        self.memory = self.driver.memory

    def start(self, features: int = HIGH_FEATURES) -> None:
        self.driver.start(features)
        for index, fd in enumerate(self.driver.transport.notify_fds):
            self.loop.add(fd, select.EPOLLIN, self._notifier(index))
        self.settle()

    def _notifier(self, index: int) -> Callable[[int], None]:
        return lambda _events: self.driver.transport.on_notify(index)

    @property
    def rx(self) -> GuestQueue:
        return self.driver.queues[RX]

    @property
    def tx(self) -> GuestQueue:
        return self.driver.queues[TX]

    def settle(self) -> int:
        """Run the loop until nothing is ready any more; how many rounds did something. Fails when there is no end to it."""
        for rounds in range(10_000):
            if not select.select([self.loop._epoll.fileno()], [], [], 0)[0]:
                return rounds
            self.loop.run_once(0)
        raise AssertionError("the loop spins")

    def post(self, sizes: list[int], at: int = RX_DATA) -> list[int]:
        """One receive buffer of one descriptor for each size; their addresses."""
        addresses = []
        for size in sizes:
            self.memory.write(at, b"\xaa" * size)
            self.rx.add([(at, size, True)])
            addresses.append(at)
            at += size
        self.driver.write(vd.QUEUE_NOTIFY, RX)
        self.settle()
        return addresses

    def arrive(self, frame: bytes, header: bytes = bytes(10)) -> None:
        """A frame comes from the network, as the kernel hands it over: ten bytes of header, and two that it leaves alone."""
        self.network.send(header + b"\x77\x77" + frame)

    def send(self, pieces: list[bytes], at: int = TX_DATA) -> int:
        """The driver sends a chain of these pieces."""
        buffers = []
        for piece in pieces:
            self.memory.write(at, piece)
            buffers.append((at, len(piece), False))
            at += len(piece) + 3
        head = self.tx.add(buffers)
        self.driver.write(vd.QUEUE_NOTIFY, TX)
        self.settle()
        return head

    def sent(self) -> list[bytes]:
        """What has come out on the network."""
        packets = []
        while True:
            try:
                packets.append(self.network.recv(1 << 18))
            except BlockingIOError:
                return packets

    def command(self, kind: int, command: int, data: bytes) -> int:
        """A control command; its ack."""
        self.memory.write(COMMAND_AT, bytes([kind, command]) + data)
        self.memory.write(ACK_AT, b"\x55")
        buffers = [(COMMAND_AT, 2, False), (COMMAND_AT + 2, len(data), False), (ACK_AT, 1, True)]
        queue = self.driver.queues[CTRL]
        queue.add([buffer for buffer in buffers if buffer[1]])
        self.driver.write(vd.QUEUE_NOTIFY, CTRL)
        self.settle()
        assert len(queue.collect()) == 1
        queue.release_all()
        return self.memory.read(ACK_AT, 1)[0]

    def close(self) -> None:
        self.driver.close()


@pytest.fixture
def net() -> Iterator[Interface]:
    interface = Interface()
    yield interface
    interface.close()


def frame(size: int = 60, destination: bytes = MAC) -> bytes:
    body = bytes(number * 7 & 0xFF for number in range(size - 14))
    return destination + OTHER + b"\x08\x00" + body


# -- receiving


def test_a_frame_lands_in_one_buffer(net: Interface) -> None:
    net.start()
    (address,) = net.post([2048])
    before = net.driver.line.count
    net.arrive(frame(600))
    net.settle()
    assert net.rx.collect() == [(0, 612)]
    assert net.memory.read(address, 612) == HEADER.pack(0, 0, 0, 0, 0, 0, 1) + frame(600)
    assert net.memory.read(address + 612, 4) == b"\xaa" * 4
    assert net.driver.line.count == before + 1


def test_a_large_frame_fills_several_buffers_and_says_how_many(net: Interface) -> None:
    net.start()
    addresses = net.post([1500] * 8)
    net.arrive(frame(4000))
    net.settle()
    assert net.rx.collect() == [(0, 1500), (1, 1500), (2, 1012)]
    assert net.memory.read(addresses[0], 4012) == HEADER.pack(0, 0, 0, 0, 0, 0, 3) + frame(4000)
    # the buffers that were not needed serve the next frame
    net.arrive(frame(100))
    net.settle()
    assert net.rx.collect() == [(3, 112)]
    assert net.memory.read(addresses[3], 112) == HEADER.pack(0, 0, 0, 0, 0, 0, 1) + frame(100)


@pytest.mark.reference
def test_defect_14_the_header_is_complete_before_any_buffer_is_given_back(net: Interface) -> None:
    net.start()
    (address, *_) = net.post([100] * 8)
    queue = net.device.queues[RX]
    assert queue is not None
    seen: list[tuple[int, bytes]] = []
    original = net.device.transport
    assert original is not None

    class Watching:
        """A store to used.idx as a driver on another processor sees it: nothing before it, everything after it."""

        def __init__(self, indices: memoryview) -> None:
            self.indices = indices

        def __getitem__(self, index: int) -> int:
            return self.indices[index]

        def __setitem__(self, index: int, value: int) -> None:
            self.indices[index] = value
            seen.append((net.rx.used_idx(), net.memory.read(address + 10, 2)))

    queue._used16 = Watching(queue._used16)  # type: ignore[assignment]
    net.arrive(frame(300))
    net.settle()
    assert [entry for entry in seen if entry[0]] == [(4, b"\x04\x00")] * len([entry for entry in seen if entry[0]])
    assert (4, b"\x04\x00") in seen


def test_defect_3_receiving_goes_on_after_a_refill(net: Interface) -> None:
    """The tap and the ring are both full; no event is lost, whichever is emptied first, and nothing spins meanwhile."""
    net.start()
    frames = [frame(60 + number % 150) for number in range(200)]
    sent = 0
    for _ in range(3):
        try:
            while sent < len(frames):
                net.network.send(bytes(12) + frames[sent])
                sent += 1
        except BlockingIOError:
            pass
        net.settle()
    assert net.rx.collect() == []
    got: list[bytes] = []
    while len(got) < len(frames):
        addresses = net.post([256] * 7)
        returned = net.rx.collect()
        got += [net.memory.read(address + 12, length - 12)
                for address, (_, length) in zip(addresses, returned, strict=False)]
        net.rx.release_all()
        assert returned, "receiving stalls"
        try:
            while sent < len(frames):
                net.network.send(bytes(12) + frames[sent])
                sent += 1
        except BlockingIOError:
            pass
    assert got == frames


@pytest.mark.parametrize("features", [HIGH_FEATURES, HIGH_FEATURES | vd.EVENT_IDX])
def test_a_turn_that_ends_with_the_last_buffer_at_hand_is_not_the_last(net: Interface, features: int) -> None:
    """Each frame fills what was popped for it, and more of them wait than one turn moves: there must be another turn."""
    net.start(features)
    frames = [frame(60 + number % 50) for number in range(RX_BATCH + 20)]
    for each in frames:
        net.arrive(each)
    net.post([SMALL_FRAME] * len(frames))
    assert [length - 12 for _, length in net.rx.collect()] == [len(each) for each in frames]


@pytest.mark.parametrize("features", [HIGH_FEATURES, HIGH_FEATURES | vd.EVENT_IDX | vd.INDIRECT_DESC])
def test_a_frame_waits_for_more_room(net: Interface, features: int) -> None:
    net.start(features)
    first = net.post([1000, 1000])
    net.arrive(frame(5000))
    net.arrive(frame(80))
    net.settle()
    assert net.rx.collect() == []
    second = net.post([1000], at=RX_DATA + 0x2000)
    assert net.rx.collect() == []
    third = net.post([1000] * 4, at=RX_DATA + 0x4000)
    assert net.rx.collect() == [(0, 1000), (1, 1000), (2, 1000), (3, 1000), (4, 1000), (5, 12), (6, 92)]
    content = b"".join(net.memory.read(address, 1000) for address in (*first, *second, *third[:3]))
    assert content[:5012] == HEADER.pack(0, 0, 0, 0, 0, 0, 6) + frame(5000)
    assert net.memory.read(third[3], 92) == HEADER.pack(0, 0, 0, 0, 0, 0, 1) + frame(80)


def test_a_frame_that_can_never_fit_is_dropped(net: Interface) -> None:
    net.start(vd.VERSION_1)  # no mergeable buffers: a frame has one chain
    addresses = net.post([500, 500])
    net.arrive(frame(600))
    net.arrive(frame(400))
    net.settle()
    assert net.rx.collect() == [(0, 412)]
    assert net.memory.read(addresses[0], 412) == HEADER.pack(0, 0, 0, 0, 0, 0, 1) + frame(400)
    assert "larger than the driver's buffers" in str(net.errors[0])


def test_a_ring_of_small_buffers_drops_what_is_larger_than_all_of_it(net: Interface) -> None:
    net.start()
    net.post([13] * 256)
    net.arrive(frame(4000))
    net.arrive(frame(60))
    net.settle()
    assert net.rx.collect() == [(number, 13) for number in range(5)] + [(5, 7)]


@pytest.mark.parametrize("cuts", [[1] * 40, [9, 1, 1, 1, 60], [10, 2, 60], [11, 61], [12, 60], [3, 8, 5, 90]], ids=str)
def test_defect_19_a_buffer_may_be_cut_anywhere(net: Interface, cuts: list[int]) -> None:
    net.start()
    at, buffers = RX_DATA, []
    for cut in cuts:
        buffers.append((at, cut, True))
        at += cut + 5
    net.rx.add(buffers)
    net.driver.write(vd.QUEUE_NOTIFY, RX)
    net.arrive(frame(28))
    net.settle()
    assert net.rx.collect() == [(0, 40)]
    content = b"".join(net.memory.read(address, length) for address, length, _ in buffers)
    assert content[:40] == HEADER.pack(0, 0, 0, 0, 0, 0, 1) + frame(28)


def test_more_pieces_than_one_system_call_takes(net: Interface) -> None:
    """Chains of hundreds of descriptors: together more than IOV_MAX, in one frame."""
    net.start(HIGH_FEATURES | vd.INDIRECT_DESC)
    for number in range(6):
        net.rx.add([(RX_DATA + 1000 * number + 4 * piece, 4, True) for piece in range(250)], 0xE_0000 + 0x1000 * number)
    net.driver.write(vd.QUEUE_NOTIFY, RX)
    net.arrive(frame(5500))
    net.settle()
    assert net.rx.collect() == [(number, 1000) for number in range(5)] + [(5, 512)]
    assert net.memory.read(RX_DATA, 5512) == HEADER.pack(0, 0, 0, 0, 0, 0, 6) + frame(5500)


def test_a_buffer_without_room_for_the_header_breaks_the_device(net: Interface) -> None:
    net.start()
    net.post([1500, 11])
    assert net.driver.status & vd.NEEDS_RESET
    assert sorted(net.rx.collect()) == [(0, 0), (1, 0)]
    net.arrive(frame())
    net.settle()


def test_defect_13_no_more_is_in_flight_than_the_queue_holds(net: Interface) -> None:
    """The driver publishes one descriptor for ever; what the device keeps stays bounded."""
    net.start()
    net.rx.describe(0, RX_DATA, 12, vd.WRITE)
    for _ in range(20):
        for _ in range(net.rx.size):
            net.rx.publish(0)
        net.driver.write(vd.QUEUE_NOTIFY, RX)
        net.settle()
        assert len(net.device.pairs[0].receiver.chains) <= net.rx.size
    for _ in range(net.rx.size):  # the index has run too far ahead of a device that takes no more: a broken ring
        net.arrive(frame())
        net.settle()
    assert net.driver.status & vd.NEEDS_RESET


@pytest.mark.parametrize("state", ["before any driver", "after a reset", "driver without receive queue"])
def test_frames_for_nobody_do_not_keep_the_loop_busy(net: Interface, state: str) -> None:
    if state == "after a reset":
        net.start()
        net.post([1500])
        net.driver.write(vd.STATUS, 0)
    elif state == "driver without receive queue":
        net.driver.negotiate(HIGH_FEATURES)
        net.driver.set_up_queue(TX)
        net.driver.add_status(vd.DRIVER_OK)
    net.arrive(frame())
    net.settle()


def test_a_reset_forgets_buffers_and_frames_of_the_last_driver(net: Interface) -> None:
    net.start()
    net.post([100, 100])
    net.arrive(frame(3000))  # held: too little room
    net.settle()
    net.arrive(frame(500))
    assert net.command(0, 0, b"\0") == 0
    net.driver.write(vd.STATUS, 0)
    for fd in net.driver.transport.notify_fds:
        net.loop.remove(fd)
    net.start()
    net.post([1500, 1500])
    net.arrive(frame(70, OTHER))  # promiscuous again
    net.settle()
    assert net.rx.collect() == [(0, 82)]


def test_offloads_follow_what_the_driver_negotiated(net: Interface) -> None:
    def offload(*bits: int) -> int | None:
        net.driver.start(vd.VERSION_1 | sum(1 << bit for bit in bits))
        return net.tap.offload

    assert offload() == 0
    assert offload(1) == TUN_F_CSUM
    assert offload(1, 7, 8) == TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6
    assert offload(7, 8) == 0  # segmentation without checksum is no combination (5.1.3.1)
    net.driver.write(vd.STATUS, 0)
    assert net.tap.offload == 0


# -- sending


def test_a_frame_is_sent_whatever_pieces_it_is_in(net: Interface) -> None:
    net.start()
    whole = bytes(12) + frame(200)
    for cuts in ([212], [12, 200], [5, 3, 4, 200], [1] * 20 + [192], [13, 199], [100, 112]):
        pieces, at = [], 0
        for cut in cuts:
            pieces.append(whole[at : at + cut])
            at += cut
        head = net.send(pieces)
        assert net.sent() == [whole], cuts
        assert net.tx.collect() == [(head, 0)]
        net.tx.release_all()


def test_a_full_tap_is_waited_for(net: Interface) -> None:
    net.start()
    with socket.socket(fileno=os.dup(net.tap.fd)) as tap:
        tap.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    for number in range(250):
        net.memory.write(TX_DATA + 1024 * number, bytes(12) + frame(1000, bytes([2, 0, 0, 0, 0, number])))
        net.tx.add([(TX_DATA + 1024 * number, 1012, False)])
    net.driver.write(vd.QUEUE_NOTIFY, TX)
    net.settle()
    assert len(net.tx.collect()) < 50
    net.tx.used_index = 0
    order = []
    for _ in range(1000):
        packets = net.sent()
        order += [packet[12 + 5] for packet in packets]
        net.settle()
        if not packets:
            break
    assert order == list(range(250))
    assert [head for head, _ in net.tx.collect()] == list(range(250))


def test_a_frame_without_a_header_breaks_the_device(net: Interface) -> None:
    net.start()
    head = net.send([bytes(11)])
    assert net.driver.status & vd.NEEDS_RESET
    assert net.tx.collect() == [(head, 0)]
    assert net.sent() == []


ALL = HIGH_FEATURES | 1 | 1 << 11 | 1 << 12


@pytest.mark.parametrize(("header", "size", "features"), [
    ((1, 0, 0, 0, 59, 0), 60, ALL),  # defect 17: the checksum lies outside the frame
    ((1, 0, 0, 0, 58, 1), 60, ALL),
    ((1, 0, 0, 0, 0xFFFF, 0xFFFF), 60, ALL),
    ((1, 0, 0, 0, 34, 16), 60, HIGH_FEATURES),  # not negotiated
    ((0, 1, 54, 1460, 0, 0), 3000, ALL),  # segmentation without checksum
    ((1, 1, 54, 0, 34, 16), 3000, ALL),  # segments of nothing
    ((1, 1, 3001, 1460, 34, 16), 3000, ALL),
    ((1, 1, 54, 1460, 34, 16), 3000, HIGH_FEATURES | 1),
    ((1, 4, 54, 1460, 34, 16), 3000, HIGH_FEATURES | 1 | 1 << 11),
    ((1, 3, 54, 1460, 34, 6), 3000, ALL),  # UDP was not even offered
    ((1, 5, 54, 1460, 34, 6), 3000, ALL),
    ((1, 0x81, 54, 1460, 34, 16), 3000, ALL),
    ((1, 0xFF, 54, 1460, 34, 16), 3000, ALL),
    ((0, 0, 0, 0, 0, 0), 13, ALL),
    ((0, 0, 0, 0, 0, 0), 0, ALL),
    ((0, 0, 0, 0, 0, 0), 70_000, ALL),
], ids=str)
def test_defect_17_a_forged_header_never_reaches_the_kernel(
    net: Interface, header: tuple[int, ...], size: int, features: int
) -> None:
    net.start(features)
    head = net.send([piece for piece in (HEADER.pack(*header, 0), bytes(size)) if piece])
    assert net.sent() == []
    assert net.tx.collect() == [(head, 0)]
    assert len(net.errors) == 1
    assert not net.driver.status & vd.NEEDS_RESET
    net.tx.release_all()
    net.send([bytes(12) + frame()])
    assert net.sent() == [bytes(12) + frame()]


@pytest.mark.parametrize(("header", "expected"), [
    ((1, 0, 0, 0, 34, 16, 9), (1, 0, 0, 0, 34, 16, 0)),
    ((1, 1, 54, 1460, 34, 16, 0), (1, 1, 54, 1460, 34, 16, 0)),
    ((1, 4, 74, 1440, 54, 16, 0), (1, 4, 74, 1440, 54, 16, 0)),
    ((0xFE, 0, 99, 98, 97, 96, 95), (0, 0, 0, 0, 0, 0, 0)),  # unknown flags are ignored, and what has no meaning is not passed
], ids=str)
def test_a_good_header_is_passed_on(net: Interface, header: tuple[int, ...], expected: tuple[int, ...]) -> None:
    net.start(ALL)
    net.send([HEADER.pack(*header), frame(3000)])
    assert net.sent() == [HEADER.pack(*expected) + frame(3000)]


def test_defect_22_a_header_that_changes_after_the_check_changes_nothing(net: Interface) -> None:
    net.start(ALL)
    write = net.tap.write

    def late(views: list[bytes | memoryview]) -> bool:
        net.memory.write(TX_DATA, b"\xff" * 12)
        return write(views)

    net.tap.write = late  # type: ignore[method-assign]
    net.send([bytes(12) + frame()])
    assert net.sent() == [bytes(12) + frame()]


# -- the control queue


@pytest.mark.parametrize(("kind", "command", "data", "ack"), [
    (0, 0, b"\1", 0), (0, 5, b"\0", 0), (0, 6, b"\0", 1), (0, 0, b"", 1), (0, 0, b"\0\0", 1),
    (1, 1, bytes(6), 0), (1, 1, bytes(5), 1), (1, 2, bytes(6), 1),
    (1, 0, bytes(8), 0), (1, 0, bytes(7), 1), (1, 0, b"\1\0\0\0" + bytes(6) + bytes(4), 0),
    (1, 0, b"\xff\xff\xff\xff" + bytes(4), 1), (1, 0, bytes(4) + b"\2\0\0\0" + bytes(6), 1), (1, 0, bytes(9), 1),
    (2, 0, b"\5\0", 0), (2, 1, b"\5\0", 0), (2, 0, b"\0\x10", 1), (2, 2, b"\5\0", 1),
    (3, 0, b"", 1), (4, 0, b"\1\0", 1), (5, 0, b"\0" * 8, 1), (255, 255, b"\xff" * 100, 1),
], ids=str)
def test_commands_are_carried_out_or_refused(net: Interface, kind: int, command: int, data: bytes, ack: int) -> None:
    net.start(HIGH_FEATURES | 1 << F_CTRL_VLAN)
    assert net.command(kind, command, data) == ack


def test_a_command_of_monstrous_size_is_refused_unread(net: Interface) -> None:
    net.start(HIGH_FEATURES | vd.INDIRECT_DESC)
    queue = net.driver.queues[CTRL]
    buffers = [(0x1_0000, 0x8_0000, False)] * 50 + [(ACK_AT, 1, True)]
    queue.add(buffers)
    net.driver.write(vd.QUEUE_NOTIFY, CTRL)
    net.settle()
    assert (len(queue.collect()), net.memory.read(ACK_AT, 1)) == (1, b"\1")


def test_the_address_set_by_the_driver_holds_until_a_reset(net: Interface) -> None:
    net.start()
    assert net.command(1, 1, OTHER) == 0
    assert bytes(net.driver.read(vd.CONFIG + at, 1) for at in range(6)) == OTHER
    net.driver.write(vd.STATUS, 0)
    assert bytes(net.driver.read(vd.CONFIG + at, 1) for at in range(6)) == MAC


def vlan_frame(vlan: int) -> bytes:
    return MAC + OTHER + b"\x81\x00" + (0x2000 | vlan).to_bytes(2, "big") + b"\x08\x00" + bytes(46)


GROUP = bytes.fromhex("01005e000001")


@pytest.mark.parametrize(("commands", "accepted"), [
    ([], {MAC, OTHER, GROUP, BROADCAST}),
    ([(0, 0, b"\0")], {MAC, BROADCAST}),
    ([(0, 0, b"\0"), (0, 1, b"\1")], {MAC, GROUP, BROADCAST}),
    ([(0, 0, b"\0"), (0, 2, b"\1")], {MAC, OTHER, BROADCAST}),
    ([(0, 0, b"\0"), (0, 1, b"\1"), (0, 3, b"\1")], {MAC, BROADCAST}),
    ([(0, 0, b"\0"), (0, 4, b"\1")], {BROADCAST}),
    ([(0, 0, b"\0"), (0, 5, b"\1")], {MAC}),
    ([(0, 0, b"\0"), (1, 0, b"\1\0\0\0" + OTHER + b"\1\0\0\0" + GROUP)], {MAC, OTHER, GROUP, BROADCAST}),
    ([(0, 0, b"\0"), (1, 0, bytes(4) + b"\x41\0\0\0" + bytes(6 * 65))], {MAC, GROUP, BROADCAST}),
    ([(0, 0, b"\0"), (1, 1, OTHER)], {OTHER, BROADCAST}),
], ids=str)
def test_the_filter_passes_what_the_driver_asked_for(
    net: Interface, commands: list[tuple[int, int, bytes]], accepted: set[bytes]
) -> None:
    net.start()
    for command in commands:
        assert net.command(*command) == 0
    addresses = net.post([200] * 8)
    for destination in (MAC, OTHER, GROUP, BROADCAST):
        net.arrive(frame(60, destination))
    net.settle()
    got = {net.memory.read(address + 12, 6) for address, _ in zip(addresses, net.rx.collect(), strict=False)}
    assert got == accepted


def test_tagged_frames_pass_once_their_vlan_was_added(net: Interface) -> None:
    net.start(HIGH_FEATURES | 1 << F_CTRL_VLAN)
    net.post([200] * 8)
    for added, vlan, expected in ((5, 5, 1), (7, 6, 0), (6, 6, 1)):
        net.command(2, 0, added.to_bytes(2, "little"))
        net.arrive(vlan_frame(vlan))
        net.settle()
        assert len(net.rx.collect()) == expected
    net.command(2, 1, b"\x05\0")
    net.arrive(vlan_frame(5))
    net.arrive(frame())
    net.settle()
    assert len(net.rx.collect()) == 1


# -- the link


def test_a_tap_that_goes_away_is_a_link_that_goes_down(net: Interface) -> None:
    net.start(HIGH_FEATURES | 1 << 16)
    net.post([1500])
    assert net.driver.read(vd.CONFIG + 6, 2) == 1
    generation = net.driver.read(vd.CONFIG_GENERATION)
    net.network.close()
    net.settle()
    assert net.driver.read(vd.CONFIG + 6, 2) == 0
    assert net.driver.read(vd.CONFIG_GENERATION) == generation + 1
    assert net.driver.read(vd.INTERRUPT_STATUS) & 2
    assert len(net.errors) == 1 and isinstance(net.errors[0], HostError)
    head = net.send([bytes(12) + frame()])
    assert net.tx.collect() == [(head, 0)]
    assert not net.driver.status & vd.NEEDS_RESET
    assert len(net.errors) == 1


def test_a_cable_can_be_pulled_and_put_back(net: Interface) -> None:
    net.start(HIGH_FEATURES | 1 << 16)
    net.post([1500] * 2)
    net.device.set_link(False)
    net.arrive(frame())
    net.settle()
    assert (net.driver.read(vd.CONFIG + 6, 2), net.rx.collect()) == (0, [])
    net.device.set_link(True)
    net.settle()
    assert (net.driver.read(vd.CONFIG + 6, 2), net.rx.collect()) == (1, [(0, 72)])


@pytest.mark.reference
def test_errors_of_the_tap_cost_frames_not_the_device(net: Interface) -> None:
    net.start()

    def fail(views: list[bytes | memoryview]) -> bool:
        raise HostError("write on tap tap0", 5)

    working, net.tap.write = net.tap.write, fail  # type: ignore[method-assign]
    first = net.send([bytes(12) + frame()])
    net.tap.write = working  # type: ignore[method-assign]
    second = net.send([bytes(12) + frame(80)], at=TX_DATA + 4096)
    assert net.tx.collect() == [(first, 0), (second, 0)]
    assert net.sent() == [bytes(12) + frame(80)]
    assert len(net.errors) == 1


@pytest.mark.reference
def test_a_tap_that_cannot_be_read_does_not_keep_the_loop_busy(net: Interface) -> None:
    net.start()
    (address,) = net.post([1500])
    now = 0.0
    net.loop.clock = lambda: now

    def fail(views: list[memoryview]) -> int:
        raise HostError("read on tap tap0", 12)

    working, net.tap.read = net.tap.read, fail  # type: ignore[method-assign]
    net.arrive(frame())
    net.settle()
    for _ in range(5):
        net.driver.write(vd.QUEUE_NOTIFY, RX)
        net.settle()
    assert len(net.loop._timers) == 1
    net.tap.read = working  # type: ignore[method-assign]
    now = 1.0
    net.loop.run_once(0)
    net.settle()
    assert net.rx.collect() == [(0, 72)]
    assert net.memory.read(address + 12, 60) == frame()
