"""The devices of a PC that every machine has, and its serial port."""

from __future__ import annotations

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

    def reset(self) -> None:
        """All of them, as after power-on. Thread: main, while no vCPU runs."""
        self.rtc.reset()
        if self.serial is not None:
            self.serial.reset()
