"""Help and version, made from the declarations. Not on the way to a running guest."""

from __future__ import annotations

import os
import shutil
import textwrap

from stratovirt import __version__
from stratovirt.cli.options import OPTIONS
from stratovirt.config import later, options
from stratovirt.config.schema import IGNORED, Group, Key
from stratovirt.errors import ConfigError

_USAGE = """\
StratoVirt {version}: a lightweight virtual machine monitor for Linux KVM

Start a machine:   stratovirt -kernel FILE [OPTION…]
In a launcher:     stratovirt --warm -kernel FILE [OPTION…]
For people:        stratovirt run, doctor, snapshot, launcher, template, clone; each with --help

Example:
  stratovirt -machine microvm -smp 2 -m 512M -kernel vmlinuz -initrd initrd.img \\
    -append "console=ttyS0 reboot=k panic=1" -serial stdio \\
    -drive id=root,file=root.img -device virtio-blk-device,id=disk0,drive=root \\
    -qmp unix:/run/vm.sock,server,nowait"""

_GROUPS = {group.title: group for group in (
    options.MACHINE, options.ACCEL, options.SMP, options.CPU, options.MEMORY, options.DRIVE, options.QMP, options.MON,
    options.ACTION)}
KINDS = {
    "-device": {**options.DEVICES, **later.DEVICES},
    "-object": {**options.OBJECTS, **later.OBJECTS},
    "-chardev": options.CHARDEVS,
    "-netdev": {**options.NETDEVS, **later.NETDEVS},
}


def usage(width: int = 100) -> str:
    """What `-h` prints."""
    lines = [_USAGE.format(version=__version__)]
    section = ""
    for option in OPTIONS.values():
        if not option.section:
            continue
        if option.section != section:
            section = option.section
            lines += ["", f"{section}:"]
        lines += _columns(f"-{option.name} {option.value}".rstrip(), option.help, width)
    ignored = ", ".join(f"-{option.name}" for option in OPTIONS.values() if not option.section and option.status is IGNORED)
    for text in (f"Accepted, without effect: {ignored}.",
                 "What there is: -device help, -object help, -chardev help; the keys of one: -device DRIVER,help, "
                 "-object TYPE,help, -chardev KIND,help, -machine help, -drive help."):
        lines += ["", *textwrap.wrap(text, width)]
    lines.append("")
    return "\n".join(lines)


def _columns(left: str, right: str, width: int, column: int = 34) -> list[str]:
    indent = " " * column
    lines = textwrap.wrap(right, max(width, column + 20), initial_indent=indent, subsequent_indent=indent)
    if len(left) + 4 > column:
        return ["  " + left, *lines]
    return [("  " + left).ljust(column) + lines[0].lstrip(), *lines[1:]]


def _print(text: str) -> int:
    """Whole lines on stdout, as UTF-8 whatever the locale; a reader that has gone (`| head`) is no error."""
    data = memoryview((text.rstrip("\n") + "\n").encode())
    try:
        while data:
            data = data[os.write(1, data) :]
    except BrokenPipeError:
        pass
    return 0


def print_usage() -> int:
    return _print(usage(min(shutil.get_terminal_size((100, 24)).columns, 120)))


def print_version() -> int:
    return _print(f"StratoVirt {__version__}")


def find_group(option: str, kind: str) -> Group:
    """The declaration behind `option kind`. Raises: ConfigError when there is none."""
    if option in KINDS:
        kinds = KINDS[option]
        if kind in kinds:
            return kinds[kind]
        raise ConfigError(f'nothing is known about "{kind}"', option=option, value=f"{kind},help",
                          accepted=", ".join(f"{name},help" for name in kinds))
    return _GROUPS[option]


def print_topic(option: str, kind: str) -> int:
    """`-device help` (no kind) and `-device X,help`."""
    if option in KINDS and not kind:
        return _print(list_kinds(option))
    return _print(describe(find_group(option, kind)))


def list_kinds(option: str) -> str:
    lines: list[str] = []
    for name, group in KINDS[option].items():
        lines += _columns(name, group.help + ("" if group.works else " (not supported yet)"), 100)
    return "\n".join(lines)


def value_text(key: Key) -> str:
    """What a key takes, with default and status, in one sentence."""
    text = key.kind.accepted
    if key.required:
        text += "; required"
    elif key.default is not None:
        text += f"; default {key.kind.show(key.default)}"
    if key.ignored or key.works is not None:
        text += f"; {key.status}"
    return text


def describe(group: Group) -> str:
    """The keys of one option or device."""
    lines = [f"{group.title}: {group.help}" + ("" if group.works else " (not supported yet)")]
    for key in group.keys:
        lines += _columns(f"{key.name}=…", f"{key.help} ({value_text(key)})", 110)
    return "\n".join(lines)
