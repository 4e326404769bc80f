"""QMP commands and the event of the balloon, by which memory is taken back from the guest."""

from __future__ import annotations

from stratovirt.control.protocol import DEVICE_NOT_ACTIVE, QmpError
from stratovirt.control.table import Command, Event
from stratovirt.control.types import INT, UINT64, Member, record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from stratovirt.control.table import BalloonView, MachineView


def _device(machine: MachineView) -> BalloonView:
    if machine.balloon is None:
        raise QmpError("No balloon device has been activated", DEVICE_NOT_ACTIVE)
    return machine.balloon


def _balloon(machine: MachineView, arguments: dict[str, Any]) -> object:
    _device(machine).set_target(arguments.get("value", 0))
    return {}


def _query_balloon(machine: MachineView, _arguments: dict[str, Any]) -> object:
    return {"actual": _device(machine).guest_bytes}


_ACTUAL = record({"actual": INT})

COMMANDS = (
    Command("balloon", _balloon, "Ask the guest to make do with so much memory; it follows at its own pace.",
            arguments=(Member("value", UINT64, "Bytes that the guest keeps; none if left out.", optional=True),)),
    Command("query-balloon", _query_balloon, "How much memory the guest has left.", returns=_ACTUAL),
)

EVENTS = (
    Event("BALLOON_CHANGED", "The guest has given or taken memory in the last second; it has `actual` bytes left.", _ACTUAL),
)
