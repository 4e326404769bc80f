"""QMP commands that describe the machine and the host."""

from __future__ import annotations

import os

from stratovirt import log
from stratovirt.control.table import Command
from stratovirt.control.types import ANY, BOOL, INT, STR, Array, Member, Type, record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from stratovirt.control.table import MachineView

# QMP's name for an architecture in query-cpus, by the host's name for it.
_CPU_ARCHITECTURES = {"x86_64": "x86", "aarch64": "arm"}
_ARCHITECTURE = os.uname().machine  # once: a running machine may not ask


def _query_target(_machine: MachineView, _arguments: dict[str, Any]) -> object:
    return {"arch": _ARCHITECTURE}


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
    """Where vCPU `index` sits, as query-cpus spells it."""
    smp = machine.config.smp
    rest, thread = divmod(index, max(1, smp.threads))
    rest, core = divmod(rest, max(1, smp.cores))
    rest, _cluster = divmod(rest, max(1, smp.clusters))
    socket, die = divmod(rest, max(1, smp.dies))
    return {"core-id": core, "die_id": die, "socket-id": socket, "thread-id": thread}


def _query_gic_capabilities(machine: MachineView, _arguments: dict[str, Any]) -> object:
    """The one that this machine has, which is the best that the host's KVM makes: there is no choice."""
    version = machine.interrupt_controller.removeprefix("gicv")[:1]
    return [{"version": int(version), "emulated": False, "kernel": True}] if version else []


def _qom_path(index: int) -> str:
    return f"/machine/unattached/device[{index}]"


def _query_cpus(machine: MachineView, _arguments: dict[str, Any]) -> object:
    architecture = _CPU_ARCHITECTURES.get(_ARCHITECTURE, "x86")
    return [
        {"CPU": index, "arch": architecture, "current": True, "halted": False, "qom_path": _qom_path(index),
         "thread_id": thread_id, "props": _topology(machine, index)}
        for index, thread_id in enumerate(machine.vcpu_thread_ids())
    ]


def _query_cpus_fast(machine: MachineView, _arguments: dict[str, Any]) -> object:
    cpus = []
    for index, thread_id in enumerate(machine.vcpu_thread_ids()):
        props = _topology(machine, index)
        props["die-id"] = props.pop("die_id")
        cpus.append({"cpu-index": index, "qom-path": _qom_path(index), "target": _ARCHITECTURE, "thread-id": thread_id,
                     "props": props})
    return cpus


def _query_hotpluggable_cpus(machine: MachineView, _arguments: dict[str, Any]) -> object:
    smp = machine.config.smp
    kind = "host-aarch64-cpu" if _ARCHITECTURE == "aarch64" else "host-x86-cpu"
    return [
        {"props": _topology(machine, index), "type": kind, "vcpus-count": 1,
         **({"qom-path": _qom_path(index)} if index < smp.cpus else {})}
        for index in range(smp.max_cpus)
    ]


def _query_chardev(machine: MachineView, _arguments: dict[str, Any]) -> object:
    return [
        {"filename": device.filename, "frontend-open": True, "label": label}
        for label, device in machine.chardevs.items()
    ] + [
        {"filename": f"unix:{chardev.path}", "frontend-open": True, "label": label}
        for label, chardev in machine.config.vhost_users.items()
    ]


def _query_name(machine: MachineView, _arguments: dict[str, Any]) -> object:
    return {"name": machine.config.name} if machine.config.name else {}


def _query_command_line(machine: MachineView, _arguments: dict[str, Any]) -> object:
    return {"arguments": machine.config.arguments, "directory": machine.config.directory}


def _query_uuid(_machine: MachineView, _arguments: dict[str, Any]) -> object:
    return {"UUID": "00000000-0000-0000-0000-000000000000"}  # that is how "none was given" is spelled


def _query_mem(machine: MachineView, _arguments: dict[str, Any]) -> object:
    log.info(f"guest memory: {machine.config.memory_size >> 20} MiB")
    return {}


def _query_memory_size_summary(machine: MachineView, _arguments: dict[str, Any]) -> object:
    return {"base-memory": machine.config.memory_size}


def _query_iothreads(machine: MachineView, _arguments: dict[str, Any]) -> object:
    return [{"id": id, "thread-id": thread.native_id, "poll-grow": 0, "poll-max-ns": 0, "poll-shrink": 0}
            for id, thread in machine.iothreads.items()]


def _qom_list(machine: MachineView, arguments: dict[str, Any]) -> object:
    """The devices by their ids, where libvirt looks for them; the rest of QEMU's tree does not exist."""
    if arguments.get("path") != "/machine/peripheral":
        return []
    return [{"name": device.id, "type": f"child<{device.driver}>"} for device in machine.config.devices]


def _empty_list(_machine: MachineView, _arguments: dict[str, Any]) -> object:
    return []


_PROPS: dict[str, Type] = {"core-id": INT, "socket-id": INT, "thread-id": INT}

COMMANDS = (
    Command("query-cpus", _query_cpus, "The vCPUs and their threads.",
            returns=Array(record({"CPU": INT, "arch": STR, "current": BOOL, "halted": BOOL, "qom_path": STR, "thread_id": INT,
                                  "props": record({**_PROPS, "die_id": INT})}))),
    Command("query-cpus-fast", _query_cpus_fast, "The same in the spelling that newer clients use.",
            returns=Array(record({"cpu-index": INT, "qom-path": STR, "target": STR, "thread-id": INT,
                                  "props": record({**_PROPS, "die-id": INT})}))),
    Command("query-hotpluggable-cpus", _query_hotpluggable_cpus, "All places for vCPUs; those with a qom-path are taken.",
            returns=Array(record({"type": STR, "vcpus-count": INT, "qom-path?": STR,
                                  "props": record({**_PROPS, "die_id": INT})}))),
    Command("query-target", _query_target, "The architecture.", returns=record({"arch": STR}), strict=False),
    Command("query-kvm", _query_kvm, "Whether /dev/kvm exists and may be used.",
            returns=record({"enabled": BOOL, "present": BOOL}), strict=False),
    Command("query-gic-capabilities", _query_gic_capabilities, "The interrupt controller on arm64, none on x86_64.",
            returns=Array(record({"version": INT, "emulated": BOOL, "kernel": BOOL})), strict=False),
    Command("query-machines", _query_machines, "The machine types.",
            returns=Array(record({"cpu-max": INT, "deprecated": BOOL, "hotpluggable-cpus": BOOL, "name": STR,
                                  "numa-mem-supported": BOOL})), strict=False),
    Command("query-chardev", _query_chardev, "The character devices in use.",
            returns=Array(record({"filename": STR, "frontend-open": BOOL, "label": STR})), strict=False),
    Command("query-name", _query_name, "The name given with -name.", returns=record({"name?": STR})),
    Command("query-command-line", _query_command_line, "How this machine was started, for `stratovirt template create`: the "
            "arguments behind the program's name, and the working directory.",
            returns=record({"arguments": Array(STR), "directory": STR})),
    Command("query-uuid", _query_uuid, "The UUID of the guest.", returns=record({"UUID": STR})),
    Command("query-mem", _query_mem, "Writes the guest's memory layout into the log."),
    Command("query-memory-size-summary", _query_memory_size_summary, "The size of the guest's memory.",
            returns=record({"base-memory": INT})),
    Command("query-iothreads", _query_iothreads, "The I/O threads.",
            returns=Array(record({"id": STR, "thread-id": INT, "poll-grow": INT, "poll-max-ns": INT, "poll-shrink": INT})),
            strict=False),
    Command("qom-list", _qom_list, "The devices of the command line for the path /machine/peripheral, nothing elsewhere.",
            returns=Array(record({"name": STR, "type": STR})), arguments=(Member("path", STR, "A path.", optional=True),),
            strict=False),
    Command("qom-get", _empty_list, "Nothing: there is no object tree.", returns=Array(ANY),
            arguments=(Member("path", STR, optional=True), Member("property", STR, optional=True)), strict=False),
)
