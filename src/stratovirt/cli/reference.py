"""The parts of the documentation that follow from the declarations: `python -m stratovirt.cli.reference DOCS-FOLDER`.

Writes reference/options.md and reference/qmp.md whole, and in compatibility.md what stands between `<!-- begin: NAME -->` and
`<!-- end -->`. A unit test fails when one of them differs from what this makes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from stratovirt.cli import help
from stratovirt.cli.options import FLAG, OPTIONS
from stratovirt.config import options
from stratovirt.config.schema import NOT_YET, WORKS, Group, Key
from stratovirt.control import absent
from stratovirt.control import reference as control_reference
from stratovirt.control.commands import COMMANDS, EVENTS

# The commands of the interface, in its order.
QMP_COMMANDS = (
    "qmp_capabilities", "quit", "stop", "cont", "system_powerdown", "system_reset", "device_add", "device_del", "chardev-add",
    "chardev-remove", "netdev_add", "netdev_del", "netdev_replace", "netlink_set", "cameradev_add", "cameradev_del",
    "query-hotpluggable-cpus", "query-cpus", "query-status", "getfd", "blockdev-add", "blockdev-del", "balloon", "set-viomem",
    "get-viomem", "query-mem", "query-mem-gpa", "query-balloon", "query-vnc", "query-display-image", "switch-audio-record",
    "migrate", "query-migrate", "migrate_cancel", "query-version", "query-commands", "query-target", "query-kvm",
    "query-machines", "query-events", "qom-list-types", "device-list-properties", "block-commit", "query-tpm-models",
    "query-tpm-types", "query-command-line-options", "query-migrate-capabilities", "query-qmp-schema",
    "query-sev-capabilities", "query-chardev", "qom-list", "qom-get", "query-block", "query-named-block-nodes",
    "query-blockstats", "query-block-jobs", "query-gic-capabilities", "query-iothreads", "update_region", "input_event",
    "human-monitor-command", "blockdev-snapshot-internal-sync", "blockdev-snapshot-delete-internal-sync", "query-vcpu-reg",
    "trace-get-state", "trace-set-state", "query-ohui-status", "query-workloads", "detect-silent-audio",
)
_ABSENT = "not on this machine"  # and answered accordingly
QMP_EVENTS = (
    "SHUTDOWN", "RESET", "STOP", "RESUME", "POWERDOWN", "CPU_RESIZE", "DEVICE_DELETED", "BALLOON_CHANGED",
    "USB_HOST_ADD_RES", "AUDIO_CHANGED", "VM_NOTIFY_EVENT",
)
_HEAD = """\
# Options

Made from the declarations in `config/` by `python -m stratovirt.cli.reference docs`; do not edit.

A value of several parts is `key=value,key=value`. Neither a comma nor an equals sign can be part of a value. Sizes end in
K, M or G; without, they count MiB.
"""


def _groups() -> list[Group]:
    """Every declared group: those of the machine, of what there are kinds of, of the console and control."""
    kinds = [group for groups in help.KINDS.values() for group in groups.values()]
    return [options.MACHINE, options.ACCEL, options.CPU, options.SMP, options.MEMORY, options.DRIVE, *kinds,
            *options.SERIALS.values(), options.QMP, options.MON, options.ACTION]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join(lines)


def _default(key: Key) -> str:
    return "required" if key.required else key.kind.show(key.default)


def options_page() -> str:
    """reference/options.md."""
    parts = [_HEAD, table(("option", "value", "meaning", "status"), [
        (f"`-{option.name}`", f"`{option.value}`" if option.value else "" if option.takes is FLAG else option.takes,
         option.help, option.status) for option in OPTIONS.values()])]
    for group in _groups():
        parts.append(f"## {group.title}\n\n{group.help[:1].upper()}{group.help[1:]}."
                     + ("" if group.works else " Not supported yet.")
                     + (f" The first word may stand without `{group.first}=`." if group.first else ""))
        if group.keys:
            parts.append(table(("key", "value", "default", "meaning", "status"), [
                (f"`{key.name}`", key.kind.accepted, _default(key), key.help, key.status if group.works else NOT_YET)
                for key in group.keys]))
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _option_rows() -> str:
    return table(("option", "status"), [(f"`-{option.name}`", option.status) for option in OPTIONS.values()])


def _key_rows() -> str:
    """The keys of what works; those that simply work share one row."""
    rows: list[tuple[str, ...]] = []
    for group in _groups():
        if not group.works:
            continue
        plain = [key.name for key in group.keys if key.status == WORKS]
        if plain:
            rows.append((f"`{group.title}`", ", ".join(f"`{name}`" for name in plain), WORKS))
        rows += [(f"`{group.title}`", f"`{key.name}`", key.status) for key in group.keys if key.status != WORKS]
        if not group.keys:
            rows.append((f"`{group.title}`", "", WORKS))
    return table(("option", "keys", "status"), rows)


def _kind_rows() -> str:
    groups = [group for group in _groups() if group.title.startswith(("-device ", "-object ", "-netdev "))]
    return table(("device or object", "what", "status"), [(f"`{group.title}`", group.help, group.status) for group in groups])


def _qmp_rows() -> str:
    have = {command.name: command.summary for command in COMMANDS}
    not_there = {command.name for command in absent.COMMANDS}
    rows = [(f"`{name}`", NOT_YET if name not in have else _ABSENT if name in not_there else WORKS, have.get(name, ""))
            for name in QMP_COMMANDS]
    rows += [(f"`{name}`", "an addition", summary) for name, summary in have.items() if name not in QMP_COMMANDS]
    return table(("command", "status", ""), rows)


def _event_rows() -> str:
    have = {event.name: event.summary for event in EVENTS}
    rows = [(f"`{name}`", WORKS if name in have else NOT_YET, have.get(name, "")) for name in QMP_EVENTS]
    rows += [(f"`{name}`", "an addition", summary) for name, summary in have.items() if name not in QMP_EVENTS]
    return table(("event", "status", ""), rows)


BLOCKS = {"options": _option_rows, "keys": _key_rows, "devices": _kind_rows, "commands": _qmp_rows, "events": _event_rows}
_BLOCK = re.compile(r"(<!-- begin: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str) -> str:
    """`text` with every block between markers made anew."""
    return _BLOCK.sub(lambda match: f"{match[1]}{BLOCKS[match[2]]()}\n{match[3]}", text)


def main(arguments: list[str]) -> int:
    docs = Path(arguments[0] if arguments else "docs")
    (docs / "reference").mkdir(exist_ok=True)
    (docs / "reference" / "options.md").write_text(options_page(), encoding="utf-8")
    (docs / "reference" / "qmp.md").write_text(control_reference.page(), encoding="utf-8")
    page = docs / "compatibility.md"
    page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
