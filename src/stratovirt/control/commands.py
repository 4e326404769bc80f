"""All QMP commands and events there are, from all families, and the commands that list them."""

from __future__ import annotations

from stratovirt.control import absent, balloon, declared, descriptors, disks, inquiry, interfaces, migration, plugging, power
from stratovirt.control.protocol import PACKAGE, QEMU_VERSION, QmpError
from stratovirt.control.schema import describe
from stratovirt.control.table import Command, CommandTable
from stratovirt.control.types import ANY, INT, STR, Array, Member, record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from stratovirt.control.table import MachineView


def _qmp_capabilities(_machine: MachineView, arguments: dict[str, Any]) -> object:
    for name in arguments.get("enable", ()):
        raise QmpError(f"capability {name!r} is not offered")
    return {}


def _query_version(_machine: MachineView, _arguments: dict[str, Any]) -> object:
    major, minor, micro = QEMU_VERSION
    return {"package": PACKAGE, "qemu": {"major": major, "micro": micro, "minor": minor}}


def _query_commands(_machine: MachineView, _arguments: dict[str, Any]) -> object:
    return [{"name": command.name} for command in COMMANDS]


def _query_events(_machine: MachineView, _arguments: dict[str, Any]) -> object:
    return [{"name": event.name} for event in EVENTS]


def _query_qmp_schema(_machine: MachineView, _arguments: dict[str, Any]) -> object:
    return describe(COMMANDS, EVENTS)


_NAMES = Array(record({"name": STR}))

EVENTS = (*power.EVENTS, *plugging.EVENTS, *balloon.EVENTS)

# The order of `query-commands` in StratoVirt. What it does not have comes after.
_ORDER = """
    qmp_capabilities quit stop cont system_powerdown system_reset device_add device_del chardev-add chardev-remove netdev_add
    netdev_del netdev_replace netlink_set cameradev_add cameradev_del query-hotpluggable-cpus query-cpus query-status getfd
    blockdev-add blockdev-del balloon set-viomem get-viomem query-mem query-mem-gpa query-balloon query-vnc query-display-image
    switch-audio-record migrate query-migrate migrate_cancel query-version query-commands query-target query-kvm query-machines
    query-events qom-list-types device-list-properties block-commit query-tpm-models query-tpm-types query-command-line-options
    query-migrate-capabilities query-qmp-schema query-sev-capabilities query-chardev qom-list qom-get query-block
    query-named-block-nodes query-blockstats query-block-jobs query-gic-capabilities query-iothreads update_region input_event
    human-monitor-command blockdev-snapshot-internal-sync blockdev-snapshot-delete-internal-sync query-vcpu-reg trace-get-state
    trace-set-state query-ohui-status query-workloads detect-silent-audio
"""
_PLACE = {name: number for number, name in enumerate(_ORDER.split())}

COMMANDS = CommandTable(tuple(sorted((
    Command("qmp_capabilities", _qmp_capabilities, "End the negotiation; not needed, may be repeated.",
            arguments=(Member("enable", Array(STR), "Capabilities to use; none is offered.", optional=True),)),
    *power.COMMANDS,
    *migration.COMMANDS,
    *plugging.COMMANDS,
    *interfaces.COMMANDS,
    *disks.COMMANDS,
    *descriptors.COMMANDS,
    *inquiry.COMMANDS,
    *balloon.COMMANDS,
    *declared.COMMANDS,
    *absent.COMMANDS,
    Command("query-version", _query_version, "The version of QEMU's interface that is spoken.",
            returns=record({"package": STR, "qemu": record({"major": INT, "micro": INT, "minor": INT})}), strict=False),
    Command("query-commands", _query_commands, "This list.", returns=_NAMES, strict=False),
    Command("query-events", _query_events, "The events that can be sent.", returns=_NAMES, strict=False),
    Command("query-qmp-schema", _query_qmp_schema, "Commands, events and their types, as QEMU describes them.",
            returns=Array(ANY), strict=False),
), key=lambda command: _PLACE.get(command.name, len(_PLACE)))))
