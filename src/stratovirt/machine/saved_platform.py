"""The devices that every machine has, in a snapshot: clock and serial port, of whichever kind, and the generation ID.

Only snapshots import this. Thread: the main loop's, while no vCPU runs.
"""

from __future__ import annotations

import posix

from stratovirt.machine.board import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from stratovirt.machine.kvm import Wiring
    from stratovirt.memory import GuestMemory
    from stratovirt.snapshot.saved import Saved

    class Device(Protocol):
        def save(self) -> dict[str, object]: ...

        def restore(self, state: Saved) -> None: ...

    class Platform(Protocol):
        """`PlatformDevices` of either architecture."""

        @property
        def rtc(self) -> Device: ...

        @property
        def serial(self) -> Device | None: ...

_GENERATION_SIZE = 16


def save(platform: Platform) -> dict[str, object]:
    return {"rtc": platform.rtc.save(), "serial": platform.serial.save() if platform.serial is not None else None}


def restore(platform: Platform, state: Saved) -> None:
    """Raises: SnapshotError."""
    platform.rtc.restore(state.section("rtc"))
    serial = state.optional_section("serial")
    if (serial is None) != (platform.serial is None):
        raise state.error("serial", "the machine had " + ("none, and now has -serial" if serial is None else "one"))
    if serial is not None and platform.serial is not None:
        platform.serial.restore(serial)
    state.end()


def tell_generation(vm: Wiring, memory: GuestMemory) -> None:
    """The guest is another one than it was: it gets a new generation ID, and an interrupt that says so. Raises: HostError."""
    memory.write(layout.GENERATION_ID, posix.urandom(_GENERATION_SIZE))
    vm.create_irqfd(layout.GENERATION_IRQ).trigger()
