"""KVM's tracepoints during a run: how often a guest leaves to user space, for what, and how long it is away.

The same view of every monitor, from outside. Writing events down takes time of its own, so a traced run is not a timed one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

_FOLDER = Path("/sys/kernel/tracing")
_EVENTS = ("kvm_entry", "kvm_userspace_exit", "kvm_pio", "kvm_mmio")
_BUFFER_KIB = 128 << 10

# "  qemu-system-123     [000] d..2.    12.345678: kvm_pio: pio_write at 0x3f8 size 1 count 1 val 0x41 "
_LINE = re.compile(r"^.*?-\d+ +\[\d+\] \S+ +(\d+)\.(\d{6}): (\w+): (.*)$")
_PIO = re.compile(r"pio_(read|write) at (0x[0-9a-f]+)")
_MMIO = re.compile(r"mmio (read|write) len \d+ gpa (0x[0-9a-f]+)")
_REASON = re.compile(r"KVM_EXIT_(\w+)|reason (\w+)")

_HIST = re.compile(r"\{ exit_reason: +(\d+) \} hitcount: +(\d+)")
# AMD's, APM volume 2, appendix C: the lab's processor is one of theirs.
_REASONS = {
    0x60: "interrupt", 0x61: "NMI", 0x64: "interrupt window", 0x72: "CPUID", 0x78: "HLT", 0x7B: "port access",
    0x7C: "MSR access", 0x81: "VMMCALL", 0x89: "WBINVD", 0x400: "nested page fault",
}  # fmt: skip

Event = tuple[int, str, str]
"""Nanoseconds, name, the rest."""


def record(work: Callable[[], object], file: Path) -> dict[str, int]:
    """Write the events while `work` runs to `file`; how often the guest was left, by the processor's reason. Needs root."""
    if not (_FOLDER / "trace").exists():
        subprocess.run(["mount", "-t", "tracefs", "tracefs", str(_FOLDER)], check=True)
    (_FOLDER / "tracing_on").write_text("0")
    (_FOLDER / "buffer_size_kb").write_text(str(_BUFFER_KIB))
    for name in _EVENTS:
        (_FOLDER / f"events/kvm/{name}/enable").write_text("1")
    (_FOLDER / "trace").write_text("")
    reasons = _FOLDER / "events/kvm/kvm_exit"
    (reasons / "trigger").write_text("hist:keys=exit_reason")
    (_FOLDER / "tracing_on").write_text("1")
    try:
        work()
        histogram = (reasons / "hist").read_text()
    finally:
        (_FOLDER / "tracing_on").write_text("0")
        for name in _EVENTS:
            (_FOLDER / f"events/kvm/{name}/enable").write_text("0")
        (reasons / "trigger").write_text("!hist:keys=exit_reason")
    with open(_FOLDER / "trace", "rb") as trace, open(file, "wb") as copy:
        shutil.copyfileobj(trace, copy, 1 << 20)
    (_FOLDER / "trace").write_text("")
    return {_REASONS.get(int(code), f"reason {int(code):#x}"): int(times) for code, times in _HIST.findall(histogram)}


def read(file: Path) -> list[Event]:
    """What `record` wrote."""
    events: list[Event] = []
    with open(file, encoding="ascii", errors="replace") as lines:
        for line in lines:
            match = _LINE.match(line)
            if match:
                seconds, micros, name, rest = match.groups()
                events.append((int(seconds) * 10**9 + int(micros) * 1000, name, rest))
    return events


def kernel_port_accesses(events: list[Event]) -> dict[str, int]:
    """Port accesses that KVM's own devices answered."""
    totals: dict[str, int] = {}
    pending, left = "", False
    for _, name, rest in events:
        if name == "kvm_entry":
            if pending and not left:
                totals[pending] = totals.get(pending, 0) + 1
            pending, left = "", False
        elif name == "kvm_userspace_exit":
            left = True
        elif name == "kvm_pio":
            pending = _access(rest)
    return totals


def count(events: list[Event], name: str) -> int:
    return sum(event[1] == name for event in events)


def user_space_exits(events: list[Event]) -> dict[str, tuple[int, int]]:
    """What the guest left to user space for: how often, and ns until it went on, in all."""
    totals: dict[str, tuple[int, int]] = {}
    left_at, label, access = 0, "", ""
    for at, name, rest in events:
        if name == "kvm_entry":
            if left_at:
                times, total = totals.get(label, (0, 0))
                totals[label] = (times + 1, total + at - left_at)
            left_at, access = 0, ""
        elif name == "kvm_userspace_exit":
            left_at, label = at, access or _reason(rest)
        elif name in ("kvm_pio", "kvm_mmio"):
            described = _access(rest)
            if left_at and "read" in described:
                label = described  # a read is traced when its value has come back
            access = described or access
    return totals


def _access(rest: str) -> str:
    match = _PIO.search(rest)
    if match:
        return f"port {match[2]} {match[1]}"
    match = _MMIO.search(rest)
    return f"mmio {match[2]} {match[1]}" if match else ""


def _reason(rest: str) -> str:
    match = _REASON.search(rest)
    return (match[1] or match[2]).lower() if match else "unknown"
