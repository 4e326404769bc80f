"""QMP commands on disk images: `blockdev-add`, `blockdev-del`, and what there is."""

from __future__ import annotations

from stratovirt.backends.block import DISCARD, FLUSH, READ, WRITE
from stratovirt.config.schema import Bool
from stratovirt.config.vm import DriveConfig
from stratovirt.control.protocol import QmpError
from stratovirt.control.table import Command
from stratovirt.control.types import ANY, BOOL, INT, STR, UINT64, Array, Enum, Member, Object, record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from stratovirt.control.table import MachineView
    from stratovirt.machine.hotplug import BlockNode

_NAME_LIMIT = 255
MAX_IOPS = 1_000_000
_SWITCH = Bool()


def _blockdev_add(machine: MachineView, arguments: dict[str, Any]) -> object:
    file = arguments.get("file")
    if file is None:
        if "filename" not in arguments:
            raise QmpError("missing field `file`")
        file = {name: arguments[name] for name in ("filename", "aio") if name in arguments}
    for member, supported in (("driver", ("raw", "file", "host_device")), ("media", ("disk", "cdrom"))):
        if arguments.get(member, supported[0]) not in supported:
            raise QmpError(f"`{member}` {arguments[member][:100]} is not supported yet")
    for member in ("backing", "options"):
        if arguments.get(member):
            raise QmpError(f"`{member}` is not supported yet")
    machine.hotplug.add_node(_drive(file, arguments))
    return {}


def _drive(file: dict[str, Any], arguments: dict[str, Any]) -> DriveConfig:
    name, path = arguments["node-name"], file["filename"]
    if not 0 < len(name.encode("utf-8", "surrogatepass")) <= _NAME_LIMIT:
        raise QmpError(f"`node-name` must have 1 to {_NAME_LIMIT} bytes")
    if not path or "\0" in path or not _encodable(path):
        raise QmpError("`file.filename` is not a path")
    cache = {**file.get("cache", {}), **arguments.get("cache", {})}
    limit = arguments.get("throttling.iops-total", 0)
    if limit > MAX_IOPS:
        raise QmpError(f"`throttling.iops-total` must be at most {MAX_IOPS}")
    aio = "io_uring" if file.get("aio") == "iouring" else file.get("aio")
    try:
        discard = _SWITCH.parse(arguments.get("discard", file.get("discard", "ignore")))
    except ValueError as error:
        raise QmpError(f"`discard` is {error}") from error
    readonly = arguments.get("read-only", False) or arguments.get("media") == "cdrom"
    return DriveConfig(name, path, readonly, cache.get("direct"), aio, discard=discard,
                       detect_zeroes=arguments.get("detect-zeroes", "off"), iops_limit=limit)


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _blockdev_del(machine: MachineView, arguments: dict[str, Any]) -> object:
    machine.hotplug.delete_node(arguments["node-name"])
    return {}


# -- what there is


def _node(node: BlockNode) -> dict[str, object]:
    """QEMU's BlockDeviceInfo, without the members that QEMU makes optional."""
    image = node.image
    size = image.size if image is not None else 0
    direct = image is not None and image.direct
    return {
        "node-name": node.config.id, "drv": "raw", "file": node.config.file, "ro": node.config.readonly, "encrypted": False,
        "backing_file_depth": 0, "detect_zeroes": node.config.detect_zeroes, "write_threshold": 0,
        "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": node.config.iops_limit, "iops_rd": 0, "iops_wr": 0,
        "cache": {"writeback": True, "direct": direct, "no-flush": False},
        "image": {"filename": node.config.file, "format": "raw", "virtual-size": size},
    }


def _query_block(machine: MachineView, _arguments: dict[str, Any]) -> object:
    return [{"device": node.config.id, "qdev": node.device, "type": "unknown", "removable": False, "locked": False,
             "inserted": _node(node)} for node, _ in machine.hotplug.disks()]


def _query_named_block_nodes(machine: MachineView, _arguments: dict[str, Any]) -> object:
    return [_node(node) for node in machine.hotplug.nodes()]


def _query_blockstats(machine: MachineView, _arguments: dict[str, Any]) -> object:
    answer = []
    for node, device in machine.hotplug.disks():
        stats = {}
        for word, kind in _COUNTED:
            stats[f"{word}_operations"] = device.operations[kind]
            stats[f"failed_{word}_operations"] = device.failures[kind]
            if kind != FLUSH:
                stats[f"{word}_bytes"] = device.bytes[kind]
        answer.append({"device": node.config.id, "node-name": node.config.id, "qdev": node.device, "stats": stats})
    return answer


_COUNTED = (("rd", READ), ("wr", WRITE), ("flush", FLUSH), ("unmap", DISCARD))

_FILE = Object(
    Member("filename", STR, "The path of the image."),
    Member("driver", STR, "`file` or `host_device`; which of the two it is, is found out.", optional=True),
    Member("aio", Enum("off", "native", "iouring", "io_uring", "threads"), "How requests are carried out.", optional=True),
    Member("discard", STR, "As below.", optional=True),
    Member("cache", record({"direct?": BOOL, "no-flush?": BOOL}), "As below.", optional=True),
)
_ADD = (
    Member("node-name", STR, "The name that device_add and blockdev-del use."),
    Member("file", _FILE, "The image.", optional=True),
    Member("driver", STR, "The format, `raw`; or `file` with `filename` in place of `file`.", optional=True),
    Member("filename", STR, "The path of the image, in place of `file`.", optional=True),
    Member("aio", Enum("off", "native", "iouring", "io_uring", "threads"), "With `filename`.", optional=True),
    Member("read-only", BOOL, "Refuse writes.", optional=True),
    Member("cache", record({"direct?": BOOL, "no-flush?": BOOL}), "`direct`: bypass the host's page cache; if left out, "
           "wherever the file system can. `no-flush` has no effect.", optional=True),
    Member("discard", STR, "`unmap` or `on`: pass the guest's discards to the image; `ignore` or `off`.", optional=True),
    Member("detect-zeroes", Enum("off", "on", "unmap"), "Turn writes of zeroes into holes.", optional=True),
    Member("media", STR, "`disk`, or `cdrom`: a disk that refuses writes.", optional=True),
    Member("id", STR, "No effect.", optional=True),
    Member("auto-read-only", BOOL, "No effect.", optional=True),
    Member("backing", STR, "Not supported yet.", optional=True),
    Member("options", STR, "Not supported yet.", optional=True),
    Member("throttling.iops-total", UINT64, "Requests a second; 0 for no limit.", optional=True),
    Member("l2-cache-size", STR, "No effect on a raw image.", optional=True),
    Member("refcount-cache-size", STR, "No effect on a raw image.", optional=True),
    Member("logical_block_size", INT, "No effect: 512.", optional=True),
    Member("physical_block_size", INT, "No effect.", optional=True),
)

_NODE = record({
    "node-name": STR, "drv": STR, "file": STR, "ro": BOOL, "encrypted": BOOL, "backing_file_depth": INT, "detect_zeroes": STR,
    "write_threshold": INT, "bps": INT, "bps_rd": INT, "bps_wr": INT, "iops": INT, "iops_rd": INT, "iops_wr": INT,
    "cache": record({"writeback": BOOL, "direct": BOOL, "no-flush": BOOL}),
    "image": record({"filename": STR, "format": STR, "virtual-size": INT}),
})

_STATISTICS = record({name: UINT64 for word, kind in _COUNTED for name in (
    f"{word}_operations", f"failed_{word}_operations", *(() if kind == FLUSH else (f"{word}_bytes",)))})

COMMANDS = (
    Command("blockdev-add", _blockdev_add, "Open an image, to be plugged in with device_add.", arguments=_ADD),
    Command("blockdev-del", _blockdev_del, "Close an image that no device uses, and forget its name.",
            arguments=(Member("node-name", STR, "Its name."),)),
    Command("query-block", _query_block, "The disks that have an image.",
            returns=Array(record({"device": STR, "qdev": STR, "type": STR, "removable": BOOL, "locked": BOOL,
                                  "inserted": _NODE})), strict=False),
    Command("query-blockstats", _query_blockstats, "What the guest has done to its disks; writes of zeroes count as writes.",
            returns=Array(record({"device": STR, "node-name": STR, "qdev": STR, "stats": _STATISTICS})),
            arguments=(Member("query-nodes", BOOL, "No effect.", optional=True),), strict=False),
    Command("query-named-block-nodes", _query_named_block_nodes, "The images that are open.", returns=Array(_NODE),
            arguments=(Member("flat", ANY, "No effect.", optional=True),), strict=False),
)
