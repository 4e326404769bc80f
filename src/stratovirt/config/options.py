"""The declarations of every option value that a microVM of today can be built from.

What the interface has and this version not yet is in `config/later.py`, which only help, documentation and the error for
such an option import.
"""

from __future__ import annotations

from stratovirt.config.schema import (
    GIB,
    MIB,
    U8_MAX,
    U32_MAX,
    U64_MAX,
    Bool,
    Choice,
    Flag,
    Group,
    Int,
    IntList,
    Ipv4,
    Key,
    Mac,
    Path,
    PowerOfTwo,
    Size,
    SocketPath,
    StrictBool,
    String,
)

MAX_CPUS = 254
MIN_MEMORY = 128 * MIB
MAX_MEMORY = 512 * GIB
MEMORY_GRANULE = 4096
MAX_QUEUES = 32
MAX_QUEUE_PAIRS = 16
MAX_IOTHREADS = 8
SERIAL_NUMBER_SIZE = 20
FS_TAG_SIZE = 36

_BOOL = Bool()
_STRICT = StrictBool()
_STRING = String()
_ID = Key("id", _STRING, "the name by which other options and QMP refer to it", required=True)
_CHARDEV = Key("chardev", _STRING, "the id of its -chardev", required=True)
_BACKEND = Key("chardev", _STRING, "the id of a -chardev socket with the path on which its back end listens", required=True)
_FD = Int(0, (1 << 31) - 1)
_ACCEL = Choice("kvm", "kvm:tcg", "test")

MACHINE = Group("-machine", "the machine model and what holds for all of it", first="type", keys=(
    Key("type", Choice("none", "microvm", "q35", "virt", fold=True), "machine model", "microvm", works=("microvm",)),
    Key("accel", _ACCEL, "kvm, or test: devices driven through -mod-test; kvm:tcg is taken as kvm", "kvm"),
    Key("dump-guest-core", _BOOL, "let guest memory be part of a core dump", True, aliases=("dump_guest_core",)),
    Key("mem-share", _BOOL, "guest memory that another process can map", False),
    Key("memory-backend", _STRING, "the id of the -object memory-backend-… that is the guest's memory; QEMU's key"),
    Key("usb", _BOOL, "a USB controller", False, works=(False,), refusal="this machine has no USB controller"),
))

ACCEL = Group("-accel", "what runs the guest's instructions, before -machine accel=", first="accel", keys=(
    Key("accel", _ACCEL, "kvm, or test: devices driven through -mod-test; kvm:tcg is taken as kvm", "kvm",
        required=True),
))

_DERIVED = Int(0, MAX_CPUS)
SMP = Group("-smp", "virtual CPUs and their topology; a count of 0 is derived from the others", first="cpus", keys=(
    Key("cpus", Int(1, MAX_CPUS), "CPUs at start", required=True),
    Key("maxcpus", _DERIVED, "the product of the counts below, at least cpus", 0),
    Key("sockets", _DERIVED, "sockets", 0),
    Key("dies", Int(1, MAX_CPUS), "dies in a socket", 1),
    Key("clusters", Int(1, MAX_CPUS), "clusters in a die; on x86_64 they count as cores", 1),
    Key("cores", _DERIVED, "cores in a cluster", 0),
    Key("threads", _DERIVED, "threads in a core", 0),
))

CPU = Group("-cpu", "the CPU model that the guest sees", first="model", keys=(
    Key("model", Choice("host"), "the host's own", required=True),
    Key("pmu", _BOOL, "performance counters, on arm64; without meaning on x86_64", False),
    Key("sve", _BOOL, "scalable vectors, on arm64; without meaning on x86_64", False),
    Key("kvm-steal-time", _BOOL, "the guest learns of stolen time, on arm64; without meaning on x86_64", False),
))

MEMORY = Group("-m", "guest memory", first="size", keys=(
    Key("size", Size(MIN_MEMORY, MAX_MEMORY), "memory at start", 256 * MIB),
    Key("maxmem", Size(MIN_MEMORY), "at least size; of use to virtio-mem devices only", ignored=True),
))

DRIVE = Group("-drive", "a disk image for a -device", keys=(
    _ID,
    Key("file", Path(), "the image: a regular file or a block device", required=True),
    Key("if", Choice("none", "pflash"), "none: for a -device; pflash: firmware", "none", works=("none",)),
    Key("unit", Int(0, 1), "which pflash", works=()),
    Key("format", Choice("raw", "qcow2"), "image format; it is never guessed", "raw", works=("raw",)),
    Key("readonly", _BOOL, "refuse writes", False),
    Key("direct", _BOOL, "bypass the host's page cache; if left out, wherever the file system can"),
    Key("aio", Choice("off", "native", "io_uring", "threads"),
        "how requests are carried out; if left out, native with O_DIRECT and off without"),
    Key("media", Choice("disk", "cdrom"), "cdrom: a disk that refuses writes; a microVM has no other drive", "disk"),
    Key("discard", _BOOL, "pass the guest's discards to the image", False),
    Key("detect-zeroes", Choice("off", "on", "unmap"), "turn writes of zeroes into zeroed ranges, or with unmap into holes",
        "off"),
    Key("throttling.iops-total", Int(0, 1_000_000), "requests a second for each queue, 0 for no limit", 0),
    Key("l2-cache-size", Size(0, 32 * MIB), "memory for the tables of a qcow2 image; a raw one has none", ignored=True),
    Key("refcount-cache-size", Size(0, 32 * MIB), "memory for the reference counts of a qcow2 image", ignored=True),
))

_NEVER_WAITS = "the guest never waits for a client"
_LISTEN = (
    Key("server", Flag(), "listen", False),
    Key("nowait", Flag(), "start the guest without waiting for a client", False),
    Key("wait", _BOOL, "wait=off is QEMU's spelling of nowait", works=(False,), refusal=_NEVER_WAITS),
)
_CHARDEVS: tuple[tuple[str, str, tuple[Key, ...]], ...] = (
    ("stdio", "standard input and output; a terminal is switched to raw mode", ()),
    ("pty", "a new pseudo-terminal; query-chardev tells its name", ()),
    ("file", "output at the end of a file, which is created if need be", (
        Key("path", Path(), "the file", required=True),)),
    ("socket", "one client at a time on a unix socket (path) or TCP (port), or a vhost-user back end (path)", (
        Key("path", SocketPath(), "the unix socket"),
        Key("host", Ipv4(), "the address to listen on; 0.0.0.0 if left out"),
        Key("port", Int(1, 65535), "the TCP port"),
        *_LISTEN,
        Key("reconnect", Int(0, 3600), "seconds until a lost vhost-user back end is tried again, 0 for never", 3))),
    ("redirect-to-log", "every line of output becomes a line of the log", ()),
)
CHARDEVS = {kind: Group(f"-chardev {kind}", help, (_ID, *keys)) for kind, help, keys in _CHARDEVS}
SERIALS = {kind: Group(f"-serial {kind}", help, keys) for kind, help, keys in _CHARDEVS}

# `-qmp unix:PATH,…` and `-qmp tcp:HOST:PORT,…`: what stands before the first comma is a value of its own.
QMP = Group("-qmp", "a QMP monitor on a socket", first="endpoint", keys=(
    Key("endpoint", String(4200), "unix:PATH or tcp:IP:PORT", required=True),
    *_LISTEN,
    Key("iothread", _STRING, "an iothread; commands are carried out on the main thread all the same", ignored=True),
))
QMP_PATH = Key("unix", SocketPath(), "the unix socket")
QMP_HOST = Key("tcp", Ipv4(), "the address to listen on")
QMP_PORT = Key("port", Int(1, 65535), "the TCP port")
QMP_ACCEPTED = "unix:PATH,server,nowait or tcp:IP:PORT,server,nowait"

# -accel test: who drives the devices listens there.
MOD_TEST = Key("mod-test", SocketPath(), "the unix socket")

MON = Group("-mon", "a QMP monitor on a -chardev socket", keys=(
    Key("chardev", _STRING, "the id of a listening -chardev socket", required=True),
    Key("mode", Choice("control"), "QMP", required=True),
    Key("id", _STRING, "a name for it", ignored=True),
))

ACTION = Group("-action", "what becomes of the machine when the guest ends it", keys=(
    Key("reboot", Choice("reset", "shutdown"), "start again in place, or end", "shutdown"),
    Key("shutdown", Choice("poweroff"), "end", "poweroff"),
))

NETDEVS = {
    "tap": Group("-netdev tap", "a tap device of the host", (
        _ID,
        Key("ifname", _STRING, "name of the tap device; it is created if need be"),
        Key("fd", _FD, "an inherited descriptor of a tap opened with IFF_NO_PI and IFF_VNET_HDR"),
        Key("fds", IntList(1 << 20), "the same, one for each queue pair; opened with IFF_MULTI_QUEUE if they are several"),
        Key("path", Path(), "path of an auxiliary device; of use to netdev_replace only", ignored=True),
        Key("queues", Int(1, MAX_QUEUE_PAIRS), "queue pairs; as many as fds if those are given", 1),
        Key("vhost", _BOOL, "let the host kernel move the packets", False),
        Key("vhostfd", _FD, "an open /dev/vhost-net descriptor, with vhost=on"),
        Key("vhostfds", IntList(1 << 20), "the same, one for each queue pair"),
        Key("macnat", _BOOL, "translate MAC addresses", False, works=(False,), refusal="frames keep their addresses here"),
    )),
    "vhost-user": Group("-netdev vhost-user", "a network back end in another process", (
        _ID,
        _BACKEND,
        Key("queues", Int(1, MAX_QUEUE_PAIRS), "queue pairs", 1),
    )),
}

_MEMORY_BACKEND = (
    _ID,
    Key("size", Size(1), "bytes; the machine's memory has to be as large", required=True),
    Key("host-nodes", IntList(128), "NUMA nodes of the host"),
    Key("policy", Choice("default", "preferred", "bind", "interleave"), "how they are used", "default"),
    Key("dump-guest-core", _BOOL, "let it be part of a core dump", True),
    Key("mem-prealloc", _BOOL, "allocate all of it at start", False, aliases=("prealloc",)),
)
OBJECTS = {
    "memory-backend-ram": Group("-object memory-backend-ram", "anonymous memory", (
        *_MEMORY_BACKEND, Key("share", _BOOL, "can be mapped by others", False))),
    "memory-backend-memfd": Group("-object memory-backend-memfd", "memory in a memfd", (
        *_MEMORY_BACKEND, Key("share", _BOOL, "can be mapped by others", True))),
    "memory-backend-file": Group("-object memory-backend-file", "memory in a file", (
        *_MEMORY_BACKEND, Key("share", _BOOL, "can be mapped by others", True),
        Key("mem-path", Path(), "the file, or a directory (of hugetlbfs, for example) for a temporary one", required=True))),
    "iothread": Group("-object iothread", "a thread for devices; at most 8", (_ID,)),
    "rng-random": Group("-object rng-random", "a source of random bytes on the host", (
        _ID,
        Key("filename", Path(), "a character device such as /dev/urandom", required=True),
    )),
}

DEVICES = {
    "virtio-blk-device": Group("-device virtio-blk-device", "a disk", (
        _ID,
        Key("drive", _STRING, "the id of its -drive", required=True),
        Key("bootindex", Int(0, U8_MAX), "rank in the boot order; a microvm boots its -kernel", ignored=True),
        Key("num-queues", Int(1, MAX_QUEUES), "request queues", 1),
        Key("iothread", _STRING, "the iothread that serves it"),
        Key("queue-size", PowerOfTwo(4, 1024), "descriptors in a queue", 256),
        Key("serial", String(SERIAL_NUMBER_SIZE), "the serial number that the guest sees"),
    )),
    "virtio-net-device": Group("-device virtio-net-device", "a network interface", (
        _ID,
        Key("netdev", _STRING, "the id of its -netdev", required=True),
        Key("mac", Mac(), "MAC address; 52:54:00:12:34:56 and upwards if left out"),
        Key("iothread", _STRING, "the iothread that serves it"),
        Key("rx-iothread", _STRING, "the iothread for received packets, before iothread"),
        Key("tx-iothread", _STRING, "the iothread for sent packets, before iothread"),
        Key("mq", _BOOL, "several queue pairs; if left out, as many as the netdev has"),
        Key("queue-size", PowerOfTwo(256, 4096), "descriptors in a queue", 256),
        Key("vectors", Int(0, U32_MAX), "interrupt vectors", ignored=True),
    )),
    "virtio-rng-device": Group("-device virtio-rng-device", "random bytes for the guest", (
        _ID,
        Key("rng", _STRING, "the id of its -object rng-random", required=True),
        Key("max-bytes", Int(1, U64_MAX), "bytes in a period, with period"),
        Key("period", Int(1, U64_MAX), "milliseconds, with max-bytes"),
    )),
    "virtio-serial-device": Group("-device virtio-serial-device", "controller of virtio consoles and ports", (
        _ID,
        Key("max-ports", Int(1, 31), "ports", 31, aliases=("max_ports",)),
    )),
    "virtconsole": Group("-device virtconsole", "console on the virtio-serial-device", (
        _ID,
        _CHARDEV,
        Key("nr", Int(0, 30), "port number; the lowest free one if left out"),
    )),
    "virtserialport": Group("-device virtserialport", "port on the virtio-serial-device; its name in the guest is its id", (
        _ID,
        _CHARDEV,
        Key("nr", Int(1, 30), "port number, 0 is for a console; the lowest free one if left out"),
    )),
    "virtio-balloon-device": Group("-device virtio-balloon-device", "takes memory back from the guest; one for a machine", (
        _ID,
        Key("deflate-on-oom", _STRICT, "give memory back before the guest runs out", False),
        Key("free-page-reporting", _STRICT, "the guest tells which pages are free", False),
        Key("auto-balloon", _STRICT, "the guest's own driver says how much it can do without", False),
        Key("membuf-percent", Int(20, 80), "what it is to keep beside what its programs need, with auto-balloon", 50),
        Key("monitor-interval", Int(5, 300), "seconds between its looks, with auto-balloon", 10),
    )),
    "vhost-vsock-device": Group("-device vhost-vsock-device", "sockets between host and guest", (
        _ID,
        Key("guest-cid", Int(3, U32_MAX), "the guest's address", required=True),
        Key("vhostfd", _FD, "an open /dev/vhost-vsock descriptor"),
    )),
    "vhost-user-fs-device": Group("-device vhost-user-fs-device", "a shared directory, served by virtiofsd", (
        _ID,
        _BACKEND,
        Key("tag", String(FS_TAG_SIZE - 1), "the name that the guest mounts", required=True),
    )),
    "vhost-user-blk-device": Group("-device vhost-user-blk-device", "a disk in another process", (
        _ID,
        _BACKEND,
        Key("num-queues", Int(1, MAX_QUEUES), "request queues", 1),
        Key("queue-size", PowerOfTwo(4, 1024), "descriptors in a queue", 256),
        Key("bootindex", Int(0, U8_MAX), "rank in the boot order; a microvm boots its -kernel", ignored=True),
    )),
}
MIN_RNG_RATE, MAX_RNG_RATE = 64, 1_000_000_000  # bytes a second
