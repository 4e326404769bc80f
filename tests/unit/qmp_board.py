"""The replaceable slots of a machine without the machine: empty devices with drivers bound to them, under real commands."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

from stratovirt.backends.block import NoImage, RawImage
from stratovirt.backends.tap import NoTap, Tap
from stratovirt.config.schema import OptionValues
from stratovirt.config.vm import DeviceConfig, DriveConfig, VmConfig
from stratovirt.control.commands import COMMANDS
from stratovirt.control.descriptors import Descriptors
from stratovirt.control.protocol import ABSENT, QmpError, Request
from stratovirt.errors import StratoVirtError
from stratovirt.loop import EventLoop
from stratovirt.machine.drivers import BLOCK
from stratovirt.machine.events import EventHub
from stratovirt.machine.hotplug import HotPlug
from stratovirt.machine.slots import OccupiedSlot, empty_slots
from stratovirt.memory import GuestMemory
from stratovirt.virtio.block import VirtioBlock
from stratovirt.virtio.net import VirtioNet
from unit.virtio_devices import disk_content
from unit.virtio_driver import CONFIG, Driver, guest_memory

SECTOR = 512


class SocketTap(Tap):
    """The host's end of a pair of sockets in place of a tap."""

    def __init__(self, name: str) -> None:
        mine, self.other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        super().__init__(mine.detach(), name)
        self.closed = False

    def set_offload(self, flags: int) -> None:
        self.offload = flags

    def close(self) -> None:
        assert not self.closed
        self.closed = True
        super().close()
        self.other.close()


class Board:
    """The slots of a machine without the machine: six empty devices, each with a driver bound to it."""

    def __init__(self, folder: Path, root: bool = False, spare: bool = False, memory: Callable[[], GuestMemory] = guest_memory,
                 modest: bool = False, rx_loop: bool = False) -> None:
        self.folder = folder
        self.loop = EventLoop()
        self.rx_loop = EventLoop()
        self.interrupt_controller = ""
        self.config = VmConfig()
        self.hub = EventHub()
        self.events: list[tuple[str, object]] = []
        self.hub.subscribe(lambda name, data, _seconds, _microseconds: self.events.append((name, data)))
        self.drivers: list[Driver] = []
        slots: list[OccupiedSlot] = []
        for kind, slot in empty_slots([]):
            device = (VirtioBlock(NoImage(), loop=self.loop, modest=modest) if kind == BLOCK
                      else VirtioNet(NoTap(), bytes(6), self.loop, rx_loop=self.rx_loop if rx_loop else None))
            id = ""
            if root and slot.number == 0:
                drive = DriveConfig("rootfs", self.image("root", 4), direct=False)
                self.config.drives["rootfs"] = drive
                self.config.devices.append(DeviceConfig("virtio-blk-device", "blk0", OptionValues(
                    {"drive": "rootfs", "iothread": None})))
                device, id = VirtioBlock(RawImage(drive)), "blk0"
            driver = Driver(device, memory())
            self.drivers.append(driver)
            slots.append(OccupiedSlot(id, slot, device, driver.transport))
        if spare:
            self.config.drives["spare"] = DriveConfig("spare", self.image("spare", 6), direct=False)
        self.migration = "none"
        self.state, self.chardevs, self.iothreads, self.balloon = "running", {}, {}, None
        self.hotplug = HotPlug(self.config, slots, self.hub, {}, self.drivers[0].memory, self.loop)
        self.descriptors = Descriptors()

    def image(self, name: str, sectors: int = 8) -> str:
        path = self.folder / name
        path.write_bytes(disk_content(sectors))
        return str(path)

    def ask(self, command: str, **arguments: object) -> object:
        """The return value, which must be of the type that the command declares, or "class: description" of an error."""
        names = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            answer = COMMANDS.dispatch(self, Request(command, names, ABSENT), self.descriptors)
        except QmpError as error:
            return f"{error.error_class}: {error}"
        except StratoVirtError as error:
            return str(error)
        next(each for each in COMMANDS if each.name == command).returns.check(answer, command)
        return answer

    def blockdev_add(self, name: str, path: str, **more: object) -> object:
        return self.ask("blockdev-add", node_name=name, file={"driver": "file", "filename": path},
                        cache={"direct": False}, **more)

    def capacity(self, slot: int) -> int:
        return self.drivers[slot].read(CONFIG) | self.drivers[slot].read(CONFIG + 4) << 32

    def close(self) -> None:
        for driver in self.drivers:
            driver.close()
        self.loop.close()
        self.rx_loop.close()
