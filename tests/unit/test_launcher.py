"""The launcher: what reaches a machine, what hostile clients reach, who survives whom, and that nothing is left behind."""

from __future__ import annotations

import _socket
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratovirt.errors import ConfigError
from stratovirt.launcher import child, client, command, listening, wire
from stratovirt.launcher.request import RequestError, read_request
from stratovirt.launcher.spare import descriptors_of
from unit.launchers import DEADLINE, SOURCE, Client, LauncherProcess, until


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[LauncherProcess]:
    process = LauncherProcess(tmp_path / "socket")
    yield process
    assert process.close() == 0


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., LauncherProcess]]:
    """A launcher that a test ends itself, or with constants of its own."""
    made: list[LauncherProcess] = []

    def start(*constants: str, idle: float = 0.0) -> LauncherProcess:
        made.append(LauncherProcess(tmp_path / "socket", *constants, idle=idle))
        return made[-1]

    yield start
    for process in made:
        process.close()


# -- what reaches the machine


def test_arguments_environment_directory_and_umask_arrive(launcher, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STRATOVIRT_TEST", "with = and \udcff")
    monkeypatch.delenv("HOME", raising=False)
    mask = os.umask(0o027)
    try:
        one = Client(launcher, "tell", "ü \udcfe", "0")
    finally:
        os.umask(mask)
    told = json.loads(one.read())
    assert told["argv"] == ["tell", "ü \udcfe", "0"]
    assert told["env"] == dict(os.environ)
    assert told["cwd"] == str(tmp_path)
    assert told["umask"] == 0o027
    assert told["session"] == told["pid"]
    assert one.end() == 0


def test_a_deleted_working_directory_is_no_obstacle(launcher, tmp_path, monkeypatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert Client(launcher, "0").end() == 0


def test_a_machine_has_the_descriptors_it_was_given_and_its_connection(launcher) -> None:
    read_end, write_end = os.pipe()
    high = 77
    os.dup2(write_end, high)
    one = Client(launcher, f"/dev/fd/{high}", "tell", f"write={high}", "0")
    told = json.loads(one.read())
    assert os.read(read_end, 10) == b"here"
    extra = [fd for fd in told["fds"] if fd not in (0, 1, 2, high)]
    assert len(extra) == 2, told["fds"]  # the connection, and the directory that was being listed
    assert one.end() == 0
    for fd in (read_end, write_end, high):
        os.close(fd)


def test_standard_input_is_the_clients(launcher) -> None:
    one = Client(launcher, "copy", "0")
    os.write(one.input, b"typed")
    assert one.read() == b"typed"
    assert one.end() == 0


@pytest.mark.parametrize(("words", "status"), [
    (["0"], 0), (["7"], 7 << 8), (["signal=9", "0"], 9), (["signal=15", "0"], 15), (["raise=oh", "0"], 1 << 8),
])
def test_the_end_is_told(launcher, words, status, capfd) -> None:
    assert Client(launcher, *words).end() == status
    assert ("ValueError: oh" in capfd.readouterr().err) == (words[0] == "raise=oh")


def test_descriptors_that_arguments_name() -> None:
    words = ["-netdev", "tap,id=n,fds=30:31,vhostfd=32", "tap,fd=33", "path=/dev/fd/34", "/proc/self/fd/35", "-append", "fd",
             "fd=x", "name=fd", "fdset=36", "path=/tmp/fd/37", "fds=38:", "/dev/fd/99999999999"]
    assert client.named_descriptors([word.encode() for word in words]) == [30, 31, 32, 33, 34, 35, 38]


def test_descriptors_get_numbers_that_others_have(tmp_path) -> None:
    names = ["a", "b", "c"]
    files = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in names]
    pid = os.fork()
    if pid == 0:
        try:
            # in a circle, each to another's number; the fourth is kept under any
            kept = child.place_descriptors({files[1]: files[0], files[2]: files[1], files[0]: files[2]}, [files[0]],
                                           child.own_limit())
            for number, text in ((files[1], b"A"), (files[2], b"B"), (files[0], b"C"), (kept[0], b"a")):
                os.write(number, text)
            left = {int(name) for name in os.listdir("/proc/self/fd")} - {*files, *kept}
            os._exit(0 if len(left) <= 1 else 1)  # the directory that was being listed
        finally:
            os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0
    assert [(tmp_path / name).read_text() for name in names] == ["Aa", "B", "C"]
    for fd in files:
        os.close(fd)


# -- clients that do not behave


def message(*fields: bytes) -> bytes:
    return b"\0".join([wire.GREETING, *fields])


@pytest.mark.parametrize(("request_", "count", "answer"), [
    (b"GET / HTTP/1.1", 4, "not a request of this version"),
    (b"stratovirt 2\0run\x0022\x000,1,2\x000", 4, "not a request of this version"),
    (message(b"stop", b"22", b"0,1,2", b"0"), 4, "no such request: 'stop' (accepted: run, clone, template)"),
    (message(b"clone", b"22", b"0,1,2", b"1", b"web"), 4, "this launcher has no templates"),
    (message(b"template", b"22", b"0,1,2", b"1", b"list"), 4, "this launcher has no templates"),
    (message(b"run", b"9", b"0,1,2", b"0"), 4, "umask: '9' (accepted: 0 to 777)"),
    (message(b"run", b"22", b"0,1,2", b"5", b"a"), 4, "count of arguments: '5' (accepted: 0 to 1)"),
    (message(b"run", b"22", b"0,1,2", b"-1"), 4, "count of arguments"),
    (message(b"run", b"22", b"0,1,2", b"0"), 0, "0 descriptors came, and 4 were announced"),
    (message(b"run", b"22", b"0,1,2", b"0"), 3, "3 descriptors came"),
    (message(b"run", b"22", b"0,1,2", b"0"), 5, "5 descriptors came"),
    (message(b"run", b"22", b"0,1", b"0"), 3, "descriptor numbers begin with 0,1,2"),
    (message(b"run", b"22", b"0,1,2,2", b"0"), 5, "each comes once"),
    (message(b"run", b"22", b"0,1,2,1024", b"0"), 5, "descriptor 1024 is beyond this launcher's limit of 1024"),
    (message(b"run", b"22", b"0,1,2,x", b"0"), 5, "descriptor number: 'x'"),
    (message(b"run", b"22", b"0,1,2", b"0", b"no-equals"), 4, "not a variable of an environment"),
    (message(b"run", b"22", b"0,1,2", b"0", b"A=" + bytes(0) + b"x" * wire.MAX_REQUEST), 4, "longer than 131072 bytes"),
])
def test_a_bad_request_gets_a_reason_and_no_machine(launcher, request_, count, answer) -> None:
    before = launcher.descriptors()
    got = launcher.exchange(request_, [1] * count)
    assert got.startswith(b"error ")
    assert answer in got.decode()
    assert launcher.machines() == 0
    until(lambda: launcher.descriptors() == before, "descriptors are left")
    assert Client(launcher, "0").end() == 0


@given(st.lists(st.binary(max_size=6), max_size=9), st.integers(0, 6))
def test_any_bytes_are_a_request_or_an_error(fields: list[bytes], count: int) -> None:
    try:
        request = read_request(message(b"run", *fields), list(range(count)), 1024)
    except RequestError as error:
        assert str(error).isprintable()
    else:
        assert set(request.descriptors) >= {0, 1, 2}
        assert len(request.descriptors) == count - 1


def test_the_client_does_not_send_what_is_too_long(launcher, monkeypatch) -> None:
    monkeypatch.setenv("LONG", "x" * wire.MAX_REQUEST)
    with pytest.raises(client.Trouble, match="and the launcher takes 131072"):
        client.request(launcher.connect(), ["0"])


def test_a_silent_client_is_let_go_and_keeps_nobody_waiting(make) -> None:
    launcher = make("REQUEST_SECONDS=0.3")
    silent = launcher.connect()
    assert Client(launcher, "0").end() == 0
    assert silent.recv(100) == b"error no request within 0.3 s"
    assert silent.recv(100) == b""


def test_a_late_request_is_served(launcher) -> None:
    connection = launcher.connect()
    time.sleep(0.05)
    client.request(connection, ["3"])
    _, announced = client.await_machine(connection)
    assert client.await_end(connection, announced) == 3 << 8


def test_many_silent_clients_push_out_the_oldest(make) -> None:
    launcher = make("MAX_SILENT=4")
    before = launcher.descriptors()
    silent = [launcher.connect() for _ in range(6)]
    for one in silent[:2]:
        assert one.recv(100).startswith(b"error 4 clients have connected since")
    assert Client(launcher, "0").end() == 0
    for one in silent:
        one.close()
    until(lambda: launcher.descriptors() == before, "descriptors are left")


def test_a_client_that_hangs_up_at_once(launcher) -> None:
    before = launcher.descriptors()
    for _ in range(20):
        launcher.connect().close()
    assert Client(launcher, "0").end() == 0
    until(lambda: launcher.descriptors() == before, "descriptors are left")


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")


@needs_root
def test_another_user_is_refused(tmp_path) -> None:
    folder = Path("/tmp") / f"stratovirt-test-{os.getpid()}"
    folder.mkdir(mode=0o755)
    launcher = LauncherProcess(folder / "socket")
    os.chmod(folder / "socket", 0o666)
    code = """if 1:
        import os, socket, sys
        os.setuid(65534)
        one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        one.connect(sys.argv[1])
        print(one.recv(100).decode())
    """
    try:
        done = subprocess.run([sys.executable, "-c", code, str(folder / "socket")], capture_output=True, text=True, timeout=20)
        assert done.stdout == "error this launcher serves user 0, not user 65534\n"
    finally:
        launcher.close()
        (folder / "socket").unlink()
        folder.rmdir()


@needs_root
def test_the_client_gives_nothing_to_another_users_launcher(tmp_path) -> None:
    import socket

    ready, write_end = os.pipe()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(tmp_path / "theirs"))
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        listener.listen()  # who calls this is whom the socket belongs to
        os.write(write_end, b"1")
        time.sleep(20)
        os._exit(0)
    assert os.read(ready, 1)
    with pytest.raises(client.Trouble, match="is user 65534's"):
        client.connect(bytes(tmp_path / "theirs"))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


# -- who survives whom


def test_a_machine_ends_when_its_client_is_gone(launcher) -> None:
    one = Client(launcher, "stay", "0")
    assert one.read() == b"running"
    one.connection.close()
    assert one.read() == b", hung up"
    until(lambda: launcher.machines() == 0, "the machine is still there")


def test_a_killed_machine_hurts_nobody(launcher) -> None:
    one, other = Client(launcher, "stay", "0"), Client(launcher, "stay", "0")
    assert one.read() == other.read() == b"running"
    signal.pidfd_send_signal(one.pidfd, signal.SIGKILL)
    assert one.end() == signal.SIGKILL
    until(lambda: launcher.machines() == 1, "the other machine is gone, too")
    assert Client(launcher, "0").end() == 0
    signal.pidfd_send_signal(other.pidfd, signal.SIGTERM)
    assert other.end() == signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_machines_outlive_the_launcher_and_tell_how_they_end(make, number) -> None:
    launcher = make()
    one, other = Client(launcher, "write=1", "copy", "5"), Client(launcher, "stay", "0")
    assert (one.read(), other.read()) == (b"here", b"running")
    os.kill(launcher.pid, number)
    launcher.process.wait(DEADLINE)
    os.write(one.input, b"still there")
    assert one.read() == b"still there"
    assert one.end() == 5 << 8
    other.connection.close()
    assert other.read() == b", hung up"


def test_a_machine_that_crashes_after_its_launcher(make) -> None:
    launcher = make()
    one = Client(launcher, "stay", "0")
    assert one.read() == b"running"
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.process.wait(DEADLINE)
    signal.pidfd_send_signal(one.pidfd, signal.SIGKILL)
    with pytest.raises(client.Trouble, match="the launcher, which would know how, has ended before it"):
        one.end()


def test_a_killed_spare_is_replaced(launcher) -> None:
    for _ in range(3):
        (spare,) = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        os.kill(int(spare), signal.SIGKILL)
        until(lambda spare=spare: not Path(f"/proc/{spare}/fd/0").exists(), "it is still there")
        assert Client(launcher, "4").end() == 4 << 8
        until(lambda: launcher.machines() == 0, "no spare, or a machine too many")


def spare_of(launcher: LauncherProcess) -> int:
    (spare,) = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return int(spare)


def asked(launcher: LauncherProcess, *words: str) -> _socket.socket:
    """The connection over which a machine was asked for."""
    connection = launcher.connect()
    client.request(connection, list(words))
    return connection


@pytest.mark.parametrize("kill_first", [False, True])
def test_a_spare_that_is_killed_with_its_request_leaves_it_to_another(launcher, kill_first) -> None:
    """Whichever the launcher sees first, the request or the death of the child that it is for."""
    for number in range(3):
        spare = spare_of(launcher)
        os.kill(spare, signal.SIGSTOP)
        if kill_first:
            os.kill(launcher.pid, signal.SIGSTOP)
        one: list[Client] = []
        asking = threading.Thread(target=lambda one=one: one.append(Client(launcher, "tell", "stay", "0")))
        asking.start()
        if kill_first:
            os.kill(spare, signal.SIGKILL)
            os.kill(launcher.pid, signal.SIGCONT)
        else:
            time.sleep(0.1)
            assert not one, "nothing is told yet, for nobody has taken it"
            os.kill(spare, signal.SIGKILL)
        asking.join(DEADLINE)
        (machine,) = one
        told = machine.read().decode()
        assert told.count('"argv"') == 1 and f'"pid": {spare},' not in told
        until(lambda: launcher.machines() == 1, "not one machine and a spare")
        signal.pidfd_send_signal(machine.pidfd, signal.SIGTERM)
        assert machine.end() == signal.SIGTERM
        until(lambda: launcher.machines() == 0, f"{number}: something is left")


def test_a_machine_that_is_killed_at_once_is_not_made_again(launcher) -> None:
    one = Client(launcher, "write=1", "signal=9", "0")
    assert one.read() == b"here"
    output = os.dup(one.output)
    assert one.end() == signal.SIGKILL
    assert os.read(output, 100) == b"", "and no second one has written"
    os.close(output)


def test_spare_after_spare_is_killed(make) -> None:
    launcher = make("HAND_OVERS=1")
    spare = spare_of(launcher)
    os.kill(spare, signal.SIGSTOP)
    connection = asked(launcher, "4")
    time.sleep(0.1)
    os.kill(spare, signal.SIGKILL)
    assert connection.recv(100) == b"error no process could be made for the machine"
    connection.close()
    assert Client(launcher, "4").end() == 4 << 8


def test_a_launcher_that_ends_says_whether_there_is_a_machine(make) -> None:
    launcher = make("_LAST_WORD_SECONDS=0.1")
    spare = spare_of(launcher)
    os.kill(spare, signal.SIGSTOP)
    connection = asked(launcher, "4")
    time.sleep(0.1)
    assert launcher.close() == 0
    os.kill(spare, signal.SIGCONT)
    assert connection.recv(100) == b"", "there is none: nobody could have said so"
    connection.close()


def test_the_spare_ends_with_the_launcher(make) -> None:
    launcher = make()
    (spare,) = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.process.wait(DEADLINE)
    until(lambda: not Path(f"/proc/{spare}/fd/0").exists(), "the spare is still there")


def test_an_idle_launcher_ends(make) -> None:
    launcher = make(idle=0.3)
    one = Client(launcher, "stay", "0")
    assert one.read() == b"running"
    time.sleep(0.5)
    until(lambda: launcher.machines() == 1, "the other machine is gone, too")
    one.close()
    assert launcher.process.wait(DEADLINE) == 0


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.long)])
def test_machines_in_a_row_leave_nothing(launcher, count) -> None:
    def run(machines: int) -> None:
        for number in range(machines):
            words = ["0"] if number % 3 else ["signal=9", "0"]
            assert Client(launcher, *words).end() == (0 if number % 3 else 9)

    descriptors = launcher.descriptors()
    run(100)  # until the allocator has what it needs
    until(lambda: launcher.descriptors() == descriptors, "descriptors are left")
    resident = launcher.resident_kib()
    run(count)
    until(lambda: launcher.machines() == 0, "children are left")
    until(lambda: launcher.descriptors() == descriptors, "descriptors are left")
    # It grows by up to 100 KiB in the first thousands and then no more; an object for each machine would be at least 500.
    assert launcher.resident_kib() <= resident + 256
    assert len(os.listdir(f"/proc/{launcher.pid}/task")) == 1


# -- the socket


def test_the_socket_is_this_users_alone_and_goes_with_the_launcher(tmp_path) -> None:
    path = bytes(tmp_path / "socket")
    bound = listening.bind(path)
    assert os.stat(path).st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="a launcher is running there already"):
        listening.bind(path)
    bound.remove()
    assert not os.path.exists(path)


def test_the_socket_of_a_killed_launcher_is_replaced(tmp_path) -> None:
    path = bytes(tmp_path / "socket")
    pid = os.fork()
    if pid == 0:
        listening.bind(path)
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.path.exists(path)
    bound = listening.bind(path)
    client.connect(path).close()
    bound.remove()


def test_nothing_but_a_socket_is_replaced(tmp_path) -> None:
    path = tmp_path / "socket"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="not a socket"):
        listening.bind(bytes(path))
    assert path.read_text() == "mine"


@pytest.mark.parametrize("path", [b"", b"/" + b"x" * 200, b"/nowhere/at/all"])
def test_impossible_paths(path) -> None:
    with pytest.raises(ConfigError, match="--socket"):
        listening.bind(path)


def test_where_the_socket_is(tmp_path, monkeypatch) -> None:
    fallback = b"/tmp/stratovirt-%d" % os.geteuid()
    environment: dict[bytes, bytes] = {}
    monkeypatch.setattr(wire.posix, "environ", environment)
    assert wire.default_socket() == (fallback + b"/stratovirt-launcher.sock", fallback)
    environment[b"XDG_RUNTIME_DIR"] = bytes(tmp_path)
    assert wire.default_socket() == (bytes(tmp_path) + b"/stratovirt-launcher.sock", b"")
    for useless in (b"relative", bytes(tmp_path) + b"/missing"):
        environment[b"XDG_RUNTIME_DIR"] = useless
        assert wire.default_socket()[1] == fallback


def test_a_directory_that_others_can_enter_is_not_trusted(tmp_path) -> None:
    private = tmp_path / "private"
    bound = listening.bind(bytes(private / "socket"), bytes(private))
    assert private.stat().st_mode & 0o777 == 0o700
    bound.remove()
    private.chmod(0o755)
    with pytest.raises(ConfigError, match="others have rights to it"):
        listening.bind(bytes(private / "socket"), bytes(private))
    link = tmp_path / "link"
    link.symlink_to(private)
    with pytest.raises(ConfigError, match="not a directory"):
        listening.bind(bytes(link / "socket"), bytes(link))


@pytest.mark.parametrize(("kind", "listens", "problem"), [
    ("SOCK_SEQPACKET", True, ""), ("SOCK_STREAM", True, "not a listening"), ("SOCK_SEQPACKET", False, "not a listening"),
])
def test_the_socket_that_systemd_hands_over(tmp_path, kind, listens, problem) -> None:
    code = f"""if 1:
        import os, socket, sys
        sys.path.insert(0, {str(SOURCE)!r})
        one = socket.socket(socket.AF_UNIX, socket.{kind})
        one.bind({str(tmp_path / "socket")!r})
        if {listens}: one.listen()
        os.dup2(one.fileno(), 3)
        os.environ["LISTEN_FDS"], os.environ["LISTEN_PID"] = "1", str(os.getpid())
        from stratovirt.errors import ConfigError
        from stratovirt.launcher import listening
        try:
            assert listening.from_systemd().socket.fileno() == 3
            assert "LISTEN_FDS" not in os.environ
        except ConfigError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-IS", "-c", code], capture_output=True, text=True, timeout=20)
    assert done.stderr == ""
    assert problem in done.stdout
    assert bool(problem) == bool(done.stdout)


@pytest.mark.parametrize(("arguments", "problem"), [
    (["--idle", "x"], "--idle x: not a number of seconds"), (["--idle"], "--idle: a value is missing"),
    (["--idle=99999999999"], "accepted: 0 to 31536000"), (["now"], "now: no such option"),
    (["--socket="], "a value is missing"),
])
def test_options_that_are_none(arguments, problem) -> None:
    with pytest.raises(ConfigError) as caught:
        command.parse(arguments)
    assert problem in str(caught.value)


def test_options() -> None:
    options = command.parse(["--socket", "/run/x", "--idle=5", "--daemonize"])
    assert (options.socket, options.idle, options.daemonize) == ("/run/x", 5, True)


# -- the client is small


def test_what_the_client_imports() -> None:
    code = f"import sys; before = set(sys.modules); sys.path.insert(0, {str(SOURCE)!r})\n" \
           "import stratovirt.__main__, stratovirt.launcher.client\n" \
           "print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-IS", "-c", code], capture_output=True, text=True, timeout=20)
    assert "stratovirt.launcher.client" in done.stdout.split()
    # all but our own are part of the interpreter
    ours = {"stratovirt", "stratovirt.__main__", "stratovirt.launcher", "stratovirt.launcher.client",
            "stratovirt.launcher.wire"}
    assert set(done.stdout.split()) <= {"__future__", "_signal", "_socket", "_struct", "gc"} | ours


def test_rights_are_counted_in_whole_descriptors() -> None:
    assert descriptors_of([(1, 1, struct.pack("i", 5) + b"x"), (1, 2, b"1234")]) == [5]


def test_a_signal_that_comes_before_the_machine_is_known_is_for_the_machine(tmp_path) -> None:
    """The guest may have said its first word, and somebody acted on it, before the client has the machine's pidfd."""
    path = tmp_path / "socket"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen()
    listener.settimeout(DEADLINE)
    code = f"import sys; sys.path.insert(0, {str(SOURCE)!r}); from stratovirt.launcher.client import main\n" \
           f"sys.exit(main([], {str(path)!r}))"
    machine = subprocess.Popen(["env", "--default-signal=HUP", "sleep", "60"])  # it is ignored below nohup
    with subprocess.Popen([sys.executable, "-IS", "-c", code]) as command, listener, listener.accept()[0] as connection:
        connection.settimeout(DEADLINE)
        connection.recv(wire.MAX_ANSWER)
        command.send_signal(signal.SIGHUP)
        pidfd = os.pidfd_open(machine.pid)
        socket.send_fds(connection, [b"pid"], [pidfd])
        os.close(pidfd)
        assert machine.wait(DEADLINE) == -signal.SIGHUP
        connection.send(b"ended 0")
        assert command.wait(DEADLINE) == 0
