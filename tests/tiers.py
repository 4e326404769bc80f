"""Runs the test tiers: `tests/tiers.py [unit|kvm|lab-x86|fuzz]`, all of them without an argument.

Checks (lint, types) and pytest runs are told apart in the summary, each skip is named with its reason, and the last line
alone is "N passed, N failed, N skipped". A check that fails counts as a failure, and so does a tier that should have run
tests and ran none. The exit status is 1 when anything failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
sys.path.insert(0, str(ROOT))

# Seconds after which a tier is ended as failed: well above what two slow cores need.
DEADLINES = {"checks": 600, "unit": 600, "kvm": 900, "fuzz": 900, "lab-x86": 2400}


class Result:
    """What one tier did."""

    def __init__(self, tier: str) -> None:
        self.tier = tier
        self.passed = 0
        self.failures: list[str] = []
        self.skips: Counter[str] = Counter()
        self.seconds = 0.0

    def read(self, report: Path) -> None:
        """Take in a JUnit report."""
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            name = f"{case.get('classname')}::{case.get('name')}"
            skip = case.find("skipped")
            if case.find("failure") is not None or case.find("error") is not None:
                self.failures.append(name)
            elif skip is not None:
                self.skips[skip.get("message") or "no reason given"] += 1
            else:
                self.passed += 1


def main(arguments: list[str]) -> int:
    chosen = arguments or list(TIERS)
    if "unit" in chosen and "checks" not in chosen:
        chosen = ["checks", *chosen]  # what needs no machine at all, together
    unknown = [name for name in chosen if name not in TIERS]
    if unknown:
        print(f"tiers.py: no tier {unknown[0]!r} (accepted: {', '.join(TIERS)})", file=sys.stderr)
        return 2
    results = []
    with tempfile.TemporaryDirectory(prefix="stratovirt-tests-") as folder:
        for name in chosen:
            result = Result(name)
            started = time.monotonic()
            TIERS[name](result, Path(folder))
            result.seconds = time.monotonic() - started
            results.append(result)
    return summary(results)


def summary(results: list[Result]) -> int:
    """Print what happened; 1 when anything failed."""
    print("\n" + "-" * 72)
    for result in results:
        skipped = sum(result.skips.values())
        counts = f"{result.passed:5} passed {len(result.failures):4} failed {skipped:4} skipped"
        print(f"{result.tier:8} {counts} {result.seconds:7.1f} s")
        for failure in result.failures:
            print(f"         FAILED {failure}")
        for reason, count in result.skips.items():
            print(f"         skipped {count}: {reason}")
    passed = sum(result.passed for result in results)
    failed = sum(len(result.failures) for result in results)
    skipped = sum(sum(result.skips.values()) for result in results)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


def checks(result: Result, _folder: Path) -> None:
    """Lint and types."""
    python = ["guest", "lab", "tests/tiers.py"]
    for name, command in (
        ("ruff check", [PYTHON, "-m", "ruff", "check", "."]),
        ("mypy --strict", [PYTHON, "-m", "mypy", "--strict"]),
        ("mypy --strict (guest, lab, tests/tiers.py)", [PYTHON, "-m", "mypy", "--strict", *python]),
    ):
        print(f"== {name}", flush=True)
        try:
            done = subprocess.run(command, cwd=ROOT, timeout=DEADLINES["checks"], check=False)
        except subprocess.TimeoutExpired:
            result.failures.append(f"{name}: no end after {DEADLINES['checks']} s")
            continue
        if done.returncode:
            result.failures.append(name)
        else:
            result.passed += 1


def unit(result: Result, folder: Path) -> None:
    """Devices, parsers, tables: no KVM."""
    run_pytest(result, folder, "tests/unit")


def kvm(result: Result, folder: Path) -> None:
    """Tiny guests on this machine's own /dev/kvm."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        reason = "no right to open /dev/kvm" if os.path.exists("/dev/kvm") else "this machine has no /dev/kvm"
        print(f"\n*** THE KVM TIER DOES NOT RUN: {reason} ***\n", flush=True)
        result.skips[reason] += 1
        return
    run_pytest(result, folder, "tests/kvm")


def fuzz(result: Result, folder: Path) -> None:
    """A short, deterministic fuzz run over what guests and clients can reach."""
    run_pytest(result, folder, "tests/fuzz")


def lab_x86(result: Result, folder: Path) -> None:
    """Real Linux guests, in one boot of the emulated x86_64 host."""
    setup = [str(ROOT / "lab" / "setup.sh"), "base", "guest", "lab", "venv"]
    if subprocess.run(setup, cwd=ROOT, check=False).returncode:
        result.failures.append("lab-x86: the machine cannot be set up")
        return
    from guest import assets

    print("== lab-x86", flush=True)
    # What the guests need is built here: the lab has neither the network nor a cache that lasts.
    for make in assets.NAMES.values():
        make()
    share = Path(os.environ.get("STRATOVIRT_LAB_SHARE") or folder / "lab")
    share.mkdir(parents=True, exist_ok=True)
    only = os.environ.get("STRATOVIRT_LAB_TESTS", "tests/lab")
    report = share / "lab-x86.xml"
    report.unlink(missing_ok=True)
    inside = f"{PYTHON} -m pytest {only} --junitxml=/mnt/share/{report.name} -o junit_duration_report=total -v --tb=short"
    command = [PYTHON, "-m", "lab.run", "--share", str(share), "--deadline", str(DEADLINES["lab-x86"]), "--", inside]
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    collect(result, report, status)
    if result.failures and share.is_relative_to(folder):
        print("(STRATOVIRT_LAB_SHARE=dir keeps the consoles of all guests)", flush=True)


def run_pytest(result: Result, folder: Path, where: str) -> None:
    print(f"== {result.tier}", flush=True)
    report = folder / f"{result.tier}.xml"
    command = [PYTHON, "-m", "pytest", where, f"--junitxml={report}"]
    try:
        status = subprocess.run(command, cwd=ROOT, timeout=DEADLINES[result.tier], check=False).returncode
    except subprocess.TimeoutExpired:
        result.failures.append(f"{result.tier}: no end after {DEADLINES[result.tier]} s")
        return
    collect(result, report, status)


def collect(result: Result, report: Path, status: int) -> None:
    """Take in a pytest run: its report, and what the report cannot say."""
    if report.exists():
        try:
            result.read(report)
        except ElementTree.ParseError:
            result.failures.append(f"{result.tier}: the report is damaged")
    if not result.passed and not result.failures and not result.skips:
        result.failures.append(f"{result.tier}: no test ran (pytest's exit status: {status})")
    elif status not in (0, 1, 5) or (status == 1 and not result.failures):
        result.failures.append(f"{result.tier}: pytest ended with status {status}")


TIERS: dict[str, Callable[[Result, Path], None]] = {
    "checks": checks,
    "unit": unit,
    "kvm": kvm,
    "fuzz": fuzz,
    "lab-x86": lab_x86,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
