"""QMP of the whole program, with a guest that only sleeps: the conversation that Kata's driver holds, and clients in turn."""

from __future__ import annotations

import array
import json
import os
import socket
import time
from pathlib import Path

import pytest

from kvm.guests import Asm

DEADLINE = 60.0


def idle() -> bytes:
    return Asm().set_stack().text("running\n").sti().halt_forever().kernel()


class Client:
    """A QMP client as Kata's: one line a request, no ids."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE)
        self.socket.connect(str(path))
        self.file = self.socket.makefile("rb")
        self.events: list[dict[str, object]] = []
        self.greeting = json.loads(self.file.readline())

    def read(self):
        line = self.file.readline()
        assert line.endswith(b"\r\n"), line
        return json.loads(line)

    def ask(self, command, passed_fd=None, **arguments):
        request = {"execute": command, **({"arguments": arguments} if arguments else {})}
        data = json.dumps(request).encode() + b"\n"
        passed = [] if passed_fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [passed_fd]))]
        self.socket.sendmsg([data], passed)
        while True:
            answer = self.read()
            if "event" not in answer:
                return answer.get("return", answer.get("error"))
            self.events.append(answer)

    def wait_event(self, name):
        while True:
            event = self.events.pop(0) if self.events else self.read()
            if event["event"] == name:
                return event["data"]

    def close(self):
        self.file.close()
        self.socket.close()


@pytest.fixture
def start(launch, tmp_path):
    """Starts the program; gives it, and a function that connects."""
    path = tmp_path / "qmp.socket"
    clients = []

    def begin(*arguments):
        program = launch(idle(), "-qmp", f"unix:{path},server,nowait", *arguments)
        program.wait_for("running\n")

        def connect():
            client = Client(path)
            clients.append(client)
            return client

        return program, connect

    yield begin
    for client in clients:
        client.close()


def image(tmp_path, name, size=1 << 20):
    path = tmp_path / name
    path.write_bytes(bytes(size))
    return str(path)


def open_files(pid):
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
        except FileNotFoundError:
            continue
    return found


def test_the_conversation_of_katas_driver(start, tmp_path):
    root, disk = image(tmp_path, "root"), image(tmp_path, "disk", 3 << 20)
    program, connect = start("-smp", "2", "-drive", f"id=rootfs,file={root},direct=off",
                             "-device", "virtio-blk-device,drive=rootfs,id=virtio-blk0")
    probe = connect()
    assert probe.greeting["QMP"]["version"]["qemu"] == {"micro": 1, "minor": 0, "major": 5}
    assert probe.ask("qmp_capabilities") == {}
    probe.close()

    client = connect()
    assert client.ask("qmp_capabilities") == {}
    cpus = client.ask("query-cpus")
    assert [cpu["CPU"] for cpu in cpus] == [0, 1]
    threads = {int(name) for name in os.listdir(f"/proc/{program.process.pid}/task")}
    assert {cpu["thread_id"] for cpu in cpus} <= threads
    assert all(type(cpu["props"][name]) is int for cpu in cpus for name in ("socket-id", "core-id", "thread-id"))

    for number, slot in enumerate(("1", "2", "3")):
        name = f"drive-{number:016x}"
        added = {"driver": "raw", "node-name": name, "read-only": False,
                 "file": {"driver": "file", "filename": disk if number == 0 else image(tmp_path, name), "aio": "native"}}
        answer = client.ask("blockdev-add", **added)
        if answer != {} and "O_DIRECT" in answer["desc"]:
            added["file"]["aio"] = "threads"  # this file system has no O_DIRECT
            answer = client.ask("blockdev-add", **added)
        assert answer == {}
        assert client.ask("device_add", id=name, driver="virtio-blk-mmio", drive=name, addr=slot, romfile="") == {}
        assert client.ask("blockdev-add", **added)["desc"] == f"Drive {name} has been added"
    again = client.ask("device_add", id="drive-x", driver="virtio-blk-mmio", drive="drive-x", addr="1", romfile="")
    assert again == {"class": "GenericError", "desc": "Failed to find device configuration."}
    blocks = client.ask("query-block")
    assert [(block["qdev"], block["inserted"]["image"]["virtual-size"]) for block in blocks] == [
        ("virtio-blk0", 1 << 20), ("drive-0000000000000000", 3 << 20), ("drive-0000000000000001", 1 << 20),
        ("drive-0000000000000002", 1 << 20)]

    assert disk in open_files(program.process.pid)
    assert client.ask("device_del", id="drive-0000000000000000") == {}
    assert client.wait_event("DEVICE_DELETED") == {"device": "drive-0000000000000000", "path": "drive-0000000000000000"}
    assert disk not in open_files(program.process.pid)
    client.close()

    shim = connect()  # Kata's, started again
    assert shim.ask("qmp_capabilities") == {}
    assert shim.ask("device_del", id="drive-0000000000000000")["desc"] == "Device drive-0000000000000000 not found"
    assert shim.ask("query-status")["running"] is True
    assert shim.ask("quit") == {}
    assert shim.wait_event("SHUTDOWN")["reason"] == "host-qmp-quit"
    status, _, error = program.finish()
    assert (status, error) == (0, "")


def test_a_hundred_clients_in_turn_leave_nothing_behind(start):
    program, connect = start()
    first = connect()
    first.ask("query-status")
    before = len(open_files(program.process.pid))
    for number in range(100):
        client = connect()
        if number % 3:
            assert client.ask("query-status")["status"] == "running"
        else:
            client.socket.sendall(b'{"execute":"query-')  # and leaves in the middle
        client.close()
    until = time.monotonic() + DEADLINE
    while len(open_files(program.process.pid)) > before and time.monotonic() < until:
        first.ask("query-status")
        time.sleep(0.02)
    assert len(open_files(program.process.pid)) == before
    assert first.ask("query-status")["status"] == "running"


def test_a_tap_by_descriptor_goes_into_a_slot_and_out(start):
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("no right to open /dev/net/tun")
    from stratovirt.backends.tap import open_taps
    from stratovirt.config.vm import NetdevConfig
    from stratovirt.errors import ConfigError

    try:
        tap = open_taps(NetdevConfig("t", "svtesttap0"))[0]
    except ConfigError as error:
        pytest.skip(str(error))
    program, connect = start()
    client = connect()
    for _ in range(10):
        assert client.ask("getfd", passed_fd=tap.fd, fdname="net-fd") == {}
        assert client.ask("netdev_add", id="net0", type="tap", fds="net-fd") == {}
        assert client.ask("device_add", id="net0", driver="virtio-net-mmio", netdev="net0", addr="0x1",
                          mac="52:54:00:00:00:01") == {}
        assert "occupied" in client.ask("device_add", id="net1", driver="virtio-net-mmio", netdev="net0", addr="1")["desc"]
        assert "in use" in client.ask("netdev_del", id="net0")["desc"]
        assert client.ask("device_del", id="net0") == {}
        assert client.wait_event("DEVICE_DELETED")["device"] == "net0"
        assert client.ask("netdev_del", id="net0") == {}
    assert "/dev/net/tun" not in open_files(program.process.pid)
    assert client.ask("netdev_add", id="net0", fds="net-fd")["desc"] == "File descriptor named 'net-fd' not found"
    assert "not a tap" in client.ask("netdev_add", id="net0", fd="4")["desc"]
    tap.close()


def test_an_interface_with_two_queue_pairs_on_iothreads_comes_and_goes(start):
    from stratovirt.backends.tap import open_taps
    from stratovirt.config.vm import NetdevConfig
    from stratovirt.errors import ConfigError

    name = f"svtk{os.getpid() % 1_000_000}"
    try:
        for each in open_taps(NetdevConfig("t", name, queues=2)):
            each.close()
    except ConfigError as error:
        pytest.skip(str(error))
    program, connect = start(
        "-object", "iothread,id=in0", "-object", "iothread,id=out0", "-netdev", f"tap,id=net0,ifname={name},queues=2",
        "-device", "virtio-net-device,id=eth0,netdev=net0,mq=on,vectors=6,rx-iothread=in0,tx-iothread=out0")
    client = connect()
    for _ in range(5):
        assert open_files(program.process.pid).count("/dev/net/tun") == 2
        assert client.ask("device_del", id="eth0") == {}
        assert client.wait_event("DEVICE_DELETED")["device"] == "eth0"
        assert not os.path.exists(f"/sys/class/net/{name}")
        assert client.ask("netdev_del", id="net0") == {}
        assert client.ask("netdev_add", id="net0", ifname=name, queues=3) == {}
        assert "has 2 queue pairs" in client.ask("device_add", id="eth0", driver="virtio-net-device", netdev="net0",
                                                 addr="0")["desc"]
        assert client.ask("netdev_del", id="net0") == {}
        assert client.ask("netdev_add", id="net0", ifname=name, queues=2) == {}
        assert client.ask("device_add", id="eth0", driver="virtio-net-device", netdev="net0", addr="0") == {}
    assert client.ask("quit") == {}
    assert program.finish()[0] == 0


def test_a_slot_whose_device_is_on_an_iothread(start, tmp_path):
    root, disk = image(tmp_path, "root"), image(tmp_path, "disk", 2 << 20)
    program, connect = start("-object", "iothread,id=io0", "-drive", f"id=rootfs,file={root},direct=off,aio=threads",
                             "-device", "virtio-blk-device,drive=rootfs,id=blk0,iothread=io0")
    client = connect()
    (thread,) = client.ask("query-iothreads")
    assert thread["id"] == "io0" and str(thread["thread-id"]) in os.listdir(f"/proc/{program.process.pid}/task")
    for _ in range(5):
        (block,) = client.ask("query-block")
        assert client.ask("device_del", id=block["qdev"]) == {}
        assert client.wait_event("DEVICE_DELETED")["device"] == block["qdev"]
        assert root not in open_files(program.process.pid) and disk not in open_files(program.process.pid)
        assert client.ask("blockdev-add", **{"node-name": "n", "file": {"filename": disk, "aio": "threads"},
                                             "cache": {"direct": False}}) == {}
        assert client.ask("device_add", id="n", driver="virtio-blk-mmio", drive="n", addr="0") == {}
    assert client.ask("quit") == {}
    assert program.finish()[0] == 0


def test_a_machine_without_qmp_has_no_empty_slots(machine, tmp_path):
    assert machine(idle()).vm.slots == []
    with_qmp = machine(idle(), "-qmp", f"unix:{tmp_path / 'never-bound'},server,nowait")
    assert [occupied.slot.number for occupied in with_qmp.vm.slots] == [0, 1, 2, 3, 4, 5]
