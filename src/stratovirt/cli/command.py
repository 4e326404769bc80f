"""From the process arguments to a VmConfig: `parse` on the way to a running guest, `special` for everything else.

Options are applied in one fixed order, whatever their order on the command line, so that the first error reported does not
depend on it. A character device may be named before it is declared: who uses it is settled at the end (`cli/health.py`).
"""

from __future__ import annotations

from stratovirt.cli import health
from stratovirt.cli.grammar import split_arguments
from stratovirt.cli.options import OPTIONS
from stratovirt.cli.suboptions import read_group, read_value
from stratovirt.config import options
from stratovirt.config.schema import NOT_YET, Group, Key, OptionValues, Path, StrictBool, String
from stratovirt.config.vm import (
    DeviceConfig,
    DriveConfig,
    IncomingConfig,
    NetdevConfig,
    QmpConfig,
    RngBackendConfig,
    SmpConfig,
    VmConfig,
)
from stratovirt.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SUBCOMMANDS = ("run", "doctor", "snapshot", "help")
_HELP_WORDS = ("-h", "-help", "--help")
_VERSION_WORDS = ("-V", "-version", "--version")
_REPORT_WORD = "-seccomp-report"
_HELP_TOPICS = ("-device", "-object", "-netdev", "-chardev", "-machine", "-drive")


def special(arguments: list[str]) -> int | None:
    """Do what is not the start of a machine: help, version, subcommands. Returns the exit status, None to go on to `parse`.

    `arguments` come without the program's name. Raises: ConfigError for help on something unknown.
    """
    if arguments and arguments[0] in SUBCOMMANDS:
        from stratovirt.cli import subcommands

        return subcommands.dispatch(arguments[0], arguments[1:])
    option = ""
    for word in arguments:
        if word == "--":
            break
        if word[:1] == "-":
            option = word
            if word in _HELP_WORDS or word in _VERSION_WORDS:
                from stratovirt.cli import help

                return help.print_usage() if word in _HELP_WORDS else help.print_version()
            if word == _REPORT_WORD:
                from stratovirt.sandbox import report

                return report.print_report()
        elif word[-4:] == "help" and option in _HELP_TOPICS and (word == "help" or word[-5:] == ",help"):
            from stratovirt.cli import help

            return help.print_topic(option, word[:-5])
    return None


def parse(arguments: list[str]) -> VmConfig:
    """The machine that `arguments` (without the program's name) describe. Touches no file. Raises: ConfigError."""
    found = split_arguments(arguments)
    config = VmConfig()
    config.arguments = arguments
    for name, apply in _IN_ORDER:
        if name in found:
            apply(config, found[name])
    for name in found:
        if OPTIONS[name].status is NOT_YET:
            _refuse(name, found[name])
    health.check(config, found["serial"][0] if "serial" in found else "", found["mon"][0] if "mon" in found else "")
    return config


def _refuse(name: str, values: list[str]) -> None:
    from stratovirt.cli import refusals

    refusals.check_option(name, values)
    raise ConfigError("not supported yet", option="-" + name, value=values[0] if values else None, accepted="leaving it out")


_NAME = Key("", String(), "")
_FILE = Key("", Path(), "")


def _name(config: VmConfig, values: list[str]) -> None:
    # libvirt writes the name the way QEMU takes it: guest=NAME,debug-threads=on
    text = values[0][6:].partition(",")[0] if values[0].startswith("guest=") else values[0]
    config.name = str(read_value(_NAME, text, "-name"))


def _machine(config: VmConfig, values: list[str]) -> None:
    machine = read_group(options.MACHINE, values[0])
    config.machine_type = machine.string("type")
    config.accel = _accelerator(machine)
    config.dump_guest_core = machine.boolean("dump-guest-core")
    config.mem_share = machine.boolean("mem-share")
    config.memory_backend = machine.optional_string("memory-backend") or ""


def _accel(config: VmConfig, values: list[str]) -> None:
    config.accel = _accelerator(read_group(options.ACCEL, values[0]))


def _accelerator(values: OptionValues) -> str:
    return "test" if values.string("accel") == "test" else "kvm"


def _mod_test(config: VmConfig, values: list[str]) -> None:
    config.mod_test = str(read_value(options.MOD_TEST, values[0], "-mod-test"))


def _memory(config: VmConfig, values: list[str]) -> None:
    memory = read_group(options.MEMORY, values[0])
    config.memory_size = memory.integer("size")
    config.memory_size_given = "size" in memory.given
    limit = memory.optional_integer("maxmem")
    if limit is not None and limit < config.memory_size:
        raise ConfigError("maxmem is less than size", option="-m", value=values[0], accepted="maxmem of at least size")


def _mem_path(config: VmConfig, values: list[str]) -> None:
    config.mem_path = str(read_value(_FILE, values[0], "-mem-path"))


def _mem_prealloc(config: VmConfig, values: list[str]) -> None:
    config.mem_prealloc = True


def _smp(config: VmConfig, values: list[str]) -> None:
    config.smp = derive_topology(read_group(options.SMP, values[0]), values[0])


def derive_topology(smp: OptionValues, text: str) -> SmpConfig:
    """Fill in the counts that were left out: cores first, then sockets, then threads. Raises: ConfigError."""
    cpus, max_cpus = smp.integer("cpus"), smp.integer("maxcpus")
    sockets, cores, threads = smp.integer("sockets"), smp.integer("cores"), smp.integer("threads")
    dies, clusters = smp.integer("dies"), smp.integer("clusters")
    max_cpus = max_cpus or sockets * dies * clusters * cores * threads or cpus
    if cores == 0:
        sockets, threads = sockets or 1, threads or 1
        cores = max_cpus // (sockets * dies * clusters * threads)
    elif sockets == 0:
        threads = threads or 1
        sockets = max_cpus // (dies * clusters * cores * threads)
    elif threads == 0:
        threads = max_cpus // (sockets * dies * clusters * cores)
    if sockets * dies * clusters * cores * threads != max_cpus:
        raise ConfigError("sockets * dies * clusters * cores * threads must be equal to max_cpus", option="-smp", value=text,
                          accepted=f"counts whose product is {max_cpus}")
    if not cpus <= max_cpus <= options.MAX_CPUS:
        raise ConfigError(f"maxcpus is {max_cpus}", option="-smp", value=text,
                          accepted=f"maxcpus from {cpus} (cpus) to {options.MAX_CPUS}")
    return SmpConfig(cpus, max_cpus, sockets, dies, clusters, cores, threads)


def _cpu(config: VmConfig, values: list[str]) -> None:
    cpu = read_group(options.CPU, values[0])
    config.cpu_pmu, config.cpu_sve = cpu.boolean("pmu"), cpu.boolean("sve")
    config.cpu_steal_time = cpu.boolean("kvm-steal-time")


def _kernel(config: VmConfig, values: list[str]) -> None:
    config.kernel = str(read_value(_FILE, values[0], "-kernel"))


def _initrd(config: VmConfig, values: list[str]) -> None:
    config.initrd = str(read_value(_FILE, values[0], "-initrd"))


def _append(config: VmConfig, values: list[str]) -> None:
    config.kernel_cmdline = " ".join(values)


def _drives(config: VmConfig, values: list[str]) -> None:
    for text in values:
        drive = read_group(options.DRIVE, text)
        id = _new_id(drive, config.drives, "-drive")
        readonly = drive.boolean("readonly") or drive.string("media") == "cdrom"
        config.drives[id] = DriveConfig(id, drive.string("file"), readonly,
                                        drive.optional_boolean("direct"), drive.optional_string("aio"),
                                        drive.boolean("discard"), drive.string("detect-zeroes"),
                                        drive.integer("throttling.iops-total"))


def _objects(config: VmConfig, values: list[str]) -> None:
    for text in values:
        group, rest = _choose(text, options.OBJECTS, "-object", "Unknown object type")
        backend = read_group(group, rest)
        id = _new_id(backend, (*config.rng_backends, *config.iothreads, *config.memory_backends), "-object")
        kind = group.title.rpartition(" ")[2]
        if kind.startswith("memory-backend-"):
            config.memory_backends[id] = (kind[15:], backend)
            continue
        if group is options.OBJECTS["iothread"]:
            config.iothreads.append(id)
            continue
        config.rng_backends[id] = RngBackendConfig(id, backend.string("filename"))


def _netdevs(config: VmConfig, values: list[str]) -> None:
    if not values:
        return
    from stratovirt.cli.taps import read_tap

    for text in values:
        group, rest = _choose(text, options.NETDEVS, "-netdev", "no such kind of network back end")
        netdev = read_group(group, rest)
        id = _new_id(netdev, config.netdevs, "-netdev")
        if group is options.NETDEVS["vhost-user"]:
            config.netdevs[id] = NetdevConfig(id, queues=netdev.integer("queues"), chardev=netdev.string("chardev"))
        else:
            config.netdevs[id] = read_tap(id, netdev, text, config.netdevs.values())


def _chardevs(config: VmConfig, values: list[str]) -> None:
    for text in values:
        group, rest = _choose(text, options.CHARDEVS, "-chardev", "Unsupported chardev")
        chardev = health.read_chardev(group, rest)
        if chardev.id in config.chardevs:
            raise _taken("-chardev", chardev.id)
        config.chardevs[chardev.id] = chardev


def _devices(config: VmConfig, values: list[str]) -> None:
    for text in values:
        group, rest = _choose(text, options.DEVICES, "-device", "Unsupported device")
        device = read_group(group, rest)
        id = _new_id(device, (other.id for other in config.devices), "-device")
        config.devices.append(DeviceConfig(group.title.rpartition(" ")[2], id, device))


def _choose(text: str, groups: dict[str, Group], option: str, unknown: str) -> tuple[Group, str]:
    """The group that the first word of `text` names, and the rest. Raises: ConfigError."""
    kind, _, rest = text.partition(",")
    for spelling in ("driver=", "type=", "qom-type="):
        kind = kind.removeprefix(spelling)
    group = groups.get(kind)
    if group is None:
        from stratovirt.cli import refusals

        refusals.check_kind(option, kind, rest)
        raise ConfigError(f'{unknown}: "{kind}"', option=option, value=text, accepted=", ".join(groups))
    return group, rest


def _new_id(values: OptionValues, taken: Iterable[str], option: str) -> str:
    id = values.string("id")
    if id in taken:
        raise _taken(option, id)
    return id


def _taken(option: str, id: str) -> ConfigError:
    return ConfigError(f"{id} has been added", option=f"{option} id", value=id, accepted="an id of its own for each")


def add_qmp(config: VmConfig, values: list[str]) -> None:
    monitor = read_group(options.QMP, values[0])
    scheme, _, address = monitor.string("endpoint").partition(":")
    iothread = monitor.optional_string("iothread")
    if scheme == "unix":
        config.qmp.append(QmpConfig(path=str(read_value(options.QMP_PATH, address, "-qmp unix:")), iothread=iothread))
    elif scheme == "tcp":
        host, _, port = address.rpartition(":")
        read_value(options.QMP_HOST, host, "-qmp tcp:")
        number = read_value(options.QMP_PORT, port, "-qmp tcp:IP:")
        config.qmp.append(QmpConfig(host=host, port=number if isinstance(number, int) else 0, iothread=iothread))
    else:
        raise ConfigError("neither a unix socket nor TCP", option="-qmp", value=values[0], accepted=options.QMP_ACCEPTED)
    if not health.listens(monitor, "-qmp", values[0]):
        raise ConfigError("'server' and 'nowait' are needed: QMP listens and does not wait", option="-qmp", value=values[0],
                          accepted=options.QMP_ACCEPTED)


_INCOMING = Group("-incoming file:DIR", "", (Key("mapped", StrictBool(), "", True), Key("track", StrictBool(), "", False)))
_INCOMING_ACCEPTED = "file:DIR, and behind it mapped=false, track=true"


def _incoming(config: VmConfig, values: list[str]) -> None:
    address, _, rest = values[0].partition(",")
    scheme, colon, directory = address.partition(":")
    word = scheme.lower() if scheme in (scheme.lower(), scheme.upper(), scheme.capitalize()) else ""
    if not colon or word not in ("file", "unix", "tcp"):
        raise ConfigError("not an address", option="-incoming", value=values[0], accepted=_INCOMING_ACCEPTED)
    if word != "file":
        raise ConfigError("MicroVM does not support migration", option="-incoming", value=values[0],
                          accepted=_INCOMING_ACCEPTED)
    path = str(read_value(_FILE, directory, "-incoming file:"))
    config.incoming = IncomingConfig(path)
    if rest:
        group = read_group(_INCOMING, rest)
        config.incoming = IncomingConfig(path, group.boolean("mapped"), group.boolean("track"))


def _freeze(config: VmConfig, values: list[str]) -> None:
    config.freeze = True


def _action(config: VmConfig, values: list[str]) -> None:
    config.reboot_action = read_group(options.ACTION, values[0]).string("reboot")


def _no_reboot(config: VmConfig, values: list[str]) -> None:
    if config.reboot_action == "reset":
        raise ConfigError("contradicts -action reboot=reset", option="-no-reboot", accepted="one of the two")


def _daemonize(config: VmConfig, values: list[str]) -> None:
    config.daemonize = True


def _pidfile(config: VmConfig, values: list[str]) -> None:
    config.pidfile = str(read_value(_FILE, values[0], "-pidfile"))


def _disable_seccomp(config: VmConfig, values: list[str]) -> None:
    config.seccomp = False


def _log_file(config: VmConfig, values: list[str]) -> None:
    if values:
        config.log_file = str(read_value(_FILE, values[0], "-D"))


_IN_ORDER: tuple[tuple[str, Callable[[VmConfig, list[str]], None]], ...] = (
    ("name", _name), ("machine", _machine), ("accel", _accel), ("mod-test", _mod_test), ("m", _memory),
    ("mem-path", _mem_path), ("mem-prealloc", _mem_prealloc), ("smp", _smp),
    ("cpu", _cpu), ("kernel", _kernel), ("initrd", _initrd), ("append", _append), ("drive", _drives),
    ("object", _objects), ("netdev", _netdevs), ("chardev", _chardevs), ("device", _devices),
    ("qmp", add_qmp), ("incoming", _incoming), ("S", _freeze), ("freeze", _freeze), ("action", _action),
    ("no-reboot", _no_reboot), ("daemonize", _daemonize), ("pidfile", _pidfile), ("D", _log_file),
    ("disable-seccomp", _disable_seccomp),
)
