"""The command line: what it makes of good arguments, and what it says about bad ones."""

from __future__ import annotations

import shlex

import pytest

from stratovirt.cli import command
from stratovirt.config.options import CHARDEVS, DEVICES, OBJECTS
from stratovirt.config.vm import VmConfig
from stratovirt.errors import ConfigError

MIB = 1 << 20
DISK = "-drive id=d,file=/disk.img -device virtio-blk-device,id=blk,drive=d"


def parse(line: str) -> VmConfig:
    return command.parse(shlex.split(line))


def refuse(line: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(line)
    return caught.value


def test_defaults() -> None:
    config = parse("-kernel /k")
    assert (config.kernel, config.initrd, config.kernel_cmdline) == ("/k", "", "")
    assert (config.memory_size, config.smp.cpus, config.smp.max_cpus) == (256 * MIB, 1, 1)
    assert (config.machine_type, config.accel, config.dump_guest_core) == ("microvm", "kvm", True)
    assert (config.serial, config.qmp, config.devices) == (None, [], [])
    assert (config.freeze, config.daemonize, config.reboot_action) == (False, False, "shutdown")


def test_everything_at_once_in_any_order() -> None:
    config = parse(
        "-device virtio-blk-device,id=blk,drive=d,bootindex=1,serial=SN,queue-size=128,num-queues=1 -serial chardev:con "
        "-chardev pty,id=con socket,id=mon,path=/mon.sock,server,nowait -mon chardev=mon,mode=control,id=m "
        "-qmp unix:/q.sock,server,nowait -D /log -S -daemonize -pidfile /pid -disable-seccomp "
        "-object rng-random,id=r,filename=/dev/urandom -device virtio-rng-device,id=rng,rng=r,max-bytes=1024,period=1000 "
        "-drive id=d,file=/disk.img,readonly=on,direct=off,if=none,format=raw,media=disk,aio=off -append a b=c -append d "
        "-initrd /i -kernel /k -cpu host,pmu=on -smp 4,sockets=2 -m size=1G,maxmem=2G -accel kvm:tcg "
        "-machine type=MicroVM,dump-guest-core=off,mem-share=off,usb=off -name vm -action reboot=reset")
    assert (config.name, config.kernel, config.initrd, config.kernel_cmdline) == ("vm", "/k", "/i", "a b=c d")
    assert config.memory_size == 1 << 30
    assert not config.dump_guest_core
    assert (config.freeze, config.daemonize, config.pidfile, config.log_file) == (True, True, "/pid", "/log")
    assert config.reboot_action == "reset"
    assert config.serial is not None
    assert (config.serial.id, config.serial.kind) == ("con", "pty")
    assert [(qmp.path, qmp.option) for qmp in config.qmp] == [("/q.sock", "-qmp"), ("/mon.sock", "-chardev id=mon")]
    assert config.chardevs == {}, "claimed by -serial and -mon"
    drive = config.drives["d"]
    assert (drive.file, drive.readonly, drive.direct, drive.aio) == ("/disk.img", True, False, "off")
    assert config.rng_backends["r"].filename == "/dev/urandom"
    blk, rng = config.devices
    assert (blk.driver, blk.id, blk.options.string("drive")) == ("virtio-blk-device", "blk", "d")
    assert (blk.options.integer("queue-size"), blk.options.string("serial")) == (128, "SN")
    assert (rng.options.optional_integer("max-bytes"), rng.options.optional_integer("period")) == (1024, 1000)


@pytest.mark.parametrize("line", ["-accel test", "-machine microvm,accel=test", "-accel test -machine microvm,accel=kvm"])
def test_the_test_accelerator_needs_no_kernel(line: str) -> None:
    config = parse(f"{line} -mod-test /run/test.sock")
    assert (config.accel, config.mod_test, config.kernel) == ("test", "/run/test.sock", "")


def test_everything_that_a_disk_takes() -> None:
    drive = parse("-kernel k -drive id=d,file=/f,direct=on,aio=io_uring,discard=unmap,detect-zeroes=on,"
                  "throttling.iops-total=1000000").drives["d"]
    assert (drive.direct, drive.aio, drive.discard, drive.detect_zeroes, drive.iops_limit) == (
        True, "io_uring", True, "on", 1_000_000)


def test_defaults_of_a_disk() -> None:
    config = parse(f"-kernel k {DISK}")
    drive = config.drives["d"]
    assert (drive.aio, drive.discard, drive.detect_zeroes, drive.iops_limit) == (None, False, "off", 0)
    options = config.devices[0].options
    assert config.drives["d"].direct is None
    assert (options.integer("queue-size"), options.integer("num-queues"), options.optional_string("serial")) == (256, 1, None)


@pytest.mark.parametrize(("text", "expected"), [
    ("1", (1, 1, 1, 1, 1, 1, 1)),
    ("254", (254, 254, 1, 1, 1, 254, 1)),
    ("cpus=4", (4, 4, 1, 1, 1, 4, 1)),
    ("4,sockets=2", (4, 4, 2, 1, 1, 2, 1)),
    ("2,sockets=2,cores=1,threads=1", (2, 2, 2, 1, 1, 1, 1)),
    ("8,cores=2", (8, 8, 4, 1, 1, 2, 1)),
    ("8,cores=2,sockets=2", (8, 8, 2, 1, 1, 2, 2)),
    ("8,dies=2,threads=2", (8, 8, 1, 2, 1, 2, 2)),
    ("8,clusters=2,sockets=2", (8, 8, 2, 1, 2, 2, 1)),
    ("2,maxcpus=4", (2, 4, 1, 1, 1, 4, 1)),
    ("3,sockets=2,cores=2,threads=1", (3, 4, 2, 1, 1, 2, 1)),
])
def test_topology(text: str, expected: tuple[int, ...]) -> None:
    smp = parse(f"-kernel k -smp {text}").smp
    assert (smp.cpus, smp.max_cpus, smp.sockets, smp.dies, smp.clusters, smp.cores, smp.threads) == expected


@pytest.mark.parametrize("text", [
    "0", "255", "", "-1", "x", "cores=2", "4,sockets=3", "3,sockets=2", "8,maxcpus=4", "4,maxcpus=255", "5,cores=2,sockets=2",
    "200,sockets=2,cores=200,threads=1", "4,sockets=2,cores=1,threads=1", "4,cpus=4", "4,dies=0", "4,modules=2",
])
def test_topology_that_cannot_be(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        command.parse(["-kernel", "k", "-smp", text])
    assert caught.value.option.startswith("-smp")
    assert caught.value.accepted


@pytest.mark.parametrize(("text", "size"), [("128", 128 * MIB), ("131072K", 128 * MIB), ("512G", 512 << 30),
                                            ("size=2g", 2 << 30)])
def test_memory(text: str, size: int) -> None:
    assert parse(f"-kernel k -m {text}").memory_size == size


@pytest.mark.parametrize("line", [
    "stdio", "pty", "file,path=/f", "socket,path=/s,server,nowait", "socket,path=/s,server=on,wait=off",
    "socket,host=127.0.0.1,port=1,server,nowait", "socket,port=65535,server,nowait",
])
def test_serial_and_chardev_take_the_same(line: str) -> None:
    serial = parse(f"-kernel k -serial {line}").serial
    kind, _, rest = line.partition(",")
    chardev = parse(f"-kernel k -chardev {kind},id=c{',' if rest else ''}{rest}").chardevs["c"]
    assert serial is not None
    assert ([serial.kind, serial.path, serial.host, serial.port, serial.server]
            == [chardev.kind, chardev.path, chardev.host, chardev.port, chardev.server])


@pytest.mark.parametrize("text", ["unix:/q,server,nowait", "unix:/q,nowait,server", "unix:/q,server=on,wait=off"])
def test_qmp_unix(text: str) -> None:
    assert parse(f"-kernel k -qmp {text}").qmp[0].path == "/q"


def test_qmp_tcp() -> None:
    qmp = parse("-kernel k -qmp tcp:127.0.0.1:4444,server,nowait").qmp[0]
    assert (qmp.path, qmp.host, qmp.port) == ("", "127.0.0.1", 4444)


def test_what_libvirt_sends_means_nothing() -> None:
    parse("-kernel k -overcommit mem-lock=off -uuid 1b4e -no-user-config -nodefaults -sandbox off -msg timestamp=on "
          "-rtc base=utc -boot strict=on -nographic -realtime mlock=off -usb -display none -no-shutdown")
    assert parse("-kernel k -name guest=f2,debug-threads=on").name == "f2"


def test_log_without_a_file_takes_no_argument() -> None:
    assert parse("-kernel k -D -disable-seccomp").log_file == ""


def test_double_dash_ends_the_options() -> None:
    assert parse("-kernel k -- -foo bar").kernel == "k"


def test_no_reboot_is_the_default() -> None:
    assert parse("-kernel k -no-reboot").reboot_action == "shutdown"


# (line, a part of the option, the value, a part of the message)
BAD = [
    # the outer grammar
    ("-kernel k -foo", "-foo", None, "Found argument 'foo' which wasn't expected, or isn't valid in the context"),
    ("-kernel k --smp 2", "--smp", None, "Found argument '-smp' which wasn't expected"),
    ("vm -kernel k", "vm", None, "Found argument 'vm' which wasn't expected"),
    ("-", "-", None, "Found argument '' which"),
    ("-kernel", "-kernel", None, "requires a value, but none was supplied"),
    ("-drive", "-drive", None, "requires a value, but none was supplied"),
    ("-kernel a b", "-kernel", "a b", "only needs one value"),
    ("-D a b", "-D", "a b", "only needs one value"),
    ("-kernel a -kernel b", "-kernel", "b", "was provided more than once"),
    ("-uuid a -uuid b", "-uuid", "b", "was provided more than once"),
    ("-S -S", "-S", None, "was provided more than once"),
    ("-S on", "-S", "on", "is illegal for argument 'S'"),
    # the inner grammar
    ("-kernel k -drive id=a,file=f,colour=red", "-drive", "colour=red", "Found argument 'colour' which wasn't expected"),
    ("-kernel k -drive id=a,id=b,file=f", "-drive id", "b", "given more than once"),
    ("-kernel k -drive id=a,file", "-drive file", None, "has no value"),
    ("-kernel k -drive id=a,,file=f", "-drive", "", "empty key"),
    ("-kernel k -drive file=f", "-drive id", None, "missing"),
    ("-kernel k -drive id=,file=f", "-drive id", "", "empty"),
    ("-kernel k -drive id=a,file=f,readonly=maybe", "-drive readonly", "maybe", "not a switch"),
    ("-kernel k -m 127M", "-m", "127M", "too small"),
    ("-kernel k -m 513G", "-m", "513G", "too large"),
    ("-kernel k -m 256,slots=2", "-m", "slots=2", "Found argument 'slots'"),
    ("-kernel k -m 512,maxmem=256", "-m", "512,maxmem=256", "maxmem is less than size"),
    (f"-kernel k -name {'n' * 256}", "-name", "n" * 256, "256 bytes are too long"),
    ("-kernel k -cpu max", "-cpu", "max", "unknown"),
    ("-kernel k -accel tcg", "-accel", "tcg", "unknown"),
    ("-kernel k -accel test", "-accel", "test", "needs a socket"),
    ("-kernel k -mod-test /s", "-mod-test", "/s", "MST can only use test accel!"),
    ("-kernel k -machine microvm,accel=test -accel kvm -mod-test /s", "-mod-test", "/s", "MST can only use test accel!"),
    (f"-accel test -mod-test {'s' * 108}", "-mod-test", "s" * 108, "108 bytes are too long"),
    ("-kernel k -machine pc", "-machine", "pc", "unknown"),
    ("-kernel k -machine microvm,usb=on", "-machine usb", "on", "no USB controller"),
    ("-kernel k -machine microvm,gic-version=3", "-machine", "gic-version=3", "Found argument 'gic-version'"),
    ("-kernel k -action reboot=pause", "-action reboot", "pause", "unknown"),
    ("-kernel k -action reboot=reset -no-reboot", "-no-reboot", None, "contradicts"),
    # devices and back ends
    ("-kernel k -device virtio-blk-device,drive=d", "-device virtio-blk-device,id", None, "missing"),
    ("-kernel k -device virtio-blk-device", "-device virtio-blk-device,id", None, "missing"),
    ("-kernel k -device virtio-blk-device,id=b,drive=d", "-device virtio-blk-device,drive", "d", "there is no drive d"),
    (f"-kernel k {DISK} -device virtio-blk-device,id=b,drive=d", "-device virtio-blk-device,drive", "d", "is used by blk"),
    (f"-kernel k {DISK} -device virtio-rng-device,id=blk,rng=r", "-device id", "blk", "has been added"),
    ("-kernel k -drive id=d,file=a -drive id=d,file=b", "-drive id", "d", "d has been added"),
    ("-kernel k -drive id=a,file=/x -drive id=b,file=/./x,readonly=on", "-drive file", "/./x", "in another -drive already"),
    (f"-kernel k {DISK},serial={'s' * 21}", "-device virtio-blk-device,serial", "s" * 21, "21 bytes are too long"),
    (f"-kernel k {DISK},queue-size=3", "-device virtio-blk-device,queue-size", "3", "out of range"),
    (f"-kernel k {DISK},queue-size=100", "-device virtio-blk-device,queue-size", "100", "not a power of two"),
    (f"-kernel k {DISK},num-queues=33", "-device virtio-blk-device,num-queues", "33", "out of range"),
    (f"-kernel k {DISK},bootindex=256", "-device virtio-blk-device,bootindex", "256", "out of range"),
    (f"-kernel k {DISK},addr=0x1", "-device virtio-blk-device", "addr=0x1", "Should not set addr"),
    (f"-kernel k {DISK},bus=pcie.0", "-device virtio-blk-device", "bus=pcie.0", "Should not set bus"),
    ("-kernel k -device virtio-rng-device,id=r,rng=x", "-device virtio-rng-device,rng", "x", "there is no rng-random object x"),
    ("-kernel k -object rng-random,id=r,filename=/f -device virtio-rng-device,id=g,rng=r,period=1", "-device virtio-rng-device",
     "period=1", "belong together"),
    ("-kernel k -object rng-random,id=r,filename=/f -device virtio-rng-device,id=g,rng=r,max-bytes=63,period=1000",
     "-device virtio-rng-device", "max-bytes=63,period=1000", "63 bytes a second"),
    ("-kernel k -object rng-random,id=r,filename=/f -device virtio-rng-device,id=g,rng=r,max-bytes=1000001,period=1",
     "-device virtio-rng-device", "max-bytes=1000001,period=1", "1000001000 bytes a second"),
    ("-kernel k -object rng-random,id=r", "-object rng-random,filename", None, "missing"),
    ("-kernel k -object rng-random,id=r,filename=/f -object rng-random,id=r,filename=/f", "-object id", "r", "has been added"),
    ("-kernel k -object secret,id=r", "-object", "secret,id=r", "Unknown object type"),
    ("-kernel k -device nonsense,id=n", "-device", "nonsense,id=n", 'Unsupported device: "nonsense"'),
    ("-kernel k -device virtio-blk-pci,id=b,drive=d", "-device", "virtio-blk-pci,id=b,drive=d", "No pci host found"),
    # character devices
    ("-kernel k -chardev null,id=c", "-chardev", "null,id=c", "Unsupported chardev"),
    ("-kernel k -chardev pty,id=c -chardev pty,id=c", "-chardev id", "c", "has been added"),
    ("-kernel k -chardev socket,id=c,server,nowait", "-chardev socket", "id=c,server,nowait", "either a path or a port"),
    ("-kernel k -chardev socket,id=c,path=p,port=1,server,nowait", "-chardev socket", "id=c,path=p,port=1,server,nowait",
     "either"),
    ("-kernel k -chardev socket,id=c,host=localhost,port=1", "-chardev socket,host", "localhost", "not an IPv4 address"),
    ("-kernel k -chardev socket,id=c,port=0", "-chardev socket,port", "0", "out of range"),
    (f"-kernel k -chardev socket,id=c,path={'p' * 108}", "-chardev socket,path", "p" * 108, "108 bytes are too long"),
    ("-kernel k -chardev socket,id=c,path=p,wait=on", "-chardev socket,wait", "on", "never waits"),
    ("-kernel k -serial socket,path=p,server", "-serial socket", "path=p,server", "'nowait' is missing"),
    ("-kernel k -serial socket,path=p,nowait", "-serial socket", "path=p,nowait", "'server' is missing"),
    ("-kernel k -serial socket,path=p", "-serial", "socket,path=p", "listening socket"),
    ("-kernel k -serial file", "-serial file,path", None, "missing"),
    ("-kernel k -serial stdio,id=x", "-serial stdio", "id=x", "Found argument 'id'"),
    ("-kernel k -serial vc", "-serial", "vc", "no such kind"),
    ("-kernel k -serial chardev:c", "-serial", "chardev:c", 'Chardev "c" not found or is in use'),
    ("-kernel k -chardev socket,id=c,path=p,server,nowait -serial chardev:c -mon chardev=c,mode=control", "-mon chardev", "c",
     'Chardev "c" not found or is in use'),
    ("-kernel k -chardev socket,id=c,path=p -serial chardev:c", "-serial", "chardev:c", "a listening socket is needed"),
    ("-kernel k -serial stdio -chardev stdio,id=c", "-serial, -chardev", "stdio", "Can't set multiple devices redirected"),
    ("-kernel k -chardev stdio,id=a -chardev stdio,id=b", "-serial, -chardev", "stdio", "Can't set multiple devices"),
    ("-kernel k -serial pty -chardev pty,id=serial0", "-chardev id", "serial0", "serial0 has been added"),
    ("-kernel k -serial stdio -daemonize", "-daemonize", None, "can't be set together"),
    # monitors
    ("-kernel k -qmp unix:/q", "-qmp", "unix:/q", "'server' and 'nowait' are needed"),
    ("-kernel k -qmp stdio,server,nowait", "-qmp", "stdio,server,nowait", "neither a unix socket nor TCP"),
    (f"-kernel k -qmp unix:{'q' * 108},server,nowait", "-qmp unix:", "q" * 108, "108 bytes are too long"),
    ("-kernel k -qmp unix:,server,nowait", "-qmp unix:", "", "empty"),
    ("-kernel k -qmp tcp:localhost:1,server,nowait", "-qmp tcp:", "localhost", "not an IPv4 address"),
    ("-kernel k -qmp tcp:127.0.0.1:0,server,nowait", "-qmp tcp:IP:", "0", "out of range"),
    ("-kernel k -mon chardev=c", "-mon mode", None, "missing"),
    ("-kernel k -mon chardev=c,mode=readline", "-mon mode", "readline", "unknown"),
    ("-kernel k -mon chardev=c,mode=control", "-mon chardev", "c", "not found or is in use"),
    ("-kernel k -chardev pty,id=c -mon chardev=c,mode=control", "-mon chardev", "c", "a character device of kind pty"),
    ("-smp 2", "-kernel", None, "kernel file is required for microvm machine type, which is not provided"),
]


@pytest.mark.parametrize(("line", "option", "value", "message"), BAD, ids=[case[0][:60] for case in BAD])
def test_an_error_names_option_value_and_what_is_accepted(line: str, option: str, value: str | None, message: str) -> None:
    error = refuse(line)
    assert error.option == option
    assert error.value == value
    assert message in error.problem
    assert error.accepted
    text = str(error)
    assert "\n" not in text
    assert option in text
    assert error.accepted in text


NOT_YET = [
    ("-machine q35", "-machine", "q35"),
    ("-machine none,accel=kvm:tcg", "-machine", "none"),
    ("-device usb-kbd,id=k", "-device usb-kbd", "id=k"),
    ("-drive id=d,file=f,format=qcow2", "-drive format", "qcow2"),
    ("-drive file=f,if=pflash,unit=0", "-drive if", "pflash"),
    ("-numa node,nodeid=0", "-numa", "node,nodeid=0"),
    ("-smbios type=1", "-smbios", "type=1"),
    ('-blockdev {"driver":"file"}', "-blockdev", "{driver:file}"),
    ("-battery", "-battery", None),
]


@pytest.mark.parametrize(("line", "option", "value"), NOT_YET, ids=[case[0][:60] for case in NOT_YET])
def test_what_a_later_version_brings_is_refused_and_named(line: str, option: str, value: str | None) -> None:
    error = refuse(f"-kernel k {line}")
    assert (error.option, error.value, error.problem) == (option, value, "not supported yet")


# Wrong values of what is not there yet are called wrong.
@pytest.mark.parametrize(("line", "message"), [
    ("-netdev tap,id=n", "Tap device is missing, use 'ifname' or 'fd' to configure a tap device"),
    ("-netdev tap,id=n,ifname=t,queues=17", "out of range"),
    ("-netdev user,id=n", "no such kind"),
    ("-device virtio-net-device,id=n,netdev=n,mac=1", "not a MAC address"),
    ("-device virtio-net-device,id=n,netdev=n,queue-size=128", "out of range"),
    ("-device vhost-vsock-device,id=v,guest-cid=2", "out of range"),
    ("-device vhost-vsock-device,id=v,guest-cid=4294967296", "out of range"),
    ("-device virtio-balloon-device,id=b,deflate-on-oom=on", "not a switch"),
    (f"-device vhost-user-fs-device,id=f,chardev=c,tag={'t' * 36}", "36 bytes are too long"),
    ("-object iothread", "missing"),
    ("-incoming http://x", "not an address"),
    ("-incoming file", "not an address"),
    ("-incoming fILE:/x", "not an address"),
    ("-incoming file:", "empty"),
    ("-incoming file:/x,mapped=on", "not a switch"),
    ("-incoming file:/x,track=1", "not a switch"),
    ("-incoming file:/x,copied=true", "wasn't expected"),
    ("-incoming unix:/x", "MicroVM does not support migration"),
    ("-incoming TCP:1.2.3.4:5", "MicroVM does not support migration"),
    ("-incoming file:/x -accel test -mod-test /y", "no processors"),
    ("-drive id=d,file=f,aio=sometimes", "unknown"),
    ("-drive id=d,file=f,throttling.iops-total=1000001", "out of range"),
    ("-drive id=d,file=f,l2-cache-size=33M", "too large"),
])
def test_limits_hold_for_what_is_not_supported_yet(line: str, message: str) -> None:
    assert message in refuse(f"-kernel k {line}").problem


KATA = (
    "-name sandbox-4f2a -uuid 1b4e28ba-2fa1-4d4e-883f-0016d3cca427 -smp 1 -m 2048 -kernel /opt/kata/vmlinux.container "
    "-append 'root=/dev/vda1 rootflags=data=ordered,errors=remount-ro ro rootfstype=ext4 reboot=k panic=1' "
    "-qmp unix:/run/vc/vm/4f2a/qmp.socket,server,nowait -D -disable-seccomp -machine type=microvm,dump-guest-core=off "
    "-object rng-random,id=objrng0,filename=/dev/urandom -device virtio-rng-device,rng=objrng0,id=virtio-rng0 "
    "-drive id=rootfs,file=/opt/kata/kata.img,readonly=on,direct=off -device virtio-blk-device,drive=rootfs,id=virtio-blk0")


def test_kata_without_a_network_and_a_shared_directory() -> None:
    config = parse(KATA)
    assert config.memory_size == 2048 * MIB
    assert config.kernel_cmdline.startswith("root=/dev/vda1 rootflags=data=ordered,errors=remount-ro ro")
    assert [device.id for device in config.devices] == ["virtio-rng0", "virtio-blk0"]
    assert config.drives["rootfs"].readonly


def test_kata_with_a_network() -> None:
    config = parse(f"{KATA} -netdev tap,id=eth0,fds=4 -device virtio-net-device,netdev=eth0,id=eth0,mac=02:42:ac:11:00:02")
    assert (config.netdevs["eth0"].fds, config.netdevs["eth0"].ifname) == ((4,), "")
    assert config.devices[-1].options.string("mac") == "02:42:ac:11:00:02"


def test_kata_with_a_shared_directory() -> None:
    line = KATA.replace("dump-guest-core=off", "dump-guest-core=off,mem-share=on")
    config = parse(f"{line} -chardev socket,id=virtio_fs,path=/run/v.socket,server,nowait "
                   "-device vhost-user-fs-device,chardev=virtio_fs,tag=kataShared,id=virtio-fs0")
    assert config.chardevs == {}  # nobody is to listen there: virtiofsd does
    assert config.vhost_users["virtio_fs"].path == "/run/v.socket"
    assert config.devices[-1].options.string("tag") == "kataShared"


NET = "-netdev tap,id=n,ifname=tap0 -device virtio-net-device,id=eth0,netdev=n"


def test_queue_pairs_and_vhost() -> None:
    netdev = parse(f"-kernel k {NET.replace('ifname=tap0', 'fds=4:5,vhost=on,vhostfds=6:7')},mq=on,vectors=6").netdevs["n"]
    assert (netdev.fds, netdev.queues, netdev.vhost, netdev.vhost_fds) == ((4, 5), 2, True, (6, 7))
    netdev = parse(f"-kernel k {NET.replace('ifname=tap0', 'ifname=tap0,queues=2,vhost=on')}").netdevs["n"]
    assert (netdev.ifname, netdev.queues, netdev.vhost, netdev.vhost_fds) == ("tap0", 2, True, ())


@pytest.mark.parametrize(("line", "message"), [
    ("-netdev tap,id=n,fd=4,fds=5", "fd and fds are one key"),
    ("-netdev tap,id=n,fds=4:4", "a descriptor is named twice"),
    ("-netdev tap,id=n,fd=4 -netdev tap,id=m,fds=5:4", "a descriptor is named twice"),
    ("-netdev tap,id=n,fd=4,vhost=on,vhostfd=4", "a descriptor is named twice"),
    ("-netdev tap,id=n,fds=3-19", "too many queue pairs"),
    ("-netdev tap,id=n,fds=4:5,queues=3", "3 queue pairs and 2 descriptors"),
    ("-netdev tap,id=n,ifname=t,vhostfd=4", "Argument 'vhostfd' or 'vhostfds' are not needed for virtio-net device"),
    ("-netdev tap,id=n,ifname=t,vhost=on,vhostfd=4,vhostfds=4", "vhostfd and vhostfds are one key"),
    ("-netdev tap,id=n,fds=4:5,vhost=on,vhostfds=6", "The num of vhostfds must equal to fds"),
    (f"{NET},mq=off".replace("ifname=tap0", "fds=4:5"), "the netdev n has 2 queue pairs"),
    (f"{NET},rx-iothread=i", "there is no iothread i"),
    (f"{NET},tx-iothread=i", "there is no iothread i"),
    ("-netdev tap,id=n,ifname=a -netdev tap,id=n,ifname=b", "n has been added"),
    ("-device virtio-net-device,id=eth0,netdev=n", "there is no netdev n"),
    (f"{NET} -device virtio-net-device,id=eth1,netdev=n", "the netdev n is used by eth0 already"),
    (f"{NET},iothread=i", "there is no iothread i"),
    (f"{DISK},iothread=i", "there is no iothread i"),
    ("-qmp unix:/q,server,nowait,iothread=i", "there is no iothread i"),
    ("-qmp tcp:127.0.0.1:1,server,nowait,iothread=j -object iothread,id=i", "there is no iothread j"),
    ("-object iothread,id=i -object iothread,id=i", "i has been added"),
    (" ".join(f"-object iothread,id=i{number}" for number in range(9)), "too many iothreads"),
])
def test_a_network_that_cannot_be(line: str, message: str) -> None:
    assert message in refuse(f"-kernel k {line}").problem


def test_a_cd_cannot_be_written() -> None:
    config = parse("-kernel k -drive id=d,file=f,media=cdrom -drive id=e,file=g,media=disk "
                   "-device virtio-blk-device,id=a,drive=d -device virtio-blk-device,id=b,drive=e")
    assert [config.drives[id].readonly for id in "de"] == [True, False]
    assert refuse("-kernel k -drive id=d,file=f,media=floppy").option == "-drive media"


def test_what_means_nothing_here_is_checked_and_passed_over() -> None:
    config = parse("-kernel k -object iothread,id=i -qmp unix:/q,server,nowait,iothread=i "
                   "-drive id=d,file=f,l2-cache-size=1M,refcount-cache-size=32M -device virtio-blk-device,id=b,drive=d "
                   "-netdev tap,id=n,ifname=tap0,path=/dev/tap7,macnat=off -device virtio-net-device,id=e,netdev=n")
    assert (config.qmp[0].path, config.qmp[0].iothread) == ("/q", "i")
    for line, option in (("-drive id=d,file=f,l2-cache-size=33M", "-drive l2-cache-size"),
                         ("-drive id=d,file=f,refcount-cache-size=x", "-drive refcount-cache-size"),
                         ("-device virtio-balloon-device,id=b,membuf-percent=81",
                          "-device virtio-balloon-device,membuf-percent"),
                         ("-device virtio-balloon-device,id=b,monitor-interval=4",
                          "-device virtio-balloon-device,monitor-interval")):
        assert refuse(f"-kernel k {line}").option == option
    assert "frames keep their addresses" in str(refuse("-kernel k -netdev tap,id=n,ifname=t,macnat=on"))


def test_the_first_error_does_not_depend_on_the_order() -> None:
    words = ["-smp 0", "-m 1", "-machine q35"]
    options = {refuse(" ".join(order)).option for order in (words, words[::-1], [words[1], words[2], words[0]])}
    assert options == {"-machine"}


def test_every_declared_group_asks_for_its_id() -> None:
    for option, groups in (("-device", DEVICES), ("-object", OBJECTS), ("-chardev", CHARDEVS)):
        for kind in groups:
            assert refuse(f"-kernel k {option} {kind}").option == f"{option} {kind},id"
