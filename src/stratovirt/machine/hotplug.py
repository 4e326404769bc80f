"""What comes into and goes out of the replaceable slots while the machine runs: disks, and the network's cables.

A guest finds virtio-mmio devices when it boots and never looks again. So the devices are there from the start: slots 0 to 3
have a virtio-blk each, 4 and 5 a virtio-net, and what is plugged is what lies behind them. An empty disk slot is a drive of
capacity 0, an empty network slot an interface whose link is down; both can change under a driver that is bound, and Linux
follows without help. Empty slots exist when somebody could fill them, that is when the machine has a QMP listener.

    blockdev-add        the image is opened, checked and locked             node
    device_add          it goes behind a slot, the driver is told           node, device
    device_del          requests in flight end, capacity 0, image closed    node of an image taken out
    blockdev-del        forgotten                                           -

A node whose image was taken out keeps nothing open. It gives its name up to the next `blockdev-add`, as StratoVirt's clients
expect; `device_add` opens it again, and `blockdev-del` forgets it, as QEMU's clients expect. Taps likewise, with `netdev_add`
and `netdev_del`; but one that came as a descriptor cannot be opened again.

A disk or interface whose back end is another process takes the whole device's place: `machine/hotplug_user.py`.

Thread: the main loop's.
"""

from __future__ import annotations

from stratovirt.backends.block import NoImage, RawImage
from stratovirt.backends.tap import NoTap
from stratovirt.errors import ConfigError, StratoVirtError
from stratovirt.machine.net_backend import NetBackend, open_net_backend
from stratovirt.virtio.block import VirtioBlock
from stratovirt.virtio.net import VirtioNet

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeVar

    from stratovirt.config.vm import DriveConfig, NetdevConfig, VmConfig
    from stratovirt.iothread import IoThread
    from stratovirt.loop import EventLoop
    from stratovirt.machine.events import EventHub
    from stratovirt.machine.slots import OccupiedSlot
    from stratovirt.memory import GuestMemory
    from stratovirt.virtio.vhost_user_net import VhostUserNet

    Result = TypeVar("Result")

BLOCK_SLOTS = range(4)
NET_SLOTS = range(4, 6)
MAX_BACKENDS = 64  # images, and as many taps


class HotPlugError(StratoVirtError):
    """What a client asked for cannot be done. The text is the whole answer."""


class BlockNode:
    """An image by its name. `device` is the id of the device that it is in, "" for none.

    `taken_out`: it was in one, and whoever wants may have its name. A -drive without a -device is opened when it gets one.
    """

    __slots__ = ("config", "device", "image", "taken_out")

    def __init__(self, config: DriveConfig, image: RawImage | None, device: str = "") -> None:
        self.config = config
        self.image = image  # None: not open
        self.device = device
        self.taken_out = False


class Netdev:
    """A tap by its name, like BlockNode; or the back end at a character device, which is connected to only while it is used."""

    __slots__ = ("backend", "config", "device", "taken_out")

    def __init__(self, config: NetdevConfig, backend: NetBackend | None, device: str = "") -> None:
        self.config = config
        self.backend = backend  # None: not open
        self.device = device
        self.taken_out = False


class HotPlug:
    """The replaceable slots of one machine, and the back ends that are in them or wait outside."""

    def __init__(self, config: VmConfig, slots: list[OccupiedSlot], events: EventHub, iothreads: dict[str, IoThread],
                 memory: GuestMemory, loop: EventLoop) -> None:
        self._config = config
        self._memory = memory
        self._loop = loop
        self._slots = {occupied.slot.number: occupied for occupied in slots}
        self._events = events
        self._nodes = {drive.id: BlockNode(drive, None) for drive in config.drives.values()}
        self._netdevs = {netdev.id: Netdev(netdev, None) for netdev in config.netdevs.values()}
        self._disks_elsewhere: dict[str, str] = {}  # the character device of each vhost-user disk that was plugged in
        self._threads: dict[int, IoThread] = {}  # of slots whose device is not on the main loop
        configured = {device.id: device for device in config.devices}
        for occupied in slots:
            device, there = configured.get(occupied.id), occupied.device
            if device is None or device.driver not in ("virtio-blk-device", "virtio-net-device"):
                continue
            iothread = device.options.optional_string("iothread")
            if iothread is not None:
                self._threads[occupied.slot.number] = iothreads[iothread]
            if isinstance(there, VirtioBlock):
                drive = config.drives[device.options.string("drive")]
                self._nodes[drive.id] = BlockNode(drive, there.image, device.id)
            else:
                netdev = config.netdevs[device.options.string("netdev")]
                backend = NetBackend(there.taps, there.vhosts) if isinstance(there, VirtioNet) else None
                self._netdevs[netdev.id] = Netdev(netdev, backend, device.id)

    def _on_its_loop(self, occupied: OccupiedSlot, change: Callable[[], Result]) -> Result:
        """Call `change` on the loop that owns the device in a slot. Raises: as it does; StateError when the loop is stuck."""
        thread = self._threads.get(occupied.slot.number)
        if thread is None:
            return change()
        results: list[Result] = []
        errors: list[StratoVirtError] = []

        def call() -> None:
            try:
                results.append(change())
            except StratoVirtError as error:
                errors.append(error)

        thread.call(call)
        if errors:
            raise errors[0]
        return results[0]

    def _loop_of(self, occupied: OccupiedSlot) -> EventLoop:
        thread = self._threads.get(occupied.slot.number)
        return thread.loop if thread is not None else self._loop

    # -- disks

    def nodes(self) -> list[BlockNode]:
        """Images that are open, in a slot or not."""
        return [node for node in self._nodes.values() if node.image is not None]

    def disks(self) -> Iterator[tuple[BlockNode, VirtioBlock]]:
        """Images in a slot, with their devices, in the order of the slots."""
        node_of = {node.device: node for node in self._nodes.values() if node.device}
        for number in sorted(self._slots):
            occupied = self._slots[number]
            if occupied.id in node_of and isinstance(occupied.device, VirtioBlock):
                yield node_of[occupied.id], occupied.device

    def add_node(self, drive: DriveConfig) -> None:
        """Open the image of `drive`. Raises: HotPlugError, ConfigError."""
        old = self._nodes.get(drive.id)
        if old is not None and not old.taken_out:
            raise HotPlugError(f"Drive {drive.id} has been added")
        image = _open_image(drive)
        if not _make_room(self._nodes, drive.id):
            image.close()
            raise HotPlugError(f"There are {MAX_BACKENDS} drives already.")
        self._nodes[drive.id] = BlockNode(drive, image)

    def delete_node(self, name: str) -> None:
        """Close an image that is in no slot, and forget it. Raises: HotPlugError."""
        node = self._nodes.get(name)
        if node is None:
            raise HotPlugError(f"Drive {name} not found")
        if node.device:
            raise HotPlugError(f"Drive {name} is in use by device {node.device}")
        if node.image is not None:
            node.image.close()
        del self._nodes[name]

    def plug_disk(self, id: str, drive: str, slot: int | None, serial: str = "") -> None:
        """Put the image `drive`, or else the one called `id`, behind a slot; None: the first that is free.

        Raises: HotPlugError; ConfigError when an image that was taken out cannot be opened again.
        """
        node = self._nodes.get(drive) or self._nodes.get(id)
        if node is None:
            raise HotPlugError("Failed to find device configuration.")
        occupied = self._free_slot(BLOCK_SLOTS, slot, "block")
        self._check_unused(id, node.config.id, node.device)
        device = occupied.device
        if not isinstance(device, VirtioBlock):
            raise HotPlugError("Unsupported replaceable device type.")
        image = node.image or _open_image(node.config)
        node.image, node.taken_out = image, False
        self._on_its_loop(occupied, lambda: device.replace_image(image, serial))
        node.device = occupied.id = id

    def plug_disk_elsewhere(self, id: str, chardev: str, slot: int | None) -> None:
        """Put the disk of the vhost-user back end at `chardev` behind a slot. Raises: HotPlugError, ConfigError, HostError."""
        from stratovirt.machine import hotplug_user

        occupied = self._free_slot(BLOCK_SLOTS, slot, "block")
        self._check_unused(id, "", "")
        backend = hotplug_user.find_backend(self._config, chardev, self._memory)
        self._check_chardev(chardev)
        hotplug_user.plug_disk(occupied, backend, id, self._loop_of(occupied),
                               lambda change: self._on_its_loop(occupied, change))
        self._disks_elsewhere[id] = chardev
        occupied.id = id

    def _check_chardev(self, chardev: str) -> None:
        user = next((id for id, name in self._disks_elsewhere.items() if name == chardev), "")
        user = user or next((netdev.config.id for netdev in self._netdevs.values() if netdev.config.chardev == chardev), "")
        if user:
            raise HotPlugError(f'Chardev "{chardev}" is used by {user}')

    def _unplug_elsewhere(self, occupied: OccupiedSlot) -> None:
        from stratovirt.machine import hotplug_user

        hotplug_user.unplug(occupied, self._config, self._loop_of(occupied),
                            lambda change: self._on_its_loop(occupied, change))
        self._disks_elsewhere.pop(occupied.id, None)
        self._take_out_netdev(occupied.id)

    def _unplug_disk(self, occupied: OccupiedSlot, device: VirtioBlock) -> None:
        empty = NoImage()
        self._on_its_loop(occupied, lambda: device.replace_image(empty)).close()
        for node in self._nodes.values():
            if node.device == occupied.id:
                node.device, node.image, node.taken_out = "", None, True

    # -- network interfaces

    def add_netdev(self, config: NetdevConfig) -> None:
        """Open a tap. Raises: HotPlugError, ConfigError; descriptors in `config` then stay the caller's."""
        old = self._netdevs.get(config.id)
        if old is not None and not old.taken_out:
            raise HotPlugError(f"Netdev {config.id} has been added")
        if config.chardev:
            from stratovirt.machine.hotplug_user import find_backend

            find_backend(self._config, config.chardev, self._memory)
            if old is None or old.config.chardev != config.chardev:
                self._check_chardev(config.chardev)
        backends = [netdev.backend for netdev in self._netdevs.values() if netdev.backend is not None]
        in_use = {fd for backend in backends for fd in backend.descriptors}
        names = {backend.taps[0].name for backend in backends}
        if not in_use.isdisjoint((*config.fds, *config.vhost_fds)) or (not config.fds and config.ifname in names):
            raise HotPlugError("Tap device already in use")
        if not _make_room(self._netdevs, config.id):
            raise HotPlugError(f"There are {MAX_BACKENDS} netdevs already.")
        self._netdevs[config.id] = Netdev(config, None if config.chardev else self._open_backend(config))

    def _open_backend(self, netdev: NetdevConfig) -> NetBackend:
        try:
            return open_net_backend(netdev, self._memory)
        except ConfigError as error:
            raise ConfigError(error.problem, option=error.option.removeprefix("-netdev "), value=error.value,
                              accepted=error.accepted) from error

    def delete_netdev(self, id: str) -> None:
        """Close a tap that is in no slot, and forget it. Raises: HotPlugError."""
        netdev = self._netdevs.get(id)
        if netdev is None:
            raise HotPlugError(f"Netdev {id} not found")
        if netdev.device:
            raise HotPlugError(f"Netdev {id} is in use by device {netdev.device}")
        if netdev.backend is not None:
            netdev.backend.close()
        del self._netdevs[id]

    def plug_interface(self, id: str, netdev_id: str, slot: int | None, mac: bytes | None = None) -> None:
        """Connect the interface of a slot to the tap `netdev_id`, or else to the one called `id`. `slot` as for a disk.

        Raises: HotPlugError; ConfigError when a tap that was taken out cannot be opened again; HostError when its vhost cannot
        do what the guest's driver has negotiated.
        """
        netdev = self._netdevs.get(netdev_id) or self._netdevs.get(id)
        if netdev is None:
            raise HotPlugError("Failed to find device configuration.")
        occupied = self._free_slot(NET_SLOTS, slot, "net")
        self._check_unused(id, netdev.config.id, netdev.device)
        device = occupied.device
        if netdev.config.chardev:
            self._plug_interface_elsewhere(occupied, netdev, mac, id)
            return
        if not isinstance(device, VirtioNet):
            raise HotPlugError("Unsupported replaceable device type.")
        if netdev.taken_out and (netdev.config.fds or netdev.config.vhost_fds):
            raise HotPlugError(f"The tap of netdev {netdev.config.id} was closed when its device was taken out.")
        if netdev.config.queues > len(device.pairs):
            raise HotPlugError(f"The slot has {len(device.pairs)} queue pairs, the netdev {netdev.config.queues}")
        backend = netdev.backend or self._open_backend(netdev.config)
        netdev.backend, netdev.taken_out = backend, False
        self._on_its_loop(occupied, lambda: device.replace_taps(backend.taps, mac, backend.vhosts))
        netdev.device = occupied.id = id

    def _plug_interface_elsewhere(self, occupied: OccupiedSlot, netdev: Netdev, mac: bytes | None, id: str) -> None:
        from stratovirt.machine import hotplug_user

        backend = hotplug_user.find_backend(self._config, netdev.config.chardev, self._memory)
        hotplug_user.plug_interface(occupied, backend, netdev.config.queues, mac, id, self._loop_of(occupied),
                                    lambda change: self._on_its_loop(occupied, change))
        netdev.taken_out = False
        netdev.device = occupied.id = id

    def _unplug_interface(self, occupied: OccupiedSlot, device: VirtioNet) -> None:
        self._on_its_loop(occupied, lambda: device.replace_taps([NoTap()]))
        self._take_out_netdev(occupied.id)

    def _take_out_netdev(self, device: str) -> None:
        for netdev in self._netdevs.values():
            if netdev.device == device:
                netdev.device, netdev.backend, netdev.taken_out = "", None, True

    def set_link(self, id: str, up: bool) -> bool:
        """Plug the cable of an interface in or out; `id` is the device's or its netdev's. False: there is none."""
        netdev = self._netdevs.get(id)
        wanted = netdev.device if netdev is not None else id
        interfaces: tuple[type[VirtioNet] | type[VhostUserNet], ...] = (VirtioNet,)
        if any(each.config.chardev for each in self._netdevs.values()):
            from stratovirt.virtio.vhost_user_net import VhostUserNet

            interfaces = (VirtioNet, VhostUserNet)
        for occupied in self._slots.values():
            device = occupied.device
            if wanted and occupied.id == wanted and isinstance(device, interfaces):
                self._on_its_loop(occupied, lambda device=device: device.set_link(up))  # type: ignore[misc]
                return True
        return False

    # -- slots

    def _free_slot(self, numbers: range, wanted: int | None, kind: str) -> OccupiedSlot:
        """The slot to plug into; `wanted` counts among `numbers`."""
        slots = [self._slots.get(number) for number in numbers]
        if wanted is None:
            free = (place for place, occupied in enumerate(slots) if occupied is not None and not occupied.id)
            wanted = next(free, len(slots))
        if wanted >= len(slots):
            raise HotPlugError(f"A maximum of {len(slots)} {kind} replaceable devices are supported.")
        occupied = slots[wanted]
        if occupied is None or occupied.id:
            raise HotPlugError(f"The slot {wanted} is occupied already.")
        return occupied

    def _check_unused(self, id: str, backend: str, device: str) -> None:
        if any(occupied.id == id for occupied in self._slots.values()):
            raise HotPlugError(f"Device id {id} existed")
        if device:
            raise HotPlugError(f"{backend} is in use by device {device}")

    def unplug(self, id: str) -> None:
        """Take out what is behind the slot of device `id`; requests in flight end first.

        Raises: HotPlugError; HostError when they do not end, and everything is as it was.
        """
        occupied = next((occupied for occupied in self._slots.values() if id and occupied.id == id), None)
        if occupied is None:
            raise HotPlugError(f"Device {id} not found")
        device, number = occupied.device, occupied.slot.number
        if isinstance(device, VirtioBlock) and number in BLOCK_SLOTS:
            self._unplug_disk(occupied, device)
        elif isinstance(device, VirtioNet) and number in NET_SLOTS:
            self._unplug_interface(occupied, device)
        elif (device.name == "vhost-user-blk" and number in BLOCK_SLOTS) or (
                device.name == "vhost-user-net" and number in NET_SLOTS):
            self._unplug_elsewhere(occupied)
        else:
            raise HotPlugError(f"Device {id} cannot be unplugged")
        occupied.id = ""
        self._events.emit("DEVICE_DELETED", {"device": id, "path": id})


def _make_room(backends: dict[str, BlockNode] | dict[str, Netdev], id: str) -> bool:
    """May one more, called `id`, be kept? What was taken out first is forgotten for it."""
    backends.pop(id, None)  # taken out, or the caller would not ask
    if len(backends) >= MAX_BACKENDS:
        gone = next((name for name in backends if backends[name].taken_out), None)
        if gone is None:
            return False
        del backends[gone]
    return True


def _open_image(drive: DriveConfig) -> RawImage:
    try:
        return RawImage(drive)
    except ConfigError as error:  # it speaks of -drive, which this client has not typed
        raise ConfigError(error.problem, option="filename", value=drive.file, accepted=error.accepted) from error
