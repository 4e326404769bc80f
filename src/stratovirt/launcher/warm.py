"""What a launcher imports before it serves: all that a machine may need, so that children share it and load nothing.

What every start needs comes first: so it lies together, and what it writes to are fewer pages of a child's own.
"""

from __future__ import annotations

import importlib
import os
import pkgutil

import stratovirt

_FIRST = ("stratovirt.__main__", "stratovirt.cli.command", "stratovirt.log", "stratovirt.process", "stratovirt.loop",
          "stratovirt.machine.microvm", "stratovirt.loader.elf", "stratovirt.lockdown", "stratovirt.sandbox.kernel")
# Tools for people, what runs no guest, and what is the launcher's own.
_LEFT_OUT = (
    "stratovirt.cli.doctor", "stratovirt.cli.guest_console", "stratovirt.cli.reference", "stratovirt.cli.run",
    "stratovirt.control.reference", "stratovirt.hypervisor.test_accel", "stratovirt.launcher", "stratovirt.machine.probe",
    "stratovirt.native._native",  # `stratovirt.native` imports it, if it fits
    "stratovirt.sandbox.generate", "stratovirt.sandbox.report",
)
_OTHER_ARCHITECTURE = "x86_64" if os.uname().machine == "aarch64" else "aarch64"


def warm_up() -> list[str]:
    """Import them; their names."""
    done = []
    for name in (*_FIRST, *(found.name for found in pkgutil.walk_packages(stratovirt.__path__, "stratovirt."))):
        if not name.startswith(_LEFT_OUT) and _OTHER_ARCHITECTURE not in name:
            importlib.import_module(name)
            done.append(name)
    return done
