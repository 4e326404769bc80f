"""QMP commands that say what this program could build: types, their properties, command-line options.

All of it comes from the declarations that the command line is parsed by (`config/options.py`), so it cannot promise what a
start would refuse: keys that this version does not have are left out.
"""

from __future__ import annotations

from stratovirt.config import options
from stratovirt.config.schema import Bool, Group, Int, Key, PowerOfTwo, Size, StrictBool
from stratovirt.control.table import Command
from stratovirt.control.types import ANY, STR, Array, Member, record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from stratovirt.control.table import MachineView

# What QEMU calls the parents, by how our names begin.
_PARENTS = (("virtconsole", "virtserialport"), ("virtserialport", "virtio-serial-port"), ("rng-", "rng-backend"),
            ("memory-backend-", "memory-backend"), ("virtio-", "virtio-device"), ("vhost-", "virtio-device"))


def _parent(name: str) -> str:
    return next((parent for prefix, parent in _PARENTS if name.startswith(prefix)), "object")


def _query_types(_machine: MachineView, _arguments: dict[str, Any]) -> object:
    return [{"name": name, "parent": _parent(name)}
            for groups in (options.DEVICES, options.OBJECTS) for name, group in groups.items() if group.works]


def _works(key: Key) -> bool:
    """Is there anything to choose? A key of which one value alone works is as good as absent."""
    return key.works is None or len(key.works) > 1


def _property_type(key: Key) -> str:
    if isinstance(key.kind, (Bool, StrictBool)):
        return "bool"
    if isinstance(key.kind, (Int, Size)):
        return "uint16" if isinstance(key.kind, PowerOfTwo) or key.name == "num-queues" else "uint64"
    return "str"


def _device_list_properties(_machine: MachineView, arguments: dict[str, Any]) -> object:
    """libvirt asks for many types and goes by single properties, so an unknown type is no error."""
    name = arguments["typename"]
    found = {"disable-legacy": "OnOffAuto"}
    if name.startswith("virtio-balloon"):
        found["deflate-on-oom"] = "bool"
    if name.startswith("virtio-blk"):
        found["num-queues"] = "uint16"
    group = options.DEVICES.get(name)
    for key in group.keys if group is not None else ():
        if key.name != "id" and _works(key):
            found[key.name] = _property_type(key)
    return [{"name": property, "type": type} for property, type in found.items()]


def _option_type(key: Key) -> str:
    if isinstance(key.kind, (Bool, StrictBool)):
        return "boolean"
    if isinstance(key.kind, Size):
        return "size"
    return "number" if isinstance(key.kind, Int) else "string"


def _merged(name: str, groups: dict[str, Group]) -> tuple[str, list[Key]]:
    keys: dict[str, Key] = {}
    for group in groups.values():
        for key in group.keys:
            keys.setdefault(key.name, key)
    return name, list(keys.values())


def _options() -> Iterator[tuple[str, list[Key]]]:
    for group in (options.MACHINE, options.ACCEL, options.SMP, options.MEMORY, options.DRIVE, options.MON, options.ACTION):
        yield _OPTION_NAMES.get(group.title, group.title[1:]), list(group.keys)
    yield _merged("chardev", options.CHARDEVS)
    yield _merged("object", options.OBJECTS)
    yield _merged("device", options.DEVICES)


_OPTION_NAMES = {"-smp": "smp-opts", "-m": "memory"}
# Named in the answer although they are not to be had yet: clients go by the presence of these two.
_ALWAYS_NAMED = {("drive", "discard"): "discard operation (unmap|ignore)",
                 ("drive", "detect-zeroes"): "optimize zero writes (unmap|on|off)"}


def _query_command_line_options(_machine: MachineView, arguments: dict[str, Any]) -> object:
    wanted = arguments.get("option")
    answer = []
    for option, keys in _options():
        if wanted not in (None, option):
            continue
        parameters = []
        for key in keys:
            help = _ALWAYS_NAMED.get((option, key.name))
            if help is not None:
                parameters.append({"name": key.name, "type": "string", "help": help})
            elif _works(key) or key.required:
                parameters.append({"name": key.name, "type": _option_type(key), "help": key.help})
        answer.append({"option": option, "parameters": parameters})
    return answer


COMMANDS = (
    Command("qom-list-types", _query_types, "The devices and objects that can be made.",
            returns=Array(record({"name": STR, "parent": STR})),
            arguments=(Member("implements", STR, "Ignored.", True), Member("abstract", ANY, "Ignored.", True)),
            strict=False),
    Command("device-list-properties", _device_list_properties, "The properties of a device type; the common ones if unknown.",
            returns=Array(record({"name": STR, "type": STR})), arguments=(Member("typename", STR, "The type."),)),
    Command("query-command-line-options", _query_command_line_options, "Command-line options and their parameters.",
            returns=Array(record({"option": STR, "parameters": Array(record({"name": STR, "type": STR, "help": STR}))})),
            arguments=(Member("option", STR, "This one only.", optional=True),), strict=False),
)
