"""The virtio-mmio slots of a microVM: which device sits where, and how it is wired to KVM.

Slots 0-3 are for disks, 4 and 5 for network interfaces, 6-10 for everything else and for what finds its own kind full;
devices take them in the order of the command line.
"""

from __future__ import annotations

from stratovirt import log
from stratovirt.arch.x86_64 import layout
from stratovirt.backends.block import RawImage
from stratovirt.errors import ConfigError, GuestError, HostError
from stratovirt.loop import READ, EventLoop
from stratovirt.virtio.block import VirtioBlock
from stratovirt.virtio.mmio import QUEUE_NOTIFY, VirtioMmio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from stratovirt.address_map import AddressMap
    from stratovirt.arch.x86_64.layout import Slot
    from stratovirt.config.vm import DeviceConfig, VmConfig
    from stratovirt.hypervisor.kvm.vm import KvmVm
    from stratovirt.memory import GuestMemory
    from stratovirt.virtio.device import VirtioDevice

_BLOCK_SLOTS = range(4)
_OTHER_SLOTS = range(6, layout.VIRTIO_SLOTS)


class OccupiedSlot:
    """A device in its slot."""

    __slots__ = ("device", "id", "slot", "transport")

    def __init__(self, id: str, slot: Slot, device: VirtioDevice, transport: VirtioMmio) -> None:
        self.id = id
        self.slot = slot
        self.device = device
        self.transport = transport


def assign_slots(devices: list[DeviceConfig]) -> list[Slot]:
    """The slot of each device, in order. Raises: ConfigError when there are more than slots."""
    free = list(range(layout.VIRTIO_SLOTS))
    chosen: list[Slot] = []
    for device in devices:
        own = _BLOCK_SLOTS if device.driver == "virtio-blk-device" else _OTHER_SLOTS
        fitting = [number for number in (*own, *_OTHER_SLOTS) if number in free]
        if not fitting:
            raise ConfigError("no virtio-mmio slot is left", option="-device", value=f"{device.driver},id={device.id}",
                              accepted=f"at most {len(_BLOCK_SLOTS) + len(_OTHER_SLOTS)} disks, "
                              f"at most {len(_OTHER_SLOTS)} of all other devices")
        free.remove(fitting[0])
        chosen.append(layout.slot(fitting[0]))
    return chosen


def create_device(config: VmConfig, device: DeviceConfig, loop: EventLoop) -> VirtioDevice:
    """The device that `device` describes, with its back end open. Raises: ConfigError."""
    options = device.options

    def report(error: HostError) -> None:
        log.guest_warn(device.id, str(error))

    if device.driver == "virtio-blk-device":
        image = RawImage(config.drives[options.string("drive")])
        return VirtioBlock(image, options.integer("queue-size"), options.optional_string("serial") or "", report)
    if device.driver == "virtio-rng-device":
        from stratovirt.backends.rng import RandomSource
        from stratovirt.virtio.rng import VirtioRng

        source = RandomSource(config.rng_backends[options.string("rng")])
        max_bytes, period = options.optional_integer("max-bytes"), options.optional_integer("period")
        rate = max_bytes * 1000 / period if max_bytes is not None and period is not None else None
        return VirtioRng(source, loop, rate, report)
    raise ConfigError("not supported yet", option="-device", value=device.driver,
                      accepted="virtio-blk-device, virtio-rng-device")


def plug(device: VirtioDevice, id: str, slot: Slot, vm: KvmVm, memory: GuestMemory, mmio: AddressMap,
         loop: EventLoop) -> OccupiedSlot:
    """Wire a device into its slot: registers in both windows, one interrupt, an ioeventfd for each queue and window."""

    def report(error: GuestError) -> None:
        log.guest_warn(id, str(error))

    transport = VirtioMmio(device, memory, vm.create_irqfd(slot.irq), report)
    for window, base in zip(transport.windows, (slot.base, slot.acpi_base), strict=True):
        mmio.claim(base, layout.VIRTIO_MMIO_SIZE, window)
        for index, fd in enumerate(transport.notify_fds):
            vm.add_ioeventfd(fd, base + QUEUE_NOTIFY, 4, index)
    for index, fd in enumerate(transport.notify_fds):
        loop.add(fd, READ, _notifier(transport, index))
    return OccupiedSlot(id, slot, device, transport)


def _notifier(transport: VirtioMmio, index: int) -> Callable[[int], None]:
    return lambda _events: transport.on_notify(index)
