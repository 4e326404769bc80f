"""Commands of the interface for what a microVM does not have: each answers what StratoVirt's microVM answers.

Some of those answers are errors, some an empty list or object, and some a successful return of a sentence that says no. They
are here because clients ask for them in passing and go by the answer.
"""

from __future__ import annotations

from stratovirt import log
from stratovirt.control.protocol import GENERIC_ERROR, QmpError
from stratovirt.control.table import Command
from stratovirt.control.types import ANY, BOOL, INT, NOTHING, STR, UINT64, Array, Enum, Member, Object, Type, record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from stratovirt.control.table import Handler, MachineView


def _refuse(text: str, error_class: str = GENERIC_ERROR) -> Handler:
    def handler(_machine: MachineView, _arguments: dict[str, Any]) -> object:
        raise QmpError(text, error_class)

    return handler


def _answer(make: Callable[[], object]) -> Handler:
    return lambda _machine, _arguments: make()


def _say(text: str) -> Handler:
    return _answer(lambda: text)


def _snapshot(machine: MachineView, arguments: dict[str, Any]) -> object:
    log.warn(f"QMP: no snapshot of {arguments['device']}: a raw image has none")
    return {}


def _human_monitor_command(_machine: MachineView, arguments: dict[str, Any]) -> object:
    words = arguments["command-line"].split()
    if words != ["info", "snapshots"]:
        raise QmpError(f"Unsupported command: {arguments['command-line'][:100]}")
    return "There is no snapshot available.\r\n"


_SNAPSHOT = (Member("device", STR, "A disk."), Member("name", STR, "A snapshot."))
_ID = Member("id", STR, "A name.")
_LIST = Array(ANY)


def _optional(types: dict[str, Type]) -> tuple[Member, ...]:
    return tuple(Member(name, type, optional=True) for name, type in types.items())


def _empty_list(name: str, summary: str, arguments: tuple[Member, ...] = ()) -> Command:
    return Command(name, _answer(list), summary, returns=_LIST, arguments=arguments, strict=False)


COMMANDS = (
    Command("chardev-add", _refuse("chardev_add not supported yet for microVM"), "Character devices are made at start only.",
            arguments=(_ID, Member("backend", Object(open=True), "What it is."))),
    Command("chardev-remove", _refuse("chardev_remove not supported yet for microVM"), "Always an error.", arguments=(_ID,)),
    Command("cameradev_add", _refuse("cameradev_add not supported for MicroVM"), "Always an error.",
            arguments=(_ID, Member("driver", STR), *_optional({"path": STR}))),
    Command("cameradev_del", _refuse("cameradev_del not supported for MicroVM"), "Always an error.", arguments=(_ID,)),
    Command("netdev_replace", _say("netdev_replace not supported for VM"), "Returns a sentence that says so.", returns=STR,
            arguments=(_ID, Member("ifname", STR, "A tap device."), Member("macnat", BOOL, optional=True),
                       Member("path", STR, optional=True))),
    Command("set-viomem", _refuse("There is no virtio-mem device."), "Always an error.",
            arguments=(_ID, Member("requested-size", STR, "A size."))),
    Command("get-viomem", _refuse("There is no virtio-mem device."), "Always an error.", arguments=(_ID,)),
    Command("query-mem-gpa", _refuse("query_mem_gpa is not supported yet"), "Always an error.",
            arguments=(Member("gpa", STR, "A guest physical address.", optional=True),)),
    Command("query-vcpu-reg", _refuse("query_vcpu_reg is not supported yet"), "Always an error.",
            arguments=(Member("addr", STR, "A register."), Member("vcpu", UINT64, "A vCPU."))),
    Command("query-vnc", _refuse("The service of VNC is not supported"), "Always an error."),
    Command("query-display-image", _refuse("query-display-image is not supported"), "Always an error."),
    Command("switch-audio-record", _say("switch_audio_record not supported for VM"), "Returns a sentence that says so.",
            returns=STR, arguments=(Member("authorized", Enum("on", "off"), "Whether the guest may record."),)),
    Command("input_event", _refuse("There is no input device."), "Always an error.",
            arguments=_optional({"key": STR, "value": STR})),
    Command("query-ohui-status", _refuse("query_ohui_status not supported for VM"), "Always an error."),
    Command("query-workloads", _refuse("query_workloads not supported for VM"), "Always an error; needs `arguments`.",
            may_omit=False),
    Command("detect-silent-audio", _refuse("There is no audio device."), "Always an error; needs `arguments`.", strict=False,
            may_omit=False),
    Command("update_region", _refuse("The micro vm is not supported"), "Always an error.", strict=False, may_omit=False),
    Command("trace-get-state", _answer(list), "Trace points that match; there are none.",
            returns=Array(record({"name": STR, "state": BOOL})), arguments=(Member("name", STR, "A regular expression."),)),
    Command("trace-set-state", _answer(dict), "Switch the trace points that match; there are none.",
            arguments=(Member("name", STR, "A regular expression."), Member("enable", BOOL, "On or off."))),
    Command("block-commit", _answer(dict), "Nothing to commit: a raw image has no layers.", strict=False),
    Command("blockdev-snapshot-internal-sync", _snapshot, "Does nothing, successfully: a raw image has no snapshots.",
            arguments=_SNAPSHOT),
    Command("blockdev-snapshot-delete-internal-sync", _snapshot, "Does nothing, successfully.", arguments=_SNAPSHOT),
    Command("human-monitor-command", _human_monitor_command, "`info snapshots` is the one line it knows.", returns=STR,
            arguments=(Member("command-line", STR, "The line."), Member("cpu-index", INT, optional=True))),
    Command("query-sev-capabilities", _answer(dict), "Nothing: there is no memory encryption.", returns=NOTHING, strict=False),
    _empty_list("query-block-jobs", "Jobs on disks; there are none."),
    _empty_list("query-tpm-models", "TPM models; there are none."),
    _empty_list("query-tpm-types", "TPM back ends; there are none."),
    _empty_list("query-migrate-capabilities", "What migration can do; it cannot be done."),
)
