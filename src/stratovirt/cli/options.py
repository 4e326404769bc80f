"""The options of the command line: name, how many values, what it is for and whether it works.

What stands inside a value is declared in `config/options.py` and `config/later.py`.
"""

from __future__ import annotations

from stratovirt.config.schema import IGNORED, NOT_YET, WORKS

FLAG, ONE, OPTIONAL, MANY = "no value", "one value", "a value or none", "values, repeatable"


class Option:
    """`value` shows what to write behind the name; `section` is where help lists it, "" for nowhere."""

    __slots__ = ("help", "name", "section", "status", "takes", "value")

    def __init__(self, name: str, takes: str, value: str, section: str, help: str, status: str = WORKS) -> None:
        self.name = name
        self.takes = takes
        self.value = value
        self.section = section
        self.help = help
        self.status = status


_MACHINE, _BOOT, _DEVICES, _CONTROL, _PROCESS, _LATER = (
    "Machine", "What it boots", "Devices", "Console and control", "Process", "Not supported yet")
_FOR_LIBVIRT = "sent by libvirt; means nothing here"

_DECLARED = (
    Option("name", ONE, "NAME", _MACHINE, "the machine's name, for people"),
    Option("machine", ONE, "[type=]microvm[,KEY=VALUE…]", _MACHINE, "machine model (default microvm)"),
    Option("accel", ONE, "kvm|test", _MACHINE, "what runs the guest's instructions; test: nothing, see -mod-test"),
    Option("cpu", ONE, "host", _MACHINE, "CPU model"),
    Option("smp", ONE, "[cpus=]N[,sockets=N…]", _MACHINE, "virtual CPUs, 1 to 254 (default 1)"),
    Option("m", ONE, "[size=]SIZE", _MACHINE, "memory, 128M to 512G (default 256M); a bare number counts MiB"),
    Option("mem-path", ONE, "PATH", _MACHINE, "guest memory in this file, or in a temporary one in this directory (hugetlbfs)"),
    Option("mem-prealloc", FLAG, "", _MACHINE, "allocate all memory at start"),

    Option("kernel", ONE, "FILE", _BOOT, "bzImage, ELF vmlinux or flat binary"),
    Option("initrd", ONE, "FILE", _BOOT, "initial RAM disk"),
    Option("append", MANY, "WORD…", _BOOT, "kernel command line; several values are joined by spaces"),

    Option("drive", MANY, "id=ID,file=FILE[,KEY=VALUE…]", _DEVICES, "disk image for a -device"),
    Option("netdev", MANY, "tap,id=ID,ifname=NAME[,KEY=VALUE…]", _DEVICES, "network back end for a -device"),
    Option("object", MANY, "TYPE,id=ID[,KEY=VALUE…]", _DEVICES, "back end; -object help lists the types"),
    Option("device", MANY, "DRIVER,id=ID[,KEY=VALUE…]", _DEVICES,
           "device; -device help lists the drivers, -device DRIVER,help the keys of one"),

    Option("serial", ONE, "stdio|pty|file,path=…|socket,…|chardev:ID", _CONTROL, "serial port of the guest"),
    Option("chardev", MANY, "KIND,id=ID[,KEY=VALUE…]", _CONTROL,
           "character device: stdio, pty, file, socket, redirect-to-log"),
    Option("qmp", ONE, "unix:PATH,server,nowait", _CONTROL, "QMP monitor; also tcp:IP:PORT,server,nowait"),
    Option("mon", ONE, "chardev=ID,mode=control", _CONTROL, "QMP monitor on a -chardev socket"),

    Option("incoming", ONE, "file:DIR[,mapped=false][,track=true]", _BOOT,
           "go on from a snapshot, its memory mapped copy-on-write, with mapped=false read; track=true counts what is written, "
           "for an incremental one"),
    Option("S", FLAG, "", _PROCESS, "start paused; QMP cont lets it run"),
    Option("freeze", FLAG, "", _PROCESS, "the same as -S"),
    Option("action", ONE, "reboot=reset|shutdown", _PROCESS, "a reboot by the guest starts it again, or ends it (default)"),
    Option("no-reboot", FLAG, "", _PROCESS, "a reboot by the guest ends the process: -action reboot=shutdown"),
    Option("daemonize", FLAG, "", _PROCESS, "go to the background"),
    Option("pidfile", ONE, "FILE", _PROCESS, "write the process id there; removed at the end"),
    Option("mod-test", ONE, "PATH", _PROCESS, "with -accel test: the socket from which devices are driven"),
    Option("D", OPTIONAL, "[FILE]", _PROCESS, "log to FILE instead of stderr"),
    Option("disable-seccomp", FLAG, "", _PROCESS, "no system call filters (seccomp)"),
    Option("seccomp-report", FLAG, "", _PROCESS, "list the system calls that a running machine may make, and why"),
    Option("h", FLAG, "", _PROCESS, "this help, also -help"),
    Option("V", FLAG, "", _PROCESS, "version, also -version"),
    Option("help", FLAG, "", "", "the same as -h"),
    Option("version", FLAG, "", "", "the same as -V"),

    Option("no-shutdown", OPTIONAL, "", "", "takes effect on the arm64 virt machine only", IGNORED),
    Option("overcommit", OPTIONAL, "", "", _FOR_LIBVIRT, IGNORED),
    Option("uuid", OPTIONAL, "", "", _FOR_LIBVIRT, IGNORED),
    Option("no-user-config", OPTIONAL, "", "", _FOR_LIBVIRT, IGNORED),
    Option("nodefaults", OPTIONAL, "", "", _FOR_LIBVIRT, IGNORED),
    Option("sandbox", OPTIONAL, "", "", _FOR_LIBVIRT, IGNORED),
    Option("msg", OPTIONAL, "", "", _FOR_LIBVIRT, IGNORED),
    Option("rtc", OPTIONAL, "", "", _FOR_LIBVIRT, IGNORED),
    Option("boot", OPTIONAL, "", "", _FOR_LIBVIRT, IGNORED),
    Option("nographic", OPTIONAL, "", "", _FOR_LIBVIRT, IGNORED),
    Option("realtime", OPTIONAL, "", "", _FOR_LIBVIRT, IGNORED),
    Option("usb", OPTIONAL, "", "", _FOR_LIBVIRT, IGNORED),
    Option("display", OPTIONAL, "", "", "no display is built in", IGNORED),

    Option("numa", MANY, "node,…|dist,…", _LATER, "NUMA nodes and distances", NOT_YET),
    Option("global", MANY, "DRIVER.KEY=VALUE", _LATER, "a default for a kind of device", NOT_YET),
    Option("smbios", MANY, "type=N[,KEY=VALUE…]", _LATER, "SMBIOS tables", NOT_YET),
    Option("hardware-signature", ONE, "NUMBER", _LATER, "hardware signature in the ACPI FACS", NOT_YET),
    Option("trace", ONE, "file=FILE|type=KIND", _LATER, "trace points", NOT_YET),
    Option("battery", FLAG, "", _LATER, "a battery, on the arm64 virt machine", NOT_YET),
    Option("vnc", ONE, "IP:DISPLAY", _LATER, "VNC server", NOT_YET),
    Option("cameradev", MANY, "v4l2|demo,id=ID,path=PATH", _LATER, "camera back end", NOT_YET),
    Option("windows_emu_pid", ONE, "PID", _LATER, "end together with that process", NOT_YET),
    Option("blockdev", MANY, "JSON", _LATER, "block node, as libvirt sends it", NOT_YET),
    Option("audiodev", MANY, "JSON", _LATER, "audio back end, as libvirt sends it", NOT_YET),
)

OPTIONS = {option.name: option for option in _DECLARED}
