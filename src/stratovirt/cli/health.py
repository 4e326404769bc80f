"""What only the whole command line can tell: references between options, and combinations that cannot be.

Every back end is used by one front end. `-serial`, `-mon` and devices on vhost-user take their character device out of
`VmConfig.chardevs`.
"""

from __future__ import annotations

from stratovirt.cli.suboptions import read_group
from stratovirt.config import options
from stratovirt.config.schema import Group, OptionValues
from stratovirt.config.vm import CharDeviceConfig, QmpConfig, VmConfig
from stratovirt.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

SERIAL_ID = "serial0"
_SERIAL_ACCEPTED = "stdio; pty; file,path=PATH; socket,path=PATH,server,nowait; socket,host=IP,port=N,server,nowait; chardev:ID"


def read_chardev(group: Group, text: str) -> CharDeviceConfig:
    """The character device that a `-chardev` or `-serial` value describes. Raises: ConfigError."""
    values = read_group(group, text) if text or group.keys else OptionValues({})
    kind = group.title.rpartition(" ")[2]
    id = values.string("id") if group.title.startswith("-chardev") else SERIAL_ID
    if kind == "file":
        return CharDeviceConfig(id, kind, path=values.string("path"))
    if kind != "socket":
        return CharDeviceConfig(id, kind)
    path, port = values.optional_string("path"), values.optional_integer("port")
    if (path is None) == (port is None) or (path is not None and "host" in values.given):
        raise ConfigError("a socket has either a path or a port", option=group.title, value=text,
                          accepted="path=PATH, or port=N and host=IP")
    host = values.optional_string("host") or "0.0.0.0"
    server = listens(values, group.title, text)
    if server and "reconnect" in values.given:
        raise ConfigError("a socket that listens connects to nobody", option=f"{group.title},reconnect",
                          value=str(values.integer("reconnect")), accepted="reconnect without server,nowait")
    return CharDeviceConfig(id, kind, path or "", host if port else "", port or 0, server, values.integer("reconnect"))


def listens(values: OptionValues, option: str, text: str) -> bool:
    """True with `server` and `nowait`, False with neither. Raises: ConfigError with one of them alone."""
    server = values.boolean("server")
    nowait = values.boolean("nowait") or values.optional_boolean("wait") is False
    if server and not nowait:
        raise ConfigError("'nowait' is missing: the guest never waits for a client", option=option, value=text,
                          accepted="server,nowait")
    if nowait and not server:
        raise ConfigError("'server' is missing", option=option, value=text, accepted="server,nowait")
    return server


def check(config: VmConfig, serial: str, mon: str) -> None:
    """Resolve references and refuse what cannot be. `serial` and `mon` are those options' values, "" if not given.

    Raises: ConfigError.
    """
    stdio_users = sum(chardev.kind == "stdio" for chardev in config.chardevs.values())
    if serial:
        config.serial = _serial(config, serial)
        stdio_users += serial == "stdio"
    if mon:
        config.qmp.append(_monitor(config, mon))
    if config.mod_test and config.accel != "test":
        raise ConfigError("MST can only use test accel!", option="-mod-test", value=config.mod_test, accepted="-accel test")
    if config.accel == "test" and not config.mod_test:
        raise ConfigError("the test accelerator needs a socket to be driven from", option="-accel", value="test",
                          accepted="-mod-test PATH")
    if config.incoming is not None and config.accel == "test":
        raise ConfigError("the test accelerator has no processors to restore", option="-accel", value="test", accepted="kvm")
    if not config.kernel and config.accel != "test" and config.incoming is None:
        raise ConfigError("kernel file is required for microvm machine type, which is not provided", option="-kernel",
                          accepted="-kernel FILE; stratovirt -h lists all options")
    if stdio_users > 1:
        raise ConfigError("Can't set multiple devices redirected to stdio", option="-serial, -chardev", value="stdio",
                          accepted="one user of standard input and output")
    if stdio_users and config.daemonize:
        raise ConfigError("Device redirected to stdio and daemonize can't be set together", option="-daemonize",
                          accepted="a serial port on a pty, file or socket")
    if config.mem_share or config.mem_path or config.mem_prealloc or config.memory_backend or config.memory_backends:
        from stratovirt.cli.ram import settle

        settle(config)
    _check_devices(config)
    if len(config.drives) > 1:
        _check_images(config)


def _serial(config: VmConfig, text: str) -> CharDeviceConfig:
    if text.startswith("chardev:"):
        return _claim(config, text[8:], "-serial", text)
    kind, _, rest = text.partition(",")
    group = options.SERIALS.get(kind)
    if group is None:
        raise ConfigError("no such kind of serial port", option="-serial", value=text, accepted=_SERIAL_ACCEPTED)
    chardev = read_chardev(group, rest)
    if chardev.kind == "socket" and not chardev.server:
        raise ConfigError("a serial port needs a listening socket", option="-serial", value=text, accepted="server,nowait")
    if SERIAL_ID in config.chardevs:
        raise ConfigError(f"{SERIAL_ID} has been added: it is the id of the serial port's own character device",
                          option="-chardev id", value=SERIAL_ID, accepted=f"another id, or -serial chardev:{SERIAL_ID}")
    return chardev


def _monitor(config: VmConfig, text: str) -> QmpConfig:
    monitor = read_group(options.MON, text)
    id = monitor.string("chardev")
    chardev = _claim(config, id, "-mon chardev", id)
    if chardev.kind != "socket":
        raise ConfigError(f"QMP cannot be on a character device of kind {chardev.kind}", option="-mon chardev", value=id,
                          accepted="a -chardev socket with server,nowait")
    return QmpConfig(chardev.path, chardev.host, chardev.port, option=f"-chardev id={id}")


def _claim(config: VmConfig, id: str, option: str, value: str) -> CharDeviceConfig:
    """Take the character device `id` for one user."""
    chardev = config.chardevs.pop(id, None)
    if chardev is None:
        raise ConfigError(f'Chardev "{id}" not found or is in use', option=option, value=value,
                          accepted="the id of a -chardev that nothing else uses")
    if chardev.kind == "socket" and not chardev.server:
        raise ConfigError("a listening socket is needed here", option=option, value=value,
                          accepted="a -chardev socket with server,nowait")
    return chardev


def _check_devices(config: VmConfig) -> None:
    """Every device has its back end, and every drive and netdev one device."""
    drive_users: dict[str, str] = {}
    netdev_users: dict[str, str] = {}
    if len(config.iothreads) > options.MAX_IOTHREADS:
        raise ConfigError("too many iothreads", option="-object iothread,id", value=config.iothreads[options.MAX_IOTHREADS],
                          accepted=f"at most {options.MAX_IOTHREADS}")
    for qmp in config.qmp:
        if qmp.iothread is not None and qmp.iothread not in config.iothreads:
            raise ConfigError(f"there is no iothread {qmp.iothread}", option="-qmp iothread", value=qmp.iothread,
                              accepted=_ids("-object iothread", config.iothreads))
    port_users: set[str] = set()
    for device in config.devices:
        title = f"-device {device.driver}"
        if device.driver == "virtio-blk-device":
            drive = device.options.string("drive")
            if drive not in config.drives:
                raise ConfigError(f"there is no drive {drive}", option=f"{title},drive", value=drive,
                                  accepted=_ids("-drive", config.drives))
            if drive in drive_users:
                raise ConfigError(f"the drive {drive} is used by {drive_users[drive]} already", option=f"{title},drive",
                                  value=drive, accepted="a drive of its own for each device")
            drive_users[drive] = device.id
            _check_iothread(config, device.options, title)
        elif device.driver == "virtio-net-device":
            from stratovirt.cli.taps import check_pairs

            netdev = device.options.string("netdev")
            if netdev not in config.netdevs:
                raise ConfigError(f"there is no netdev {netdev}", option=f"{title},netdev", value=netdev,
                                  accepted=_ids("-netdev", config.netdevs))
            if netdev in netdev_users:
                raise ConfigError(f"the netdev {netdev} is used by {netdev_users[netdev]} already", option=f"{title},netdev",
                                  value=netdev, accepted="a netdev of its own for each device")
            netdev_users[netdev] = device.id
            for key in ("iothread", "rx-iothread", "tx-iothread"):
                _check_iothread(config, device.options, title, key)
            check_pairs(config.netdevs[netdev], device.options, title)
            if config.netdevs[netdev].chardev:
                from stratovirt.cli.vhost_users import claim

                claim(config, config.netdevs[netdev].chardev, "-netdev vhost-user", netdev)
        elif device.driver == "virtio-rng-device":
            rng = device.options.string("rng")
            if rng not in config.rng_backends:
                raise ConfigError(f"there is no rng-random object {rng}", option=f"{title},rng", value=rng,
                                  accepted=_ids("-object rng-random", config.rng_backends))
            _check_rate(device.options, title)
        elif device.driver in ("vhost-user-fs-device", "vhost-user-blk-device"):
            from stratovirt.cli.vhost_users import claim

            claim(config, device.options.string("chardev"), title, device.id)
        elif device.driver in ("virtconsole", "virtserialport"):
            chardev = device.options.string("chardev")
            if chardev in port_users or chardev not in config.chardevs:
                raise ConfigError(f'Chardev "{chardev}" not found or is in use', option=f"{title},chardev", value=chardev,
                                  accepted="the id of a -chardev that nothing else uses")
            port_users.add(chardev)
    if config.qmp and any(chardev.kind == "socket" and not chardev.server for chardev in config.chardevs.values()):
        from stratovirt.cli.vhost_users import keep_spare

        keep_spare(config, port_users)
    balloons = [device.id for device in config.devices if device.driver == "virtio-balloon-device"]
    if len(balloons) > 1:
        raise ConfigError(f"there is a balloon already: {balloons[0]}", option="-device virtio-balloon-device",
                          value=f"id={balloons[1]}", accepted="one for a machine")
    if port_users or any(device.driver == "virtio-serial-device" for device in config.devices):
        from stratovirt.config.ports import number_ports

        number_ports(config.devices)


def _check_iothread(config: VmConfig, values: OptionValues, title: str, key: str = "iothread") -> None:
    iothread = values.optional_string(key)
    if iothread is not None and iothread not in config.iothreads:
        raise ConfigError(f"there is no iothread {iothread}", option=f"{title},{key}", value=iothread,
                          accepted=_ids("-object iothread", config.iothreads))


def _ids(option: str, known: Iterable[str]) -> str:
    names = list(known)
    return f"the id of a {option}" + (f": {', '.join(names[:16])}" if names else "")


def _check_rate(values: OptionValues, title: str) -> None:
    max_bytes, period = values.optional_integer("max-bytes"), values.optional_integer("period")
    if (max_bytes is None) != (period is None):
        raise ConfigError("max-bytes and period belong together", option=title,
                          value=f"max-bytes={max_bytes}" if period is None else f"period={period}", accepted="both or neither")
    if max_bytes is not None and period is not None:
        rate = max_bytes * 1000 // period
        if not options.MIN_RNG_RATE <= rate <= options.MAX_RNG_RATE:
            raise ConfigError(f"the rate is {rate} bytes a second", option=title,
                              value=f"max-bytes={max_bytes},period={period}",
                              accepted=f"{options.MIN_RNG_RATE} to {options.MAX_RNG_RATE} bytes a second")


def _check_images(config: VmConfig) -> None:
    """One image in two drives is for readers only: a writer's changes would corrupt the other's view."""
    if len(config.drives) < 2:
        return
    from os.path import realpath

    writable: dict[str, bool] = {}
    for drive in config.drives.values():
        path = realpath(drive.file)
        if path in writable and (writable[path] or not drive.readonly):
            raise ConfigError("the image is in another -drive already", option="-drive file", value=drive.file,
                              accepted="one drive for an image, or readonly=on for all of them")
        writable[path] = not drive.readonly
