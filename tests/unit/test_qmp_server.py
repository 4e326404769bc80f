"""The QMP server over real sockets, with QEMU's own client and with hostile ones."""

from __future__ import annotations

import array
import asyncio
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest

import stratovirt
from stratovirt.config.vm import CharDeviceConfig, QmpConfig, SmpConfig, VmConfig
from stratovirt.control import server as server_module
from stratovirt.control.listener import QmpListener
from stratovirt.control.server import LeakyBucket
from stratovirt.errors import ConfigError, HostError, StateError
from stratovirt.loop import EventLoop
from stratovirt.machine.hotplug import HotPlug
from unit.virtio_driver import guest_memory

SOURCES = os.path.dirname(os.path.dirname(stratovirt.__file__))
GREETING = {"QMP": {"version": {"qemu": {"micro": 1, "minor": 0, "major": 5}, "package": "StratoVirt-2.5.0"},
                    "capabilities": []}}


class Events:
    def __init__(self):
        self.callbacks = []

    def subscribe(self, callback):
        self.callbacks.append(callback)

    def unsubscribe(self, callback):
        self.callbacks.remove(callback)

    def emit(self, name, data):
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        for callback in list(self.callbacks):
            callback(name, data, seconds, nanoseconds // 1000)


class Console:
    filename = "pty:/dev/pts/7"


class Machine:
    """Behaves towards QMP as a machine does: changes state at once and emits the event before it returns."""

    def __init__(self, loop):
        self.loop, self.config, self.events, self.state = loop, VmConfig(), Events(), "running"
        self.config.smp = SmpConfig(cpus=4, max_cpus=4, cores=2, threads=2)
        self.chardevs = {"serial0": Console()}
        self.iothreads = {}
        self.balloon = None
        self.interrupt_controller = ""
        self.hotplug = HotPlug(self.config, [], self.events, {}, guest_memory(), self.loop)

    def vcpu_thread_ids(self):
        return [101, 102, 103, 104]

    def pause(self):
        self.state = "paused"
        self.events.emit("STOP", {})

    def resume(self):
        self.state = "running"
        self.events.emit("RESUME", {})

    def reset(self, guest):
        self.events.emit("RESET", {"guest": guest})

    def powerdown(self):
        self.events.emit("POWERDOWN", {})

    def shutdown(self, guest, reason):
        self.state = "shutdown"
        self.events.emit("SHUTDOWN", {"guest": guest, "reason": reason})
        self.loop.stop()


class Setup:
    def __init__(self, path):
        self.path = path
        self.loop = EventLoop()
        self.machine = Machine(self.loop)
        self.listener = QmpListener(QmpConfig(path=path))
        self.listener.bind()
        self.clients = []

    def serve(self):
        self.listener.serve(self.machine)
        return self.listener._server

    def connect(self):
        client = QmpPeer(self)
        self.clients.append(client)
        return client

    def close(self):
        for client in self.clients:
            client.socket.close()
        self.listener.close()
        self.loop.close()


class QmpPeer:
    """A client that turns the server's loop while it waits."""

    def __init__(self, setup):
        self.loop = setup.loop
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(setup.path)
        self.socket.setblocking(False)
        self.buffer = b""
        self.lines = []
        self.ended = False

    def pump(self, until, rounds=400):
        for _ in range(rounds):
            if until():
                return
            self.loop.run_once(0.005)
            try:
                while data := self.socket.recv(1 << 16):
                    self.buffer += data
                self.ended = True
            except BlockingIOError:
                pass
            except ConnectionError:
                self.ended = True
            *lines, self.buffer = self.buffer.split(b"\r\n")
            self.lines += [json.loads(line) for line in lines]
        assert until(), (self.lines, self.buffer)

    def read(self, count=1):
        self.pump(lambda: len(self.lines) >= count)
        taken, self.lines = self.lines[:count], self.lines[count:]
        return taken

    def send(self, data):
        self.socket.sendall(data if isinstance(data, bytes) else json.dumps(data).encode())

    def ask(self, name, id=None, **arguments):
        self.send({"execute": name, **({"arguments": arguments} if arguments else {}), **({"id": id} if id else {})})
        return self.read()[0]


@pytest.fixture
def setup(tmp_path):
    setup = Setup(str(tmp_path / "qmp.sock"))
    yield setup
    setup.close()


@pytest.fixture
def peer(setup):
    setup.serve()
    peer = setup.connect()
    assert peer.read() == [GREETING]
    return peer


def test_clients_may_connect_before_the_machine_is_served(setup):
    early = setup.connect()
    early.send({"execute": "query-status"})
    setup.serve()
    assert early.read(2) == [GREETING, {"return": {"running": True, "singlestep": False, "status": "running"}}]


def test_binding_imports_nothing_heavy(tmp_path):
    code = ("import sys; import stratovirt.control.listener as l; from stratovirt.config.vm import QmpConfig; "
            "q = l.QmpListener(QmpConfig(path=sys.argv[1])); q.bind(); q.close(); "
            "heavy = ('json', 're', 'socket', 'asyncio', 'typing', 'stratovirt.control.server'); "
            "print(*[m for m in heavy if m in sys.modules])")
    done = subprocess.run([sys.executable, "-S", "-c", code, str(tmp_path / "s")],
                          capture_output=True, text=True, env={"PYTHONPATH": SOURCES}, check=True)
    assert done.stdout.strip() == ""


def test_a_session_as_kata_and_libvirt_hold_it(peer):
    assert peer.ask("qmp_capabilities") == {"return": {}}
    assert peer.ask("qmp_capabilities", id="libvirt-1") == {"return": {}, "id": "libvirt-1"}
    assert peer.ask("qmp_capabilities", enable=[]) == {"return": {}}
    assert "not offered" in peer.ask("qmp_capabilities", enable=["oob"])["error"]["desc"]
    assert peer.ask("query-version")["return"] == {
        "package": "StratoVirt-2.5.0", "qemu": {"major": 5, "micro": 1, "minor": 0}}
    assert peer.ask("query-target")["return"] == {"arch": os.uname().machine}
    assert peer.ask("query-kvm")["return"]["present"] == os.path.exists("/dev/kvm")
    assert [cpu["name"] for cpu in peer.ask("query-machines")["return"]] == ["none", "microvm"]
    assert peer.ask("query-chardev")["return"] == [
        {"filename": "pty:/dev/pts/7", "frontend-open": True, "label": "serial0"}]
    assert {"name": "SHUTDOWN"} in peer.ask("query-events")["return"]
    assert peer.ask("query-name")["return"] == {}
    assert peer.ask("no-such-command")["error"] == {
        "class": "CommandNotFound", "desc": "The command no-such-command has not been found"}


def test_sockets_of_vhost_user_are_reported_with_the_character_devices(setup, peer):
    setup.machine.config.vhost_users["fsd"] = CharDeviceConfig("fsd", "socket", "/run/fsd.socket")
    assert peer.ask("query-chardev")["return"][1:] == [
        {"filename": "unix:/run/fsd.socket", "frontend-open": True, "label": "fsd"}]


def test_cpus_are_reported_with_their_threads_and_topology(peer):
    cpus = peer.ask("query-cpus")["return"]
    assert [(cpu["CPU"], cpu["thread_id"]) for cpu in cpus] == [(0, 101), (1, 102), (2, 103), (3, 104)]
    assert [(cpu["props"]["socket-id"], cpu["props"]["core-id"], cpu["props"]["thread-id"]) for cpu in cpus] == [
        (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    fast = peer.ask("query-cpus-fast")["return"]
    assert [(cpu["cpu-index"], cpu["thread-id"], cpu["qom-path"]) for cpu in fast][3] == (
        3, 104, "/machine/unattached/device[3]")


def test_a_reply_precedes_the_events_its_command_caused_even_in_a_burst(peer):
    peer.send(b'{"execute":"stop","id":1}{"execute":"query-status","id":2}{"execute":"cont","id":3}')
    lines = peer.read(5)
    assert [line.get("id", line.get("event")) for line in lines] == [1, "STOP", 2, 3, "RESUME"]
    assert lines[2]["return"]["status"] == "paused"
    stamp = lines[1]["timestamp"]
    assert set(stamp) == {"seconds", "microseconds"} and 0 <= stamp["microseconds"] < 10**6


def test_power_commands_reach_the_machine(peer, setup):
    assert peer.ask("system_reset") == {"return": {}}
    assert peer.ask("system_powerdown")["event"] == "RESET"
    lines = peer.read(2)
    assert (lines[0], lines[1]["event"]) == ({"return": {}}, "POWERDOWN")


def test_errors_of_the_machine_become_error_replies(peer, setup):
    def fail(error):
        raise error

    for error in (StateError("stop", "created", "running"), HostError("timer", 11), OSError(5, "Input/output error")):
        setup.machine.pause = lambda error=error: fail(error)
        assert peer.ask("stop", id="e") == {"error": {"class": "GenericError", "desc": str(error)}, "id": "e"}


def test_every_client_gets_every_event_and_only_its_own_replies(setup, peer):
    second = setup.connect()
    second.read()
    peer.send({"execute": "stop"})
    assert [line.get("event") for line in peer.read(2)] == [None, "STOP"]
    assert [line.get("event") for line in second.read(1)] == ["STOP"]
    peer.socket.close()
    assert "return" in second.ask("cont")
    assert second.read()[0]["event"] == "RESUME"
    third = setup.connect()
    assert third.read() == [GREETING]


def test_an_event_from_another_thread_wakes_the_loop(setup, peer):
    thread = threading.Thread(target=setup.machine.events.emit, args=("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"}))
    thread.start()
    thread.join()
    assert peer.read()[0]["data"] == {"guest": True, "reason": "guest-shutdown"}


def test_quit_answers_then_tells_then_ends_and_leaves_nothing(setup, peer):
    peer.send({"execute": "quit", "id": "q"})
    setup.loop.run()
    setup.listener.flush(1.0)
    setup.listener.close()
    setup.listener.close()
    peer.pump(lambda: peer.ended, rounds=1)
    assert peer.lines[0] == {"return": {}, "id": "q"}
    assert (peer.lines[1]["event"], peer.lines[1]["data"]) == ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
    assert not os.path.lexists(setup.path)
    assert setup.machine.events.callbacks == []


def test_flush_delivers_events_that_the_loop_never_came_to(setup, peer):
    setup.machine.events.emit("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})
    setup.listener.flush(1.0)
    setup.listener.close()
    peer.pump(lambda: peer.ended, rounds=1)
    assert [line["event"] for line in peer.lines] == ["SHUTDOWN"]


def test_only_the_latest_fifty_events_are_kept_for_delivery(setup, peer):
    for number in range(80):
        setup.machine.events.emit("STOP", {"n": number})
    assert [line["data"]["n"] for line in peer.read(50)] == list(range(30, 80))


def test_a_client_that_only_sends_is_answered_and_closed(setup, peer):
    peer.send(b'{"execute":"query-status"}\n{"execute":"stop"}\n')
    peer.socket.shutdown(socket.SHUT_WR)
    peer.pump(lambda: peer.ended)
    assert [next(iter(line)) for line in peer.lines] == ["return", "return", "event"]
    assert setup.listener._server._clients == {}


def test_a_client_that_leaves_in_the_middle_harms_nobody(setup, peer):
    for last in (b'{"execute":"st', b'{"execute":"query-commands"}' * 50, b'{"execute":"stop"}'):
        rude = setup.connect()
        rude.send(last)
        rude.socket.close()
    peer.pump(lambda: len(setup.listener._server._clients) == 1)
    peer.lines.clear()
    assert "return" in peer.ask("query-status")


def test_flow_control_costs_the_request_only(setup, peer):
    setup.loop.clock = lambda: 0.0
    server = setup.listener._server
    now = [0.0]
    server._bucket = LeakyBucket(100, lambda: now[0])
    peer.send(b"".join(b'{"execute":"query-status","id":%d}' % number for number in range(103)))
    lines = peer.read(103)
    assert all("return" in line for line in lines[:100])
    assert [line["error"]["class"] for line in lines[100:]] == ["OperationThrottled"] * 3
    assert [line["id"] for line in lines] == list(range(103))
    now[0] = 0.05
    peer.send(b'{"execute":"query-status"}' * 6)
    assert ["return" in line for line in peer.read(6)] == [True] * 5 + [False]


def test_a_client_that_does_not_read_is_not_read_from_and_bounded(setup, peer, monkeypatch):
    server = setup.listener._server
    server._bucket = LeakyBucket(10**9, setup.loop.clock)
    (client,) = server._clients.values()
    sent = 0
    request = b'{"execute":"query-commands"}' * 100
    for _ in range(3000):
        try:
            sent += peer.socket.send(request)
        except BlockingIOError:
            if client.interest == server_module.WRITE:
                break
        setup.loop.run_once(0)
        assert len(client.output) < server_module.OUTPUT_HIGH_WATER + 4096
        assert len(client.requests) <= server_module.READ_SIZE // 28 + 1
    assert client.interest == server_module.WRITE
    other = setup.connect()
    other.read()
    assert "return" in other.ask("query-status")
    peer.pump(lambda: len(peer.lines) == sent // 28, rounds=20000)
    assert all("return" in line for line in peer.lines)


def test_a_client_that_events_overflow_is_disconnected(setup, peer):
    server = setup.listener._server
    for _ in range(100):
        for _ in range(50):
            setup.machine.events.emit("STOP", {"padding": "x" * 1000})
        setup.loop.run_once(0)
        if not server._clients:
            break
    assert server._clients == {}


def test_more_clients_than_allowed_wait_in_the_backlog(setup, monkeypatch):
    monkeypatch.setattr(server_module, "MAX_CLIENTS", 3)
    setup.serve()
    peers = [setup.connect() for _ in range(5)]
    for peer in peers[:3]:
        peer.read()
    for _ in range(5):
        setup.loop.run_once(0.005)
    assert len(setup.listener._server._clients) == 3
    peers[0].socket.close()
    peers[1].socket.close()
    assert peers[3].read() == [GREETING] and peers[4].read() == [GREETING]


def test_running_out_of_descriptors_does_not_spin_or_end_the_server(setup, monkeypatch):
    monkeypatch.setattr(server_module, "ACCEPT_RETRY_SECONDS", 0.01)
    server = setup.serve()
    accept, calls = setup.listener._listener.accept, []

    class Refusing:
        fd = setup.listener._listener.fd

        def accept(self):
            calls.append(1)
            if len(calls) == 1:
                raise OSError(24, "Too many open files")
            return accept()

    server._listener = Refusing()
    peer = setup.connect()
    assert peer.read() == [GREETING]
    assert len(calls) == 2


@pytest.mark.parametrize("garbage", [
    b"\x00" * 5000, b"[" * 100_000, b'"' * 5000, b'{"execute":"' + b"A" * 200_000, b"\xff\xfe{}\n" * 50,
    b'{"execute":"query-status","id":' + b"[" * 40 + b"]" * 40 + b"}",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", os.urandom(20000),
])
def test_hostile_bytes_leave_other_clients_and_the_server_unharmed(setup, peer, garbage):
    hostile = setup.connect()
    hostile.socket.setblocking(True)
    writer = threading.Thread(target=hostile.send, args=(garbage,))
    writer.start()
    hostile.socket.settimeout(None)
    for _ in range(30):
        setup.loop.run_once(0.002)
    writer.join()
    setup.listener._server._bucket = LeakyBucket(100, setup.loop.clock)
    assert "return" in peer.ask("query-status")
    for client in setup.listener._server._clients.values():
        assert len(client.decoder._document) <= 64 << 10
    hostile.socket.close()


# -- file descriptors


def send_fds(peer, data, *fds):
    peer.socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


@pytest.fixture
def pipes():
    """Makes pipes; gives the reading end, and tells whether the only writing end is still open somewhere."""
    readers = []

    class Pipe:
        def __init__(self):
            self.reader, self.writer = os.pipe2(os.O_NONBLOCK)
            readers.append(self.reader)

        def pass_on(self, peer, data):
            send_fds(peer, data, self.writer)
            os.close(self.writer)

        @property
        def kept(self):
            try:
                return os.read(self.reader, 1) != b""
            except BlockingIOError:
                return True

    yield Pipe
    for reader in readers:
        os.close(reader)


GETFD = b'{"execute":"getfd","arguments":{"fdname":"%s"}}\n'


def test_a_named_descriptor_is_kept_until_it_is_replaced_or_closed(peer, pipes):
    first, second, third = pipes(), pipes(), pipes()
    first.pass_on(peer, GETFD % b"net")
    assert peer.read() == [{"return": {}}] and first.kept
    second.pass_on(peer, GETFD % b"net")
    assert peer.read() == [{"return": {}}] and not first.kept and second.kept
    third.pass_on(peer, GETFD % b"other")
    peer.read()
    assert peer.ask("closefd", fdname="net") == {"return": {}}
    assert not second.kept and third.kept
    assert peer.ask("closefd", fdname="net")["error"]["desc"] == "File descriptor named 'net' not found"


def test_descriptors_end_with_their_client(setup, pipes):
    setup.serve()
    peer, other = setup.connect(), setup.connect()
    peer.read()
    other.read()
    named, waiting = pipes(), pipes()
    named.pass_on(peer, GETFD % b"net")
    peer.read()
    assert other.ask("closefd", fdname="net")["error"]["desc"] == "File descriptor named 'net' not found"
    waiting.pass_on(peer, b" ")
    peer.pump(lambda: any(client.descriptors._arrived for client in setup.listener._server._clients.values()))
    peer.socket.close()
    other.pump(lambda: not named.kept and not waiting.kept)


def test_of_several_descriptors_the_last_counts_and_none_is_left(peer, pipes):
    several = [pipes() for _ in range(3)]
    send_fds(peer, GETFD % b"net", *(pipe.writer for pipe in several))
    for pipe in several:
        os.close(pipe.writer)
    assert peer.read() == [{"return": {}}]
    assert [pipe.kept for pipe in several] == [False, False, True]


def test_getfd_without_a_descriptor_is_an_error(peer, pipes):
    assert peer.ask("getfd", fdname="net")["error"] == {"class": "GenericError", "desc": "Invalid SCM message"}
    pipe = pipes()
    pipe.pass_on(peer, GETFD % b"7up")
    assert "not starting with a digit" in peer.read()[0]["error"]["desc"]
    assert not pipe.kept


def test_a_descriptor_may_come_before_its_command_as_qemus_library_sends_it(peer, pipes):
    pipe = pipes()
    pipe.pass_on(peer, b" ")
    peer.send(GETFD[:20])
    for _ in range(5):
        peer.loop.run_once(0.001)
    peer.send(GETFD[20:] % b"net")
    assert peer.read() == [{"return": {}}] and pipe.kept


@pytest.mark.parametrize("data", [b'{"execute":"query-status"}\n', b"garbage\n", b'{"execute":"getfd"}\n', b'{"execute":"x"}'])
def test_descriptors_with_other_commands_are_closed(setup, peer, pipes, data):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        pipe = pipes()
        pipe.pass_on(peer, data)
        peer.read()
        assert not pipe.kept
    assert len(os.listdir("/proc/self/fd")) == before + 20  # the reading ends


def test_a_client_can_neither_hoard_nor_flood(setup, peer, pipes, monkeypatch):
    setup.listener._server._bucket = LeakyBucket(10**9, setup.loop.clock)
    before = len(os.listdir("/proc/self/fd"))
    null = os.open(os.devnull, os.O_RDONLY)
    for number in range(100):
        send_fds(peer, GETFD % f"name{number}".encode(), null)
        answer = peer.read()[0]
        assert ("return" in answer) == (number < 64), answer
    assert len(os.listdir("/proc/self/fd")) == before + 1 + 64
    for _ in range(10):
        send_fds(peer, b" ", *[null] * 250)
        for _ in range(3):
            setup.loop.run_once(0.001)
        assert len(os.listdir("/proc/self/fd")) <= before + 1 + 64 + 16
    os.close(null)


# -- QEMU's own client, against a loop that runs as in the program


def test_qemu_qmp_speaks_with_it(setup):
    qmp = pytest.importorskip("qemu.qmp")
    setup.serve()
    thread = threading.Thread(target=setup.loop.run)
    thread.start()

    async def talk():
        client = qmp.QMPClient("test")
        await client.connect(setup.path)
        status = await client.execute("query-status")
        assert status == {"running": True, "singlestep": False, "status": "running"}
        with client.listener(("STOP", "RESUME", "SHUTDOWN")) as events:
            await client.execute("stop")
            assert (await asyncio.wait_for(events.get(), 10))["event"] == "STOP"
            await client.execute("cont")
            assert (await asyncio.wait_for(events.get(), 10))["event"] == "RESUME"
            with pytest.raises(qmp.ExecuteError) as caught:
                await client.execute("no-such-command")
            assert caught.value.error_class == "CommandNotFound"
            with pytest.raises(qmp.ExecuteError):
                await client.execute("quit", {"now": True})
            await client.execute("quit")
            assert (await asyncio.wait_for(events.get(), 10))["data"]["reason"] == "host-qmp-quit"
        await client.disconnect()

    try:
        asyncio.run(asyncio.wait_for(talk(), 60))
    finally:
        setup.loop.stop()
        thread.join()


# -- the endpoint


def test_socket_is_private_and_errors_name_the_option(setup, tmp_path):
    assert stat.S_IMODE(os.lstat(setup.path).st_mode) == 0o600
    (tmp_path / "file").write_text("")
    for path in (setup.path, str(tmp_path / "file"), "y" * 108, str(tmp_path / "no" / "such")):
        with pytest.raises(ConfigError) as caught:
            QmpListener(QmpConfig(path=path, option="-mon chardev=m")).bind()
        assert str(caught.value).startswith(f"-mon chardev=m {path}: ")


def test_tcp_endpoint(setup):
    listener = QmpListener(QmpConfig(host="127.0.0.1", port=0))
    listener.bind()
    listener.serve(setup.machine)
    with socket.create_connection(listener._listener.socket.getsockname()) as client:
        client.setblocking(False)
        for _ in range(50):
            setup.loop.run_once(0.005)
            try:
                assert json.loads(client.recv(4096)) == GREETING
                break
            except BlockingIOError:
                continue
        else:
            pytest.fail("no greeting")
    listener.close()
