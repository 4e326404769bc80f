"""QMP commands on network back ends: `netdev_add`, `netdev_del`, and the state of a link."""

from __future__ import annotations

import os

from stratovirt.config.options import MAX_QUEUE_PAIRS
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
    kind = arguments.get("type", "tap")
    if arguments.get("macnat") and (arguments.get("vhost") or kind == "vhost-user"):
        raise QmpError("macnat doesn't support vhost or vhost-user")
    if kind == "vhost-user":
        return _add_vhost_user(machine, arguments)
    if kind != "tap":
        raise QmpError(f"`type` {kind[:100]} cannot be plugged in: a microVM takes `tap` and `vhost-user`")
    fd_texts, vhost_texts = (_texts(arguments, name) for name in ("fd", "vhostfd"))
    ifname, vhost, queues = arguments.get("ifname", ""), arguments.get("vhost", False), arguments.get("queues", 1)
    if fd_texts and "ifname" in arguments:
        raise QmpError("fd is conflict with ifname")
    if not fd_texts and (not ifname or "\0" in ifname or any("\ud800" <= letter <= "\udfff" for letter in ifname)):
        raise QmpError("`ifname`, `fd` or `fds` must name a tap")
    if not 1 <= queues <= MAX_QUEUE_PAIRS or (fd_texts and "queues" in arguments and queues != len(fd_texts)):
        raise QmpError(f"`queues` must be 1 to {MAX_QUEUE_PAIRS}, and as many as there are fds")
    if vhost_texts and not vhost:
        raise QmpError("Argument 'vhostfd' or 'vhostfds' are not needed for virtio-net device")
    if vhost_texts and len(vhost_texts) != (len(fd_texts) or queues):
        raise QmpError("The num of vhostfds must equal to fds")
    taken: list[int] = []
    try:
        fds, vhost_fds = (tuple(_find(text, descriptors, taken) for text in texts) for texts in (fd_texts, vhost_texts))
        if len({*fds, *vhost_fds}) < len(fds) + len(vhost_fds):
            raise QmpError("a descriptor is named twice")
        machine.hotplug.add_netdev(NetdevConfig(id, ifname, fds, queues, vhost, vhost_fds))
    except StratoVirtError:
        for fd in taken:
            os.close(fd)
        raise
    return {}


def _add_vhost_user(machine: MachineView, arguments: dict[str, Any]) -> object:
    for name in ("ifname", "fd", "fds", "vhost", "vhostfd", "vhostfds"):
        if arguments.get(name):
            raise QmpError(f"vhost-user netdev does not support '{name}' option")
    queues = arguments.get("queues", 1)
    if not 1 <= queues <= MAX_QUEUE_PAIRS:
        raise QmpError(f"`queues` must be 1 to {MAX_QUEUE_PAIRS}")
    if not arguments.get("chardev"):
        raise QmpError("`chardev` must name the -chardev socket of the back end")
    machine.hotplug.add_netdev(NetdevConfig(arguments["id"], queues=queues, chardev=arguments["chardev"]))
    return {}


def _texts(arguments: dict[str, Any], name: str) -> list[str]:
    """The names or numbers of descriptors, in the argument `name` or its plural."""
    several = f"{name}s"
    if several not in arguments:
        return [arguments[name]] if name in arguments else []
    if name in arguments:
        raise QmpError(f"{name} is conflict with {several}")
    texts: list[str] = arguments[several].split(":")
    if len(texts) > MAX_QUEUE_PAIRS:
        raise QmpError(f"`{several}` must be at most {MAX_QUEUE_PAIRS}, one for each queue pair")
    return texts


def _find(text: str, descriptors: Descriptors, taken: list[int]) -> int:
    """The descriptor of that name, which is ours from now on and goes into `taken`; or else of that number, inherited."""
    fd = descriptors.take(text)
    if fd is not None:
        taken.append(fd)
        return fd
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
    DescriptorCommand("netdev_add", _netdev_add,
                      "Open a tap, or name a vhost-user back end, to be plugged in with device_add.", arguments=(
        Member("id", STR, "The name that device_add and netdev_del use."),
        Member("ifname", STR, "The name of the tap; it is created if need be.", True),
        Member("fd", STR, "A tap's descriptor: a name of getfd, or the number of one that was inherited.", True),
        Member("fds", STR, "The same for several queue pairs, joined by colons.", True),
        Member("type", STR, "`tap`, or `vhost-user`.", True),
        Member("chardev", STR, "The -chardev socket of a vhost-user back end, one that no device uses.", True),
        Member("queues", UINT16, "Queue pairs, 1 to 16; the slot must have as many.", True),
        Member("vhost", BOOL, "Let the host kernel move the packets.", True),
        Member("vhostfd", STR, "An open /dev/vhost-net, named like `fd`; with `vhost`.", True),
        Member("vhostfds", STR, "The same, one for each queue pair, joined by colons.", True),
        *(Member(name, STR, "No effect.", True) for name in ("dnssearch", "script", "downscript")),
        Member("macnat", BOOL, "No effect.", True))),
    Command("netdev_del", _netdev_del, "Close a tap that no device uses, and forget its name.",
            arguments=(Member("id", STR, "Its name."),)),
    Command("netlink_set", lambda machine, arguments: _set_link(machine, arguments["id"], arguments["up"]),
            "Change the state of an interface's link; the guest is told.",
            arguments=(Member("id", STR, "A device, or its netdev."), _UP)),
    Command("set_link", lambda machine, arguments: _set_link(machine, arguments["name"], arguments["up"]),
            "The same in QEMU's spelling.", arguments=(Member("name", STR, "A device, or its netdev."), _UP)),
)
