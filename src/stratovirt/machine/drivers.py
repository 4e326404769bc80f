"""From a `-device` to the device: one function a driver, and the kind of slot that each takes.

A driver's modules are imported by its function, so that a machine pays only for the devices it has.
"""

from __future__ import annotations

from stratovirt import log
from stratovirt.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from stratovirt.backends.chardev import CharDevice
    from stratovirt.config.vm import DeviceConfig, NetdevConfig, VmConfig
    from stratovirt.errors import StratoVirtError
    from stratovirt.iothread import IoThread
    from stratovirt.loop import EventLoop
    from stratovirt.memory import GuestMemory
    from stratovirt.vhost.user import BackendSocket
    from stratovirt.virtio.balloon import VirtioBalloon
    from stratovirt.virtio.device import VirtioDevice

BLOCK, NET, OTHER = "block", "net", "other"
_ON_IOTHREADS = ("virtio-blk-device", "virtio-net-device")
_FIRST_MAC = b"\x52\x54\x00\x12\x34\x56"


class Surroundings:
    """What a device may be given: the configuration around it, the machine's memory, loops and character devices."""

    __slots__ = ("_macs", "balloon", "chardevs", "config", "iothreads", "loop", "memory", "on_balloon")

    def __init__(self, config: VmConfig, memory: GuestMemory, loop: EventLoop, chardevs: dict[str, CharDevice],
                 iothreads: dict[str, IoThread], on_balloon: Callable[[int], None]) -> None:
        self.config = config
        self.memory = memory
        self.loop = loop
        self.chardevs = chardevs
        self.iothreads = iothreads
        self.on_balloon = on_balloon  # hears how many bytes the guest has left, when the balloon has changed that
        self.balloon: VirtioBalloon | None = None
        self._macs = 0

    def loop_of(self, device: DeviceConfig, key: str = "iothread") -> EventLoop:
        """The loop that owns a device: its iothread's, else the main one. With another `key` one that has a part of it."""
        options = device.options if device.driver in _ON_IOTHREADS else None
        iothread = (options.optional_string(key) or options.optional_string("iothread")) if options is not None else None
        return self.iothreads[iothread].loop if iothread is not None else self.loop

    def next_mac(self) -> bytes:
        """The address of the next network interface without one of its own."""
        self._macs += 1
        return _FIRST_MAC[:-1] + bytes([(_FIRST_MAC[-1] + self._macs - 1) & 0xFF])


def _reporter(id: str) -> Callable[[StratoVirtError], None]:
    return lambda error: log.guest_warn(id, str(error))


def _create_block(around: Surroundings, device: DeviceConfig) -> VirtioDevice:
    from stratovirt.backends.block import RawImage
    from stratovirt.virtio.block import VirtioBlock

    options = device.options
    image = RawImage(around.config.drives[options.string("drive")])
    serial = options.optional_string("serial") or ""
    return VirtioBlock(image, options.integer("queue-size"), serial, _reporter(device.id), loop=around.loop_of(device),
                       queues=options.integer("num-queues"))


def _net_reporter(id: str) -> Callable[[StratoVirtError], None]:
    """A tap can go away only once: that line is not held back for others that the guest has caused."""
    from stratovirt.backends.tap import TapGoneError

    report = _reporter(id)
    return lambda error: log.error(f"{id}: {error}") if isinstance(error, TapGoneError) else report(error)


def _create_net(around: Surroundings, device: DeviceConfig) -> VirtioDevice:
    options = device.options
    own = around.next_mac()
    given = options.optional_string("mac")
    mac = bytes.fromhex(given.replace(":", "")) if given else own
    netdev = around.config.netdevs[options.string("netdev")]
    if netdev.chardev:
        return _create_vhost_user_net(around, device, netdev, mac)
    from stratovirt.machine.net_backend import open_net_backend
    from stratovirt.virtio.net import VirtioNet

    backend = open_net_backend(netdev, around.memory)
    return VirtioNet(backend.taps, mac, around.loop_of(device),
                     options.integer("queue-size"), _net_reporter(device.id), backend.vhosts,
                     around.loop_of(device, "rx-iothread"), around.loop_of(device, "tx-iothread"))


def _create_rng(around: Surroundings, device: DeviceConfig) -> VirtioDevice:
    from stratovirt.backends.rng import RandomSource
    from stratovirt.virtio.rng import VirtioRng

    options = device.options
    source = RandomSource(around.config.rng_backends[options.string("rng")])
    max_bytes, period = options.optional_integer("max-bytes"), options.optional_integer("period")
    rate = max_bytes * 1000 / period if max_bytes is not None and period is not None else None
    return VirtioRng(source, around.loop, rate, _reporter(device.id))


def _create_vsock(around: Surroundings, device: DeviceConfig) -> VirtioDevice:
    from stratovirt.virtio.vsock import VhostVsock, open_backend

    guest_cid = device.options.integer("guest-cid")
    backend = open_backend(guest_cid, device.options.optional_integer("vhostfd"), around.memory)
    return VhostVsock(backend, guest_cid, around.loop, _reporter(device.id))


def _create_vhost_user_fs(around: Surroundings, device: DeviceConfig) -> VirtioDevice:
    from stratovirt.virtio.vhost_user_fs import VhostUserFs

    backend = _backend_socket(around, device.options.string("chardev"))
    tag = device.options.string("tag").encode("utf-8", "surrogateescape")
    return _with_backend(backend, lambda: VhostUserFs(backend, tag, around.loop, _backend_reporter(device.id)))


def _create_vhost_user_blk(around: Surroundings, device: DeviceConfig) -> VirtioDevice:
    from stratovirt.virtio.vhost_user_blk import VhostUserBlk

    backend = _backend_socket(around, device.options.string("chardev"))
    queues, queue_size = device.options.integer("num-queues"), device.options.integer("queue-size")
    return _with_backend(
        backend, lambda: VhostUserBlk(backend, queues, queue_size, around.loop, _backend_reporter(device.id)))


def _create_vhost_user_net(around: Surroundings, device: DeviceConfig, netdev: NetdevConfig, mac: bytes) -> VirtioDevice:
    from stratovirt.virtio.vhost_user_net import VhostUserNet

    backend, queue_size = _backend_socket(around, netdev.chardev), device.options.integer("queue-size")
    return _with_backend(backend, lambda: VhostUserNet(backend, netdev.queues, mac, around.loop_of(device), queue_size,
                                                       _backend_reporter(device.id)))


def _backend_socket(around: Surroundings, id: str) -> BackendSocket:
    from stratovirt.vhost.user import BackendSocket

    chardev = around.config.vhost_users[id]
    return BackendSocket(id, chardev.path, around.memory, chardev.reconnect)


def _with_backend(backend: BackendSocket, make: Callable[[], VirtioDevice]) -> VirtioDevice:
    from stratovirt.vhost.user import BackendError

    try:
        return make()
    except BackendError as error:
        raise ConfigError(str(error), option=f"-chardev socket,id={backend.id},path", value=backend.path,
                          accepted="the socket of a vhost-user back end for this device, which is running already") from error


def _backend_reporter(id: str) -> Callable[[StratoVirtError], None]:
    """A back end is lost once, and then tried at intervals: no guest can fill the log with that."""
    return lambda error: log.error(f"{id}: {error}")


def _create_serial(around: Surroundings, device: DeviceConfig) -> VirtioDevice:
    from stratovirt.config.ports import CONSOLE, number_ports
    from stratovirt.virtio.console import Port, VirtioConsole

    ports = number_ports(around.config.devices)
    return VirtioConsole([
        Port(number, port.id, around.chardevs[port.options.string("chardev")], port.driver == CONSOLE)
        for number, port in ports.items()
    ])


def _create_balloon(around: Surroundings, device: DeviceConfig) -> VirtioDevice:
    from stratovirt.virtio.balloon import VirtioBalloon

    options = device.options
    auto = (options.integer("membuf-percent"), options.integer("monitor-interval")) if options.boolean("auto-balloon") else None
    around.balloon = VirtioBalloon(
        around.memory, around.loop, around.on_balloon, deflate_on_oom=options.boolean("deflate-on-oom"),
        reporting=options.boolean("free-page-reporting"), auto=auto, shared=around.memory.shared, on_error=_reporter(device.id))
    return around.balloon


DRIVERS: dict[str, tuple[str, Callable[[Surroundings, DeviceConfig], VirtioDevice]]] = {
    "virtio-blk-device": (BLOCK, _create_block),
    "virtio-net-device": (NET, _create_net),
    "virtio-rng-device": (OTHER, _create_rng),
    "virtio-serial-device": (OTHER, _create_serial),
    "virtio-balloon-device": (OTHER, _create_balloon),
    "vhost-vsock-device": (OTHER, _create_vsock),
    "vhost-user-fs-device": (OTHER, _create_vhost_user_fs),
    "vhost-user-blk-device": (BLOCK, _create_vhost_user_blk),
}


def takes_slot(device: DeviceConfig) -> bool:
    """Ports have none of their own: their controller, wherever it stands on the command line, brings them along."""
    return device.driver not in ("virtconsole", "virtserialport")


def create(around: Surroundings, device: DeviceConfig) -> VirtioDevice:
    """The device that `device` describes, with its back end open. Raises: ConfigError."""
    return _driver(device)[1](around, device)


def create_empty(around: Surroundings, kind: str, number: int) -> VirtioDevice:
    """The device of replaceable slot `number` while nothing is plugged in there; `kind` is BLOCK or NET."""
    report = _reporter(f"slot {number}")
    if kind == BLOCK:
        from stratovirt.backends.block import NoImage
        from stratovirt.virtio.block import VirtioBlock

        return VirtioBlock(NoImage(), on_error=report, loop=around.loop, modest=bool(around.config.spare_backends))
    from stratovirt.backends.tap import NoTap
    from stratovirt.virtio.net import VirtioNet

    return VirtioNet(NoTap(), around.next_mac(), around.loop, on_error=_net_reporter(f"slot {number}"))


def slot_kind(device: DeviceConfig) -> str:
    return _driver(device)[0]


def _driver(device: DeviceConfig) -> tuple[str, Callable[[Surroundings, DeviceConfig], VirtioDevice]]:
    driver = DRIVERS.get(device.driver)
    if driver is None:
        raise ConfigError("not supported yet", option="-device", value=device.driver, accepted=", ".join(DRIVERS))
    return driver
