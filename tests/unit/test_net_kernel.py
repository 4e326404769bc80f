"""virtio-net between two network stacks of this kernel: its tap in one network namespace, its driver's tap in another.

The driver has no stack of its own. It passes frames on, headers and all, to a second tap, so that the kernel behind that one
plays the guest: real ARP, ping and TCP with segmentation and checksum offload go through the device. Needs root.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from stratovirt.backends import tap
from stratovirt.config.vm import NetdevConfig
from stratovirt.errors import ConfigError, StratoVirtError
from stratovirt.loop import READ, EventLoop
from stratovirt.virtio.net import RX, TX, VirtioNet
from unit import virtio_driver as vd

pytestmark = pytest.mark.usefixtures("implementation")

MAC = "52:54:00:12:34:56"
HOST, GUEST = "10.78.0.1", "10.78.0.2"
OURS, THEIRS = f"svth{os.getpid() % 100_000}", f"svtg{os.getpid() % 100_000}"
RX_AT, RX_SIZE = 1 << 20, 4096
TX_AT, TX_SIZE, TX_SLOTS = 3 << 20, 1 << 17, 32
WAIT = 60.0

ECHO_SUMS = """
import hashlib, socket, sys
server = socket.create_server((sys.argv[1], 5000))
print("listening", flush=True)
connection = server.accept()[0]
digest = hashlib.md5()
while piece := connection.recv(1 << 18):
    digest.update(piece)
connection.sendall(digest.hexdigest().encode())
"""
SEND = """
import hashlib, socket, sys
connection = socket.create_connection((sys.argv[1], 5000), 30)
digest = hashlib.md5()
for number in range(int(sys.argv[2])):
    block = hashlib.sha512(b"%d" % number).digest() * 1024
    digest.update(block)
    connection.sendall(block)
connection.shutdown(socket.SHUT_WR)
answer = b""
while piece := connection.recv(100):
    answer += piece
print(answer.decode() == digest.hexdigest())
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=WAIT)


class Relay:
    """Device, driver and the second tap, on one loop in one thread."""

    def __init__(self, features: int | None) -> None:
        self.loop = EventLoop()
        self.tap = tap.open_taps(NetdevConfig("n", OURS))[0]
        self.far = tap.open_taps(NetdevConfig("f", THEIRS))[0]
        self.errors: list[StratoVirtError] = []
        self.device = VirtioNet(self.tap, bytes.fromhex(MAC.replace(":", "")), self.loop, on_error=self.errors.append)
        self.memory = vd.guest_memory(8 << 20)
        self.driver = vd.Driver(self.device, self.memory)
        self.largest = {"rx": 0, "tx": 0}
        self._failure: BaseException | None = None
        for index, fd in enumerate(self.driver.transport.notify_fds):
            self.loop.add(fd, READ, self._notifier(index))
        self.driver.start(features)
        offload = tap.TUN_F_CSUM | tap.TUN_F_TSO4 | tap.TUN_F_TSO6
        self.far.set_offload(offload if self.device.driver_features >> 11 & 1 else 0)
        self.mergeable = bool(self.device.driver_features >> 15 & 1)
        self._slots = list(range(TX_SLOTS))
        self._slot_of: dict[int, int] = {}
        queue = self.driver.queues[RX]
        self._buffer = RX_SIZE if self.mergeable else 1 << 16
        for number in range(256 if self.mergeable else 30):
            queue.add([(RX_AT + self._buffer * number, self._buffer, True)])
        self.driver.write(vd.QUEUE_NOTIFY, RX)
        self._stopping = False
        self._thread = threading.Thread(target=self._run)

    def _notifier(self, index: int) -> Callable[[int], None]:
        return lambda _events: self.driver.transport.on_notify(index)

    def start(self) -> None:
        self._watched = False
        self.loop.add(self.far.fd, 0, self._on_far)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stopping:
                wanted = bool(self._slots)
                if wanted != self._watched:
                    self.loop.modify(self.far.fd, select.EPOLLIN if wanted else 0)
                    self._watched = wanted
                self.loop.run_once(0.05)
                self._received()
                for head, _ in self.driver.queues[TX].collect():
                    self._slots.append(self._slot_of.pop(head))
                    self.driver.queues[TX].free += [head, head ^ 1]
        except BaseException as error:  # noqa: BLE001 - reported by close()
            self._failure = error

    def _on_far(self, _events: int) -> None:
        """Frames that the guest's stack sends."""
        queue = self.driver.queues[TX]
        while self._slots:
            slot = self._slots[-1]
            at = TX_AT + TX_SIZE * slot
            length = self.far.read([self.memory.slice(at, TX_SIZE)])
            if not length:
                break
            self.largest["tx"] = max(self.largest["tx"], length)
            head = 2 * slot
            queue.describe(head, at, 12, vd.NEXT, head + 1)
            queue.describe(head + 1, at + 12, length - 12)
            queue.publish(head)
            self._slot_of[head] = self._slots.pop()
        self.driver.write(vd.QUEUE_NOTIFY, TX)

    def _received(self) -> None:
        """Frames for the guest's stack."""
        queue = self.driver.queues[RX]
        returned = queue.collect()
        while returned:
            first = RX_AT + self._buffer * returned[0][0]
            count = int.from_bytes(self.memory.read(first + 10, 2), "little")
            frame, returned = returned[:count], returned[count:]
            assert len(frame) == count, "num_buffers tells more than there is"
            views: list[bytes | memoryview] = [self.memory.slice(RX_AT + self._buffer * head, size) for head, size in frame]
            self.largest["rx"] = max(self.largest["rx"], sum(map(len, views)))
            self.far.write(views)
            for head, _ in frame:
                queue.publish(head)
            self.driver.write(vd.QUEUE_NOTIFY, RX)

    def close(self) -> None:
        self._stopping = True
        self._thread.join(WAIT)
        self.driver.close()
        self.device.close()
        self.far.close()
        self.loop.close()
        if self._failure is not None:
            raise self._failure


@pytest.fixture(params=["all features", "no offloads", "no mergeable buffers"])
def relay(request: pytest.FixtureRequest) -> Iterator[Relay]:
    all_but = {"all features": (), "no offloads": (0, 1, 7, 8, 10, 11, 12, 14), "no mergeable buffers": (15,)}[request.param]
    features = sum(1 << bit for bit in (0, 1, 5, 7, 8, 11, 12, 15, 16, 17, 18, 28, 29, 32) if bit not in all_but)
    try:
        made = Relay(features)
    except ConfigError as error:
        pytest.skip(f"no taps here: {error.problem}")
    try:
        for name, interface, address in ((OURS, made.tap, HOST), (THEIRS, made.far, GUEST)):
            try:
                ip("netns", "add", name)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no network namespaces here: {error}")
            ip("link", "set", interface.name, "netns", name)
            if interface is made.far:
                ip("-n", name, "link", "set", interface.name, "address", MAC)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface.name)
            ip("-n", name, "link", "set", interface.name, "up")
        made.start()
        yield made
    finally:
        try:
            made.close()
        finally:
            for name in (OURS, THEIRS):
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=WAIT)


def within(namespace: str, *command: str) -> subprocess.Popen[str]:
    line = ["ip", "netns", "exec", namespace, *command]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def transfer(server: str, address: str, client: str, blocks: int) -> None:
    listening = within(server, sys.executable, "-c", ECHO_SUMS, address)
    assert listening.stdout is not None
    try:
        assert listening.stdout.readline() == "listening\n", listening.stderr and listening.stderr.read()
        sending = within(client, sys.executable, "-c", SEND, address, str(blocks))
        try:
            out, errors = sending.communicate(timeout=WAIT)
        finally:
            sending.kill()
        assert out == "True\n", errors
    finally:
        listening.kill()
        listening.communicate()


def test_ping_and_tcp_between_two_stacks(relay: Relay) -> None:
    busybox = shutil.which("busybox") or pytest.skip("no busybox")
    for namespace, address in ((OURS, GUEST), (THEIRS, HOST)):
        for size in ("56", "1400"):
            result = within(namespace, busybox, "ping", "-c", "2", "-i", "0.1", "-q", "-s", size, address)
            out, errors = result.communicate(timeout=WAIT)
            assert "2 packets received" in out or "2 received" in out, (namespace, out, errors, relay.errors)
    transfer(OURS, HOST, THEIRS, 256)  # 16 MiB from the guest
    transfer(THEIRS, GUEST, OURS, 256)
    assert relay.errors == []
    if relay.device.driver_features >> 11 & 1:
        assert relay.largest["tx"] > 20_000, "segmentation offload was not used"
        assert relay.largest["rx"] > 20_000
    else:
        assert max(relay.largest.values()) <= 1526
