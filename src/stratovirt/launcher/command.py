"""`stratovirt launcher`: the options, the warm-up, and the loop."""

from __future__ import annotations

import gc
import os
import resource
import sys
import time

from stratovirt import hostmap, log
from stratovirt.errors import ConfigError, StratoVirtError
from stratovirt.launcher import listening, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable

    from stratovirt.launcher.child import Attachment
    from stratovirt.machine.kvm import KvmAhead
    from stratovirt.sandbox.kernel import Sandbox
else:
    import _signal  # see process.py

_USAGE = """\
usage: stratovirt launcher [--socket PATH] [--idle SECONDS] [--daemonize]

A warm process of this user that starts machines for `stratovirt --warm` in a few milliseconds, until SIGTERM or SIGINT.

  --socket PATH    where to listen (default: stratovirt-launcher.sock in $XDG_RUNTIME_DIR, else in /tmp/stratovirt-UID);
                   a socket that systemd hands over (LISTEN_FDS) comes first
  --idle SECONDS   end after so long without a machine (default 0: never)
  --daemonize      go to the background once it listens
"""
_MAX_IDLE = 365 * 86400
_MOST_AHEAD = 16  # vCPUs of a machine that may never be asked for


class Options:
    """What was asked for."""

    def __init__(self) -> None:
        self.socket = ""
        self.idle = 0
        self.daemonize = False


def main(arguments: list[str]) -> int:
    """The exit status."""
    if any(word in ("-h", "-help", "--help") for word in arguments):
        sys.stdout.write(_USAGE)
        return 0
    report: Callable[[str], None] | None = None
    try:
        options = parse(arguments)
        socket = listening.from_systemd()
        _fill_standard_descriptors()
        # What else was inherited is not kept open for as long as a launcher lives: somebody may wait for its end.
        os.closerange(listening.SYSTEMD_FD + (socket is not None), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        if options.daemonize:
            from stratovirt.process import daemonize

            report = daemonize()
        if socket is None:
            path, directory = (os.fsencode(options.socket), b"") if options.socket else wire.default_socket()
            socket = listening.bind(path, directory)
        serve(socket, options.idle, report)
    except StratoVirtError as error:
        text = f"stratovirt launcher: {error}\n"
        if report is None:
            sys.stderr.write(text)
            return 1
        report(text)
        os._exit(1)
    return 0


def parse(arguments: list[str]) -> Options:
    """Raises: ConfigError."""
    options = Options()
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--socket", "--idle"):
            if not equals:
                value = next(words, "")
            if not value:
                raise ConfigError("a value is missing", option=name)
        elif word != "--daemonize":
            raise ConfigError("no such option", option=word, accepted="--socket PATH, --idle SECONDS, --daemonize")
        if name == "--socket":
            options.socket = value
        elif name == "--idle":
            if not (value.isascii() and value.isdigit() and len(value) < 10 and int(value) <= _MAX_IDLE):
                raise ConfigError("not a number of seconds", option=name, value=value, accepted=f"0 to {_MAX_IDLE}")
            options.idle = int(value)
        else:
            options.daemonize = True
    return options


def _fill_standard_descriptors() -> None:
    """0, 1 and 2 are open, so that nothing else gets these numbers, and the interpreter has files for them."""
    null = os.open(os.devnull, os.O_RDWR)
    while null <= 2:
        null = os.dup(null)
    os.close(null)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)


def serve(socket: listening.LauncherSocket, idle: float, report: Callable[[str], None] | None) -> None:
    """Until a signal, or until it has been idle for long enough. Raises: StratoVirtError."""
    from stratovirt.launcher import clone as _clone  # noqa: F401  # its children need it, and shall not have to import it
    from stratovirt.launcher import pages
    from stratovirt.launcher.practice import fill_gaps, practise, rehearse, settle
    from stratovirt.launcher.sample import FirstMachines
    from stratovirt.launcher.server import Launcher
    from stratovirt.launcher.templates import Templates, root_of
    from stratovirt.launcher.warm import warm_up
    from stratovirt.loop import EventLoop

    pages.keep_arenas()
    warm_up()
    practise()
    settle()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # one for each machine that runs
    os.chdir("/")
    loop = EventLoop()
    templates = Templates(root_of(os.fsdecode(socket.socket.getsockname())))
    templates.find()

    def end() -> None:
        socket.remove()
        loop.stop()

    kept = fill_gaps()
    places = pages.find()
    # Whatever is here now stays: a collection that looked through it would copy its pages in every child.
    gc.freeze()
    gc.disable()
    sharing = pages.Sharing(places)
    for number in (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP):
        _signal.signal(number, lambda _number, _frame: end())
    launcher = Launcher(loop, socket.socket, start_machine, soft, idle, end, rehearse, make_ahead, templates, serving=False)

    def begin() -> None:
        if report is not None:
            report("")  # while there is no child, which would keep the stderr of who started the daemon
        else:  # who comes from here on may have to wait for a moment
            log.info(f"listening at {os.fsdecode(socket.path) or 'the socket of systemd'}")
        hostmap.trim_heap()
        launcher.begin()

    hostmap.trim_heap()
    sharing.share()
    FirstMachines(launcher, loop, sharing, begin)
    loop.run()
    kept.clear()
    launcher.close()
    log.info("ending; machines run on")


def make_ahead(last: list[str]) -> tuple[KvmAhead | None, Sandbox | None]:
    """In the spare child; `last` is what the last machine was. The next often is of the same kind.

    None: the machine will say itself what is wrong with KVM or with the filters, if anything is by then.
    """
    from stratovirt.cli.command import parse
    from stratovirt.config.vm import VmConfig
    from stratovirt.launcher.clone import make_sandbox
    from stratovirt.machine.kvm import KvmAhead

    config = None
    if last:
        try:
            config = parse(last)
            if config.smp.cpus > _MOST_AHEAD:
                config = None
        except StratoVirtError as error:
            log.debug(f"nothing to go by: {error}")
    sandbox = make_sandbox(config or VmConfig())
    try:
        return KvmAhead(config), sandbox
    except StratoVirtError as error:
        log.debug(f"no VM ahead: {error}")
        return None, sandbox


def start_machine(arguments: list[str], attachment: Attachment) -> int:
    """In the child: what the `stratovirt` command does."""
    from stratovirt.__main__ import start

    log.LOG.level = log.level_from_name(os.environ.get("STRATOVIRT_LOG_LEVEL"))
    if not arguments or arguments[0][:1] != "-":
        sys.stderr.write("stratovirt: a launcher starts machines (accepted: options, as in `stratovirt --warm -kernel FILE`)\n")
        return 1
    return start(arguments, time.monotonic(), attachment)
