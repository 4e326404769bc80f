"""The way into the sandbox: what a thread still needs from the file system is fetched, then its filter is installed.

A vCPU's thread confines itself before the guest's first instruction, an iothread before its loop, the main thread when QMP is
served, before its loop. From then on no code can be loaded from shared objects, and only the main thread opens files. So
modules that others import late, when a disk needs its engine for example, are imported before.
"""

from __future__ import annotations

import sys

from stratovirt import log
from stratovirt.errors import HostError
from stratovirt.sandbox import IOTHREAD, MAIN
from stratovirt.sandbox.kernel import Sandbox

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.config.vm import VmConfig
    from stratovirt.loop import EventLoop

# What disks import late. Their first import asks for more than a filter allows: the machine's name, a shared object.
DISK_MODULES = (
    "stratovirt.backends.aio", "stratovirt.backends.aio_native", "stratovirt.backends.aio_uring",
    "stratovirt.backends.block_holes", "stratovirt.backends.block_rate",
)


class Lockdown:
    """One process's sandbox. `loop` is the main thread's. `made` comes from `make_sandbox`, in this process; for another
    configuration it may not do.

    Thread: the main thread, before it starts others. Raises: HostError when the host cannot do it.
    """

    def __init__(self, config: VmConfig, loop: EventLoop, made: Sandbox | None = None) -> None:
        barrier = sys.modules.get("stratovirt.barrier")  # which came with the first virtio device, where there are barriers
        if barrier is not None and barrier.uses_system_call:
            raise HostError("this host forbids pages of machine code, so rings are ordered by membarrier(2), which no filter "
                            "allows", 0, "-disable-seccomp runs the machine without filters")
        self._has_disks = bool(config.drives or config.qmp)  # a QMP client may plug one in
        if made is not None and made.grants == _grants(config):
            made.move_log(log.LOG.fd)
        else:
            made = make_sandbox(config)
        self._sandbox = made
        made.begin()
        # Threads that are confined before this one may have something to tell.
        log.LOG.rotate_through(loop.call_soon, self._sandbox.move_log)

    def confine(self, kind: int) -> None:
        """Confine the calling thread, which is new. Raises: HostError."""
        if kind == IOTHREAD and self._has_disks:
            self._fetch()
        self._sandbox.confine(kind)

    def confine_main(self) -> None:
        """Confine the main thread, whose loop is about to run. Raises: HostError."""
        if self._has_disks:
            self._fetch()
        sys.dont_write_bytecode = True  # a module that is imported late leaves no file behind
        self._sandbox.confine(MAIN)

    def _fetch(self) -> None:
        for name in DISK_MODULES:
            __import__(name)


def make_sandbox(config: VmConfig) -> Sandbox:
    """What a machine of `config` is confined by, later. Raises: HostError."""
    return Sandbox(log.LOG.fd, *_grants(config))


def _grants(config: VmConfig) -> tuple[bool, bool]:
    return any(drive.aio == "io_uring" for drive in config.drives.values()), bool(config.vhost_users)
