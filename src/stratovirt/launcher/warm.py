"""What a launcher imports before it serves: all that a machine may need, so that children share it and load nothing."""

from __future__ import annotations

import importlib
import pkgutil

import stratovirt

# Tools for people, what runs no guest, and what is the launcher's own.
_LEFT_OUT = (
    "stratovirt.cli.doctor", "stratovirt.cli.guest_console", "stratovirt.cli.reference", "stratovirt.cli.run",
    "stratovirt.control.reference", "stratovirt.hypervisor.test_accel", "stratovirt.launcher", "stratovirt.machine.probe",
    "stratovirt.sandbox.generate", "stratovirt.sandbox.report",
)


def warm_up() -> list[str]:
    """Import them; their names."""
    done = []
    import stratovirt.__main__, stratovirt.launcher.server
    from stratovirt.cli import command
    from stratovirt import log, process, loop
    from stratovirt.machine.microvm import MicroVm
    import stratovirt.loader.elf
    for found in pkgutil.walk_packages(stratovirt.__path__, "stratovirt."):
        if not found.name.startswith(_LEFT_OUT):
            importlib.import_module(found.name)
            done.append(found.name)
    return done
