"""Devices with their back end in another process, into and out of the replaceable slots.

What a guest has in such a slot is a device of ours that it found when it booted. Here another device takes that one's place:
same queues, same driver, which goes on with what it has negotiated and read by then. So a back end must be able to do at least
that, and is refused otherwise. When it is taken out an empty device comes back.

Back ends are found at the character devices (`-chardev socket` with a path) that no device of the command line uses: without
one of those the filters of system calls would not let this process connect.

Thread: the main loop's; a change of device happens on the loop that owns the slot.
"""

from __future__ import annotations

from stratovirt import log
from stratovirt.backends.block import NoImage
from stratovirt.backends.tap import NoTap
from stratovirt.errors import ConfigError, HostError
from stratovirt.vhost.user import BackendError, BackendSocket
from stratovirt.virtio.block import VirtioBlock
from stratovirt.virtio.net import VirtioNet
from stratovirt.virtio.vhost_user import VhostUserDevice
from stratovirt.virtio.vhost_user_blk import VhostUserBlk
from stratovirt.virtio.vhost_user_net import VhostUserNet

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from stratovirt.config.vm import VmConfig
    from stratovirt.errors import StratoVirtError
    from stratovirt.loop import EventLoop
    from stratovirt.machine.slots import OccupiedSlot
    from stratovirt.memory import GuestMemory
    from stratovirt.virtio.device import VirtioDevice

    Device = TypeVar("Device", bound=VirtioDevice)
    Run = Callable[[Callable[[], None]], None]
    """Calls a function on the loop that owns a slot. Raises as that does."""


def find_backend(config: VmConfig, chardev: str, memory: GuestMemory) -> BackendSocket:
    """The back end at the character device `chardev`. Raises: ConfigError when there is none for this."""
    found = config.vhost_users.get(chardev)
    if found is None or chardev not in config.spare_backends:
        spare = ", ".join(config.spare_backends)
        raise ConfigError(f'Chardev "{chardev}" not found or is in use', option="chardev", value=chardev,
                          accepted=f"the id of a -chardev socket,path=PATH that no other device uses{spare and ': '}{spare}")
    return BackendSocket(chardev, found.path, memory, found.reconnect)


def plug_disk(occupied: OccupiedSlot, backend: BackendSocket, id: str, loop: EventLoop, run: Run) -> None:
    """Put a disk of `backend` in the place of an empty one. Raises: ConfigError, HostError; nothing has changed."""
    empty = occupied.device
    if not isinstance(empty, VirtioBlock):
        raise HostError("the slot has no disk of its own")
    sizes = empty.queue_sizes
    device = _connected(backend, lambda: VhostUserBlk(backend, len(sizes), sizes[0], loop, _reporter(id)))

    def change() -> None:
        device.check_driver(empty)
        _change(occupied, device, loop)

    _run_or_close(run, change, device)


def plug_interface(occupied: OccupiedSlot, backend: BackendSocket, pairs: int, mac: bytes | None, id: str, loop: EventLoop,
                   run: Run) -> None:
    """Put an interface of `backend` in the place of one without a cable. Raises: as `plug_disk`."""
    empty = occupied.device
    if not isinstance(empty, VirtioNet):
        raise HostError("the slot has no interface of its own")
    size = empty.queue_sizes[0]
    if pairs != len(empty.pairs):
        raise HostError(f"The slot has {len(empty.pairs)} queue pairs, the netdev {pairs}")
    device = _connected(backend, lambda: VhostUserNet(backend, pairs, mac or empty.filter.own_mac, loop, size, _reporter(id)))

    def change() -> None:
        device.check_driver(empty)
        _change(occupied, device, loop)

    _run_or_close(run, change, device)


def unplug(occupied: OccupiedSlot, config: VmConfig, loop: EventLoop, run: Run) -> None:
    """Take a device with its back end elsewhere out of its slot. Raises: StateError when the slot's loop is stuck."""
    there, report = occupied.device, _guest_reporter(occupied.slot.number)
    sizes = there.queue_sizes
    if isinstance(there, VhostUserNet):
        interface = VirtioNet([NoTap() for _ in range(there.pairs)], there.filter.own_mac, loop, sizes[0], report)

        def change() -> None:
            interface.go_on_from(there.filter, there.pairs_in_use)
            _change(occupied, interface, loop)
    else:
        disk = VirtioBlock(NoImage(), sizes[0], on_error=report, loop=loop, queues=len(sizes), modest=True)

        def change() -> None:
            _change(occupied, disk, loop)

    run(change)
    if isinstance(there, VhostUserDevice) and there.chardev not in config.spare_backends:
        config.spare_backends.append(there.chardev)  # it was the command line's


def _change(occupied: OccupiedSlot, device: VirtioDevice, loop: EventLoop) -> None:
    occupied.transport.replace_device(device, loop)
    occupied.device = device


def _connected(backend: BackendSocket, make: Callable[[], Device]) -> Device:
    try:
        return make()
    except BackendError as error:
        raise ConfigError(str(error), option="chardev", value=backend.id,
                          accepted="one with a vhost-user back end for this device, which is running already") from error


def _run_or_close(run: Run, change: Callable[[], None], device: VirtioDevice) -> None:
    try:
        run(change)
    except HostError:
        device.hand_over()  # it has nothing: only its connection is closed
        raise


def _reporter(id: str) -> Callable[[StratoVirtError], None]:
    return lambda error: log.error(f"{id}: {error}")


def _guest_reporter(number: int) -> Callable[[StratoVirtError], None]:
    return lambda error: log.guest_warn(f"slot {number}", str(error))
