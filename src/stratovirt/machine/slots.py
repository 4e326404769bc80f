"""The virtio-mmio slots of a microVM: which device sits where, and how it is wired to KVM.

Slots 0-3 are for disks, 4 and 5 for network interfaces, 6-10 for everything else and for what finds its own kind full;
devices take them in the order of the command line. Slots 0 to 5 that are left over have an empty device
each when the machine has a QMP listener, for what is plugged in later (`machine/hotplug.py`).
"""

from __future__ import annotations

import posix

from stratovirt import log
from stratovirt.errors import ConfigError, GuestError
from stratovirt.loop import READ, EventLoop
from stratovirt.machine.board import layout
from stratovirt.machine.drivers import BLOCK, NET, slot_kind

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from stratovirt.address_map import AddressMap
    from stratovirt.arch.x86_64.layout import Slot
    from stratovirt.config.vm import DeviceConfig
    from stratovirt.machine.kvm import Wiring
    from stratovirt.memory import GuestMemory
    from stratovirt.virtio.device import VirtioDevice
    from stratovirt.virtio.mmio import VirtioMmio

_OTHER_SLOTS = range(6, layout.VIRTIO_SLOTS)
_SLOTS_OF_KIND = {BLOCK: range(4), NET: range(4, 6)}


class OccupiedSlot:
    """A device in its slot; `id` is "" while an empty device waits for something to be plugged in."""

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
        own = _SLOTS_OF_KIND.get(slot_kind(device), ())
        fitting = [number for number in (*own, *_OTHER_SLOTS) if number in free]
        if not fitting:
            raise ConfigError("no virtio-mmio slot is left", option="-device", value=f"{device.driver},id={device.id}",
                              accepted=f"{len(own)} of its kind, and {len(_OTHER_SLOTS)} of any kind beyond those")
        free.remove(fitting[0])
        chosen.append(layout.slot(fitting[0]))
    return chosen


def empty_slots(chosen: list[Slot]) -> list[tuple[str, Slot]]:
    """The replaceable slots beside `chosen`, each with the kind of device that belongs there."""
    taken = {slot.number for slot in chosen}
    return [(kind, layout.slot(number)) for kind, numbers in _SLOTS_OF_KIND.items()
            for number in numbers if number not in taken]


def plug(device: VirtioDevice, id: str, slot: Slot, vm: Wiring, memory: GuestMemory, mmio: AddressMap,
         loop: EventLoop) -> OccupiedSlot:
    """Wire a device into its slot: registers in its windows, one interrupt, an ioeventfd for each queue and window."""
    from stratovirt.virtio.mmio import INTERRUPT_ACK, INTERRUPT_USED, QUEUE_NOTIFY, VirtioMmio

    def report(error: GuestError) -> None:
        log.guest_warn(id or f"slot {slot.number}", str(error))

    transport = VirtioMmio(device, memory, vm.create_irqfd(slot.irq), report)
    for window, base in zip(transport.windows, slot.windows, strict=False):
        mmio.claim(base, layout.VIRTIO_MMIO_SIZE, window)
        for index, fd in enumerate(transport.notify_fds):
            vm.add_ioeventfd(fd, base + QUEUE_NOTIFY, 4, index)
    if device.interrupted_by_kernel:
        # An interrupt of vhost's costs the guest two exits: for the reason, and for its acknowledgement. With vhost the reason
        # is always the same, so nobody needs to hear the second: KVM takes the write, and signals what nobody listens to.
        unheard = posix.eventfd(0, posix.EFD_NONBLOCK | posix.EFD_CLOEXEC)
        for base in slot.windows:
            vm.add_ioeventfd(unheard, base + INTERRUPT_ACK, 4, INTERRUPT_USED)
        posix.close(unheard)  # KVM has it
        transport.acks_vanish = True
    for index, fd in enumerate(transport.notify_fds):
        if index not in device.external_queues:
            (device.loop_of(index) or loop).add(fd, READ, _notifier(transport, index))
    return OccupiedSlot(id, slot, device, transport)


def _notifier(transport: VirtioMmio, index: int) -> Callable[[int], None]:
    return lambda _events: transport.on_notify(index)
