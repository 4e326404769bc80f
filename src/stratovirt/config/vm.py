"""What the user asked for: one VmConfig, pure data.

The command line fills it (`cli/`), the machine reads it (`machine/`); nothing here touches the host. Plain classes with
slots and not dataclasses, because the import of `dataclasses` takes longer than creating the virtual machine.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.config.schema import OptionValues

MIB = 1 << 20


class SmpConfig:
    """CPU topology: `cpus` boot; sockets * dies * clusters * cores * threads == max_cpus."""

    __slots__ = ("clusters", "cores", "cpus", "dies", "max_cpus", "sockets", "threads")

    def __init__(self, cpus: int = 1, max_cpus: int = 1, sockets: int = 1, dies: int = 1, clusters: int = 1,
                 cores: int = 1, threads: int = 1) -> None:
        self.cpus = cpus
        self.max_cpus = max_cpus
        self.sockets = sockets
        self.dies = dies
        self.clusters = clusters
        self.cores = cores
        self.threads = threads

    __hash__ = None  # type: ignore[assignment]  # it can be changed

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SmpConfig) and all(getattr(self, name) == getattr(other, name) for name in self.__slots__)


class CharDeviceConfig:
    """A character device: `kind` is stdio, pty, file, socket or redirect-to-log.

    `path` is the file or the unix socket, `host` and `port` the TCP listener; `server` says that the program listens.
    `reconnect` is how many seconds after its loss a vhost-user back end is tried again, 0 for never.
    """

    __slots__ = ("host", "id", "kind", "path", "port", "reconnect", "server")

    def __init__(self, id: str, kind: str, path: str = "", host: str = "", port: int = 0, server: bool = False,
                 reconnect: int = 0) -> None:
        self.id = id
        self.kind = kind
        self.path = path
        self.host = host
        self.port = port
        self.server = server
        self.reconnect = reconnect


class DriveConfig:
    """A disk image. `direct` is None when the user did not say: O_DIRECT where the file system has it.

    `aio` is None when the user did not say: the kernel's own engine with O_DIRECT, none without. `detect_zeroes` is off, on
    or unmap; `iops_limit` in requests a second, 0 for none.
    """

    __slots__ = ("aio", "detect_zeroes", "direct", "discard", "file", "id", "iops_limit", "readonly")

    def __init__(self, id: str, file: str, readonly: bool = False, direct: bool | None = None, aio: str | None = None,
                 discard: bool = False, detect_zeroes: str = "off", iops_limit: int = 0) -> None:
        self.id = id
        self.file = file
        self.readonly = readonly
        self.direct = direct
        self.aio = aio
        self.discard = discard
        self.detect_zeroes = detect_zeroes
        self.iops_limit = iops_limit


class RngBackendConfig:
    """`-object rng-random`: where random bytes come from."""

    __slots__ = ("filename", "id")

    def __init__(self, id: str, filename: str) -> None:
        self.id = id
        self.filename = filename


class NetdevConfig:
    """`-netdev tap`: the device by its name, or by inherited descriptors of its queues, one for each pair, which then count.

    With `vhost` the kernel serves the pairs; `vhost_fds` are open /dev/vhost-net descriptors, none or one for each pair.
    `-netdev vhost-user`: only `chardev`, the id of the back end's socket, and `queues`.
    """

    __slots__ = ("chardev", "fds", "id", "ifname", "queues", "vhost", "vhost_fds")

    def __init__(self, id: str, ifname: str = "", fds: tuple[int, ...] = (), queues: int = 1, vhost: bool = False,
                 vhost_fds: tuple[int, ...] = (), chardev: str = "") -> None:
        self.id = id
        self.ifname = ifname
        self.fds = fds
        self.queues = len(fds) or queues
        self.vhost = vhost
        self.vhost_fds = vhost_fds
        self.chardev = chardev


class RamConfig:
    """What guest memory is made of, other than anonymous private memory. `kind` is ram, memfd or file.

    `option` is what an error about `path` names. `policy` is a NUMA policy of the host over `host_nodes`.
    """

    __slots__ = ("host_nodes", "id", "kind", "option", "path", "policy", "prealloc", "share")

    def __init__(self, kind: str, *, id: str = "", path: str = "", share: bool = False, prealloc: bool = False,
                 host_nodes: tuple[int, ...] = (), policy: str = "default", option: str = "-mem-path") -> None:
        self.kind = kind
        self.id = id
        self.path = path
        self.share = share
        self.prealloc = prealloc
        self.host_nodes = host_nodes
        self.policy = policy
        self.option = option


class DeviceConfig:
    """One `-device`: the driver's name, its id and its validated options."""

    __slots__ = ("driver", "id", "options")

    def __init__(self, driver: str, id: str, options: OptionValues) -> None:
        self.driver = driver
        self.id = id
        self.options = options


class QmpConfig:
    """A QMP listener: a unix socket `path`, or `host` and `port`. `option` is what the user typed, for errors.

    `iothread` must be there, and has nothing to do: what a command changes belongs to the main thread.
    """

    __slots__ = ("host", "iothread", "option", "path", "port")

    def __init__(self, path: str = "", host: str = "", port: int = 0, option: str = "-qmp",
                 iothread: str | None = None) -> None:
        self.path = path
        self.host = host
        self.port = port
        self.option = option
        self.iothread = iothread


class IncomingConfig:
    """`-incoming file:DIRECTORY`; `mapped` memory is copied when it is written, other is read at start. `track`: what is
    written is counted, for incremental snapshots.
    """

    __slots__ = ("directory", "mapped", "track")

    def __init__(self, directory: str, mapped: bool = True, track: bool = False) -> None:
        self.directory = directory
        self.mapped = mapped
        self.track = track


class VmConfig:
    """Everything asked for on one command line. Defaults are those of an empty command line."""

    __slots__ = (
        "accel", "arguments", "chardevs", "cpu_pmu", "cpu_steal_time", "cpu_sve",
        "daemonize", "devices", "directory", "drives", "dump_guest_core", "freeze", "incoming", "initrd", "iothreads", "kernel",
        "kernel_cmdline", "log_file", "machine_type", "mem_path", "mem_prealloc", "mem_share", "memory_backend",
        "memory_backends", "memory_size", "memory_size_given", "mod_test", "name", "netdevs", "pidfile", "qmp", "ram",
        "reboot_action", "rng_backends", "seccomp", "serial", "smp", "spare_backends", "vhost_users",
    )

    def __init__(self) -> None:
        self.name = ""
        self.arguments: list[str] = []  # all of this as it was written
        self.directory = ""  # where that was, once the machine is about to run
        self.machine_type = "microvm"
        self.accel = "kvm"  # or "test"
        self.mod_test = ""  # the socket that the test accelerator connects to
        self.dump_guest_core = True
        self.smp = SmpConfig()
        self.cpu_pmu = False  # these three on arm64
        self.cpu_sve = False
        self.cpu_steal_time = False
        self.memory_size = 256 * MIB
        self.memory_size_given = False
        self.mem_share = False
        self.mem_path = ""
        self.mem_prealloc = False
        self.memory_backend = ""  # the id of the one that is the machine's RAM
        self.memory_backends: dict[str, tuple[str, OptionValues]] = {}  # ram, memfd or file, and its keys
        self.ram: RamConfig | None = None  # what the five above come to; None: anonymous and private
        self.kernel = ""
        self.initrd = ""
        self.kernel_cmdline = ""
        self.serial: CharDeviceConfig | None = None
        self.chardevs: dict[str, CharDeviceConfig] = {}  # without those that others have taken: -serial, -mon,
        self.vhost_users: dict[str, CharDeviceConfig] = {}  # and devices with a back end in another process
        self.spare_backends: list[str] = []  # those of them that no device uses yet
        self.drives: dict[str, DriveConfig] = {}
        self.rng_backends: dict[str, RngBackendConfig] = {}
        self.netdevs: dict[str, NetdevConfig] = {}
        self.iothreads: list[str] = []  # their ids
        self.devices: list[DeviceConfig] = []
        self.qmp: list[QmpConfig] = []
        self.freeze = False
        self.incoming: IncomingConfig | None = None
        self.daemonize = False
        self.pidfile = ""
        self.log_file = ""
        self.reboot_action = "shutdown"
        self.seccomp = True
