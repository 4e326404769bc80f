"""`stratovirt clone`: machines that go on from a template, each with an identity of its own.

    stratovirt clone web                        one, in the foreground: its console here, its exit status
    stratovirt clone web -n 10 -d               ten, in the background; a line for each, when its guest runs
    stratovirt clone web --name blue --mac 52:54:00:00:00:01 --tap tap7 --qmp unix:/run/blue.qmp

In the foreground signals are passed on, and whoever ends this command ends the machines.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import struct
import sys

from stratovirt.errors import ConfigError
from stratovirt.launcher import asking, client, wire
from stratovirt.launcher.asking import Parser

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    import signal as _signal
    from typing import Any
else:
    import _signal

MAX_COUNT = 1000
_START_SECONDS = 60
_FORWARDED = (_signal.SIGHUP, _signal.SIGINT, _signal.SIGQUIT, _signal.SIGTERM, _signal.SIGUSR1, _signal.SIGUSR2)


def main(arguments: list[str]) -> int:
    """The exit status."""
    return asking.told(lambda: _run(arguments))


def _parser() -> Parser:
    parser = Parser(prog="stratovirt clone", allow_abbrev=False, description="Start machines from a template: memory is shared "
                    "until it is written, disks that can be written are copies that end with their machine.")
    parser.add_argument("template", metavar="NAME", help="a template, see `stratovirt template list`")
    parser.add_argument("-n", "--count", default="1", metavar="N", help=f"how many (default 1, at most {MAX_COUNT})")
    parser.add_argument("--name", metavar="NAME", help="the clone's name (default NAME-%%d; %%d is its number, from 1 on)")
    parser.add_argument("--mac", action="append", default=[], metavar="MAC", help="of a network device, in order; may be "
                        "repeated. With -n the first of so many (default: at random)")
    parser.add_argument("--tap", action="append", default=[], metavar="TAP", help="of a -netdev, in order; may be repeated; "
                        "with -n a pattern such as tap%%d")
    parser.add_argument("--cid", metavar="CID", help="of the vsock device; with -n the first of so many (default: the first "
                        "free)")
    parser.add_argument("--qmp", action="append", default=[], metavar="ADDRESS", help="unix:PATH or tcp:HOST:PORT; with -n a "
                        "pattern such as unix:/run/web%%d.qmp")
    parser.add_argument("-d", "--detach", action="store_true", help="return as soon as the guests run, and let them run")
    asking.add_socket(parser)
    return parser


def _run(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    count = int(options.count) if options.count.isascii() and options.count.isdigit() and len(options.count) < 6 else 0
    if not 1 <= count <= MAX_COUNT:
        raise ConfigError("not a number of clones", option="clone -n", value=options.count, accepted=f"1 to {MAX_COUNT}")
    requests = [words(options, number, count) for number in range(count)]
    if count > 1 or options.detach:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)  # one terminal cannot be the input of several
        os.close(null)
    clones: list[Clone] = []
    try:
        for each in requests:
            clones.append(Clone(options, each))
        if options.detach:
            return _see_them_run(clones)
        _pass_signals_on(clones)
        return _await_ends(clones)
    finally:
        for clone in clones:
            clone.close()


def words(options: argparse.Namespace, number: int, count: int) -> list[str]:
    """The request for one of `count`. Raises: ConfigError."""
    asked = [options.template]
    if count > 1:
        for option, values in (("--name", [options.name] if options.name is not None else []), ("--tap", options.tap),
                               ("--qmp", options.qmp)):
            for value in values:
                if "%d" not in value:
                    raise ConfigError(f"{count} clones cannot have the same", option=f"clone {option}", value=value,
                                      accepted="a pattern with %d for the clone's number")
    if options.name is not None:
        asked.append(f"name={options.name}")
    if options.mac:
        asked.append(f"mac={','.join(_counted_mac(mac, number) for mac in options.mac)}")
    if options.tap:
        asked.append(f"tap={','.join(options.tap)}")
    if options.cid is not None:
        cid = options.cid
        asked.append(f"cid={int(cid) + number if cid.isascii() and cid.isdigit() and len(cid) < 11 else cid}")
    asked += [f"qmp={_absolute(address)}" for address in options.qmp]
    if options.detach:
        asked.append("detach=1")
    return asked


def _counted_mac(mac: str, number: int) -> str:
    """`number` addresses further; what is no address goes on as it is, to be refused."""
    digits = mac.replace(":", "")
    if len(digits) != 12 or not number or not all(digit in "0123456789abcdefABCDEF" for digit in digits):
        return mac
    text = f"{(int(digits, 16) + number) & (1 << 48) - 1:012x}"
    return ":".join(text[at : at + 2] for at in range(0, 12, 2))


def _absolute(address: str) -> str:
    """A clone is not started in this directory."""
    scheme, colon, path = address.partition(":")
    return f"unix:{os.path.abspath(path)}" if colon and scheme == "unix" and path else address


class Clone:
    """One that was asked for. Raises: client.Trouble when the launcher refuses it."""

    def __init__(self, options: argparse.Namespace, request: list[str]) -> None:
        self.own: dict[str, Any] = {}
        self.pid = 0
        self.pidfd = -1
        self.status: int | None = None  # a wait status
        self.runs = False
        self.connection: _socket.socket = asking.connect(options)
        try:
            client.request(self.connection, request, b"clone")
            while not self.pid:
                self.hear()
        except BaseException:
            self.close()
            raise

    def hear(self) -> bool:
        """One message. False: there will be no more."""
        try:
            data, rights, _, _ = self.connection.recvmsg(wire.MAX_DONE, 64, 0x40000000)  # MSG_CMSG_CLOEXEC
        except BlockingIOError as error:
            raise client.Trouble("the launcher, or the machine, does not answer") from error
        except ConnectionResetError:
            data, rights = b"", []
        kind, _, text = data.partition(b" ")
        if kind == b"error":
            raise client.Trouble(text.decode("utf-8", "replace"))
        if kind == b"clone":
            self.own = json.loads(text)
        elif kind == b"pid" and rights:
            self.pid = int(text)
            (self.pidfd,) = struct.unpack("i", rights[0][2][:4])
        elif kind == b"running":
            self.runs = True
        elif kind == b"status":
            self.status = int(text) << 8
        elif kind == b"ended":
            self.status = int(text)
            return False
        elif not data:
            if not self.pid:
                raise client.Trouble("the launcher went away without an answer")
            return False
        return True

    def signal(self, number: int) -> None:
        try:
            _signal.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            pass  # it has ended, and we are about to hear how

    def close(self) -> None:
        self.connection.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def _see_them_run(clones: list[Clone]) -> int:
    failed = 0
    for clone in clones:
        client.set_timeouts(clone.connection, _START_SECONDS)
        while not clone.runs and clone.hear():
            pass
        if clone.runs:
            sys.stdout.write(describe(clone) + "\n")
            sys.stdout.flush()
        else:
            failed = 1  # and the machine has said why
    return failed


def describe(clone: Clone) -> str:
    """One line for people and scripts."""
    own = clone.own
    line = f"{own['name']} pid={clone.pid}"
    for key in ("mac", "tap", "qmp"):
        if own[key]:
            line += f" {key}={','.join(own[key])}"
    return line + (f" cid={own['cid']}" if own["cid"] else "")


def _pass_signals_on(clones: list[Clone]) -> None:
    def forward(number: int, _frame: object) -> None:
        for clone in clones:
            clone.signal(number)

    for number in _FORWARDED:
        _signal.signal(number, forward)


def _await_ends(clones: list[Clone]) -> int:
    """0 when all have ended well; else the exit status of the first that has not."""
    poll = select.poll()
    by_fd = {clone.connection.fileno(): clone for clone in clones}
    for fd, clone in by_fd.items():
        client.set_timeouts(clone.connection, 0)
        poll.register(fd, select.POLLIN)
    result = 0
    while by_fd:
        for fd, _events in poll.poll():
            clone = by_fd[fd]
            if clone.hear():
                continue
            poll.unregister(fd)
            del by_fd[fd]
            if clone.status is None:
                raise client.Trouble(f"{clone.own['name']} has ended, and the launcher, which would know how, has ended "
                                     "before it")
            result = result or _exit_status(clone.status)
    return result


def _exit_status(status: int) -> int:
    return 128 + (status & 0x7F) if status & 0x7F else status >> 8
