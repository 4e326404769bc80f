"""The devices that every arm64 microVM has: a clock, and a serial port with the boot-time register in its page."""

from __future__ import annotations

from stratovirt.arch.aarch64 import layout
from stratovirt.devices.pl031 import Pl031
from stratovirt.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from stratovirt.address_map import AddressMap
    from stratovirt.backends.chardev import CharDevice
    from stratovirt.devices.pl011 import Pl011
    from stratovirt.machine.aarch64.processors import Wiring
    from stratovirt.memory import GuestMemory
    from stratovirt.snapshot.saved import Saved


class PlatformDevices:
    """Plugs them in. A guest asks KVM for power-off and reset (PSCI), not a device."""

    def __init__(self, ports: AddressMap, mmio: AddressMap, vm: Wiring, now: Callable[[], float],
                 on_reset: Callable[[], None], on_power_off: Callable[[], None]) -> None:
        self._mmio = mmio
        self._vm = vm
        self.rtc = Pl031(vm.create_level_line(layout.RTC_IRQ), now)
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

    def save(self) -> dict[str, object]:
        """What a snapshot would keep. Raises: HostError."""
        raise HostError("there are no snapshots of arm64 machines yet")

    def restore(self, state: Saved) -> None:
        """Raises: HostError."""
        raise HostError("there are no snapshots of arm64 machines yet")

    def tell_generation(self, memory: GuestMemory) -> None:
        """Raises: HostError."""
        raise HostError("there are no snapshots of arm64 machines yet")

    def reset(self) -> None:
        """All of them, as after power-on. Thread: main, while no vCPU runs."""
        self.rtc.reset()
        if self.serial is not None:
            self.serial.reset()


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
