"""The devices that every arm64 microVM has: a clock, and a serial port with the boot-time register in its page."""

from __future__ import annotations

from stratovirt.arch.aarch64 import layout
from stratovirt.devices.pl031 import Pl031

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from stratovirt.address_map import AddressMap
    from stratovirt.backends.chardev import CharDevice
    from stratovirt.devices.pl011 import Pl011
    from stratovirt.loop import EventLoop, Timer
    from stratovirt.machine.aarch64.processors import Wiring


class PlatformDevices:
    """Plugs them in. A guest asks KVM for power-off and reset (PSCI), not a device. The clock's alarm is a timer of `loop`."""

    def __init__(self, ports: AddressMap, mmio: AddressMap, vm: Wiring, now: Callable[[], float], loop: EventLoop,
                 on_reset: Callable[[], None], on_power_off: Callable[[], None]) -> None:
        self._mmio = mmio
        self._vm = vm
        alarm = Alarm(loop)
        self.rtc = Pl031(vm.create_level_line(layout.RTC_IRQ), now, alarm.set)
        alarm.check = self.rtc.check_alarm
        self.serial: Pl011 | None = None
        mmio.claim(layout.RTC, layout.RTC_SIZE, self.rtc)

    def plug_serial(self, chardev: CharDevice, on_boot_time: Callable[[int], None]) -> None:
        """The first serial port, and where guests measure their boot."""
        from stratovirt.devices.pl011 import Pl011

        self.serial = Pl011(self._vm.create_level_line(layout.SERIAL_IRQ), chardev)
        boot_time = BootTime(on_boot_time)
        behind = layout.BOOT_TIME + BootTime.SIZE
        self._mmio.claim(layout.SERIAL, layout.BOOT_TIME - layout.SERIAL, self.serial)
        self._mmio.claim(layout.BOOT_TIME, BootTime.SIZE, boot_time)
        self._mmio.claim(behind, layout.SERIAL + layout.SERIAL_SIZE - behind, Shifted(self.serial, behind - layout.SERIAL))

    def reset(self) -> None:
        """All of them, as after power-on. Thread: main, while no vCPU runs."""
        self.rtc.reset()
        if self.serial is not None:
            self.serial.reset()


class Alarm:
    """A time that is set on any thread, after which `check` is called on the loop's. A new one takes the place of the old."""

    def __init__(self, loop: EventLoop) -> None:
        self.check: Callable[[], None] = lambda: None
        self._loop = loop
        self._timer: Timer | None = None
        self._wait = 0.0
        self._asked = False

    def set(self, seconds: float) -> None:
        """Thread: any. However often a guest does this, the loop has one call of it to make."""
        self._wait = seconds
        if not self._asked:
            self._asked = True
            self._loop.call_soon(self._arm)

    def _arm(self) -> None:
        self._asked = False  # before the time is read: whoever sets another now asks again
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(self._wait, self.check)


class BootTime:
    """A write-only register: guests that measure themselves write 1 when the kernel starts and 2 when the boot is complete."""

    SIZE = 0x10

    def __init__(self, on_boot_time: Callable[[int], None]) -> None:
        self._on_boot_time = on_boot_time

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0:
            self._on_boot_time(value & 0xFF)


class Shifted:
    """The registers of a device from `first` on: the serial port's page goes on behind the boot-time register."""

    def __init__(self, device: Pl011, first: int) -> None:
        self._device = device
        self._first = first

    def read(self, offset: int, size: int) -> int:
        return self._device.read(self._first + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._device.write(self._first + offset, size, value)
