"""Runs the test tiers: `tests/tiers.py [unit|kvm|fuzz|readme|lab-x86|lab-arm]`, all of them without an argument.

Checks (lint, types) and pytest runs are told apart in the summary, each skip is named with its reason, and the last line
alone is "N passed, N failed, N skipped". A check that fails counts as a failure, and so does a tier that should have run
tests and ran none. The exit status is 1 when anything failed.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
sys.path.insert(0, str(ROOT))

# Seconds after which a tier is ended as failed: well above what two slow cores need.
REPORT = "STRATOVIRT_TIERS_REPORT"  # where the process beside leaves what its tiers did
LAB_TIERS = ("readme", "lab-x86", "lab-arm")  # each needs the lab, of which there is one at a time
DEADLINES = {"checks": 600, "unit": 600, "kvm": 900, "fuzz": 900, "readme": 1500, "lab-x86": 3000, "lab-arm": 3000}


# A test of real guests ends by its own deadlines long before this.
STALL_SECONDS = 420.0
LAB_HUNG = -1
LAB_DIED = (LAB_HUNG, 124, 125)
MAX_LAB_DEATHS = 5
MAX_SECOND_ATTEMPTS = 3


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
    with tempfile.TemporaryDirectory(prefix="stratovirt-tests-") as folder:
        in_lab = [name for name in chosen if name in LAB_TIERS]
        others = [name for name in chosen if name not in LAB_TIERS]
        if in_lab and others:
            beside = Beside(others, Path(folder))
            results = [run_tier(name, Path(folder)) for name in in_lab]
            results = beside.finish() + results
        else:
            results = [run_tier(name, Path(folder)) for name in chosen]
    if report := os.environ.get(REPORT):
        Path(report).write_text(json.dumps([vars(result) for result in results]))
        return 0
    return summary(results)


def run_tier(name: str, folder: Path) -> Result:
    result = Result(name)
    started = time.monotonic()
    TIERS[name](result, folder)
    result.seconds = time.monotonic() - started
    return result


class Beside:
    """The tiers without a lab, in a process of their own: an emulated host keeps one processor busy, and there are two.

    What they print comes in one piece when they have ended.
    """

    def __init__(self, tiers: list[str], folder: Path) -> None:
        self._tiers, self._report, self._log = tiers, folder / "beside.json", folder / "beside.log"
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen([PYTHON, __file__, *tiers], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                                             env={**os.environ, REPORT: str(self._report)})
        self._printer = threading.Thread(target=self._print)
        self._printer.start()

    def _print(self) -> None:
        self._process.wait()  # each tier has its deadline
        print(self._log.read_text(errors="replace"), flush=True)

    def finish(self) -> list[Result]:
        self._printer.join()
        if not self._report.exists():
            failed = Result(self._tiers[0])
            failed.failures.append(f"{', '.join(self._tiers)}: ended with status {self._process.returncode}, without results")
            return [failed]
        results = []
        for values in json.loads(self._report.read_text()):
            result = Result(values["tier"])
            vars(result).update(values, skips=Counter(values["skips"]))
            results.append(result)
        return results


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


def readme(result: Result, folder: Path) -> None:
    """The README's first command, `make run`, in the ways a newcomer would type it."""
    run_pytest(result, folder, "tests/readme")


def lab_x86(result: Result, folder: Path) -> None:
    """Real Linux guests, in one boot of the emulated x86_64 host."""
    lab(result, folder, "x86_64", "lab")


def lab_arm(result: Result, folder: Path) -> None:
    """The same suite in the emulated arm64 host."""
    lab(result, folder, "aarch64", "lab", "lab-arm")


def lab(result: Result, folder: Path, arch: str, *groups: str) -> None:
    """The suite in the lab of one architecture."""
    tier = result.tier
    setup = [str(ROOT / "lab" / "setup.sh"), "base", "native", "guest", *groups, "venv"]
    if subprocess.run(setup, cwd=ROOT, check=False).returncode:
        result.failures.append(f"{tier}: the machine cannot be set up")
        return
    from guest import assets

    print(f"== {tier}", flush=True)
    # What the guests need is built here: the lab has neither the network nor a cache that lasts.
    for name, make in assets.ASSETS[arch].items():
        if name not in assets.LONG or os.environ.get("LONG"):
            make()
    share = Path(os.environ.get("STRATOVIRT_LAB_SHARE") or folder / tier)
    share.mkdir(parents=True, exist_ok=True)
    tests = os.environ.get("STRATOVIRT_LAB_TESTS", "tests/lab")
    progress = share / "progress"
    progress.unlink(missing_ok=True)
    until = time.monotonic() + DEADLINES[tier]
    seen: Counter[str] = Counter()  # how often the host died in a test
    status = boot_lab(arch, tests, share, until)
    while status in LAB_DIED and time.monotonic() < until:
        # The emulation has faults of its own: a host that dies is started again, and goes on with the next test. Only a
        # test in which it dies twice has failed.
        current = in_flight(progress)
        seen[current] += 1
        if not current or seen[current] > 1:
            reason = "the lab host died in it twice" if current else "the lab host died before the first test"
            result.failures.append(f"{current or tier}: {reason}")
            if not current or sum(seen.values()) > MAX_LAB_DEATHS:
                break
            with open(progress, "a", encoding="utf-8") as file:
                file.write("\n" + json.dumps({"test": current, "outcome": "host died", "reason": ""}))
        print(f"*** the lab host died in {current}: starting it again ***", flush=True)
        status = boot_lab(arch, tests, share, until)
    collect_progress(result, progress, status)
    second_attempt(result, arch, share, until)
    if result.failures and share.is_relative_to(folder):
        print("(STRATOVIRT_LAB_SHARE=dir keeps the consoles of all guests)", flush=True)


def second_attempt(result: Result, arch: str, share: Path, until: float) -> None:
    """Run the few tests that failed once more, in a fresh lab host, and say so: the emulation has faults of its own."""
    names = [name for name in result.failures if name.startswith("tests/lab/") and ": " not in name]
    if not names or len(names) != len(result.failures) or len(names) > MAX_SECOND_ATTEMPTS:
        return
    again = share / "second-attempt"
    again.mkdir(exist_ok=True)
    (again / "progress").unlink(missing_ok=True)
    print(f"*** failed in the lab, once more: {', '.join(names)} ***", flush=True)
    boot_lab(arch, " ".join(shlex.quote(name) for name in names), again, until)
    passed = {line["test"] for line in read_progress(again / "progress") if line["outcome"] == "passed"}
    passed -= {line["test"] for line in read_progress(again / "progress") if line["outcome"] == "failed"}
    for name in names:
        if name in passed:
            print(f"*** {name}: failed at first, passed at the second attempt ***", flush=True)
            result.failures.remove(name)
            result.passed += 1


def boot_lab(arch: str, tests: str, share: Path, until: float) -> int:
    """One boot of the lab, and in it all tests that have not ended yet; its exit status.

    The lab counts as hung when the tests make no progress for longer than any test may take.
    """
    progress = share / "progress"
    long = "STRATOVIRT_LAB_LONG=1 " if os.environ.get("LONG") else ""
    inside = f"{long}STRATOVIRT_LAB_PROGRESS=/mnt/share/{progress.name} {PYTHON} -m pytest {tests} -v --tb=short --durations=20"
    inside += " -p no:hypothesispytest"  # no property tests here, and it is a compiled module of this machine's architecture
    inside += " -o tmp_path_retention_policy=failed"  # its /tmp is memory: what a passed test wrote goes at once
    left = max(1.0, until - time.monotonic())
    command = [PYTHON, "-m", "lab.run", "--arch", arch, "--share", str(share), "--deadline", f"{left:.0f}", "--", inside]
    lab = subprocess.Popen(command, cwd=ROOT)
    size, moved = -1, time.monotonic()
    try:
        while True:
            try:
                return lab.wait(5)
            except subprocess.TimeoutExpired:
                now = progress.stat().st_size if progress.exists() else -1
                if now != size:
                    size, moved = now, time.monotonic()
                elif size >= 0 and time.monotonic() - moved > STALL_SECONDS:
                    return LAB_HUNG
    finally:
        if lab.poll() is None:
            lab.terminate()
            lab.wait()


def in_flight(progress: Path) -> str:
    """The test that had started and not ended; "" when there is none."""
    current = ""
    for line in read_progress(progress):
        current = line["test"] if line["outcome"] == "started" else ""
    return current


def read_progress(progress: Path) -> list[dict[str, str]]:
    """The lines of a progress file; the last one may be cut off by the death of the host."""
    lines = []
    for text in progress.read_text(encoding="utf-8", errors="replace").splitlines() if progress.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def collect_progress(result: Result, progress: Path, status: int) -> None:
    """Take in what the tests in the lab have noted. A test may fail twice: in its call and in its clean-up."""
    outcomes: dict[str, str] = {}
    for line in read_progress(progress):
        name = line["test"]
        if line["outcome"] == "skipped":
            outcomes[name] = "skipped"
            result.skips[line["reason"] or "no reason given"] += 1
        elif line["outcome"] == "failed" or (line["outcome"] == "passed" and outcomes.get(name) != "failed"):
            outcomes[name] = line["outcome"]
    result.passed += sum(outcome == "passed" for outcome in outcomes.values())
    result.failures += [name for name, outcome in outcomes.items() if outcome == "failed"]
    if not outcomes and not result.failures:
        result.failures.append(f"{result.tier}: no test ran (exit status of the lab: {status})")
    elif status not in (0, 1, 5) and not result.failures:
        result.failures.append(f"{result.tier}: the tests did not come to their end (exit status of the lab: {status})")
    elif status == 1 and not result.failures:
        result.failures.append(f"{result.tier}: pytest says that something failed")


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
    "readme": readme,
    "lab-x86": lab_x86,
    "lab-arm": lab_arm,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
