"""The devices of a PC that every machine has, and its serial port."""

from __future__ import annotations

import posix

from stratovirt.arch.x86_64 import layout
from stratovirt.devices.cmos_rtc import CmosRtc
from stratovirt.devices.i8042 import I8042
from stratovirt.devices.sleep_control import SleepControl

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from stratovirt.address_map import AddressMap
    from stratovirt.backends.chardev import CharDevice
    from stratovirt.devices.serial import Serial
    from stratovirt.loop import EventLoop
    from stratovirt.machine.kvm import Wiring
    from stratovirt.memory import GuestMemory
    from stratovirt.snapshot.saved import Saved

_CMOS_PORT, _KEYBOARD_DATA_PORT = 0x70, 0x60


class PlatformDevices:
    """Plugs them in. `on_reset` and `on_power_off` hear of it when the guest asks for that, on a vCPU's thread.

    `loop` is not needed: this clock has no alarm.
    """

    def __init__(self, ports: AddressMap, mmio: AddressMap, vm: Wiring, now: Callable[[], float], loop: EventLoop,
                 on_reset: Callable[[], None], on_power_off: Callable[[], None]) -> None:
        self._ports = ports
        self._vm = vm
        self.rtc = CmosRtc(now)
        self.serial: Serial | None = None
        ports.claim(_CMOS_PORT, 2, self.rtc)
        ports.claim(_KEYBOARD_DATA_PORT, 1, I8042(False, on_reset))
        ports.claim(layout.KEYBOARD_CONTROLLER_PORT, 1, I8042(True, on_reset))
        ports.claim(layout.SLEEP_CONTROL_PORT, 2, SleepControl(on_power_off))

    def plug_serial(self, chardev: CharDevice, on_boot_time: Callable[[int], None]) -> None:
        """The first serial port; its scratch register is also what guests measure their boot with."""
        from stratovirt.devices.serial import Serial

        self.serial = Serial(self._vm.create_irqfd(layout.SERIAL_IRQ), chardev, on_boot_time)
        self._ports.claim(layout.SERIAL_PORT, layout.SERIAL_PORTS, self.serial)

    def save(self) -> dict[str, object]:
        """What a snapshot keeps of them. Call it while no vCPU runs."""
        return {"rtc": self.rtc.save(), "serial": self.serial.save() if self.serial is not None else None}

    def restore(self, state: Saved) -> None:
        """Raises: SnapshotError."""
        self.rtc.restore(state.section("rtc"))
        serial = state.optional_section("serial")
        if (serial is None) != (self.serial is None):
            raise state.error("serial", "the machine had " + ("none, and now has -serial" if serial is None else "one"))
        if serial is not None and self.serial is not None:
            self.serial.restore(serial)
        state.end()

    def tell_generation(self, memory: GuestMemory) -> None:
        """The guest is another one than it was: it gets a new generation ID, and an interrupt that says so."""
        memory.write(layout.GENERATION_ID, posix.urandom(16))
        self._vm.create_irqfd(layout.GENERATION_IRQ).trigger()

    def reset(self) -> None:
        """All of them, as after power-on. Thread: main, while no vCPU runs."""
        self.rtc.reset()
        if self.serial is not None:
            self.serial.reset()
