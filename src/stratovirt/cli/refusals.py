"""Errors for what the interface has and this version not yet.

A value is checked as if it worked, so that a wrong one is called wrong; a right one is refused as not supported yet. Only
imported when something is refused.
"""

from __future__ import annotations

from stratovirt.cli.suboptions import read_group, read_value
from stratovirt.config import later
from stratovirt.errors import ConfigError


def check_option(name: str, values: list[str]) -> None:
    """Raise ConfigError when a value of the option `-name` is wrong in itself."""
    for text in values:
        if name in later.VALUES:
            read_value(later.VALUES[name], text, "-" + name)


def check_kind(option: str, kind: str, rest: str) -> None:
    """Raise ConfigError if `kind` is one that `option` will take in a later version."""
    text = f"{kind},{rest}" if rest else kind
    if kind.startswith("{"):
        raise ConfigError("JSON is not supported yet", option=option, value=text, accepted="DRIVER,id=ID,KEY=VALUE…")
    known = {"-device": later.DEVICES, "-object": later.OBJECTS, "-netdev": later.NETDEVS}.get(option, {})
    if kind in known:
        read_group(known[kind], rest)
    if option == "-device" and kind in later.PCI_DEVICES:
        raise ConfigError("No pci host found: a microvm has virtio-mmio devices only", option=option, value=text,
                          accepted="a device whose name ends in -device")
    if option == "-device" and kind in later.OTHER_DEVICES:
        raise ConfigError("not supported yet", option=f"{option} {kind}", value=rest, accepted="leaving it out")
