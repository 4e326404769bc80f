"""From argv to a running guest by the shortest path, and out again.

    parse argv -> bind the QMP sockets -> build the machine -> start the vCPUs -> now the rest: QMP, the loop -> clean up

Everything imported at the top of a module on this path is paid for by every start; what a running guest does not need
to exist is imported after its first vCPU runs, or when it is used.
"""

from __future__ import annotations

import gc
import os
import sys
import time

_STARTED_AT = time.monotonic()

QMP_FLUSH_SECONDS = 1.0  # how long a client may take to read the last events

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from stratovirt.config.vm import VmConfig


def main() -> int:
    """The `stratovirt` command. Returns its exit status; a machine that has run ends the process itself."""
    gc.disable()  # what is made until the guest runs stays; looking through it again and again takes a tenth of a start
    from stratovirt.cli import command
    from stratovirt.errors import StratoVirtError

    argv = sys.argv[1:]
    try:
        status = command.special(argv)
        if status is not None:
            return status
        return run(command.parse(argv))
    except StratoVirtError as error:
        sys.stderr.write(f"stratovirt: {error}\n")
        return 1


def run(config: VmConfig) -> int:
    """Run the machine of `config` until it ends; the exit status. Raises: ConfigError and HostError when it cannot start."""
    from stratovirt import log
    from stratovirt.errors import StratoVirtError

    if config.log_file:
        log.LOG.open(config.log_file)
    report: Callable[[str], None] | None = None
    if config.daemonize:
        from stratovirt.process import daemonize

        report = daemonize()
    try:
        status = _run_machine(config, report)
    except StratoVirtError as error:
        if config.log_file:
            log.error(str(error))
        if report is None:
            raise
        report(f"stratovirt: {error}\n")
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # no thread, file or mapping needs the interpreter's tear-down, which takes longer than a start


def _run_machine(config: VmConfig, report: Callable[[str], None] | None) -> int:
    from stratovirt import log
    from stratovirt.loop import EventLoop
    from stratovirt.machine.microvm import MicroVm
    from stratovirt.process import PidFile, handle_signals

    loop = EventLoop()
    machine = MicroVm(config, loop, _STARTED_AT)
    cleanup: list[Callable[[], None]] = [machine.close]

    def terminate(number: int) -> None:
        log.info(f"received signal {number}, ending")
        machine.shutdown(False, f"host-signal-{number}")

    handle_signals(loop, terminate)
    try:
        if config.pidfile:
            cleanup.append(PidFile(config.pidfile).remove)
        listeners = []
        if config.qmp:
            from stratovirt.control.listener import QmpListener

            for qmp in config.qmp:
                listener = QmpListener(qmp)
                cleanup.append(listener.close)
                listener.bind()
                listeners.append(listener)
        machine.build()
        machine.start()
        gc.freeze()
        gc.enable()
        if report is not None:
            report("")
        for listener in listeners:
            listener.serve(machine)
        loop.run()
        for listener in listeners:
            listener.flush(QMP_FLUSH_SECONDS)
        machine.close_behind()
        return machine.exit_status
    finally:
        for release in reversed(cleanup):
            release()


if __name__ == "__main__":
    sys.exit(main())
