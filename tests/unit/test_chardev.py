"""Character devices over real descriptors: pipes, terminals, files and sockets."""

from __future__ import annotations

import os
import pty
import select
import socket
import stat
import termios

import pytest

import stratovirt
from stratovirt.backends import chardev, listen
from stratovirt.backends.chardev import OUTPUT_LIMIT, OUTPUT_LOW_WATER, CharDevice, create
from stratovirt.backends.chardev_stdio import StdioCharDevice
from stratovirt.config.vm import CharDeviceConfig
from stratovirt.errors import ConfigError
from stratovirt.loop import EventLoop

SOURCES = os.path.dirname(os.path.dirname(stratovirt.__file__))


@pytest.fixture
def loop():
    loop = EventLoop()
    yield loop
    loop.close()


@pytest.fixture
def pipes():
    """(what the device reads, where the test writes, where the test reads, what the device writes)"""
    fds = [*os.pipe(), *os.pipe()]
    yield fds[0], fds[1], fds[2], fds[3]
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            continue


def turn(loop, until=lambda: False, rounds=200):
    for _ in range(rounds):
        if until():
            return True
        loop.run_once(0.005)
    return until()


class Port:
    """The guest's port: takes as much input as it is told to have room for."""

    def __init__(self, device, room=1 << 20):
        self.device, self.room, self.got, self.writable = device, room, b"", 0
        device.set_receiver(self.receive, lambda: self.room - len(self.got), self.on_writable)

    def receive(self, data):
        assert len(data) <= self.room - len(self.got)
        self.got += data

    def on_writable(self):
        assert self.device.can_write
        self.writable += 1


def test_a_burst_costs_one_wake_up_and_one_write(loop, pipes):
    device = StdioCharDevice(loop, in_fd=pipes[0], out_fd=pipes[3])
    calls, sends = [], []
    call_soon, send = loop.call_soon, device._send
    loop.call_soon = lambda call: (calls.append(call), call_soon(call))
    device._send = lambda chunk: (sends.append(chunk), send(chunk))[1]
    for value in b"Linux version 6.1":
        device.write(bytes((value,)))
    assert turn(loop, lambda: sends)
    assert (len(calls), sends) == (1, [b"Linux version 6.1"])
    assert os.read(pipes[2], 100) == b"Linux version 6.1"
    device.close()


def test_a_reader_that_stops_holds_the_port_back_and_loses_nothing(loop, pipes):
    device = StdioCharDevice(loop, in_fd=pipes[0], out_fd=pipes[3])
    port = Port(device)
    sent = 0
    while device.can_write or turn(loop, lambda: device.can_write, 5):
        device.write(bytes((sent & 0xFF,)) * 512)
        sent += 512
        assert sent < 1 << 20
    assert len(device._output) > OUTPUT_LOW_WATER and device.dropped == 0
    got, before = b"", port.writable

    def read_some():
        nonlocal got
        while select.select([pipes[2]], [], [], 0)[0]:
            got += os.read(pipes[2], 65536)
        return len(got) == sent

    assert turn(loop, read_some)
    assert (port.writable, device.can_write) == (before + 1, True)
    assert len(device._output) == 0
    device.close()


def test_a_port_that_ignores_the_limit_is_cut_off_at_it(loop, pipes):
    device = StdioCharDevice(loop, in_fd=pipes[0], out_fd=pipes[3])
    for _ in range(100):
        device.write(bytes(1000))
    assert (len(device._output), device.dropped, device.can_write) == (OUTPUT_LIMIT, 100_000 - OUTPUT_LIMIT, False)
    os.close(pipes[2])
    device.close()


def test_shared_descriptors_stay_blocking(loop, pipes):
    device = StdioCharDevice(loop, in_fd=pipes[0], out_fd=pipes[3])
    Port(device)
    device.write(b"x")
    turn(loop, rounds=3)
    assert os.get_blocking(pipes[0]) and os.get_blocking(pipes[3])
    device.close()


def test_input_pauses_when_the_port_is_full_and_resumes_without_loss(loop, pipes):
    device = StdioCharDevice(loop, in_fd=pipes[0], out_fd=pipes[3])
    port = Port(device, room=10)
    os.write(pipes[1], b"0123456789abcdef")
    assert turn(loop, lambda: len(port.got) == 10)
    turn(loop, rounds=3)
    assert pipes[0] not in loop._handlers
    port.got = b""
    device.resume_input()
    assert turn(loop, lambda: port.got == b"abcdef")
    device.close()


def test_a_paused_source_that_hangs_up_does_not_spin_the_loop(loop, pipes):
    device = StdioCharDevice(loop, in_fd=pipes[0], out_fd=pipes[3])
    port = Port(device, room=2)
    os.write(pipes[1], b"abcd")
    os.close(pipes[1])
    turn(loop, lambda: port.got == b"ab")
    turn(loop, rounds=3)
    assert not loop._epoll.poll(0)
    port.got = b""
    device.resume_input()
    assert turn(loop, lambda: port.got == b"cd")
    port.got = b""
    device.resume_input()
    turn(loop, rounds=5)
    assert pipes[0] not in loop._handlers and not loop._epoll.poll(0)
    device.close()


def test_standard_input_from_a_file_is_read_as_the_port_has_room(loop, pipes, tmp_path):
    (tmp_path / "in").write_bytes(bytes(range(256)) * 40)
    fd = os.open(tmp_path / "in", os.O_RDONLY)
    device = StdioCharDevice(loop, in_fd=fd, out_fd=pipes[3])
    port = Port(device, room=1000)
    got = b""
    while len(got) < 10240:
        expected = min(1000, 10240 - len(got))
        assert turn(loop, lambda expected=expected: len(port.got) == expected)
        turn(loop, rounds=2)
        got, port.got = got + port.got, b""
        device.resume_input()
    assert got == bytes(range(256)) * 40
    turn(loop, rounds=3)
    assert device._ended and not loop._calls
    device.close()
    os.close(fd)


def test_output_to_a_regular_file_and_to_dev_null(loop, pipes, tmp_path):
    for path in (str(tmp_path / "out"), "/dev/null"):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        device = StdioCharDevice(loop, in_fd=pipes[0], out_fd=fd)
        device.write(b"hello" * 2000)
        assert turn(loop, lambda device=device: not device._output)
        device.close()
        os.close(fd)
    assert (tmp_path / "out").read_bytes() == b"hello" * 2000


def test_a_reader_that_has_gone_costs_the_guest_only_its_output(loop, pipes):
    device = StdioCharDevice(loop, in_fd=pipes[0], out_fd=pipes[3])
    os.close(pipes[2])
    device.write(b"into the void")
    assert turn(loop, lambda: not device._output)
    device.close()


def test_close_writes_out_what_is_queued_and_waits_for_a_slow_reader_only_so_long(loop, pipes, monkeypatch):
    device = StdioCharDevice(loop, in_fd=pipes[0], out_fd=pipes[3])
    device.write(b"reboot: Power down\r\n")
    device.close()
    device.close()
    assert os.read(pipes[2], 100) == b"reboot: Power down\r\n"
    monkeypatch.setattr(chardev, "CLOSE_SECONDS", 0.05)
    stuck = StdioCharDevice(loop, in_fd=pipes[0], out_fd=pipes[3])
    for _ in range(40):
        stuck.write(bytes(4096))
        stuck._flush()
    stuck.close()
    assert len(stuck._output) > 0


def test_a_terminal_is_raw_in_between_and_as_before_afterwards(loop):
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    device = StdioCharDevice(loop, in_fd=slave, out_fd=slave)
    port = Port(device)
    raw = termios.tcgetattr(slave)
    assert not raw[3] & (termios.ISIG | termios.ICANON | termios.ECHO) and raw[1] & termios.OPOST
    os.write(master, b"\x03\x1a\r")
    assert turn(loop, lambda: port.got == b"\x03\x1a\r")
    device.write(b"login: ")
    turn(loop, lambda: not device._output)
    assert os.read(master, 100) == b"login: "
    assert os.get_blocking(slave)
    device.close()
    assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)


def test_a_stuck_terminal_does_not_block_the_loop(loop, monkeypatch):
    master, slave = pty.openpty()
    device = StdioCharDevice(loop, in_fd=slave, out_fd=slave)
    for _ in range(100):  # more than any terminal buffers
        device.write(bytes(4000))
        turn(loop, rounds=1)
    assert device._output
    monkeypatch.setattr(chardev, "CLOSE_SECONDS", 0.02)
    device.close()
    os.close(master)
    os.close(slave)


def test_no_termios_without_a_terminal():
    import subprocess
    import sys

    code = ("import sys; from stratovirt.loop import EventLoop; from stratovirt.backends.chardev_stdio import *; "
            "d = StdioCharDevice(EventLoop()); d.write(b'ok'); d.close(); "
            "assert 'termios' not in sys.modules and 'socket' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True,
                          env={"PYTHONPATH": SOURCES}, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"ok", b"")


# -- file


def test_file_keeps_what_was_there_and_creates_privately(loop, tmp_path):
    path = tmp_path / "console"
    path.write_bytes(b"old\n")
    for name, start in (("console", b"old\n"), ("new", b"")):
        device = create(CharDeviceConfig("c0", "file", path=str(tmp_path / name)), loop)
        Port(device)
        device.write(b"line\n")
        device.close()
        assert (tmp_path / name).read_bytes() == start + b"line\n"
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600


def test_file_that_is_a_named_pipe_without_room_does_not_block(loop, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    device = create(CharDeviceConfig("c0", "file", path=str(tmp_path / "fifo")), loop)
    for _ in range(40):
        device.write(bytes(4000))
        turn(loop, rounds=2)
    assert device._waits_writable
    monkeypatch.setattr(chardev, "CLOSE_SECONDS", 0.02)
    device.close()


def test_file_that_cannot_be_opened_names_option_and_path(loop, tmp_path):
    for path in (str(tmp_path), str(tmp_path / "no" / "where"), "nul\0byte"):
        with pytest.raises(ConfigError) as caught:
            create(CharDeviceConfig("c0", "file", path=path), loop, "-serial")
        assert caught.value.option == "-serial file,path" and caught.value.value == path


def test_unknown_kind_is_refused(loop):
    with pytest.raises(ConfigError, match="accepted: stdio, pty"):
        create(CharDeviceConfig("c0", "telepathy"), loop)


def test_the_null_device_takes_everything(loop):
    device = CharDevice(loop)
    device.write(b"x" * 1000)
    assert turn(loop, lambda: not device._output)
    device.close()


# -- pty


def test_pty_drains_without_a_user_and_serves_one_after_the_other(loop, monkeypatch):
    device = create(CharDeviceConfig("c0", "pty"), loop)
    port = Port(device)
    assert device.filename == f"pty:{device.path}" and device.path.startswith("/dev/pts/")
    for _ in range(100):
        device.write(bytes(4000))
        assert turn(loop, lambda: not device._output)
    for number in (b"1", b"2"):
        user = os.open(device.path, os.O_RDWR | os.O_NOCTTY)
        device.write(b"hello " + number)
        assert turn(loop, lambda: not device._output)
        assert os.read(user, 100) == b"hello " + number
        port.got = b""
        os.write(user, b"\x03" + number)
        assert turn(loop, lambda number=number: port.got == b"\x03" + number)
        os.close(user)
        turn(loop, rounds=5)
        assert not loop._epoll.poll(0), "a closed terminal must not keep the loop awake"
    device.close()


def test_pty_user_that_goes_away_while_it_is_stuck_frees_the_port(loop):
    device = create(CharDeviceConfig("c0", "pty"), loop)
    port = Port(device)
    user = os.open(device.path, os.O_RDWR | os.O_NOCTTY)
    for _ in range(200):
        if not device.can_write:
            break
        device.write(bytes(2000))
        turn(loop, rounds=1)
    assert not device.can_write
    os.close(user)
    assert turn(loop, lambda: device.can_write)
    assert port.writable == 1
    device.close()


def test_pty_input_pauses_and_resumes(loop):
    device = create(CharDeviceConfig("c0", "pty"), loop)
    port = Port(device, room=4)
    user = os.open(device.path, os.O_RDWR | os.O_NOCTTY)
    os.write(user, b"12345678")
    assert turn(loop, lambda: port.got == b"1234")
    turn(loop, rounds=3)
    port.got = b""
    device.resume_input()
    assert turn(loop, lambda: port.got == b"5678")
    os.close(user)
    device.close()


# -- socket


def connect(path):
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(5)
    client.connect(path)
    return client


@pytest.fixture
def sock(loop, tmp_path):
    path = str(tmp_path / "console.sock")
    device = create(CharDeviceConfig("c0", "socket", path=path, server=True), loop)
    device.path = path
    yield device
    device.close()


def test_socket_drops_output_without_a_client_and_serves_one_at_a_time(loop, sock):
    port = Port(sock)
    sock.write(b"nobody sees this")
    turn(loop, lambda: not sock._output)
    first, second = connect(sock.path), connect(sock.path)
    assert turn(loop, lambda: sock.connected)
    second.sendall(b"second")
    first.sendall(b"first")
    sock.write(b"to the first")
    assert turn(loop, lambda: port.got == b"first" and not sock._output)
    assert first.recv(100) == b"to the first"
    first.close()
    assert turn(loop, lambda: port.got == b"firstsecond")
    sock.write(b"to the second")
    turn(loop, lambda: not sock._output)
    assert second.recv(100) == b"to the second"
    second.close()


def test_socket_client_that_does_not_read_holds_the_port_until_it_leaves(loop, sock):
    port = Port(sock)
    client = connect(sock.path)
    turn(loop, lambda: sock.connected)
    for _ in range(2000):
        if not sock.can_write:
            break
        sock.write(bytes(2000))
        turn(loop, rounds=1)
    assert not sock.can_write
    client.close()
    assert turn(loop, lambda: sock.can_write and not sock.connected)
    assert port.writable == 1 and sock.dropped == 0


def test_socket_file_is_private_and_removed_at_close(loop, tmp_path):
    path = str(tmp_path / "s")
    old = os.umask(0)
    try:
        device = create(CharDeviceConfig("c0", "socket", path=path, server=True), loop)
    finally:
        os.umask(old)
    assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600
    device.close()
    assert not os.path.lexists(path)


def test_socket_that_somebody_replaced_is_left_alone_at_close(loop, tmp_path):
    path = str(tmp_path / "s")
    device = create(CharDeviceConfig("c0", "socket", path=path, server=True), loop)
    os.unlink(path)
    (tmp_path / "s").write_text("not ours")
    device.close()
    assert (tmp_path / "s").read_text() == "not ours"


def test_stale_socket_is_replaced_and_anything_else_refused(loop, tmp_path):
    stale = str(tmp_path / "stale")
    gone = socket.socket(socket.AF_UNIX)
    gone.bind(stale)
    gone.close()
    listen.listen_unix(stale, "-qmp").close()

    live = socket.socket(socket.AF_UNIX)
    live.bind(str(tmp_path / "live"))
    live.listen()
    (tmp_path / "file").write_text("precious")
    os.symlink(tmp_path / "file", tmp_path / "link")
    os.mkdir(tmp_path / "dir")
    for name in ("live", "file", "link", "dir"):
        with pytest.raises(ConfigError) as caught:
            create(CharDeviceConfig("c0", "socket", path=str(tmp_path / name), server=True), loop, "-serial")
        assert "taken" in str(caught.value) and "-serial socket,path" in str(caught.value)
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(BlockingIOError):  # our probe of the live one was an abortive connect, no more
        live.setblocking(False)
        live.accept()
        live.accept()
    live.close()


@pytest.mark.parametrize("path", ["", "x" * 108, "/nonexistent/dir/socket", "a\0b", "/proc/socket"])
def test_socket_path_that_cannot_be(path):
    with pytest.raises(ConfigError) as caught:
        listen.listen_unix(path, "-qmp")
    assert caught.value.option == "-qmp" and "107 bytes" in str(caught.value)


def test_a_path_of_107_bytes_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listener = listen.listen_unix("p" * 107, "-qmp")
    assert os.path.lexists("p" * 107)
    listener.close()


def test_tcp_socket(loop):
    device = create(CharDeviceConfig("c0", "socket", host="127.0.0.1", port=0, server=True), loop)
    port = Port(device)
    client = socket.create_connection(device._listener.socket.getsockname(), timeout=5)
    client.sendall(b"over tcp")
    assert turn(loop, lambda: port.got == b"over tcp")
    taken = device._listener.socket.getsockname()[1]
    for host, number in (("127.0.0.1", taken), ("localhost", 4444), ("127.0.0.1", 70000), ("192.0.2.1", 4444)):
        with pytest.raises(ConfigError) as caught:
            create(CharDeviceConfig("c1", "socket", host=host, port=number, server=True), loop)
        assert caught.value.value == f"{host}:{number}"
    client.close()
    device.close()


def test_socket_that_does_not_listen_is_refused(loop):
    with pytest.raises(ConfigError, match="server,nowait"):
        create(CharDeviceConfig("c0", "socket", path="/tmp/x"), loop)


# -- redirect-to-log


def test_every_line_becomes_a_log_line(loop, monkeypatch):
    lines = []
    monkeypatch.setattr(chardev.log, "info", lines.append)
    device = create(CharDeviceConfig("c0", "redirect-to-log"), loop)
    device.write(b"one\r\ntw")
    turn(loop, lambda: not device._output)
    device.write(b"o\nrest" + b"x" * 10)
    device.close()
    assert lines == ["one", "two", "rest" + "x" * 10]
