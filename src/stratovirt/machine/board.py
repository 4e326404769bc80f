"""The architecture that this program's machines have: that of the host, for KVM runs nothing else.

The rest of `machine/` takes what differs from here. `x86_64/` and `aarch64/` have the same names in them.
"""

from __future__ import annotations

from stratovirt.hostmap import ARCHITECTURE

TYPE_CHECKING = False

if TYPE_CHECKING or ARCHITECTURE != "aarch64":
    from stratovirt.arch.x86_64 import layout
    from stratovirt.machine.x86_64.boot import Boot
    from stratovirt.machine.x86_64.platform import PlatformDevices
    from stratovirt.machine.x86_64.processors import Processors
else:
    from stratovirt.arch.aarch64 import layout
    from stratovirt.machine.aarch64.boot import Boot
    from stratovirt.machine.aarch64.platform import PlatformDevices
    from stratovirt.machine.aarch64.processors import Processors

__all__ = ["ARCHITECTURE", "Boot", "PlatformDevices", "Processors", "layout"]
