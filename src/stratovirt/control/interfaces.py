"""QMP commands on network back ends: `netdev_add`, `netdev_del`, and the state of a link."""

from __future__ import annotations

import os

from stratovirt.config.vm import NetdevConfig
from stratovirt.control.protocol import DEVICE_NOT_FOUND, QmpError
from stratovirt.control.table import Command, DescriptorCommand
from stratovirt.control.types import BOOL, STR, UINT16, Member
from stratovirt.errors import StratoVirtError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from stratovirt.control.descriptors import Descriptors
    from stratovirt.control.table import MachineView

_ID_LIMIT = 255
_MAX_FD = (1 << 31) - 1


def _netdev_add(machine: MachineView, arguments: dict[str, Any], descriptors: Descriptors) -> object:
    id = arguments["id"]
    if not 0 < len(id.encode("utf-8", "surrogatepass")) <= _ID_LIMIT:
        raise QmpError(f"`id` must have 1 to {_ID_LIMIT} bytes")
    if arguments.get("type", "tap") != "tap":
        raise QmpError(f"`type` {arguments['type']} cannot be plugged in: a microVM takes taps")
    if arguments.get("vhost"):
        raise QmpError("vhost cannot be plugged in: the interface in the slot is served by this process")
    text = arguments["fds"].rpartition(":")[2] if "fds" in arguments else arguments.get("fd")
    if text is None:
        _add_by_name(machine, id, arguments.get("ifname", ""))
        return {}
    fd = descriptors.take(text)
    if fd is None:
        machine.hotplug.add_netdev(NetdevConfig(id, fd=_number(text)))
        return {}
    try:
        machine.hotplug.add_netdev(NetdevConfig(id, fd=fd))
    except StratoVirtError:
        os.close(fd)
        raise
    return {}


def _add_by_name(machine: MachineView, id: str, name: str) -> None:
    if not name or "\0" in name or any("\ud800" <= letter <= "\udfff" for letter in name):
        raise QmpError("`ifname`, `fd` or `fds` must name a tap")
    machine.hotplug.add_netdev(NetdevConfig(id, name))


def _number(text: str) -> int:
    """The descriptor that `text` is the number of, when it is not a name of getfd."""
    if not text.isascii() or not text.isdigit() or len(text) > 10 or not 2 < int(text) <= _MAX_FD:
        raise QmpError(f"File descriptor named '{text[:100]}' not found")
    return int(text)


def _netdev_del(machine: MachineView, arguments: dict[str, Any]) -> object:
    machine.hotplug.delete_netdev(arguments["id"])
    return {}


def _set_link(machine: MachineView, id: str, up: bool) -> object:
    if not machine.hotplug.set_link(id, up):
        raise QmpError(f"no net dev {id}", DEVICE_NOT_FOUND)
    return {}


_UP = Member("up", BOOL, "Plug the cable in, or pull it out.")

COMMANDS = (
    DescriptorCommand("netdev_add", _netdev_add, "Open a tap, to be plugged in with device_add.", arguments=(
        Member("id", STR, "The name that device_add and netdev_del use."),
        Member("ifname", STR, "The name of the tap; it is created if need be.", True),
        Member("fd", STR, "A tap's descriptor: a name of getfd, or the number of one that was inherited.", True),
        Member("fds", STR, "Several, joined by colons; the last counts.", True),
        Member("type", STR, "`tap`.", True),
        Member("queues", UINT16, "No effect: the slot has one queue pair.", True),
        Member("vhost", BOOL, "false.", True),
        *(Member(name, STR, "No effect.", True)
          for name in ("vhostfd", "vhostfds", "dnssearch", "script", "downscript", "chardev")),
        Member("macnat", BOOL, "No effect.", True))),
    Command("netdev_del", _netdev_del, "Close a tap that no device uses, and forget its name.",
            arguments=(Member("id", STR, "Its name."),)),
    Command("netlink_set", lambda machine, arguments: _set_link(machine, arguments["id"], arguments["up"]),
            "Change the state of an interface's link; the guest is told.",
            arguments=(Member("id", STR, "A device, or its netdev."), _UP)),
    Command("set_link", lambda machine, arguments: _set_link(machine, arguments["name"], arguments["up"]),
            "The same in QEMU's spelling.", arguments=(Member("name", STR, "A device, or its netdev."), _UP)),
)
