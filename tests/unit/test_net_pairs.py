"""Queue pairs of virtio-net, and vhost-net in their place: who serves which ring, from where, and when nobody does."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stratovirt.address_map import AddressMap
from stratovirt.arch.x86_64 import layout
from stratovirt.backends.tap import NoTap, TapGoneError
from stratovirt.errors import ConfigError, HostError, StratoVirtError
from stratovirt.iothread import IoThread
from stratovirt.loop import READ, EventLoop
from stratovirt.machine.slots import plug
from stratovirt.vhost.kernel import KernelVhost
from stratovirt.vhost.net import VhostNet, open_vhost_net
from stratovirt.virtio.net import VirtioNet
from unit.test_vhost import (
    GET_FEATURES,
    SET_FEATURES,
    SET_OWNER,
    VRING_ADDR,
    VRING_BASE,
    VRING_CALL,
    VRING_ERR,
    VRING_KICK,
    Kernel,
)
from unit.virtio_devices import PacketTap
from unit.virtio_driver import (
    CONFIG,
    DATA,
    EVENT_IDX,
    INDIRECT_DESC,
    INTERRUPT_ACK,
    INTERRUPT_STATUS,
    NEEDS_RESET,
    QUEUE_NOTIFY,
    STATUS,
    VERSION_1,
    Driver,
    GuestQueue,
    Line,
    guest_memory,
)

pytestmark = pytest.mark.usefixtures("implementation")

MAC = bytes.fromhex("525400123456")
MQ, MERGEABLE = 1 << 22, 1 << 15
GET_VRING_BASE, SET_BACKEND = 3 << 30 | 8 << 16 | 0xAF12, 1 << 30 | 8 << 16 | 0xAF30
ACK_AT = 0xF_0000
HEADER = bytes(12)
WAIT = 20.0


class QueueTap(PacketTap):
    """A queue of a tap: what it was told, and the network at its other end."""

    def __init__(self) -> None:
        ours, self.network = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.network.setblocking(False)
        super().__init__(ours.detach())
        self.attached = True
        self.refuse = 0
        self.closed = self.deleted = False

    def set_offload(self, flags: int) -> None:
        if self.deleted:
            raise TapGoneError.from_os("TUNSETOFFLOAD on tap tap0", OSError(errno.EBADFD, os.strerror(errno.EBADFD)))
        super().set_offload(flags)

    def enable(self, on: bool) -> None:
        if self.refuse:
            raise HostError.from_os("TUNSETQUEUE on tap tap0", OSError(self.refuse, os.strerror(self.refuse)))
        self.attached = on

    def close(self) -> None:
        assert not self.closed
        self.closed = True
        super().close()

    def sent(self) -> list[bytes]:
        frames = []
        while True:
            try:
                frames.append(self.network.recv(1 << 17)[len(HEADER):])
            except (BlockingIOError, ConnectionResetError):
                return frames


class NetKernel(Kernel):
    """vhost-net's side: which rings have a backend, and where they stood when they lost it."""

    def __init__(self) -> None:
        super().__init__()
        self.backends = {0: -1, 1: -1}
        self.stands_at = {0: 0, 1: 0}

    def __call__(self, fd: int, request: int, argument: bytes | bytearray | int) -> int:
        super().__call__(fd, request, argument)
        if request == GET_FEATURES:
            assert isinstance(argument, bytearray)
            argument[1] |= MERGEABLE >> 8
        elif request == SET_BACKEND:
            assert isinstance(argument, bytes)
            index, backend = struct.unpack("<Ii", argument)
            self.backends[index] = backend
        elif request == GET_VRING_BASE:
            assert isinstance(argument, bytearray)
            index, _ = struct.unpack("<II", argument)
            argument[:] = struct.pack("<II", index, self.stands_at[index])
        return 0

    @property
    def runs_on(self) -> int:
        """The tap's descriptor, -1 for none."""
        assert self.backends[0] == self.backends[1]
        return self.backends[0]

    def last(self, request: int) -> dict[int, tuple[int, ...]]:
        """What each ring was last told with `request`."""
        told = [struct.unpack(f"<{len(data) // 4}i", data) for data in self.arguments(request)]
        return {words[0]: words[1:] for words in told}


class PairsDriver(Driver):
    """virtio-net with so many pairs on a loop that watches its queues as a machine would."""

    def __init__(self, pairs: int = 2, vhost: bool = False) -> None:
        self.loop = EventLoop()
        self.taps = [QueueTap() for _ in range(pairs)]
        self.reported: list[StratoVirtError] = []
        memory = guest_memory()
        self.kernels = [NetKernel() for _ in range(pairs if vhost else 0)]
        self.net = VirtioNet(self.taps, MAC, self.loop, on_error=self.reported.append, vhosts=[
            self.make_vhost(kernel, memory) for kernel in self.kernels])
        super().__init__(self.net, memory)
        for index, fd in enumerate(self.transport.notify_fds):
            self.loop.add(fd, READ, self._notifier(index))

    @staticmethod
    def make_vhost(kernel: NetKernel, memory: object) -> VhostNet:
        return VhostNet(KernelVhost(os.dup(0), "/dev/vhost-net", memory, kernel))  # type: ignore[arg-type]

    def _notifier(self, index: int) -> Callable[[int], None]:
        return lambda _events: self.transport.on_notify(index)

    def settle(self) -> None:
        for _ in range(50):
            self.loop.run_once(0)

    def receive_buffers(self, queue: int, count: int = 4) -> None:
        at = DATA + 0x1_0000 * queue
        for number in range(count):
            self.queues[queue].add([(at + 2048 * number, 2048, True)])
        self.write(QUEUE_NOTIFY, queue)
        self.settle()

    def send(self, queue: int, frame: bytes) -> None:
        at = DATA + 0x1_0000 * queue
        self.memory.write(at, HEADER + frame)
        self.queues[queue].add([(at, len(HEADER) + len(frame), False)])
        self.write(QUEUE_NOTIFY, queue)
        self.settle()

    def command(self, queue: int, data: bytes) -> int:
        self.memory.write(ACK_AT, b"\x55" + data)
        self.queues[queue].add([(ACK_AT + 1, len(data), False), (ACK_AT, 1, True)])
        self.write(QUEUE_NOTIFY, queue)
        self.settle()
        assert len(self.queues[queue].collect()) == 1
        return self.memory.read(ACK_AT, 1)[0]

    def use_pairs(self, count: int) -> int:
        return self.command(4, b"\x04\x00" + count.to_bytes(2, "little"))

    def close(self) -> None:
        self.net.close()
        super().close()
        for tap in self.taps:
            tap.network.close()
        self.loop.close()


@pytest.fixture
def make() -> Iterator[Callable[..., PairsDriver]]:
    made: list[PairsDriver] = []

    def factory(*arguments: object, **options: object) -> PairsDriver:
        made.append(PairsDriver(*arguments, **options))  # type: ignore[arg-type]
        return made[-1]

    yield factory
    for driver in made:
        driver.close()


def frame(mark: int) -> bytes:
    return MAC + bytes(6) + b"\x08\x00" + bytes([mark]) * 50


# -- several pairs


def test_the_driver_uses_one_pair_until_it_asks_for_more(make: Callable[..., PairsDriver]) -> None:
    driver = make()
    first, second = driver.taps
    assert driver.offered() & MQ
    assert driver.read(CONFIG + 8, 2) == 2
    assert (first.attached, second.attached) == (True, False)
    driver.start(VERSION_1 | MQ | MERGEABLE | 1 << 17)
    driver.receive_buffers(0)
    driver.receive_buffers(2)
    second.network.send(HEADER + frame(2))
    driver.settle()
    assert driver.queues[2].collect() == []
    assert driver.use_pairs(2) == 0
    assert second.attached
    driver.settle()
    assert len(driver.queues[2].collect()) == 1
    driver.send(3, frame(3))
    driver.send(1, frame(1))
    assert (first.sent(), second.sent()) == ([frame(1)], [frame(3)])
    assert driver.use_pairs(1) == 0
    assert not second.attached
    driver.send(3, frame(4))  # it should not, and the frame is not lost for that
    assert (first.sent(), second.sent()) == ([frame(4)], [])
    assert driver.use_pairs(2) == 0
    driver.write(STATUS, 0)
    assert not second.attached


@pytest.mark.parametrize("data", [
    b"\x04\x00\x00\x00", b"\x04\x00\x03\x00", b"\x04\x00\x02", b"\x04\x00\x02\x00\x00", b"\x04\x01\x02\x00",
])
def test_a_number_of_pairs_that_cannot_be_is_refused(make: Callable[..., PairsDriver], data: bytes) -> None:
    driver = make()
    driver.start(VERSION_1 | MQ | 1 << 17)
    assert driver.command(4, data) == 1
    assert not driver.taps[1].attached


def test_a_driver_that_knows_one_pair_has_its_commands_on_queue_2(make: Callable[..., PairsDriver]) -> None:
    driver = make()
    driver.start(VERSION_1 | 1 << 17 | 1 << 18)
    assert driver.command(2, b"\x00\x00\x01") == 0  # promiscuous
    assert driver.command(2, b"\x04\x00\x02\x00") == 1
    assert not driver.taps[1].attached


def test_a_tap_that_does_not_attach_a_queue_is_a_refusal(make: Callable[..., PairsDriver]) -> None:
    driver = make()
    driver.start(VERSION_1 | MQ | 1 << 17)
    driver.taps[1].refuse = errno.E2BIG
    assert driver.use_pairs(2) == 1
    assert [error.errno for error in driver.reported if isinstance(error, HostError)] == [errno.E2BIG]
    driver.taps[1].refuse = 0
    assert driver.use_pairs(2) == 0


def test_a_tap_with_fewer_queues_than_pairs_serves_all(make: Callable[..., PairsDriver]) -> None:
    driver = make()
    driver.start(VERSION_1 | MQ | 1 << 17)
    assert driver.use_pairs(2) == 0
    driver.net.replace_taps([NoTap()])
    assert all(tap.closed for tap in driver.taps)
    driver.send(3, frame(9))  # dropped: there is no cable
    assert len(driver.queues[3].collect()) == 1
    single = QueueTap()
    driver.taps.append(single)
    driver.net.replace_taps([single])
    assert driver.use_pairs(2) == 0
    driver.send(1, frame(1))
    driver.send(3, frame(3))
    assert single.sent() == [frame(1), frame(3)]
    two = [QueueTap(), QueueTap()]
    driver.taps += two
    driver.net.replace_taps(two)
    assert [tap.attached for tap in two] == [True, True]
    driver.send(3, frame(5))
    assert two[1].sent() == [frame(5)]


def test_receiving_and_sending_on_threads_of_their_own() -> None:
    """Frames both ways at once, while the driver resets its device and the cable is exchanged."""
    threads = [IoThread(name, lambda: None) for name in ("in0", "out0")]
    main = EventLoop()
    tap = QueueTap()
    device = VirtioNet(tap, MAC, main, rx_loop=threads[0].loop, tx_loop=threads[1].loop)
    driver = Driver(device)
    ran_on: dict[int, set[int]] = {0: set(), 1: set()}

    def notifier(index: int) -> Callable[[int], None]:
        def serve(_events: int) -> None:
            ran_on[index].add(threading.get_ident())
            driver.transport.on_notify(index)

        return serve

    for index in (0, 1):
        loop = device.loop_of(index)
        assert loop is threads[index].loop
        loop.add(driver.transport.notify_fds[index], READ, notifier(index))
    for thread in threads:
        thread.start()
    taps = [tap]
    try:
        for round_number in range(30):
            driver.start(VERSION_1 | EVENT_IDX)
            receive, transmit = driver.queues[0], driver.queues[1]
            for number in range(16):
                receive.add([(DATA + 2048 * number, 2048, True)])
                at = DATA + 0x2_0000 + 2048 * number
                driver.memory.write(at, HEADER + frame(number))
                transmit.add([(at, len(HEADER) + 64, False)])
                taps[-1].network.send(HEADER + frame(number))
            driver.write(QUEUE_NOTIFY, 0)
            driver.write(QUEUE_NOTIFY, 1)
            _until(lambda receive=receive, transmit=transmit: receive.used_idx() == transmit.used_idx() == 16)
            assert taps[-1].sent() == [frame(number) for number in range(16)]
            if round_number % 3 == 0:
                taps.append(QueueTap())
                device.replace_taps([taps[-1]])
            driver.write(STATUS, 0)
    finally:
        for thread in threads:
            thread.stop()
    assert all(len(idents) == 1 for idents in ran_on.values()) and ran_on[0] != ran_on[1]
    device.close()
    driver.close()
    for each in taps:
        each.network.close()


def _until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(int(WAIT / 0.001)):
        if condition():
            return
        pause.wait(0.001)
    raise AssertionError(f"not within {WAIT} s")


# -- vhost


def test_the_kernel_is_told_everything_and_then_runs(make: Callable[..., PairsDriver]) -> None:
    driver = make(pairs=1, vhost=True)
    (kernel,), (tap,) = driver.kernels, driver.taps
    assert kernel.runs_on == -1
    driver.start(VERSION_1 | EVENT_IDX | INDIRECT_DESC | MERGEABLE | 1 << 17 | 1)
    base = driver.memory.regions[0].host.address
    assert kernel.arguments(SET_FEATURES) == [struct.pack("<Q", VERSION_1 | EVENT_IDX | INDIRECT_DESC | MERGEABLE)]
    assert kernel.arguments(VRING_ADDR) == [
        struct.pack("<IIQQQQ", ring, 0, base + queue.desc, base + queue.used, base + queue.avail, 0)
        for ring, queue in enumerate(driver.queues[:2])]
    assert kernel.last(VRING_KICK) == {ring: (driver.transport.notify_fds[ring],) for ring in (0, 1)}
    assert kernel.runs_on == tap.fd
    assert [request for request, _ in kernel.calls[-2:]] == [SET_BACKEND, SET_BACKEND]
    driver.settle()
    driver.write(QUEUE_NOTIFY, 0)
    driver.settle()
    assert os.eventfd_read(driver.transport.notify_fds[0])  # the kernel watches it, and nobody else
    before = driver.line.count
    os.eventfd_write(kernel.last(VRING_CALL)[1][0], 1)
    assert driver.read(INTERRUPT_STATUS) == 1 and driver.line.count == before + 1
    assert driver.command(2, b"\x00\x00\x01") == 0  # the control queue is ours


@pytest.mark.parametrize("how", ["pause", "link", "unplug", "gone"])
def test_the_last_interrupt_of_a_kernel_thread_is_not_lost(make: Callable[..., PairsDriver], how: str) -> None:
    """It comes straight to the line, and the driver may read InterruptStatus only when nobody runs any more."""
    driver = make(pairs=1, vhost=True)
    driver.start(VERSION_1)
    driver.settle()
    driver.write(INTERRUPT_ACK, 3)
    assert driver.read(INTERRUPT_STATUS) == 1, "any interrupt may be the kernel's"
    before = driver.line.count
    os.eventfd_write(driver.kernels[0].last(VRING_CALL)[0][0], 1)
    if how == "pause":
        driver.net.pause()
    elif how == "link":
        driver.net.set_link(False)
    elif how == "unplug":
        driver.net.replace_taps([NoTap()])
    else:
        driver.taps[0].network.close()
        driver.settle()
    assert driver.kernels[0].runs_on == -1
    assert driver.read(INTERRUPT_STATUS) & 1 and driver.line.count >= before + 2
    driver.write(INTERRUPT_ACK, 3)
    assert driver.read(INTERRUPT_STATUS) == 0


class Wiring:
    """What KVM is told of a slot."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.ioeventfds: list[tuple[int, int, int]] = []

    def add_memory(self, region: object) -> None: ...

    def create_irqfd(self, gsi: int) -> Line:
        return self.line

    def add_ioeventfd(self, fd: int, address: int, length: int, datamatch: int) -> None:
        os.fstat(fd)
        self.ioeventfds.append((address, length, datamatch))


@pytest.mark.parametrize("vhost", [False, True])
def test_acknowledging_vhosts_interrupts_is_no_exit(make: Callable[..., PairsDriver], vhost: bool) -> None:
    driver = make(pairs=1, vhost=vhost)
    slot = layout.slot(4)
    wiring = Wiring(driver.line)
    occupied = plug(driver.net, "n", slot, wiring, driver.memory, AddressMap(), EventLoop())
    swallowed = [(address, length, value) for address, length, value in wiring.ioeventfds if address & 0x1FF == INTERRUPT_ACK]
    assert swallowed == ([(base + INTERRUPT_ACK, 4, 1) for base in slot.windows] if vhost else [])
    driver.transport, driver.window = occupied.transport, occupied.transport.windows[0]
    assert driver.read(INTERRUPT_STATUS) == 0
    driver.start(VERSION_1)
    driver.net.replace_taps([NoTap()])  # no kernel thread any more, and still nobody hears of the acknowledgement
    driver.write(INTERRUPT_ACK, 2)
    if not vhost:
        driver.write(INTERRUPT_ACK, 1)
    assert driver.read(INTERRUPT_STATUS) == int(vhost)
    driver.write(STATUS, 0)
    assert driver.read(INTERRUPT_STATUS) == 0


def test_interrupts_may_be_the_kernels_as_long_as_one_pair_is_its(make: Callable[..., PairsDriver]) -> None:
    driver = make(vhost=True)
    driver.start(VERSION_1 | MQ | 1 << 17)
    assert driver.use_pairs(2) == 0 and driver.use_pairs(1) == 0
    driver.write(INTERRUPT_ACK, 3)
    assert driver.read(INTERRUPT_STATUS) == 1
    driver.write(STATUS, 0)
    assert driver.read(INTERRUPT_STATUS) == 0


@pytest.mark.parametrize("how", ["pause", "link", "reset", "unplug", "pairs"])
def test_rings_are_taken_back_and_go_on_where_they_stood(make: Callable[..., PairsDriver], how: str) -> None:
    driver = make(vhost=True)
    driver.start(VERSION_1 | MQ | 1 << 17)
    assert driver.use_pairs(2) == 0
    assert [kernel.runs_on for kernel in driver.kernels] == [tap.fd for tap in driver.taps]
    kernel = driver.kernels[1]
    kernel.stands_at = {0: 7, 1: 0xFFFF}
    for queue, index in zip(driver.queues[2:4], (7, 0xFFFF), strict=True):
        driver.memory.write(queue.avail + 2, index.to_bytes(2, "little"))  # all that was made available has been used
    if how == "pause":
        driver.net.pause()
        assert [kernel.runs_on for kernel in driver.kernels] == [-1, -1]
        driver.net.resume()
    elif how == "link":
        driver.net.set_link(False)
        assert [kernel.runs_on for kernel in driver.kernels] == [-1, -1]
        driver.net.set_link(True)
    elif how == "pairs":
        assert driver.use_pairs(1) == 0
        assert [kernel.runs_on for kernel in driver.kernels] == [driver.taps[0].fd, -1]
        assert driver.use_pairs(2) == 0
    elif how == "reset":
        driver.write(STATUS, 0)
        assert [kernel.runs_on for kernel in driver.kernels] == [-1, -1]
        driver.start(VERSION_1 | MQ | 1 << 17)
        assert driver.use_pairs(2) == 0
        assert kernel.last(VRING_BASE) == {0: (0,), 1: (0,)}
        return
    else:
        driver.net.replace_taps([NoTap()])
        assert [kernel.runs_on for kernel in driver.kernels] == [-1, -1]
        assert [vhost.fd for vhost in driver.net.vhosts] == []
        driver.kernels += [NetKernel(), NetKernel()]
        driver.taps += [QueueTap(), QueueTap()]
        driver.net.replace_taps(driver.taps[2:], vhosts=[driver.make_vhost(each, driver.memory) for each in driver.kernels[2:]])
        kernel = driver.kernels[3]
    assert kernel.last(VRING_BASE) == {0: (7,), 1: (0xFFFF,)}
    assert kernel.runs_on >= 0
    assert driver.reported == []


def test_without_a_link_what_the_driver_sends_comes_back(make: Callable[..., PairsDriver]) -> None:
    driver = make(pairs=1, vhost=True)
    driver.start(VERSION_1)
    driver.net.set_link(False)
    driver.send(1, frame(1))
    assert len(driver.queues[1].collect()) == 1
    assert driver.taps[0].sent() == []
    driver.net.set_link(True)
    assert driver.kernels[0].last(VRING_BASE)[1] == (1,)
    assert driver.kernels[0].runs_on == driver.taps[0].fd


def test_from_vhost_to_this_process_and_back(make: Callable[..., PairsDriver]) -> None:
    driver = make(pairs=1, vhost=True)
    driver.start(VERSION_1)
    driver.receive_buffers(0, 4)
    driver.kernels[0].stands_at = {0: 2, 1: 0}  # the kernel has used two of them
    _use(driver.queues[0], 2)
    plain = QueueTap()
    driver.taps.append(plain)
    driver.net.replace_taps([plain])
    plain.network.send(HEADER + frame(1))
    driver.send(1, frame(2))
    assert [head for head, _ in driver.queues[0].collect()][2:] == [2]
    assert plain.sent() == [frame(2)]
    kernel = NetKernel()
    driver.taps.append(QueueTap())
    driver.net.replace_taps(driver.taps[2:], vhosts=[driver.make_vhost(kernel, driver.memory)])
    assert kernel.last(VRING_BASE) == {0: (3,), 1: (1,)}
    assert kernel.runs_on == driver.taps[2].fd


def _use(queue: GuestQueue, count: int) -> None:
    """Return chains as the kernel would."""
    for number in range(count):
        queue.memory.write(queue.used + 4 + 8 * number, struct.pack("<II", number, 12))
    queue.memory.write(queue.used + 2, struct.pack("<H", count))


def test_a_tap_that_goes_away_stops_the_kernel(make: Callable[..., PairsDriver]) -> None:
    driver = make(pairs=1, vhost=True)
    driver.start(VERSION_1)
    driver.taps[0].network.close()  # a hang-up, as epoll says of a deleted tap that there is an error
    driver.settle()
    assert driver.kernels[0].runs_on == -1
    assert driver.read(CONFIG + 6, 2) & 1 == 0
    assert [type(error) for error in driver.reported] == [TapGoneError]
    driver.send(1, frame(1))
    assert len(driver.queues[1].collect()) == 1
    assert not driver.status & NEEDS_RESET


@pytest.mark.parametrize("request_number", [SET_FEATURES, VRING_BASE, VRING_ADDR, VRING_KICK, SET_BACKEND])
def test_a_kernel_that_refuses_leaves_a_device_that_needs_a_reset(
    make: Callable[..., PairsDriver], request_number: int
) -> None:
    driver = make(pairs=1, vhost=True)
    kernel = driver.kernels[0]
    kernel.refuse[request_number] = errno.EFAULT
    driver.start(VERSION_1)
    assert driver.status & NEEDS_RESET
    assert {error.errno for error in driver.reported if isinstance(error, HostError)} == {errno.EFAULT}
    kernel.refuse.clear()
    driver.start(VERSION_1)
    assert not driver.status & NEEDS_RESET
    assert kernel.runs_on == driver.taps[0].fd


def test_a_ring_that_the_kernel_cannot_follow(make: Callable[..., PairsDriver]) -> None:
    driver = make(vhost=True)
    driver.start(VERSION_1)
    os.eventfd_write(driver.kernels[0].last(VRING_ERR)[1][0], 1)
    driver.settle()
    assert driver.status & NEEDS_RESET
    assert driver.kernels[0].runs_on == -1
    assert len(driver.errors) == 1


def test_a_tap_that_takes_no_frames_because_it_is_gone(make: Callable[..., PairsDriver]) -> None:
    """vhost says "broken ring" for a frame that it could not send, and now and then before epoll says anything of the tap."""
    driver = make(pairs=1, vhost=True)
    driver.start(VERSION_1)
    driver.taps[0].deleted = True
    os.eventfd_write(driver.kernels[0].last(VRING_ERR)[1][0], 1)
    driver.settle()
    assert not driver.status & NEEDS_RESET
    assert driver.kernels[0].runs_on == -1
    assert driver.read(CONFIG + 6, 2) & 1 == 0
    assert [type(error) for error in driver.reported] == [TapGoneError]


def test_a_broken_control_queue_stops_the_kernel(make: Callable[..., PairsDriver]) -> None:
    driver = make(pairs=1, vhost=True)
    driver.start(VERSION_1 | 1 << 17)
    driver.queues[2].publish(0x7777)
    driver.write(QUEUE_NOTIFY, 2)
    driver.settle()
    assert driver.status & NEEDS_RESET
    assert driver.kernels[0].runs_on == -1


def test_features_that_the_kernel_lacks_are_not_offered(make: Callable[..., PairsDriver]) -> None:
    driver = make(pairs=1, vhost=True)
    assert driver.offered() & (EVENT_IDX | INDIRECT_DESC | VERSION_1) == EVENT_IDX | INDIRECT_DESC | VERSION_1
    driver.start(VERSION_1 | EVENT_IDX)
    poor = driver.make_vhost(NetKernel(), driver.memory)
    poor._features &= ~EVENT_IDX
    tap = QueueTap()
    with pytest.raises(HostError, match="lacks what the guest's driver has negotiated"):
        driver.net.replace_taps([tap], vhosts=[poor])
    assert driver.kernels[0].runs_on == driver.taps[0].fd
    poor.close()
    tap.close()
    tap.network.close()


# -- opening


def test_a_host_without_vhost_net(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="modprobe vhost_net"):
        open_vhost_net(None, guest_memory(), str(tmp_path / "vhost-net"))


@pytest.mark.parametrize("path", ["/dev/null", "/etc/hostname"])
def test_a_descriptor_of_something_else(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(ConfigError, match="not a vhost descriptor") as caught:
            open_vhost_net(fd, guest_memory())
        os.fstat(fd)  # it is not ours to close
    finally:
        os.close(fd)
    assert caught.value.value == str(fd)


@pytest.mark.parametrize(("refusals", "message"), [
    ({SET_BACKEND: errno.ENOTTY}, "another kind of vhost"),
    ({SET_OWNER: errno.EBUSY}, "that no other process uses"),
])
def test_what_the_kernel_may_refuse(monkeypatch: pytest.MonkeyPatch, refusals: dict[int, int], message: str) -> None:
    kernel = NetKernel()
    kernel.refuse = refusals
    monkeypatch.setattr("stratovirt.vhost.kernel._ioctl", kernel)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=message):
        open_vhost_net(None, guest_memory(), "/dev/null")
    assert len(os.listdir("/proc/self/fd")) == before
