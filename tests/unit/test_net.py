"""virtio-net against a pair of sockets: what the driver gets for a frame, and what a frame of the driver becomes."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Callable, Iterator

import pytest
import virtio_driver as vd
from virtio_driver import Driver, GuestQueue

from stratovirt.backends.tap import TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, Tap
from stratovirt.errors import HostError, StratoVirtError
from stratovirt.loop import EventLoop
from stratovirt.virtio.net import CTRL, F_CTRL_VLAN, F_MRG_RXBUF, RX, TX, VirtioNet

MAC = bytes.fromhex("525400123456")
OTHER = bytes.fromhex("020000000001")
BROADCAST = b"\xff" * 6
HEADER = struct.Struct("<BBHHHHH")
HIGH_FEATURES = vd.VERSION_1 | 1 << F_MRG_RXBUF
RX_DATA, TX_DATA, CTRL_DATA = 0x4_0000, 0x8_0000, 0xC_0000
COMMAND_AT, ACK_AT = CTRL_DATA, CTRL_DATA + 0x1_0000


class PacketTap(Tap):
    """One end of a socket pair in the place of a tap: it keeps the borders of packets as a tap does."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "tap0")
        self.offload: int | None = None

    def set_offload(self, flags: int) -> None:
        self.offload = flags


class Interface:
    """A device on a loop, its driver, and the network at the tap's other end."""

    def __init__(self) -> None:
        ours, self.network = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, self.network):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.network.setblocking(False)
        self.tap = PacketTap(ours.detach())
        self.loop = EventLoop()
        self.errors: list[StratoVirtError] = []
        self.device = VirtioNet(self.tap, MAC, self.loop, on_error=self.errors.append)
        self.driver = Driver(self.device)
        self.memory = self.driver.memory
        self.ready = True

    def start(self, features: int = HIGH_FEATURES) -> None:
        self.driver.start(features)
        for index, fd in enumerate(self.driver.transport.notify_fds):
            self.loop.add(fd, select.EPOLLIN, lambda _events, index=index: self.driver.transport.on_notify(index))
        self.settle()

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
        self.network.close()
        self.driver.close()
        self.device.close()
        self.loop.close()


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
