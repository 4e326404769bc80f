"""From argv to a running guest by the shortest path, and out again.

    parse argv -> bind the QMP sockets -> build the machine -> start the vCPUs -> now the rest: QMP, the loop -> clean up

Everything imported at the top of a module on this path is paid for by every start; what a running guest does not need
to exist is imported after its first vCPU runs, or when it is used. This module and `bundle` do not come from the bundle, and
would have to find `__future__` in its own file.
"""

import gc
import posix
import sys
import time

_STARTED_AT = time.monotonic()

QMP_FLUSH_SECONDS = 1.0  # how long a client may take to read the last events
WARM = "--warm"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from stratovirt.config.vm import VmConfig
    from stratovirt.launcher.child import Attachment


def main() -> int:
    """The `stratovirt` command. Returns its exit status; a machine that has run ends the process itself."""
    argv = sys.argv[1:]
    if argv[:1] == [WARM] or (b"STRATOVIRT_LAUNCHER" in posix.environ and argv and argv[0][:1] == "-"):
        status = _run_in_launcher(argv)
        if status is not None:
            return status
        if argv[:1] == [WARM]:
            argv = argv[1:]
    elif argv[:1] == ["launcher"]:
        from stratovirt.launcher import command as launcher

        return launcher.main(argv[1:])
    elif argv[:1] in (["template"], ["clone"]):
        from stratovirt.launcher import clone_command, template_command

        return clone_command.main(argv[1:]) if argv[0] == "clone" else template_command.main(argv[1:])
    from stratovirt import bundle

    bundle.install()
    return start(argv, _STARTED_AT)


def _run_in_launcher(argv: list[str]) -> int | None:
    """As the user wishes, by word or variable. None: start without."""
    wish = posix.environ.get(b"STRATOVIRT_LAUNCHER", b"").decode(sys.getfilesystemencoding(), "surrogateescape")
    if argv[0] == WARM:
        argv = argv[1:]
        if argv and argv[0][:1] != "-":
            sys.stderr.write(f"stratovirt: {WARM} {argv[0]!a}: not an option of a machine "
                             f"(accepted: options, as in `stratovirt {WARM} -kernel FILE`; `stratovirt run {WARM}`)\n")
            return 1
        wish = wish if wish[:1] == "/" else "start"
    elif wish in ("", "off"):
        return None
    elif wish != "on" and wish[:1] != "/":
        sys.stderr.write(f"stratovirt: STRATOVIRT_LAUNCHER {wish!a}: neither a switch nor a path "
                         "(accepted: on, off, the path of a launcher's socket)\n")
        return 1
    from stratovirt.launcher import client

    return client.main(argv, wish)


def start(argv: list[str], started_at: float, attachment: "Attachment | None" = None) -> int:
    """Do what `argv` says in this process; `attachment` leads to the client that a launcher does it for.

    Returns the exit status; a machine that has run ends the process itself.
    """
    gc.disable()  # what is made until the guest runs stays; looking through it again and again takes a tenth of a start
    from stratovirt.cli import command
    from stratovirt.errors import StratoVirtError

    try:
        status = command.special(argv)
        if status is not None:
            return status
        return run(command.parse(argv), started_at, attachment)
    except StratoVirtError as error:
        sys.stderr.write(f"stratovirt: {error}\n")
        return 1


def run(config: "VmConfig", started_at: float = _STARTED_AT, attachment: "Attachment | None" = None) -> int:
    """Run the machine of `config` until it ends; the exit status. Raises: ConfigError and HostError when it cannot start."""
    from stratovirt import log
    from stratovirt.errors import StratoVirtError

    if config.log_file:
        log.LOG.open(config.log_file)
    report: Callable[[str], None] | None = None
    if config.daemonize:
        from stratovirt.process import daemonize

        if attachment is not None:
            attachment.release()
            attachment = None
        report = daemonize()
    try:
        status = _run_machine(config, report, started_at, attachment)
    except StratoVirtError as error:
        if config.log_file:
            log.error(str(error))
        if report is None:
            raise
        report(f"stratovirt: {error}\n")
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if attachment is not None:
        attachment.finish(status)
    posix._exit(status)  # no thread, file or mapping needs the interpreter's tear-down, which takes longer than a start


def _run_machine(config: "VmConfig", report: "Callable[[str], None] | None", started_at: float,
                 attachment: "Attachment | None") -> int:
    from stratovirt import bundle, log
    from stratovirt.loop import EventLoop
    from stratovirt.machine.microvm import MicroVm
    from stratovirt.process import PidFile, handle_signals

    loop = EventLoop()
    machine = MicroVm(config, loop, started_at, attachment.take_ahead() if attachment is not None else None)
    cleanup: list[Callable[[], None]] = [machine.close]

    def terminate(number: int) -> None:
        log.info(f"received signal {number}, ending")
        machine.shutdown(False, f"host-signal-{number}")

    def client_gone() -> None:
        log.info("the command that this machine was started by is gone, ending")
        machine.shutdown(False, "host-signal-1")

    handle_signals(loop, terminate)
    if attachment is not None:
        attachment.watch(loop, client_gone)
    try:
        if config.pidfile:
            cleanup.append(PidFile(config.pidfile).remove)
        listeners = []
        if config.qmp:
            config.directory = posix.getcwd()  # for whoever asks; later it may not be looked up
            from stratovirt.control.listener import QmpListener

            for qmp in config.qmp:
                listener = QmpListener(qmp)
                cleanup.append(listener.close)
                listener.bind()
                listeners.append(listener)
        machine.build()
        sandbox = None
        if config.seccomp:
            from stratovirt.lockdown import Lockdown

            sandbox = Lockdown(config, loop, attachment.sandbox if attachment is not None else None)
            machine.start(sandbox.confine)
        else:
            machine.start()
        gc.freeze()
        gc.enable()
        if report is not None:
            report("")
        if attachment is not None:
            attachment.started()
        for listener in listeners:
            listener.serve(machine)
        machine.close_behind()
        if attachment is not None:
            attachment.show_command_line()
        bundle.refresh()
        if sandbox is not None:
            sandbox.confine_main()
        pages = sys.modules.get("stratovirt.launcher.pages")  # in a launcher's child
        if pages is not None:
            pages.GiveBack(loop)
        loop.run()
        for listener in listeners:
            listener.flush(QMP_FLUSH_SECONDS)
        return machine.exit_status
    finally:
        for release in reversed(cleanup):
            release()


if __name__ == "__main__":
    sys.exit(main())
