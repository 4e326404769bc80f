"""`stratovirt doctor`: what this machine can do for virtual machines, and what to do about what is missing."""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

from stratovirt.errors import HostError
from stratovirt.hypervisor.kvm import _uapi as uapi
from stratovirt.hypervisor.kvm._uapi_arm64 import KVM_CAP_ARM_PSCI_0_2
from stratovirt.hypervisor.kvm.system import DEVICE_PATH, KvmSystem

OK, WARNING, PROBLEM = "ok", "warning", "problem"
_MARKS = {OK: "ok     ", WARNING: "warning", PROBLEM: "PROBLEM"}

ARCHITECTURES = {"x86_64": "x86_64", "AMD64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
CAPABILITIES = {
    "interrupt controller in the kernel": uapi.KVM_CAP_IRQCHIP,
    "guest memory from user space": uapi.KVM_CAP_USER_MEMORY,
    "irqfd": uapi.KVM_CAP_IRQFD,
    "ioeventfd": uapi.KVM_CAP_IOEVENTFD,
    "immediate exit": uapi.KVM_CAP_IMMEDIATE_EXIT,
}
_ONLY_ON = {
    "x86_64": {"timer in the kernel": uapi.KVM_CAP_PIT2},
    "aarch64": {"power states (PSCI) in the kernel": KVM_CAP_ARM_PSCI_0_2},
}
_REMEDIES = {
    "x86_64": "enable the processor's virtualization (VT-x, AMD-V) in the firmware or, in a virtual machine, ask for "
              "nested virtualization; tiny guests run, and `make run` uses an emulated host",
    "aarch64": "boot the host's kernel at EL2, and look for messages of kvm in the kernel log (dmesg)",
}


@dataclass(frozen=True)
class Check:
    """One line of the report. `advice` says what to do, "" when nothing needs doing."""

    name: str
    status: str
    finding: str
    advice: str = ""


def main(arguments: list[str]) -> int:
    """Exit status 0 when Linux guests can run here, else 1."""
    parser = argparse.ArgumentParser(prog="stratovirt doctor", description="What this machine can do, and what is missing.")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--can-run-linux", action="store_true", help="print nothing; exit 0 if the probe guest ran, else 1")
    options = parser.parse_args(arguments)
    if options.can_run_linux:
        return 0 if can_run_linux() else 1
    checks, able = examine()
    if options.json:
        print(json.dumps({"can_run_linux": able, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        show(checks, able)
    return 0 if able else 1


def can_run_linux() -> bool:
    """Whether a Linux guest runs on this machine's KVM."""
    return examine_kvm()[1]


def examine() -> tuple[list[Check], bool]:
    """All checks, and whether Linux guests can run."""
    checks, able = examine_kvm()
    checks += [_device("/dev/vhost-net", "fast networking in the kernel", "modprobe vhost_net"),
               _device("/dev/vhost-vsock", "sockets between host and guest", "modprobe vhost_vsock"),
               _device("/dev/net/tun", "tap network devices", "modprobe tun"), _huge_pages(), _compiled()]
    return checks, able


def examine_kvm() -> tuple[list[Check], bool]:
    """The checks on /dev/kvm, and whether Linux guests can run."""
    architecture = ARCHITECTURES.get(platform.machine())
    if architecture is None:
        return [Check("processor", PROBLEM, platform.machine(),
                      "x86_64 guests run on x86_64 hosts, and aarch64 guests on aarch64 hosts")], False
    try:
        system = KvmSystem()
    except HostError as error:
        return [Check(DEVICE_PATH, PROBLEM, error.operation + (f": {os.strerror(error.errno)}" if error.errno else ""),
                      error.hint or "use a machine with KVM")], False
    try:
        checks = [Check(DEVICE_PATH, OK, f"API version {uapi.API_VERSION}, opened for reading and writing")]
        wanted = {**CAPABILITIES, **_ONLY_ON[architecture]}
        missing = [name for name, number in wanted.items() if system.check_extension(number) <= 0]
        limit = system.check_extension(uapi.KVM_CAP_MAX_VCPUS)
        if missing:
            checks.append(Check("KVM capabilities", PROBLEM, "missing: " + ", ".join(missing), "use a newer host kernel"))
        else:
            checks.append(Check("KVM capabilities", OK, f"all that are needed; up to {limit} vCPUs"))
        probe = _probe(system, architecture)
        return [*checks, probe], not missing and probe.status == OK
    finally:
        system.close()


def _probe(system: KvmSystem, architecture: str) -> Check:
    if architecture == "aarch64":
        from stratovirt.machine.aarch64.probe import probe
    else:
        from stratovirt.machine.probe import probe

    try:
        verdict = probe(system)
    except HostError as error:
        return Check("probe guest", PROBLEM, str(error), "look for messages of kvm in the kernel log (dmesg)")
    if verdict.can_run_linux:
        return Check("probe guest", OK, f"can run Linux for {architecture}: {verdict.reason}")
    return Check("probe guest", PROBLEM, f"cannot run Linux: {verdict.reason}",
                 _REMEDIES[architecture])


def _device(path: str, purpose: str, remedy: str) -> Check:
    if not os.path.exists(path):
        return Check(path, WARNING, f"missing: no {purpose}", f"as root: {remedy}")
    if not os.access(path, os.R_OK | os.W_OK):
        return Check(path, WARNING, f"not open to this user: no {purpose}", "run as root or join the group that owns it")
    return Check(path, OK, purpose)


def _huge_pages() -> Check:
    try:
        words = [line.split() for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()]
    except OSError as error:
        return Check("huge pages", WARNING, f"/proc/meminfo cannot be read: {error.strerror}")
    values = {line[0].rstrip(":"): int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}
    total, free = values.get("HugePages_Total", 0), values.get("HugePages_Free", 0)
    size = values.get("Hugepagesize", 0) // 1024
    if total:
        return Check("huge pages", OK, f"{free} of {total} free, {size} MiB each")
    return Check("huge pages", OK, "none reserved; only needed for guest memory on hugetlbfs",
                 "to reserve some: sysctl vm.nr_hugepages=N")


def _compiled() -> Check:
    from stratovirt import native

    if native.compiled is not None:
        return Check("compiled module", OK, "it walks the queues of disks and networks")
    if native.why.startswith(native.SWITCH):
        return Check("compiled module", OK, f"left out ({native.why}); Python walks the queues of disks and networks")
    return Check("compiled module", WARNING, f"{native.why}; Python walks the queues of disks and networks, which is slower",
                 "with gcc and python3-dev: lab/setup.sh native venv in a source tree, or install the package again")


def show(checks: list[Check], able: bool) -> None:
    """The report for people: a table with rich if that is installed, else lines."""
    summary = "Linux guests can run here." if able else "Linux guests cannot run here."
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        for check in checks:
            print(f"{_MARKS[check.status]}  {check.name}: {check.finding}")
            if check.advice:
                print(f"         -> {check.advice}")
        print(summary)
        return
    styles = {OK: "green", WARNING: "yellow", PROBLEM: "bold red"}
    table = Table(title=f"StratoVirt on {platform.node()}")
    for heading in ("", "What", "Finding", "What to do"):
        table.add_column(heading)
    for check in checks:
        table.add_row(Text(check.status, styles[check.status]), check.name, Text(check.finding), Text(check.advice))
    console = Console()
    console.print(table)
    console.print(Text(summary, styles[OK if able else PROBLEM]))
