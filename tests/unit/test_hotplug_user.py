"""Devices with their back end in another process come into replaceable slots and go out, under a driver that is bound."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stratovirt.cli.command import parse
from stratovirt.config.schema import OptionValues
from stratovirt.config.vm import CharDeviceConfig, DeviceConfig
from stratovirt.errors import ConfigError
from stratovirt.loop import READ
from stratovirt.machine import net_backend
from stratovirt.vhost import user
from stratovirt.vhost.user import BackendSocket
from stratovirt.virtio.block import VirtioBlock
from stratovirt.virtio.block_config import F_SIZE_MAX
from stratovirt.virtio.net import VirtioNet
from stratovirt.virtio.queue import Chain
from stratovirt.virtio.vhost_user_blk import VhostUserBlk
from unit.qmp_board import SECTOR, Board, SocketTap
from unit.test_vhost_user import CAPACITY, blk_config
from unit.vhost_user_backend import GET_VRING_BASE, FakeBackend, readable, shared_memory
from unit.virtio_driver import (
    CONFIG,
    CONFIG_GENERATION,
    DATA,
    EVENT_IDX,
    INDIRECT_DESC,
    INTERRUPT_ACK,
    INTERRUPT_STATUS,
    QUEUE_NOTIFY,
    STATUS,
    VERSION_1,
    Driver,
    GuestQueue,
)

FLUSH, SEG_MAX, SIZE_MAX, BLK_SIZE = 1 << 9, 1 << 2, 1 << 1, 1 << 6
HOST_TSO4, MRG_RXBUF, CSUM, CTRL_VQ, CTRL_RX = 1 << 11, 1 << 15, 1 << 0, 1 << 17, 1 << 18
SLOT, NET_SLOT = 1, 4
IOERR = 1


class UserBoard(Board):
    """A board with a back end at the socket of the character device `c`, which no device uses, and its memory shared."""

    def __init__(self, folder: Path, **more: bool) -> None:
        self.backend = FakeBackend(folder / "socket")
        self.backend.config = blk_config()
        self.backend.features |= FLUSH | SEG_MAX | HOST_TSO4 | MRG_RXBUF | CSUM | 1 << 12
        self.backend.handle = self.answer
        self.requests = 0
        memory = shared_memory()  # of all slots: one driver at a time
        super().__init__(folder, memory=lambda: memory, modest=True, **more)
        self.config.vhost_users["c"] = CharDeviceConfig("c", "socket", str(self.backend.path), reconnect=1)
        self.config.spare_backends.append("c")
        for driver in self.drivers:
            for index, fd in enumerate(driver.transport.notify_fds):
                self.loop.add(fd, READ, lambda _events, driver=driver, index=index: driver.transport.on_notify(index))

    def answer(self, chain: Chain) -> int:
        """As a disk: no errors, and a mark in what was read. As a network: whatever."""
        self.requests += 1
        if chain.writable and chain.readable_length == 16:
            chain.writable[0][:4] = b"back"
            chain.writable[-1][-1] = 0
        return chain.writable_length

    def settle(self) -> None:
        for _ in range(6):
            if self.backend.peers:
                self.backend.peer.serve()
            self.loop.run_once(0)

    def disk_request(self, driver: Driver) -> tuple[int, bytes]:
        """A read of a sector: the status, and what was read."""
        memory = driver.memory
        memory.write(DATA, struct.pack("<IIQ", 0, 0, 0) + bytes(SECTOR) + b"\xff")
        head = driver.queues[0].add([(DATA, 16, False), (DATA + 16, SECTOR, True), (DATA + 16 + SECTOR, 1, True)])
        driver.write(QUEUE_NOTIFY, 0)
        self.settle()
        assert [returned for returned, _ in driver.queues[0].collect()] == [head]
        driver.queues[0].release_all()
        return memory.read(DATA + 16 + SECTOR, 1)[0], memory.read(DATA + 16, 4)

    def plug(self, **more: object) -> object:
        arguments = {"id": "d", "driver": "vhost-user-blk-device", "chardev": "c", "addr": str(SLOT), **more}
        return self.ask("device_add", **arguments)

    def close(self) -> None:
        super().close()
        self.backend.die()
        os.close(self.drivers[0].memory.regions[0].fd)


@pytest.fixture
def board(tmp_path: Path) -> Iterator[UserBoard]:
    made = UserBoard(tmp_path)
    yield made
    made.close()


@pytest.fixture
def taps(monkeypatch: pytest.MonkeyPatch) -> list[SocketTap]:
    opened: list[SocketTap] = []

    def open_taps(config: object) -> list[SocketTap]:
        opened.append(SocketTap("tap0"))
        return [opened[-1]]

    monkeypatch.setattr(net_backend, "open_taps", open_taps)
    return opened


def wait_until(what: Callable[[], bool]) -> None:
    """For the back end's threads."""
    for _ in range(2000):
        if what():
            return
        time.sleep(0.005)
    raise AssertionError("it does not happen")


def descriptors() -> int:
    """How many are open, but for memory, which the back end's maps keep."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    return sum(not link.startswith("/memfd:") for link in links)


# -- disks


def test_a_disk_comes_and_goes_under_a_driver(board: UserBoard) -> None:
    driver = board.drivers[SLOT]
    driver.start()
    assert board.disk_request(driver)[0] == IOERR
    for number in range(3):
        generation, interrupts = driver.read(CONFIG_GENERATION), driver.line.count
        before = descriptors()
        assert board.plug() == {}
        assert board.capacity(SLOT) == CAPACITY
        assert driver.read(CONFIG_GENERATION) != generation and driver.line.count > interrupts
        assert driver.read(INTERRUPT_STATUS) & 2
        driver.write(INTERRUPT_ACK, 3)
        assert board.backend.peer.rings[0].base == driver.queues[0].avail_index
        for _ in range(2):
            assert board.disk_request(driver) == (0, b"back")
        assert board.requests == 2 * number + 2
        assert board.ask("device_del", id="d") == {}
        assert board.events.pop() == ("DEVICE_DELETED", {"device": "d", "path": "d"})
        assert board.capacity(SLOT) == 0 and board.backend.peer.rings == {}
        board.settle()
        assert board.disk_request(driver)[0] == IOERR
        wait_until(lambda before=before: descriptors() <= before)
    assert board.ask("device_del", id="d") == "Device d not found"


def test_a_driver_that_starts_later_finds_the_back_ends_disk(board: UserBoard) -> None:
    driver = board.drivers[SLOT]
    assert board.plug() == {}
    driver.start()
    assert driver.device is not None and driver.offered() & FLUSH
    assert board.disk_request(driver) == (0, b"back")
    driver.write(STATUS, 0)
    assert board.backend.peer.rings == {}
    driver.start()
    assert board.disk_request(driver) == (0, b"back")
    assert board.ask("device_del", id="d") == {}


def test_what_the_driver_has_made_available_before_is_served_by_whoever_comes(board: UserBoard) -> None:
    """Nothing is lost or served twice at the change: an answer is the old device's or the new one's."""
    driver = board.drivers[SLOT]
    driver.start()
    driver.memory.write(DATA, struct.pack("<IIQ", 0, 0, 0) + bytes(SECTOR) + b"\xff")
    head = driver.queues[0].add([(DATA, 16, False), (DATA + 16, SECTOR, True), (DATA + 16 + SECTOR, 1, True)])
    driver.write(QUEUE_NOTIFY, 0)  # its loop has not run yet
    assert board.plug() == {}
    board.settle()
    assert [returned for returned, _ in driver.queues[0].collect()] == [head]
    assert board.requests == 1


def test_a_machine_that_stands_still_does_so_with_another_device_too(board: UserBoard) -> None:
    driver = board.drivers[SLOT]
    driver.start()
    occupied = board.hotplug._slots[SLOT]
    occupied.device.pause()
    assert board.plug() == {}
    driver.memory.write(DATA, struct.pack("<IIQ", 0, 0, 0) + bytes(SECTOR) + b"\xff")
    head = driver.queues[0].add([(DATA, 16, False), (DATA + 16, SECTOR, True), (DATA + 16 + SECTOR, 1, True)])
    driver.write(QUEUE_NOTIFY, 0)
    board.settle()
    assert board.backend.peer.rings == {} and driver.queues[0].collect() == []
    occupied.device.resume()
    board.settle()
    assert [returned for returned, _ in driver.queues[0].collect()] == [head] and board.requests == 1
    occupied.device.pause()
    assert board.ask("device_del", id="d") == {}
    driver.queues[0].release_all()
    head = driver.queues[0].add([(DATA, 16, False), (DATA + 16, SECTOR, True), (DATA + 16 + SECTOR, 1, True)])
    driver.write(QUEUE_NOTIFY, 0)
    board.settle()
    assert driver.queues[0].collect() == []
    occupied.device.resume()
    board.settle()
    assert [returned for returned, _ in driver.queues[0].collect()] == [head]
    assert driver.memory.read(DATA + 16 + SECTOR, 1)[0] == IOERR


@pytest.mark.parametrize(("lacks", "config", "problem"), [
    (FLUSH, {}, "lacks features that the driver uses: 0x200"),
    (EVENT_IDX, {}, "lacks features that the driver uses"), (INDIRECT_DESC, {}, "lacks features that the driver uses"),
    (0, {"seg_max": 64}, "takes 64 segments in a request"), (0, {"size_max": 4096}, "takes 4096 bytes in a segment"),
    (0, {"blk_size": 4096}, "has blocks of 4096 bytes"),
])
def test_a_back_end_that_can_do_less_than_the_driver_knows_is_refused(
    board: UserBoard, lacks: int, config: dict[str, int], problem: str
) -> None:
    driver = board.drivers[SLOT]
    driver.start()
    features, whole = board.backend.features, board.backend.config
    place = {"size_max": 8, "seg_max": 12, "blk_size": 20}
    changed = bytearray(whole)
    for name, value in config.items():
        changed[place[name] : place[name] + 4] = value.to_bytes(4, "little")
    board.backend.config = bytes(changed)
    board.backend.features = features & ~lacks | SIZE_MAX * ("size_max" in config) | BLK_SIZE * ("blk_size" in config)
    answer = board.plug()
    assert isinstance(answer, str) and problem in answer, answer
    assert board.capacity(SLOT) == 0 and board.disk_request(driver)[0] == IOERR
    board.backend.features, board.backend.config = features, whole
    assert board.plug() == {}
    assert board.disk_request(driver) == (0, b"back")
    board.ask("device_del", id="d")
    board.backend.features &= ~lacks
    board.backend.config = bytes(changed)
    driver.write(STATUS, 0)
    assert board.plug() == {}, "without a driver anything goes"


@pytest.mark.parametrize(("arguments", "problem"), [
    ({"chardev": "none"}, 'Chardev "none" not found or is in use'), ({"driver": "vhost-user-fs-device"}, "Unsupported"),
    ({"driver": "vhost-user-blk-pci"}, "Unsupported"), ({"addr": "4"}, "A maximum of 4 block"),
    ({"addr": "x"}, "Invalid addr"), ({"id": ""}, "1 to 255 bytes"),
])
def test_what_device_add_refuses(board: UserBoard, arguments: dict[str, object], problem: str) -> None:
    answer = board.plug(**arguments)
    assert isinstance(answer, str) and problem in answer, answer
    answer = board.ask("device_add", id="d", driver="vhost-user-blk-device")
    assert answer == "GenericError: No chardev set"
    assert board.backend.peers == []


def test_a_back_end_has_one_device(board: UserBoard) -> None:
    assert board.plug() == {}
    assert board.plug(id="e", addr="2") == 'Chardev "c" is used by d'
    assert board.plug(addr="2") == "Device id d existed"
    assert board.plug(id="e") == "The slot 1 is occupied already."
    assert board.ask("netdev_add", id="n", type="vhost-user", chardev="c") == 'Chardev "c" is used by d'
    assert board.ask("device_del", id="d") == {}
    assert board.ask("netdev_add", id="n", type="vhost-user", chardev="c") == {}
    assert board.plug() == 'Chardev "c" is used by n'


def test_nobody_listens_or_answers(board: UserBoard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user, "HANDSHAKE_SECONDS", 0.2)
    board.backend.instead[1] = lambda peer, request, payload: False  # GET_FEATURES
    assert "does not answer" in str(board.plug())
    board.backend.die()
    assert "cannot connect" in str(board.plug()) and board.capacity(SLOT) == 0


def test_a_back_end_that_dies_and_is_taken_out_is_not_tried_again(board: UserBoard) -> None:
    driver = board.drivers[SLOT]
    driver.start()
    assert board.plug() == {}
    assert board.disk_request(driver) == (0, b"back")
    board.backend.die()
    board.backend.peers.clear()
    board.settle()
    assert board.disk_request(driver)[0] == IOERR
    assert board.ask("device_del", id="d") == {}
    board.backend.listen()
    for timer in list(board.loop._timers):
        timer.callback()
    board.settle()
    assert board.backend.peers == []
    assert board.disk_request(driver)[0] == IOERR
    assert board.plug() == {}
    assert board.disk_request(driver) == (0, b"back")


def test_a_back_end_that_does_not_let_go_leaves_errors(board: UserBoard) -> None:
    driver = board.drivers[SLOT]
    driver.start()
    assert board.plug() == {}
    board.backend.handle = None
    driver.memory.write(DATA, struct.pack("<IIQ", 0, 0, 0) + bytes(SECTOR) + b"\xff")
    head = driver.queues[0].add([(DATA, 16, False), (DATA + 16, SECTOR, True), (DATA + 16 + SECTOR, 1, True)])
    driver.write(QUEUE_NOTIFY, 0)
    board.backend.peer.serve()
    board.backend.instead[GET_VRING_BASE] = lambda peer, request, payload: peer.socket.close()  # type: ignore[func-returns-value]
    assert board.ask("device_del", id="d") == {}
    assert [returned for returned, _ in driver.queues[0].collect()] == [head]
    assert driver.memory.read(DATA + 16 + SECTOR, 1)[0] == IOERR
    assert driver.line.count and driver.read(INTERRUPT_STATUS) & 1
    assert board.disk_request(driver)[0] == IOERR


def test_a_disk_of_the_command_line_is_taken_out_and_comes_back(tmp_path: Path) -> None:
    board = UserBoard(tmp_path)
    board.config.spare_backends.clear()
    socket = BackendSocket("c", str(board.backend.path), board.drivers[0].memory, 1)
    cold = VhostUserBlk(socket, 1, 256, board.loop)
    occupied = board.hotplug._slots[0]
    occupied.transport.replace_device(cold, board.loop)
    occupied.device, occupied.id = cold, "cold"
    board.config.devices.append(DeviceConfig("vhost-user-blk-device", "cold", OptionValues({"chardev": "c"})))
    try:
        driver = board.drivers[0]
        driver.start()
        assert board.disk_request(driver) == (0, b"back")
        assert "not found or is in use" in str(board.plug())
        assert board.ask("device_del", id="cold") == {}
        assert board.disk_request(driver)[0] == IOERR
        assert isinstance(occupied.device, VirtioBlock)
        assert board.plug(addr="0") == {}
        assert board.disk_request(driver) == (0, b"back")
    finally:
        board.close()


# -- interfaces


def link(driver: Driver) -> int:
    return driver.read(CONFIG + 6, 2) & 1


def plug_net(board: UserBoard, **more: object) -> object:
    answer = board.ask("netdev_add", id="n", type="vhost-user", chardev="c", **more)
    assert answer == {}, answer
    return board.ask("device_add", id="n", driver="virtio-net-device", addr="0")


NET_FEATURES = VERSION_1 | EVENT_IDX | CSUM | HOST_TSO4 | MRG_RXBUF | CTRL_VQ | CTRL_RX | 1 << 5 | 1 << 16


def test_an_interface_comes_and_goes_under_a_driver(board: UserBoard, taps: list[SocketTap]) -> None:
    driver = board.drivers[NET_SLOT]
    driver.start(NET_FEATURES)
    mac = [driver.read(CONFIG + offset, 1) for offset in range(6)]
    for number in range(3):
        assert link(driver) == 0
        driver.queues[0].add([(DATA, 2048, True)])
        assert plug_net(board) == {}
        assert link(driver) == 1 and [driver.read(CONFIG + offset, 1) for offset in range(6)] == mac
        board.settle()
        assert sorted(board.backend.peer.rings) == [0, 1] and len(driver.queues[0].collect()) == 1
        driver.queues[1].add([(DATA + 0x1000, 100, False)])
        driver.write(QUEUE_NOTIFY, 1)
        board.settle()
        assert len(driver.queues[1].collect()) == 1
        assert board.ask("netlink_set", id="n", up=False) == {}
        assert link(driver) == 0 and board.backend.peer.rings == {}
        assert board.ask("set_link", name="n", up=True) == {}
        assert link(driver) == 1
        assert board.ask("netdev_del", id="n") == "Netdev n is in use by device n"
        assert board.ask("device_del", id="n") == {}
        assert link(driver) == 0 and board.backend.peer.rings == {}
        if number == 1:  # QEMU's clients plug it in again by its name
            assert board.ask("device_add", id="x", driver="virtio-net-device", netdev="n") == {}
            assert link(driver) == 1
            assert board.ask("device_del", id="x") == {}
        assert board.ask("netdev_del", id="n") == {}
    assert board.ask("netdev_add", id="t", ifname="tap0") == {}
    assert board.ask("device_add", id="t", driver="virtio-net-device") == {}
    assert link(driver) == 1
    driver.memory.write(DATA + 0x1000, bytes(12) + bytes(60))
    driver.queues[1].add([(DATA + 0x1000, 72, False)])
    driver.write(QUEUE_NOTIFY, 1)
    board.settle()
    assert taps[0].other.recv(4096) == bytes(72)
    assert board.ask("device_del", id="t") == {}


def command(board: UserBoard, driver: Driver, data: bytes) -> int:
    """A command of the control queue: its answer, 0 for done."""
    driver.memory.write(DATA + 0x8000, data + b"\xff")
    driver.queues[2].add([(DATA + 0x8000, len(data), False), (DATA + 0x8000 + len(data), 1, True)])
    driver.write(QUEUE_NOTIFY, 2)
    board.settle()
    driver.queues[2].collect()
    driver.queues[2].release_all()
    return driver.memory.read(DATA + 0x8000 + len(data), 1)[0]


def test_what_the_driver_has_told_is_told_for_all_that_come_after(board: UserBoard, taps: list[SocketTap]) -> None:
    driver = board.drivers[NET_SLOT]
    driver.start(NET_FEATURES | 1 << 23 | 1 << 19)
    mac, vlan = b"\x02new!!", b"\x02\x00\x07\x00"
    assert command(board, driver, b"\x01\x01" + mac) == 0 and command(board, driver, vlan) == 0
    assert plug_net(board) == {}
    assert bytes(driver.read(CONFIG + offset, 1) for offset in range(6)) == mac
    assert command(board, driver, b"\x00\x00\x00") == 0 and command(board, driver, b"\x02\x00\x09\x00") == 0
    assert board.ask("device_del", id="n") == {}
    device = board.hotplug._slots[NET_SLOT].device
    assert isinstance(device, VirtioNet)
    assert bytes(driver.read(CONFIG + offset, 1) for offset in range(6)) == mac
    assert device.filter._vlans == {7, 9}


@pytest.mark.parametrize("lacks", [HOST_TSO4, MRG_RXBUF, CSUM])
def test_a_network_that_can_do_less_than_the_driver_uses_is_refused(board: UserBoard, lacks: int) -> None:
    driver = board.drivers[NET_SLOT]
    driver.start(NET_FEATURES)
    board.backend.features &= ~lacks
    assert f"lacks features that the driver uses: {lacks:#x}" in str(plug_net(board))
    assert link(driver) == 0
    board.backend.features |= lacks
    assert board.ask("device_add", id="n", driver="virtio-net-device") == {}
    assert link(driver) == 1


def test_a_loop_of_its_own_for_receiving_is_left(tmp_path: Path) -> None:
    """Queues of a tap may be on other loops; a vhost-user device has all of its queues on one."""
    board = UserBoard(tmp_path, rx_loop=True)
    try:
        driver = board.drivers[NET_SLOT]
        fds = driver.transport.notify_fds
        board.loop.remove(fds[0])
        board.rx_loop.add(fds[0], READ, lambda _events: driver.transport.on_notify(0))
        driver.start(NET_FEATURES)
        assert plug_net(board) == {}
        board.settle()
        assert board.ask("netlink_set", id="n", up=False) == {}
        driver.write(QUEUE_NOTIFY, 0)
        board.loop.run_once(0)
        assert not readable(fds[0])
    finally:
        board.close()


@pytest.mark.parametrize(("arguments", "problem"), [
    ({"chardev": "none"}, 'Chardev "none" not found'), ({}, "`chardev` must name"),
    ({"chardev": "c", "queues": 17}, "`queues`"),
    ({"chardev": "c", "vhost": True}, "does not support 'vhost' option"), ({"chardev": "c", "fd": "7"}, "'fd' option"),
    ({"chardev": "c", "macnat": True}, "macnat doesn't support vhost or vhost-user"),
    ({"type": "tap", "ifname": "t", "macnat": True, "vhost": True}, "macnat doesn't support"),
    ({"type": "bridge"}, "cannot be plugged in"),
])
def test_what_netdev_add_refuses(board: UserBoard, arguments: dict[str, object], problem: str) -> None:
    answer = board.ask("netdev_add", **{"id": "n", "type": "vhost-user", **arguments})
    assert isinstance(answer, str) and problem in answer, answer
    assert board.ask("netdev_del", id="n") == "Netdev n not found"


def test_pairs_must_be_those_of_the_slot(board: UserBoard) -> None:
    assert board.ask("netdev_add", id="n", type="vhost-user", chardev="c", queues=2) == {}
    assert "The slot has 1 queue pairs, the netdev 2" in str(board.ask("device_add", id="n", driver="virtio-net-device"))


# -- the command line

SHARED = "-machine mem-share=on"
QMP = "-qmp unix:/q,server,nowait"


def read(line: str, *more: str) -> Callable[[], object]:
    return lambda: parse(["-kernel", "k", *f"{line} {' '.join(more)}".split()])


def test_sockets_of_back_ends_that_no_device_uses_are_kept_for_later() -> None:
    config = parse(["-kernel", "k", *f"-chardev socket,id=c,path=/s -chardev socket,id=l,path=/l,server,nowait "
                    f"-chardev socket,id=d,path=/d -device vhost-user-blk-device,id=b,chardev=d {SHARED} {QMP}".split()])
    assert config.spare_backends == ["c"] and set(config.vhost_users) == {"c", "d"} and set(config.chardevs) == {"l"}
    unused = parse(["-kernel", "k", *f"-netdev vhost-user,id=n,chardev=c -chardev socket,id=c,path=/s {SHARED} {QMP}".split()])
    assert unused.spare_backends == ["c"]


def test_without_shared_memory_or_a_client_there_is_no_later() -> None:
    with pytest.raises(ConfigError, match="must be shared") as caught:
        parse(["-kernel", "k", *f"-chardev socket,id=c,path=/s {QMP}".split()])
    assert "mem-share=on" in caught.value.accepted
    assert parse(["-kernel", "k", *f"-chardev socket,id=c,path=/s {SHARED}".split()]).spare_backends == []


def test_a_port_keeps_its_socket() -> None:
    config = parse(["-kernel", "k", *f"-chardev socket,id=c,path=/s -device virtio-serial-device,id=s "
                    f"-device virtconsole,id=v,chardev=c {SHARED} {QMP}".split()])
    assert config.spare_backends == [] and "c" in config.chardevs  # which the machine then refuses


def test_drives_are_modest_where_a_back_end_may_come(board: UserBoard) -> None:
    driver = board.drivers[0]
    assert driver.offered() >> F_SIZE_MAX & 1
    assert (driver.read(CONFIG + 8), driver.read(CONFIG + 12)) == (65536, 126)
    path = board.image("disk")
    board.blockdev_add("n", path)
    assert board.ask("device_add", id="n", driver="virtio-blk-device", drive="n") == {}
    assert (driver.read(CONFIG + 8), driver.read(CONFIG + 12)) == (65536, 126)


# -- with Debian's own back ends


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Callable[..., UserBoard]]:
    """A board whose character device leads to a back end of Debian's: `daemon(*command)`, which listens at `tmp_path / "d"`."""
    running: list[subprocess.Popen[bytes]] = []
    boards: list[UserBoard] = []

    def start(*command: str) -> UserBoard:
        if not os.path.exists(command[0]):
            pytest.skip(f"no {command[0]}: Debian's qemu-system-common, dpdk-dev")
        running.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=tmp_path))
        until = time.monotonic() + 20
        while not (tmp_path / "d").exists():
            if running[-1].poll() is not None or time.monotonic() > until:
                running[-1].kill()
                pytest.skip(f"{command[0]} does not run here: {running[-1].communicate()[1].decode()[-300:]}")
            time.sleep(0.02)
        boards.append(UserBoard(tmp_path))
        boards[-1].config.vhost_users["c"] = CharDeviceConfig("c", "socket", str(tmp_path / "d"), reconnect=1)
        return boards[-1]

    yield start
    for board in boards:
        board.close()
    for process in running:
        process.kill()
        process.communicate()


def wait_for(board: UserBoard, queue: GuestQueue) -> list[tuple[int, int]]:
    """What is returned, once something is."""
    returned: list[tuple[int, int]] = []
    until = time.monotonic() + 20
    while not returned:
        assert time.monotonic() < until
        board.loop.run_once(0.05)
        returned = queue.collect()
    return returned


def test_qemu_storage_daemon_takes_a_drive_over(daemon: Callable[..., UserBoard], tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(range(256)) * 4096)
    board = daemon("/usr/bin/qemu-storage-daemon", "--blockdev", f"driver=file,filename={image},node-name=disk", "--export",
                   f"type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={tmp_path / 'd'},writable=on")
    driver = board.drivers[SLOT]
    driver.start(driver.offered() & ~EVENT_IDX)

    def transfer(kind: int, sector: int, data: bytes) -> tuple[int, bytes]:
        driver.memory.write(DATA, struct.pack("<IIQ", kind, 0, sector) + data + b"\xff")
        driver.queues[0].add([(DATA, 16, False), (DATA + 16, SECTOR, kind == 0), (DATA + 16 + SECTOR, 1, True)])
        driver.write(QUEUE_NOTIFY, 0)
        wait_for(board, driver.queues[0])
        driver.queues[0].release_all()
        return driver.memory.read(DATA + 16 + SECTOR, 1)[0], driver.memory.read(DATA + 16, SECTOR)

    for number in range(5):
        assert transfer(0, 3, bytes(SECTOR))[0] == IOERR
        assert board.plug() == {}
        assert board.capacity(SLOT) == 2048
        assert transfer(0, 3, bytes(SECTOR)) == (0, bytes(range(256)) * 2)
        data = os.urandom(SECTOR)
        assert transfer(1, 100 + number, data)[0] == 0
        assert transfer(4, 0, data)[0] == 0  # flush
        assert board.ask("device_del", id="d") == {}
        assert board.capacity(SLOT) == 0
        assert image.read_bytes()[SECTOR * (100 + number) :][:SECTOR] == data


@pytest.mark.skipif(os.geteuid() != 0, reason="testpmd needs root")
def test_testpmd_takes_an_interface_over(daemon: Callable[..., UserBoard], tmp_path: Path) -> None:
    """It answers ARP. Its `tso` is what the driver has negotiated with the empty interface; without it is refused."""
    board = daemon(
        "/usr/bin/dpdk-testpmd", "--no-huge", "-m", "256", "--no-pci", "--lcores", "(0-1)@0",
        "--file-prefix", f"h{os.getpid()}", "--vdev", f"net_vhost0,iface={tmp_path / 'd'},tso=1", "--",
        "--forward-mode=icmpecho", "--auto-start",
        "--total-num-mbufs=4096", "--stats-period=100")
    driver = board.drivers[NET_SLOT]
    driver.start(driver.offered() & ~EVENT_IDX)
    receive, transmit = driver.queues[:2]
    mac = bytes(driver.read(CONFIG + offset, 1) for offset in range(6))
    arp = struct.pack(">HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, mac, bytes((10, 0, 0, 1)), bytes(6), bytes((10, 0, 0, 2)))
    frame = bytes(12) + b"\xff" * 6 + mac + b"\x08\x06" + arp
    for number in range(8):
        receive.add([(DATA + 2048 * number, 2048, True)])
    for _ in range(2):
        assert link(driver) == 0
        assert plug_net(board) == {}
        assert link(driver) == 1
        until, answer = time.monotonic() + 20, b""
        while not answer:
            assert time.monotonic() < until
            driver.memory.write(DATA + 0x8000, frame)
            transmit.add([(DATA + 0x8000, len(frame), False)])
            for queue in (0, 1):
                driver.write(QUEUE_NOTIFY, queue)
            for _ in range(4):
                board.loop.run_once(0.05)
            for head, length in receive.collect():
                answer = driver.memory.read(DATA + 2048 * head, length)[12:]
                receive.publish(head)
            transmit.collect()
            transmit.release_all()
        assert (answer[:6], answer[12:14], answer[20:22]) == (mac, b"\x08\x06", b"\x00\x02")
        assert board.ask("device_del", id="n") == {}
        assert board.ask("netdev_del", id="n") == {}
