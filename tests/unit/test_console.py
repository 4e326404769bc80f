"""virtio-serial: ports and their control protocol as a guest's driver and a host's client see them."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stratovirt.backends.chardev import OUTPUT_LIMIT, READ_SIZE, CharDevice, create
from stratovirt.cli import command
from stratovirt.config.ports import number_ports
from stratovirt.config.vm import CharDeviceConfig
from stratovirt.errors import ConfigError
from stratovirt.loop import EventLoop
from stratovirt.virtio.console import Port, VirtioConsole
from unit.test_virtio_conformance import PARTS
from unit.virtio_driver import CONFIG, DATA, NEEDS_RESET, RAM_SIZE, STATUS, VERSION_1, Driver, GuestQueue, guest_memory

DEVICE_READY, PORT_ADD, PORT_READY, CONSOLE_PORT, PORT_OPEN, PORT_NAME = 0, 1, 3, 4, 6, 7
CONTROL_RX, CONTROL_TX = 2, 3
MULTIPORT = 1 << 1
RAM = 4 << 20


class ConsoleDriver(Driver):
    """A controller with a console on port 0 ("con") and a port ("agent") on number 2, both on unix sockets."""

    def __init__(self, folder: Path, ram: int = RAM) -> None:
        self.loop = EventLoop()
        self.chardevs: dict[str, CharDevice] = {}
        self.clients: list[socket.socket] = []
        for name in ("con", "agent"):
            config = CharDeviceConfig(name, "socket", str(folder / name), server=True)
            self.chardevs[name] = create(config, self.loop)
        ports = [Port(0, "con", self.chardevs["con"], True), Port(2, "agent", self.chardevs["agent"], False)]
        self.folder = folder
        super().__init__(VirtioConsole(ports), guest_memory(ram))
        for number, fd in enumerate(self.transport.notify_fds):
            self.loop.add(fd, 1, self._notified(number))
        self.next_buffer = 0x10_0000

    def _notified(self, number: int) -> Callable[[int], None]:
        return lambda _events: self.transport.on_notify(number)

    def close(self) -> None:
        for client in self.clients:
            client.close()
        for number in self.transport.notify_fds:
            self.loop.remove(number)
        for chardev in self.chardevs.values():
            chardev.close()
        super().close()
        self.loop.close()

    # -- both sides

    def run(self, until: Callable[[], bool]) -> None:
        """Let the loop work until something is so."""
        for _ in range(20000):
            if until():
                return
            self.loop.run_once(0.002)
        raise AssertionError("it did not come about")

    def idle(self) -> None:
        for _ in range(5):
            self.loop.run_once(0.003)

    def connect(self, name: str) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(self.folder / name))
        client.setblocking(False)
        self.clients.append(client)
        self.idle()
        return client

    # -- the guest's side

    def start_driver(self, features: int | None = None) -> None:
        self.start(features)
        self.idle()

    def give(self, number: int, size: int = 4096, count: int = 1) -> list[int]:
        """Give the device buffers to fill; their addresses."""
        addresses = []
        for _ in range(count):
            addresses.append(self.next_buffer)
            self.queues[number].add([(self.next_buffer, size, True)])
            self.next_buffer += size
        self.write(0x050, number)
        return addresses

    def send(self, number: int, data: bytes) -> None:
        address = self.next_buffer
        self.next_buffer += len(data)
        self.memory.write(address, data)
        self.queues[number].add([(address, len(data), False)])
        self.write(0x050, number)

    def tell(self, port: int, event: int, value: int) -> None:
        self.send(CONTROL_TX, struct.pack("<IHH", port, event, value))
        self.idle()
        self.queues[CONTROL_TX].collect()
        self.queues[CONTROL_TX].release_all()

    def control(self, buffers: int = 8) -> list[tuple[int, int, int, bytes]]:
        """What the device has to say."""
        queue = self.queues[CONTROL_RX]
        addresses = self.give(CONTROL_RX, 64, buffers)
        self.idle()
        messages = []
        for address, (_head, length) in zip(addresses, queue.collect(), strict=False):
            data = self.memory.read(address, length)
            messages.append((*struct.unpack_from("<IHH", data), data[8:]))
        return messages

    def open(self, port: int) -> None:
        self.tell(0xFFFF_FFFF, DEVICE_READY, 1)
        self.tell(port, PORT_READY, 1)
        self.tell(port, PORT_OPEN, 1)

    def received(self, number: int, addresses: list[int]) -> bytes:
        """The bytes in the buffers that came back, in order."""
        return b"".join(self.memory.read(address, length)
                        for address, (_, length) in zip(addresses, self.queues[number].collect(), strict=False))


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[ConsoleDriver]:
    made = ConsoleDriver(tmp_path)
    yield made
    made.close()


AGENT_RX, AGENT_TX = 6, 7


class BusyConsole(ConsoleDriver):
    """Has input for port 0 from the start, so that its first queue takes every buffer, as conformance tests want it."""

    def start(self, features: int | None = None, size: int = 0) -> GuestQueue:
        queue = super().start(features, size)
        device = self.device
        assert isinstance(device, VirtioConsole)
        device._ports[0].open = True
        device._ports[0].pending[:] = bytes(READ_SIZE)
        return queue


@pytest.mark.parametrize("part", PARTS)
def test_it_conforms(tmp_path: Path, part: Callable[[Driver], None]) -> None:
    driver = BusyConsole(tmp_path, RAM_SIZE)
    for fd in driver.transport.notify_fds:
        driver.loop.remove(fd)
    part(driver)
    driver.close()


def test_config_space_and_queues_reach_as_far_as_the_ports(driver: ConsoleDriver) -> None:
    assert [driver.read(CONFIG + offset) for offset in (0, 4, 8)] == [0, 3, 0]
    assert driver.device.queue_sizes == (128, 128, 32, 32, 128, 128, 128, 128)


def test_the_guest_is_told_its_ports_when_it_asks(driver: ConsoleDriver) -> None:
    driver.start_driver()
    assert driver.control(1) == []
    driver.tell(0xFFFF_FFFF, DEVICE_READY, 1)
    driver.queues[CONTROL_RX].release_all()
    driver.start_driver()
    driver.tell(0xFFFF_FFFF, DEVICE_READY, 1)
    assert driver.control() == [(0, PORT_ADD, 1, b""), (2, PORT_ADD, 1, b"")]


def test_a_console_is_open_and_a_port_is_open_with_a_client(driver: ConsoleDriver) -> None:
    driver.start_driver()
    driver.tell(0, PORT_READY, 1)
    driver.tell(2, PORT_READY, 1)
    driver.connect("agent")
    assert driver.control() == [
        (0, CONSOLE_PORT, 1, b""), (0, PORT_NAME, 1, b"con\0"), (0, PORT_OPEN, 1, b""), (2, PORT_NAME, 1, b"agent\0"),
        (2, PORT_OPEN, 1, b"")]


def test_clients_that_come_and_go_are_told_to_the_guest(driver: ConsoleDriver) -> None:
    driver.start_driver()
    driver.give(AGENT_RX)
    driver.open(2)
    client = driver.connect("agent")
    client.close()
    driver.idle()
    # While the guest has no buffer for control messages, only the newest of a kind is kept.
    assert [message for message in driver.control() if message[1] == PORT_OPEN] == [(2, PORT_OPEN, 0, b"")]


def test_a_console_client_that_leaves_is_no_news(driver: ConsoleDriver) -> None:
    driver.start_driver()
    driver.connect("con").close()
    driver.idle()
    assert driver.control() == []


def test_bytes_to_the_guest(driver: ConsoleDriver) -> None:
    driver.start_driver()
    driver.open(2)
    addresses = driver.give(AGENT_RX, 16, 3)
    driver.connect("agent").sendall(b"0123456789abcdefghijklmnopqrstuv")
    driver.run(lambda: driver.queues[AGENT_RX].used_idx() == 2)
    assert driver.received(AGENT_RX, addresses) == b"0123456789abcdefghijklmnopqrstuv"


def test_nothing_is_read_before_the_guest_opens_the_port(driver: ConsoleDriver) -> None:
    driver.start_driver()
    addresses = driver.give(AGENT_RX)
    driver.connect("agent").sendall(b"early")
    driver.idle()
    assert driver.queues[AGENT_RX].used_idx() == 0
    driver.open(2)
    driver.run(lambda: driver.queues[AGENT_RX].used_idx() == 1)
    assert driver.received(AGENT_RX, addresses) == b"early"


def test_a_guest_without_buffers_pauses_the_client(driver: ConsoleDriver) -> None:
    """What the device has read beyond the guest's buffers is at most one read; the rest stays in the socket."""
    driver.start_driver()
    driver.open(2)
    client = driver.connect("agent")
    content = os.urandom(300_000)
    sent = 0
    addresses = driver.give(AGENT_RX, 10)
    for _ in range(200):
        try:
            sent += client.send(content[sent : sent + 8192])
        except BlockingIOError:
            pass
        driver.loop.run_once(0)
    device = driver.device
    assert isinstance(device, VirtioConsole)
    assert len(device._ports[2].pending) <= READ_SIZE
    assert sent < len(content)
    got = driver.received(AGENT_RX, addresses)
    while len(got) < len(content):
        driver.queues[AGENT_RX].release_all()
        driver.next_buffer = 0x10_0000
        addresses = driver.give(AGENT_RX, 1000, 100)
        for _ in range(100):
            if sent < len(content):
                try:
                    sent += client.send(content[sent : sent + 8192])
                except BlockingIOError:
                    pass
            driver.loop.run_once(0)
        got += driver.received(AGENT_RX, addresses)
        # Buffers not used yet stay with the device: count on them, but not twice.
        queue = driver.queues[AGENT_RX]
        while queue.used_idx() != queue.avail_index and len(got) < len(content):
            if sent < len(content):
                try:
                    sent += client.send(content[sent : sent + 8192])
                except BlockingIOError:
                    pass
            before = queue.used_index
            driver.loop.run_once(0.001)
            done = addresses[100 - ((queue.avail_index - before) & 0xFFFF) :]
            got += driver.received(AGENT_RX, done)
    assert got == content


def test_bytes_from_the_guest(driver: ConsoleDriver) -> None:
    driver.start_driver()
    driver.open(2)
    client = driver.connect("agent")
    driver.send(AGENT_TX, b"hello ")
    driver.send(AGENT_TX, b"world")
    seen = bytearray()

    def complete() -> bool:
        try:
            seen.extend(client.recv(4096))
        except BlockingIOError:
            return False
        return seen == b"hello world"

    driver.run(complete)
    assert driver.queues[AGENT_TX].collect() == [(0, 0), (1, 0)]


def test_a_client_that_does_not_read_holds_the_guests_buffers(driver: ConsoleDriver) -> None:
    driver.start_driver()
    driver.open(2)
    client = driver.connect("agent")
    content = os.urandom(1 << 20)
    driver.send(AGENT_TX, content[: 1 << 19])
    driver.send(AGENT_TX, content[1 << 19 :])
    for _ in range(200):
        driver.loop.run_once(0.001)
    assert driver.queues[AGENT_TX].used_idx() == 0
    assert len(driver.chardevs["agent"]._output) <= OUTPUT_LIMIT
    seen = bytearray()

    def complete() -> bool:
        try:
            seen.extend(client.recv(1 << 16))
        except BlockingIOError:
            pass
        return len(seen) == len(content)

    driver.run(complete)
    driver.idle()
    assert seen == content
    assert driver.chardevs["agent"].dropped == 0
    assert len(driver.queues[AGENT_TX].collect()) == 2


def test_without_a_client_output_is_discarded_and_the_guest_goes_on(driver: ConsoleDriver) -> None:
    driver.start_driver()
    driver.open(2)
    driver.send(AGENT_TX, bytes(1 << 20))
    driver.run(lambda: driver.queues[AGENT_TX].used_idx() == 1)


def test_a_driver_without_multiport_has_port_0(driver: ConsoleDriver) -> None:
    driver.start_driver(VERSION_1)
    addresses = driver.give(0)
    client = driver.connect("con")
    client.sendall(b"ls\n")
    driver.run(lambda: driver.queues[0].used_idx() == 1)
    assert driver.received(0, addresses) == b"ls\n"
    driver.send(1, b"answer")
    driver.run(lambda: driver.queues[1].used_idx() == 1)
    driver.idle()
    assert client.recv(100) == b"answer"


def test_a_reset_forgets_the_guests_side(driver: ConsoleDriver) -> None:
    driver.start_driver()
    driver.open(2)
    driver.connect("agent")
    driver.send(AGENT_TX, bytes(1 << 20))
    driver.loop.run_once(0)
    driver.write(STATUS, 0)
    driver.start_driver()
    assert driver.control() == []
    addresses = driver.give(AGENT_RX)
    driver.clients[0].sendall(b"x")
    driver.idle()
    assert driver.queues[AGENT_RX].used_idx() == 0  # not open any more
    driver.open(2)
    driver.run(lambda: driver.queues[AGENT_RX].used_idx() == 1)
    assert driver.received(AGENT_RX, addresses) == b"x"


# -- hostile guests


def test_control_messages_of_no_sense_are_passed_over(driver: ConsoleDriver) -> None:
    driver.start_driver()
    for data in (b"\0", bytes(7), struct.pack("<IHH", 99, PORT_READY, 1), struct.pack("<IHH", 1, PORT_OPEN, 1),
                 struct.pack("<IHH", 0, 0xFFFF, 1), struct.pack("<IHH", 0, PORT_READY, 0), bytes(100_000)):
        driver.send(CONTROL_TX, data)
    driver.idle()
    assert len(driver.queues[CONTROL_TX].collect()) == 7
    assert driver.control() == []
    assert not driver.status & NEEDS_RESET


def test_messages_to_a_guest_that_takes_none_do_not_pile_up(driver: ConsoleDriver) -> None:
    driver.start_driver()
    for _ in range(20):
        for number in range(30):
            driver.send(CONTROL_TX, struct.pack("<IHH", (0, 2)[number % 2], (DEVICE_READY, PORT_READY)[number % 3 == 0], 1))
        driver.idle()
        driver.queues[CONTROL_TX].release_all()
    device = driver.device
    assert isinstance(device, VirtioConsole)
    assert len(device._control) <= 2 * 4


def test_a_control_buffer_too_small_breaks_the_device(driver: ConsoleDriver) -> None:
    driver.start_driver()
    driver.give(CONTROL_RX, 4)
    driver.tell(0, DEVICE_READY, 1)
    assert driver.status & NEEDS_RESET
    assert len(driver.queues[CONTROL_RX].collect()) == 1


@pytest.mark.parametrize("queue", [1, AGENT_TX, CONTROL_TX])
def test_a_malformed_chain_breaks_the_device(driver: ConsoleDriver, queue: int) -> None:
    driver.start_driver()
    driver.queues[queue].describe(0, RAM, 16)
    driver.queues[queue].publish(0)
    driver.write(0x050, queue)
    driver.idle()
    assert driver.queues[queue].collect() == [(0, 0)]
    assert driver.status & NEEDS_RESET
    assert len(driver.errors) == 1


def test_queues_of_ports_that_are_not_there_stay_silent(driver: ConsoleDriver) -> None:
    driver.start_driver()
    driver.send(5, b"to port 1")
    driver.idle()
    assert driver.queues[5].collect() == []
    assert not driver.status & NEEDS_RESET


def test_buffers_without_room_do_not_hold_up_the_loop(driver: ConsoleDriver) -> None:
    driver.start_driver()
    driver.open(2)
    queue: GuestQueue = driver.queues[AGENT_RX]
    for _ in range(queue.size):
        queue.add([(DATA, 16, False)])  # readable, in a queue of writable buffers
    driver.write(0x050, AGENT_RX)
    driver.connect("agent").sendall(b"x")
    driver.run(lambda: queue.used_idx() == queue.size)
    queue.collect()
    queue.release_all()
    addresses = driver.give(AGENT_RX)
    driver.run(lambda: queue.used_idx() == queue.size + 1)
    assert driver.received(AGENT_RX, addresses) == b"x"


# -- which device is which port

CHARDEVS = "".join(f"-chardev pty,id=c{number} " for number in range(4))


def ports(line: str) -> dict[int, str]:
    config = command.parse(f"-kernel k {CHARDEVS} {line}".split())
    return {number: device.id for number, device in number_ports(config.devices).items()}


def refusal(line: str) -> str:
    with pytest.raises(ConfigError) as caught:
        ports(line)
    return str(caught.value)


CONTROLLER = "-device virtio-serial-device,id=s"


def test_ports_are_numbered_whatever_the_order() -> None:
    assert ports(f"-device virtserialport,id=a,chardev=c0 {CONTROLLER} -device virtconsole,id=b,chardev=c1") == {0: "b", 1: "a"}
    assert ports(f"{CONTROLLER} -device virtserialport,id=a,chardev=c0 -device virtserialport,id=b,chardev=c1,nr=1 "
                 "-device virtconsole,id=c,chardev=c2,nr=5 -device virtconsole,id=d,chardev=c3") == {
                     0: "d", 1: "b", 2: "a", 5: "c"}
    assert ports(CONTROLLER) == {}


def test_katas_console_and_vsock() -> None:
    line = ("-kernel k -device virtio-serial-device,id=virtio-serial0 "
            "-chardev socket,id=charconsole0,path=/run/vc/vm/1/console.socket,server,nowait "
            "-device virtconsole,chardev=charconsole0,id=virtio-console0,nr=0 "
            "-device vhost-vsock-device,id=vsock-id,guest-cid=4294967294,vhostfd=3")
    config = command.parse(line.split())
    assert {number: device.id for number, device in number_ports(config.devices).items()} == {0: "virtio-console0"}
    assert config.chardevs["charconsole0"].server
    vsock = config.devices[-1].options
    assert (vsock.integer("guest-cid"), vsock.optional_integer("vhostfd")) == (4294967294, 3)


def test_what_cannot_be_a_port() -> None:
    port = "-device virtserialport,id=a,chardev=c0"
    assert "there is no virtio-serial-device" in refusal(port)
    assert "there is a controller already" in refusal(f"{CONTROLLER} -device virtio-serial-device,id=t")
    assert "taken by a" in refusal(f"{CONTROLLER} {port},nr=3 -device virtconsole,id=b,chardev=c1,nr=3")
    assert "below max-ports=3" in refusal(f"{CONTROLLER},max-ports=3 {port},nr=3")
    assert "1 ports are taken" in refusal(f"{CONTROLLER},max-ports=1 {port}")
    assert "a number from 1 to 30" in refusal(f"{CONTROLLER} {port},nr=0")
    assert 'Chardev "x" not found or is in use' in refusal(f"{CONTROLLER} -device virtconsole,id=a,chardev=x")
    assert 'Chardev "c0" not found or is in use' in refusal(f"{CONTROLLER} {port} -device virtconsole,id=b,chardev=c0")
    assert 'Chardev "c0" not found or is in use' in refusal(f"{CONTROLLER} {port} -serial chardev:c0")
