"""Goes through a start step by step and reports the time at each border: where the time of a start goes.

Started with a bare interpreter; arguments: the source directory, a file descriptor, then those of `stratovirt`. What it
writes to the descriptor: a line for each phase when it ends, its name, a tab and CLOCK_MONOTONIC in ns. Only functions
that a start calls once are wrapped, and the writing takes a few microseconds a phase.
"""

from __future__ import annotations

import sys
import time

_BEGAN = time.monotonic_ns()

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Borders:
    """Writes down when phases end."""

    def __init__(self, fd: int) -> None:
        import posix

        self._fd = fd
        self._write = posix.write
        self._seen: set[str] = set()

    def note(self, phase: str, at: int = 0) -> None:
        self._write(self._fd, f"{phase}\t{at or time.monotonic_ns()}\n".encode())

    def after(self, owner: object, name: str, phase: str) -> None:
        """The phase ends when this function returns."""
        function: Callable[..., object] = getattr(owner, name)

        def wrapped(*arguments: object, **named: object) -> object:
            result = function(*arguments, **named)
            self.note(phase)
            return result

        setattr(owner, name, wrapped)

    def before_first(self, owner: object, name: str, phase: str) -> None:
        """The phase ends when this function is called for the first time."""
        function: Callable[..., object] = getattr(owner, name)

        def wrapped(*arguments: object) -> object:
            if phase not in self._seen:
                self._seen.add(phase)
                self.note(phase)
            return function(*arguments)

        setattr(owner, name, wrapped)


def main() -> None:
    source, fd, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    borders = Borders(fd)
    borders.note("exec and interpreter", _BEGAN)
    sys.path.insert(0, source)
    import gc

    gc.disable()  # as the program does
    from stratovirt import __main__ as program
    from stratovirt import bundle

    bundle.install()  # as the program does
    from stratovirt.cli import command

    borders.note("import the command line")
    if command.special(arguments) is not None:
        raise SystemExit("phases: these arguments do not start a machine")
    config = command.parse(arguments)
    borders.note("parse")
    import os

    import stratovirt.loop
    import stratovirt.process  # one of those that the program imports now
    from stratovirt.address_map import AddressMap
    from stratovirt.hypervisor.kvm.vm import KvmVm
    from stratovirt.machine import board, boot, kvm, microvm, vcpus
    from stratovirt.machine.x86_64 import processors

    borders.note("import the machine")
    borders.after(kvm, "KvmSystem", "open /dev/kvm")
    borders.after(processors, "KvmVm", "create the VM")
    borders.after(microvm.MicroVm, "_create_memory", "map and register memory")
    borders.after(KvmVm, "create_timer", "interrupt chips and timer")
    borders.after(boot.Boot, "__init__", "identify kernel and initrd")
    borders.after(boot.Boot, "load", "load them, write tables")
    borders.after(microvm.MicroVm, "_plug_platform", "devices")
    borders.after(processors, "create_vcpus", "vCPUs")
    borders.after(board.Boot, "enter", "registers")
    borders.before_first(vcpus, "run_loop", "start the first thread")
    borders.before_first(AddressMap, "write", "to the guest's first write")
    borders.after(stratovirt.loop.EventLoop, "run", "to the guest's end")
    borders.after(microvm.MicroVm, "close", "stop vCPUs, close")
    leave = os._exit

    def last(status: int) -> None:
        borders.note("rest of the program")
        leave(status)

    os._exit = last  # type: ignore[assignment]
    program.run(config)


if __name__ == "__main__":
    main()
