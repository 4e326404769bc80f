"""`device_add` and `device_del`: disks and network interfaces into the replaceable slots, and out of them."""

from __future__ import annotations

from stratovirt.config.schema import Mac
from stratovirt.control.protocol import QmpError
from stratovirt.control.table import Command, Event
from stratovirt.control.types import ANY, BOOL, INT, STR, UINT8, UINT16, UINT64, Member, Type, record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from stratovirt.control.table import MachineView

_ID_LIMIT = 255
_SERIAL_LIMIT = 20


def _slot(arguments: dict[str, Any]) -> int | None:
    """The number that the client names: `addr`, else `lun` + 1, else none."""
    addr = arguments.get("addr")
    if addr is None:
        return arguments["lun"] + 1 if "lun" in arguments else None
    digits = addr[2:] if addr[:2] in ("0x", "0X") else addr
    base = 10 if digits is addr else 16
    allowed = "0123456789" if base == 10 else "0123456789abcdefABCDEF"
    if not digits or len(digits) > 16 or digits.strip(allowed):
        raise QmpError(f"Invalid addr for device {arguments['id']}")
    return int(digits, base)


def _mac(text: str | None) -> bytes | None:
    if text is None:
        return None
    try:
        Mac().parse(text)
    except ValueError as error:
        raise QmpError(f"`mac` is {error}") from error
    return bytes.fromhex(text.replace(":", ""))


def _device_add(machine: MachineView, arguments: dict[str, Any]) -> object:
    id, driver = arguments["id"], arguments["driver"]
    if not 0 < len(id.encode("utf-8", "surrogatepass")) <= _ID_LIMIT:
        raise QmpError(f"`id` must have 1 to {_ID_LIMIT} bytes")
    if driver.endswith("-pci"):
        raise QmpError("Unsupported replaceable device type.")
    if driver.startswith("vhost-user"):
        if "blk" not in driver:
            raise QmpError("Unsupported replaceable device type.")
        if "chardev" not in arguments:
            raise QmpError("No chardev set")
        machine.hotplug.plug_disk_elsewhere(id, arguments["chardev"], _slot(arguments))
    elif "blk" in driver:
        if "drive" not in arguments:
            raise QmpError("No drive set")
        serial = arguments.get("serial", "")
        if len(serial) > _SERIAL_LIMIT or not serial.isascii():
            raise QmpError(f"`serial` must have at most {_SERIAL_LIMIT} ASCII characters")
        machine.hotplug.plug_disk(id, arguments["drive"], _slot(arguments), serial)
    elif "net" in driver:
        machine.hotplug.plug_interface(id, arguments.get("netdev", ""), _slot(arguments), _mac(arguments.get("mac")))
    else:
        raise QmpError("Unsupported replaceable device type.")
    return {}


def _device_del(machine: MachineView, arguments: dict[str, Any]) -> object:
    machine.hotplug.unplug(arguments["id"])
    return {}


_NO_EFFECT: dict[str, Type] = {
    "romfile": STR, "share-rw": ANY, "bus": STR, "disable-modern": ANY, "mq": ANY, "vectors": ANY,
    "iothread": STR, "multifunction": BOOL, "host": STR, "num-queues": UINT16, "boot_index": UINT8, "bootindex": INT,
    "sysfsdev": STR, "queue-size": UINT16, "port": STR, "backend": STR, "path": STR, "cameradev": STR, "hostbus": STR,
    "hostaddr": STR, "hostport": STR, "vendorid": STR, "productid": STR, "isobufs": STR, "isobsize": STR, "cpu-id": UINT8,
    "logical_block_size": INT, "physical_block_size": INT, "write-cache": ANY, "scsi": ANY, "werror": STR, "rerror": STR,
}

COMMANDS = (
    Command("device_add", _device_add, "Plug a disk or a network interface into a replaceable slot: what blockdev-add or "
            "netdev_add has opened, by the same name. The device is one that the guest knows since it booted; its queues, "
            "queue size and iothread are those of the slot.",
            arguments=(
                Member("id", STR, "The device's id: the node-name of blockdev-add or the id of netdev_add. With `drive` or "
                       "`netdev` naming that, any other."),
                Member("driver", STR, "A name with `blk` or `net` in it, such as virtio-blk-mmio or virtio-net-device; "
                       "vhost-user-blk-device for a disk in another process."),
                Member("addr", STR, "The slot, decimal or 0x hexadecimal: 0 to 3 for a disk, 0 or 1 for an interface.", True),
                Member("lun", UINT64, "The slot less one, without `addr`. With neither the first free slot.", True),
                Member("drive", STR, "The disk's node-name; required for a disk.", True),
                Member("serial", STR, "The serial number that the guest sees.", True),
                Member("netdev", STR, "The interface's netdev.", True),
                Member("chardev", STR, "The -chardev socket of a vhost-user-blk device's back end, one that no device uses. "
                       "Without effect for others.", True),
                Member("mac", STR, "Its MAC address, for a guest that starts after this.", True),
                *(Member(name, type, "No effect.", True) for name, type in _NO_EFFECT.items()),
            )),
    Command("device_del", _device_del, "Take a disk or a network interface out. Requests in flight end first; the image is "
            "closed. DEVICE_DELETED follows.", arguments=(Member("id", STR, "The device's id."),)),
)

EVENTS = (
    Event("DEVICE_DELETED", "A device has been taken out.", record({"device?": STR, "path": STR})),
)
