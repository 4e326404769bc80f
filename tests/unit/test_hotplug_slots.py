"""Disks and taps into and out of the replaceable slots: the rules, the texts, and what a bound driver sees."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from stratovirt.arch.x86_64 import layout
from stratovirt.backends.tap import Tap
from stratovirt.config.vm import NetdevConfig
from stratovirt.control.commands import COMMANDS, EVENTS
from stratovirt.machine import net_backend
from stratovirt.machine.drivers import BLOCK, NET
from stratovirt.machine.hotplug import MAX_BACKENDS
from stratovirt.machine.slots import empty_slots
from unit.qmp_board import SECTOR, Board, SocketTap
from unit.virtio_devices import disk_content
from unit.virtio_driver import CONFIG, CONFIG_GENERATION, DATA, INTERRUPT_ACK, INTERRUPT_STATUS, Driver

CONFIG_CHANGED = 2
READ, WRITE = 0, 1


@pytest.fixture
def board(tmp_path):
    board = Board(tmp_path)
    yield board
    board.close()


def files_open() -> int:
    gc.collect()  # what earlier tests have left
    return len(os.listdir("/proc/self/fd"))


def test_empty_slots_are_what_the_command_line_left(board):
    assert [(kind, slot.number) for kind, slot in empty_slots([])] == [
        (BLOCK, 0), (BLOCK, 1), (BLOCK, 2), (BLOCK, 3), (NET, 4), (NET, 5)]
    assert [slot.number for _, slot in empty_slots([layout.slot(6), layout.slot(0), layout.slot(4)])] == [1, 2, 3, 5]


def test_a_bound_driver_sees_a_disk_come_and_go(board):
    driver = board.drivers[1]
    driver.start()
    assert board.capacity(1) == 0
    for number in range(3):
        path = board.image(f"disk{number}", 8 + number)
        assert board.blockdev_add("n", path) == {}
        generation, interrupts = driver.read(CONFIG_GENERATION), driver.line.count
        assert board.ask("device_add", id="n", driver="virtio-blk-mmio", drive="n", addr="1", romfile="") == {}
        assert (driver.read(INTERRUPT_STATUS) & CONFIG_CHANGED, driver.line.count) == (CONFIG_CHANGED, interrupts + 1)
        assert driver.read(CONFIG_GENERATION) != generation
        driver.write(INTERRUPT_ACK, 3)
        assert board.capacity(1) == 8 + number
        status, data = transfer(driver, READ, 3)
        assert (status, data) == (0, disk_content(4)[3 * SECTOR :])
        before = files_open()
        assert board.ask("device_del", id="n") == {}
        assert files_open() < before
        assert board.events.pop() == ("DEVICE_DELETED", {"device": "n", "path": "n"})
        assert board.capacity(1) == 0
        assert transfer(driver, READ, 3)[0] == 1  # VIRTIO_BLK_S_IOERR
        assert board.ask("blockdev-del", node_name="n") == {}
        assert board.ask("blockdev-del", node_name="n") == "Drive n not found"


def transfer(driver: Driver, kind: int, sector: int, data: bytes = bytes(SECTOR)) -> tuple[int, bytes]:
    """One sector; the status byte and what lies in the buffer."""
    memory = driver.memory
    memory.write(DATA, kind.to_bytes(8, "little") + sector.to_bytes(8, "little"))
    memory.write(DATA + 0x1000, data)
    memory.write(DATA + 0x2000, b"\xff")
    driver.request([(DATA, 16, False), (DATA + 0x1000, SECTOR, kind == READ), (DATA + 0x2000, 1, True)])
    return memory.read(DATA + 0x2000, 1)[0], bytes(memory.read(DATA + 0x1000, SECTOR))


def test_what_the_driver_writes_is_in_the_image_when_the_disk_is_out(board):
    driver = board.drivers[0]
    driver.start()
    path = board.image("disk")
    board.blockdev_add("n", path)
    board.ask("device_add", id="n", driver="virtio-blk-mmio", drive="n")
    assert transfer(driver, WRITE, 2, b"x" * SECTOR)[0] == 0
    board.ask("device_del", id="n")
    assert Path(path).read_bytes()[2 * SECTOR : 3 * SECTOR] == b"x" * SECTOR


def test_requests_on_their_way_end_before_the_disk_is_out(board):
    driver = board.drivers[2]
    queue = driver.start()
    path = board.image("disk", 64)
    assert board.blockdev_add("n", path) == {}
    board.ask("device_del", id="n")
    board.ask("blockdev-del", node_name="n")
    assert board.ask("blockdev-add", node_name="n", file={"filename": path, "aio": "threads"}, cache={"direct": False}) == {}
    assert board.ask("device_add", id="n", driver="virtio-blk-mmio", drive="n", addr="0x2") == {}
    memory = driver.memory
    heads = []
    for number in range(16):
        at = DATA + 0x1000 * number
        memory.write(at, WRITE.to_bytes(8, "little") + number.to_bytes(8, "little") + bytes([number + 1]) * SECTOR)
        heads.append(queue.add([(at, 16 + SECTOR, False), (at + 0x800, 1, True)]))
    driver.notify()
    assert board.ask("device_del", id="n") == {}
    assert sorted(head for head, _ in queue.collect()) == sorted(heads)
    assert Path(path).read_bytes()[: 16 * SECTOR] == b"".join(bytes([number + 1]) * SECTOR for number in range(16))


@pytest.mark.parametrize("how", [{"read_only": True}, {"media": "cdrom"}])
def test_a_read_only_image_refuses_the_writes_of_a_driver_that_was_there_before(board, how):
    driver = board.drivers[0]
    driver.start()
    path = board.image("disk")
    assert board.blockdev_add("n", path, **how) == {}
    board.ask("device_add", id="n", driver="virtio-blk-mmio", drive="n")
    assert transfer(driver, WRITE, 0, b"x" * SECTOR)[0] == 1
    assert transfer(driver, READ, 0)[0] == 0
    assert Path(path).read_bytes() == disk_content(8)
    assert board.ask("query-block")[0]["inserted"]["ro"] is True


def test_slots_are_chosen_by_addr_then_lun_then_the_first_that_is_free(board):
    for name, place, slot in (("a", {"addr": "2"}, 2), ("b", {"lun": 0}, 1), ("c", {}, 0), ("d", {"addr": "0x3", "lun": 7}, 3)):
        board.blockdev_add(name, board.image(name, 8 + slot))
        assert board.ask("device_add", id=name, driver="virtio-blk-mmio", drive=name, **place) == {}
        assert board.capacity(slot) == 8 + slot
    assert [block["qdev"] for block in board.ask("query-block")] == ["c", "b", "a", "d"]


@pytest.mark.parametrize(("arguments", "answer"), [
    ({"driver": "virtio-blk-mmio", "drive": "x", "id": "x"}, "Failed to find device configuration."),
    ({"driver": "virtio-blk-mmio"}, "GenericError: No drive set"),
    ({"driver": "virtio-blk-mmio", "drive": "free", "addr": "1"}, "The slot 1 is occupied already."),
    ({"driver": "virtio-blk-mmio", "drive": "free", "addr": "4"}, "A maximum of 4 block replaceable devices are supported."),
    ({"driver": "virtio-blk-mmio", "drive": "free", "lun": 2**64 - 1},
     "A maximum of 4 block replaceable devices are supported."),
    ({"driver": "virtio-blk-mmio", "drive": "free", "addr": "x"}, "GenericError: Invalid addr for device free"),
    ({"driver": "virtio-blk-mmio", "drive": "free", "addr": "-1"}, "GenericError: Invalid addr for device free"),
    ({"driver": "virtio-blk-mmio", "drive": "free", "addr": "0x"}, "GenericError: Invalid addr for device free"),
    ({"driver": "virtio-blk-mmio", "drive": "free", "addr": "9" * 5000}, "GenericError: Invalid addr for device free"),
    ({"driver": "virtio-blk-mmio", "drive": "free", "addr": "²"}, "GenericError: Invalid addr for device free"),
    ({"driver": "virtio-blk-mmio", "drive": "used"}, "used is in use by device used"),
    ({"driver": "virtio-blk-mmio", "drive": "free", "id": "used"}, "Device id used existed"),
    ({"driver": "virtio-rng-device"}, "GenericError: Unsupported replaceable device type."),
    ({"driver": "vhost-user-blk-device", "drive": "free"}, "GenericError: No chardev set"),
    ({"driver": "virtio-net-mmio"}, "Failed to find device configuration."),
    ({"driver": "virtio-net-mmio", "addr": "2", "id": "tap"}, "A maximum of 2 net replaceable devices are supported."),
    ({"driver": "virtio-net-mmio", "id": "tap", "mac": "1:2"}, "GenericError: `mac` is not a MAC address"),
    ({"driver": "virtio-blk-mmio", "drive": "free", "serial": "s" * 21},
     "GenericError: `serial` must have at most 20 ASCII characters"),
    ({"driver": "virtio-blk-mmio", "drive": "free", "id": ""}, "GenericError: `id` must have 1 to 255 bytes"),
    ({"driver": "virtio-blk-mmio", "drive": "free", "colour": "red"}, None),
])
def test_device_add_says_what_is_wrong_and_changes_nothing(board, monkeypatch, arguments, answer):
    monkeypatch.setattr(net_backend, "open_taps", lambda config: [SocketTap(config.ifname)])
    board.blockdev_add("used", board.image("used"))
    board.ask("device_add", id="used", driver="virtio-blk-mmio", drive="used", addr="1")
    board.blockdev_add("free", board.image("free"))
    board.ask("netdev_add", id="tap", ifname="tap")
    got = board.ask("device_add", **{"id": "free", **arguments})
    assert got == answer or (answer is None and got.startswith("GenericError: unknown field `colour`, expected one of `id`, "))
    assert [board.capacity(slot) for slot in range(4)] == [0, 8, 0, 0]
    assert board.ask("device_add", id="free", driver="virtio-blk-mmio", drive="free", addr="0") == {}


def test_qemus_clients_may_name_the_device_as_they_like(board):
    path = board.image("disk")
    assert board.ask("blockdev-add", node_name="node0", driver="file", filename=path, cache={"direct": False}) == {}
    assert board.ask("device_add", id="disk0", driver="virtio-blk-device", drive="node0", bootindex=1) == {}
    assert board.ask("blockdev-del", node_name="node0") == "Drive node0 is in use by device disk0"
    assert board.ask("device_del", id="disk0") == {}
    # the node is still known to QEMU's clients, and its name is free for StratoVirt's
    assert board.ask("device_add", id="disk1", driver="virtio-blk-device", drive="node0") == {}
    assert board.ask("device_del", id="disk1") == {}
    assert board.blockdev_add("node0", path) == {}
    assert board.blockdev_add("node0", path) == "Drive node0 has been added"
    assert board.ask("blockdev-del", node_name="node0") == {}


@pytest.mark.parametrize(("arguments", "word"), [
    ({"file": {"driver": "file", "filename": "/nonexistent/x"}}, "filename /nonexistent/x: No such file"),
    ({"file": {"filename": ""}}, "`file.filename` is not a path"), ({"file": {"filename": "a\0b"}}, "is not a path"),
    ({"file": {"filename": "\ud800"}}, "is not a path"), ({}, "missing field `file`"),
    ({"file": {"driver": "file"}}, "missing field `file.filename`"), ({"file": "node"}, "`file` must be an object"),
    ({"file": {"filename": "/dev/null"}}, "not a disk image"), ({"file": {"filename": "/"}}, "filename /"),
    ({"file": {"filename": "DISK", "aio": "magic"}}, "unknown variant `magic` of `file.aio`"),
    ({"file": {"filename": "DISK"}, "driver": "qcow2"}, "`driver` qcow2 is not supported yet"),
    ({"file": {"filename": "DISK"}, "backing": "base"}, "`backing` is not supported yet"),
    ({"file": {"filename": "DISK"}, "discard": "perhaps"}, "`discard` is not a switch"),
    ({"file": {"filename": "DISK"}, "throttling.iops-total": 10**7}, "at most 1000000"),
    ({"file": {"filename": "DISK"}, "node-name": ""}, "1 to 255 bytes"),
    ({"file": {"filename": "DISK"}, "node-name": "n" * 256}, "1 to 255 bytes"),
    ({"file": {"filename": "DISK", "aio": "native"}, "cache": {"direct": False}}, '"direct" on'),
])
def test_blockdev_add_says_what_is_wrong_and_keeps_nothing_open(board, arguments, word):
    path = board.image("disk")
    if isinstance(arguments.get("file"), dict) and arguments["file"].get("filename") == "DISK":
        arguments = {**arguments, "file": {**arguments["file"], "filename": path}}
    before = files_open()
    answer = board.ask("blockdev-add", **{"node-name": "n", **arguments})
    assert word in answer, answer
    assert (files_open(), board.ask("query-named-block-nodes")) == (before, [])


def test_devices_of_the_command_line_are_there_and_can_be_taken_out(tmp_path):
    board = Board(tmp_path, root=True)
    try:
        (block,) = board.ask("query-block")
        assert (block["device"], block["qdev"], block["inserted"]["image"]["virtual-size"]) == ("rootfs", "blk0", 4 * SECTOR)
        assert board.ask("device_add", id="rootfs", driver="virtio-blk-mmio", drive="rootfs", addr="1") == (
            "rootfs is in use by device blk0")
        board.drivers[0].start()
        assert transfer(board.drivers[0], READ, 1)[0] == 0
        assert transfer(board.drivers[0], READ, 9)[0] == 1
        (stats,) = board.ask("query-blockstats")
        assert (stats["node-name"], stats["stats"]["rd_operations"], stats["stats"]["rd_bytes"]) == ("rootfs", 1, SECTOR)
        assert board.ask("device_del", id="blk0") == {}
        assert board.capacity(0) == 0 and board.ask("query-block") == []
    finally:
        board.close()


def test_a_drive_of_the_command_line_without_a_device_waits_for_one(tmp_path):
    board = Board(tmp_path, root=True, spare=True)
    try:
        assert [node["node-name"] for node in board.ask("query-named-block-nodes")] == ["rootfs"]  # the spare is not open
        assert board.blockdev_add("spare", board.image("disk")) == "Drive spare has been added"
        assert board.ask("device_add", id="d", driver="virtio-blk-device", drive="spare") == {}
        assert board.capacity(1) == 6
        assert board.ask("device_del", id="d") == {}
        assert board.ask("blockdev-del", node_name="spare") == {}
        answer = board.ask("device_add", id="d", driver="virtio-blk-device", drive="spare")
        assert answer == "Failed to find device configuration."
    finally:
        board.close()


def test_the_number_of_back_ends_is_bounded(board):
    path = board.image("disk")
    for number in range(MAX_BACKENDS):
        assert board.blockdev_add(f"n{number}", path, read_only=True) == {}
    before = files_open()
    assert board.blockdev_add("more", path, read_only=True) == f"There are {MAX_BACKENDS} drives already."
    assert files_open() == before
    assert board.ask("device_add", id="n7", driver="virtio-blk-mmio", drive="n7") == {}
    assert board.ask("device_del", id="n7") == {}
    assert board.blockdev_add("more", path, read_only=True) == {}  # n7 was taken out and is forgotten
    assert board.ask("blockdev-del", node_name="n7") == "Drive n7 not found"
    for number in (*range(7), *range(8, MAX_BACKENDS), "more"):
        board.ask("blockdev-del", node_name=f"n{number}" if number != "more" else "more")


@pytest.mark.parametrize("id", ["", "x", "slot 0"])
def test_unknown_devices_cannot_be_taken_out(board, id):
    assert board.ask("device_del", id=id) == f"Device {id} not found"
    assert board.events == []


# -- network


@pytest.fixture
def taps(monkeypatch):
    opened: list[SocketTap] = []

    def open_taps(config: NetdevConfig) -> list[Tap]:
        new = [SocketTap(config.ifname or f"fd{config.fds}") for _ in range(config.queues)]
        opened.extend(new)
        return list(new)

    monkeypatch.setattr(net_backend, "open_taps", open_taps)
    return opened


def link(driver: Driver) -> int:
    return driver.read(CONFIG + 6, 2) & 1


def test_a_bound_driver_sees_the_cable_come_and_go(board, taps):
    driver = board.drivers[5]
    driver.start()
    for _ in range(3):
        assert link(driver) == 0
        assert board.ask("netdev_add", id="net0", ifname="tap0") == {}
        assert board.ask("netdev_add", id="net1", ifname="tap0") == "Tap device already in use"
        assert board.ask("device_add", id="net0", driver="virtio-net-mmio", addr="1") == {}
        assert (link(driver), driver.read(INTERRUPT_STATUS) & CONFIG_CHANGED) == (1, CONFIG_CHANGED)
        driver.write(INTERRUPT_ACK, 3)
        assert board.ask("netlink_set", id="net0", up=False) == {}
        assert link(driver) == 0
        assert board.ask("set_link", name="net0", up=True) == {}
        assert link(driver) == 1
        assert board.ask("netdev_del", id="net0") == "Netdev net0 is in use by device net0"
        assert board.ask("device_del", id="net0") == {}
        assert taps[-1].closed and link(driver) == 0
        assert board.ask("netlink_set", id="net0", up=True) == "DeviceNotFound: no net dev net0"
        assert board.ask("netdev_del", id="net0") == {}
        assert board.ask("netdev_del", id="net0") == "Netdev net0 not found"


def test_frames_go_through_a_cable_that_came_later(board, taps):
    driver = board.drivers[4]
    driver.start()
    receive, transmit = driver.queues[0], driver.queues[1]
    receive.add([(DATA, 2048, True)])
    driver.notify(0)
    board.ask("netdev_add", id="n", ifname="tap0")
    board.ask("device_add", id="n", driver="virtio-net-mmio")
    frame = bytes(12) + b"\xff" * 6 + bytes(range(54))
    taps[0].other.send(frame)
    for _ in range(20):
        driver.serve()
        board.loop.run_once(0.01)
    ((_, length),) = receive.collect()
    assert driver.memory.read(DATA + 12, length - 12) == frame[12:]
    driver.memory.write(DATA + 0x1000, frame)
    transmit.add([(DATA + 0x1000, len(frame), False)])
    driver.notify(1)
    assert taps[0].other.recv(4096) == frame
    board.ask("device_del", id="n")


def test_a_tap_that_came_as_a_descriptor_cannot_be_opened_again(board, taps):
    reader, writer = os.pipe()
    board.descriptors.arrive([reader])
    assert board.ask("getfd", fdname="tap-fd") == {}
    assert board.ask("netdev_add", id="n", fds="tap-fd", vhost=False) == {}
    assert board.ask("device_add", id="n", driver="virtio-net-mmio", netdev="n") == {}
    assert board.ask("device_del", id="n") == {}
    assert "was closed when its device was taken out" in board.ask("device_add", id="n", driver="virtio-net-mmio", netdev="n")
    os.close(reader)  # the tap in this test is another descriptor, so this one is still open
    os.close(writer)


@pytest.mark.parametrize(("arguments", "word"), [
    ({}, "must name a tap"), ({"ifname": ""}, "must name a tap"), ({"ifname": "a\0"}, "must name a tap"),
    ({"fd": "none"}, "File descriptor named 'none' not found"), ({"fds": "7:"}, "named '' not found"),
    ({"fd": "-1"}, "not found"), ({"fd": "1" * 4000}, "not found"), ({"fd": "0"}, "not found"),
    ({"fd": "2147483648"}, "not found"), ({"fd": "999999"}, "no such descriptor"), ({"fd": "LOOP"}, "is not a tap"),
    ({"ifname": "x", "type": "vhost-user"}, "does not support 'ifname'"), ({"ifname": "x", "fd": "7"}, "conflict"),
    ({"fd": "7", "fds": "8"}, "fd is conflict with fds"), ({"ifname": "x", "queues": 0}, "`queues`"),
    ({"ifname": "x", "queues": 17}, "`queues`"), ({"fds": "7:8", "queues": 3}, "as many as"),
    ({"fds": ":".join(["7"] * 17)}, "at most 16"), ({"fds": "7:7"}, "named twice"),
    ({"ifname": "x", "vhostfd": "7"}, "not needed"), ({"ifname": "x", "vhost": True, "vhostfds": "7:8"}, "must equal to fds"),
    ({"ifname": "x", "vhost": True, "vhostfd": "none"}, "File descriptor named 'none' not found"),
    ({"ifname": "x" * 16}, "not a name of a network interface"), ({"ifname": "a", "id": ""}, "1 to 255"),
])
def test_netdev_add_says_what_is_wrong(board, arguments, word):
    if arguments.get("fd") == "LOOP":
        arguments = {"fd": str(board.loop._wake_fd)}
    assert word in board.ask("netdev_add", **{"id": "n", **arguments})
    assert board.ask("netdev_del", id="n") == "Netdev n not found"


def test_a_descriptor_that_is_no_tap_is_closed(board):
    reader, writer = os.pipe()
    board.descriptors.arrive([reader])
    board.ask("getfd", fdname="f")
    assert "is not a tap" in board.ask("netdev_add", id="n", fd="f")
    with pytest.raises(OSError):
        os.fstat(reader)
    os.close(writer)


# -- every command's answer is of the type that it declares


def test_answers_are_of_the_types_that_are_declared(tmp_path):
    board = Board(tmp_path, root=True)
    values = {"typename": "virtio-blk-device", "name": "x", "id": "x", "device": "x", "uri": "unix:/x", "addr": "0", "vcpu": 0,
              "command-line": "info snapshots", "up": True, "enable": True, "ifname": "x", "backend": {}, "driver": "x",
              "authorized": "on", "fdname": "x", "node-name": "x", "requested-size": "1M"}
    board.vcpu_thread_ids = lambda: [os.getpid()]
    try:
        answered = 0
        for command in COMMANDS:
            if command.name in ("quit", "stop", "cont", "system_powerdown", "system_reset", "qmp_capabilities"):
                continue
            arguments = {member.name: values[member.name] for member in command.arguments.members if not member.optional}
            answered += not isinstance(board.ask(command.name, **arguments), str)
        assert answered > 30
    finally:
        board.close()
    assert {event.name for event in EVENTS} >= {"DEVICE_DELETED", "SHUTDOWN"}
