"""QMP commands that change whether the machine runs."""

from __future__ import annotations

from stratovirt.control.table import Command, Event
from stratovirt.control.types import BOOL, STR, Enum, record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from stratovirt.control.table import MachineView


def _quit(machine: MachineView, _arguments: dict[str, Any]) -> object:
    machine.shutdown(False, "host-qmp-quit")
    return {}


def _stop(machine: MachineView, _arguments: dict[str, Any]) -> object:
    machine.pause()
    return {}


def _cont(machine: MachineView, _arguments: dict[str, Any]) -> object:
    machine.resume()
    return {}


def _system_powerdown(machine: MachineView, _arguments: dict[str, Any]) -> object:
    machine.powerdown()
    return {}


def _system_reset(machine: MachineView, _arguments: dict[str, Any]) -> object:
    machine.reset(False)
    return {}


def _query_status(machine: MachineView, _arguments: dict[str, Any]) -> object:
    status = machine.state if machine.state in ("running", "paused") else "debug"
    return {"running": status == "running", "singlestep": False, "status": status}


COMMANDS = (
    Command("quit", _quit, "End the machine and the program."),
    Command("stop", _stop, "Take every vCPU out of the guest; returns when that is done."),
    Command("cont", _cont, "Let the vCPUs run."),
    Command("system_powerdown", _system_powerdown, "Press the power button; a microVM has none and ends."),
    Command("system_reset", _system_reset, "Start the guest's kernel again, in place."),
    Command("query-status", _query_status, "Whether the guest runs.",
            returns=record({"running": BOOL, "singlestep": BOOL, "status": Enum("running", "paused", "debug")})),
)

EVENTS = (
    Event("SHUTDOWN", "The machine ends; `guest` says whose wish it was.", record({"guest": BOOL, "reason": STR})),
    Event("RESET", "The machine starts again; `guest` says whose wish it was.", record({"guest": BOOL})),
    Event("STOP", "The vCPUs have been stopped."),
    Event("RESUME", "The vCPUs run again."),
    Event("POWERDOWN", "The power button has been pressed."),
)
