"""Whatever the arguments are, parsing them ends in a VmConfig or in a ConfigError of one line."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from stratovirt.cli import command
from stratovirt.cli.options import OPTIONS
from stratovirt.config import later, options
from stratovirt.config.schema import Group
from stratovirt.config.vm import VmConfig
from stratovirt.errors import ConfigError

GROUPS: dict[str, list[Group]] = {
    "machine": [options.MACHINE], "accel": [options.ACCEL], "smp": [options.SMP], "cpu": [options.CPU], "m": [options.MEMORY],
    "drive": [options.DRIVE], "qmp": [options.QMP], "mon": [options.MON], "action": [options.ACTION],
    "chardev": list(options.CHARDEVS.values()), "serial": list(options.SERIALS.values()),
    "object": [*options.OBJECTS.values(), *later.OBJECTS.values()],
    "device": [*options.DEVICES.values(), *later.DEVICES.values()],
    "netdev": [*options.NETDEVS.values(), *later.NETDEVS.values()],
}
# What a process can be given: any bytes but NUL; what is not UTF-8 arrives as surrogates.
WORDS = st.text(st.characters(exclude_characters="\0"), max_size=12) | st.sampled_from(
    ["on", "off", "0", "1", "254", "256M", "512G", "/dev/null", "a", "b", "host", "kvm", "microvm", "stdio", "unix:/q",
     "tcp:1.2.3.4:5", "server", "nowait", "server=on", "wait=off", "chardev:a", "control", "18446744073709551616", "9" * 5000,
     "x" * 5000, "=", ",", "\n"])


@st.composite
def values(draw: st.DrawFn, name: str) -> str:
    """A value with some sense in it for an option that has keys."""
    group = draw(st.sampled_from(GROUPS[name]))
    kind = group.title.rpartition(" ")[2] if " " in group.title else None
    words = [] if kind is None else [kind]
    for key in draw(st.lists(st.sampled_from(group.keys), max_size=6)) if group.keys else []:
        words.append(f"{key.name}={draw(WORDS)}")
    if draw(st.booleans()):
        words.append(draw(WORDS))
    return ",".join(words)


@st.composite
def arguments(draw: st.DrawFn) -> list[str]:
    line: list[str] = []
    for name in draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=8)):
        line.append("-" + name)
        for _ in range(draw(st.integers(0, 2))):
            line.append(draw(values(name) if name in GROUPS else WORDS))
    return line


def check(line: list[str]) -> None:
    try:
        config = command.parse(line)
    except ConfigError as error:
        text = str(error)
        assert text
        assert text.isprintable()
        assert error.option
        return
    assert isinstance(config, VmConfig)
    assert config.kernel
    assert 1 <= config.smp.cpus <= config.smp.max_cpus <= 254
    assert 128 << 20 <= config.memory_size <= 512 << 30
    assert len({device.id for device in config.devices}) == len(config.devices)


@settings(max_examples=600, deadline=None)
@given(arguments())
@example(["-kernel", "\udc80"])
@example(["-name", "\ud800", "-kernel", "k"])
@example(["-kernel", "a\nb", "-f\x1b[2J"])
@example([""])
@example(["-kernel", ""])
@example(["-kernel", "k", "-device", ""])
@example(["-kernel", "k", "-netdev", ""])
@example(["-kernel", "k", "-serial", ""])
@example(["-kernel", "k", "-object", ",,,"])
@example(["-kernel", "k", "-machine", ""])
def test_sensible_arguments(line: list[str]) -> None:
    check(line)


@settings(max_examples=300, deadline=None)
@given(st.lists(WORDS | st.sampled_from(["-" + name for name in OPTIONS]), max_size=10))
def test_any_arguments(line: list[str]) -> None:
    check(line)
