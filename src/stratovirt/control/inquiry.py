"""QMP commands that describe the machine and the host."""

from __future__ import annotations

import os

from stratovirt.control.table import Command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from stratovirt.control.table import MachineView

# QMP's name for an architecture in query-cpus, by the host's name for it.
_CPU_ARCHITECTURES = {"x86_64": "x86", "aarch64": "arm"}


def _architecture() -> str:
    return os.uname().machine


def _query_target(_machine: MachineView, _arguments: dict[str, Any]) -> object:
    return {"arch": _architecture()}


def _query_kvm(_machine: MachineView, _arguments: dict[str, Any]) -> object:
    """Clients cache the answer and check it against the host, so it has to be found out and not assumed."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return {"enabled": False, "present": os.path.exists("/dev/kvm")}
    return {"enabled": True, "present": True}


def _query_machines(_machine: MachineView, _arguments: dict[str, Any]) -> object:
    return [
        {"cpu-max": 255, "deprecated": False, "hotpluggable-cpus": False, "name": name, "numa-mem-supported": False}
        for name in ("none", "microvm")
    ]


def _topology(machine: MachineView, index: int) -> dict[str, int]:
    smp = machine.config.smp
    rest, thread = divmod(index, max(1, smp.threads))
    rest, core = divmod(rest, max(1, smp.cores))
    rest, _cluster = divmod(rest, max(1, smp.clusters))
    socket, die = divmod(rest, max(1, smp.dies))
    return {"socket": socket, "die": die, "core": core, "thread": thread}


def _qom_path(index: int) -> str:
    return f"/machine/unattached/device[{index}]"


def _query_cpus(machine: MachineView, _arguments: dict[str, Any]) -> object:
    architecture = _CPU_ARCHITECTURES.get(_architecture(), "x86")
    cpus = []
    for index, thread_id in enumerate(machine.vcpu_thread_ids()):
        where = _topology(machine, index)
        cpus.append({
            "CPU": index, "arch": architecture, "current": True, "halted": False, "qom_path": _qom_path(index),
            "thread_id": thread_id,
            "props": {"core-id": where["core"], "die_id": where["die"], "socket-id": where["socket"],
                      "thread-id": where["thread"]},
        })
    return cpus


def _query_cpus_fast(machine: MachineView, _arguments: dict[str, Any]) -> object:
    cpus = []
    for index, thread_id in enumerate(machine.vcpu_thread_ids()):
        where = _topology(machine, index)
        cpus.append({
            "cpu-index": index, "qom-path": _qom_path(index), "target": _architecture(), "thread-id": thread_id,
            "props": {"core-id": where["core"], "die-id": where["die"], "socket-id": where["socket"],
                      "thread-id": where["thread"]},
        })
    return cpus


def _query_chardev(machine: MachineView, _arguments: dict[str, Any]) -> object:
    return [
        {"filename": device.filename, "frontend-open": True, "label": label}
        for label, device in machine.chardevs.items()
    ]


def _query_name(machine: MachineView, _arguments: dict[str, Any]) -> object:
    return {"name": machine.config.name} if machine.config.name else {}


def _query_uuid(_machine: MachineView, _arguments: dict[str, Any]) -> object:
    return {"UUID": "00000000-0000-0000-0000-000000000000"}  # that is how "none was given" is spelled


_CPU = '[{"thread_id" or "thread-id": host thread, "props": topology, ...}]'

COMMANDS = (
    Command("query-cpus", _query_cpus, "The vCPUs and their threads.", returns=_CPU),
    Command("query-cpus-fast", _query_cpus_fast, "The same in the spelling that newer clients use.", returns=_CPU),
    Command("query-target", _query_target, "The architecture.", returns='{"arch": str}', strict=False),
    Command("query-kvm", _query_kvm, "Whether /dev/kvm exists and may be used.",
            returns='{"enabled": bool, "present": bool}', strict=False),
    Command("query-machines", _query_machines, "The machine types.", returns='[{"name": str, "cpu-max": int, ...}]',
            strict=False),
    Command("query-chardev", _query_chardev, "The character devices in use.",
            returns='[{"filename": str, "frontend-open": true, "label": str}]', strict=False),
    Command("query-name", _query_name, "The name given with -name.", returns='{"name": str} or {}'),
    Command("query-uuid", _query_uuid, "The UUID of the guest.", returns='{"UUID": str}'),
)
