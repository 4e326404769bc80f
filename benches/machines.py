"""The command lines that are compared: ours as a user types it, and QEMU's microvm with as little in it as it allows."""

from __future__ import annotations

import sys
from pathlib import Path

STRATOVIRT = str(Path(sys.executable).with_name("stratovirt"))
QEMU = "qemu-system-x86_64"
PEER = "qemu microvm"


def ours(kernel: Path | str, memory: str, cpus: int, *more: str) -> list[str]:
    return [STRATOVIRT, "-machine", "microvm", "-m", memory, "-smp", str(cpus), "-kernel", str(kernel), *more]


def qemu(kernel: Path | str, memory: str, cpus: int, *more: str, serial: bool = False, acpi: bool = False) -> list[str]:
    """`-arch-capabilities`: without it QEMU 7.2 does not start on a KVM that emulates instructions.

    `acpi`: for a stock kernel, which finds its devices in the tables.
    """
    machine = ["microvm", "acpi=on", "rtc=on"] if acpi else [
        "microvm", "x-option-roms=off", "pit=on", "pic=on", "rtc=off", "auto-kernel-cmdline=off"]
    machine.append(f"isa-serial={'on' if serial else 'off'}")
    return [
        QEMU, "-M", ",".join(machine), "-enable-kvm", "-cpu", "host,-arch-capabilities", "-nodefaults", "-no-user-config",
        "-nographic", "-no-reboot", "-m", memory, "-smp", str(cpus), "-kernel", str(kernel), *more,
    ]  # fmt: skip
