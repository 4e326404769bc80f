"""Real Linux guests. They run inside the lab (`make test TIER=lab-x86`, `TIER=lab-arm`), or where KVM can run Linux itself."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from backends import backend, place  # noqa: E402, F401
from exceptions import long_on_this_architecture, not_on_this_architecture  # noqa: E402
from guest import assets  # noqa: E402
from linux_guest import DEADLINE, KERNELS, Guest  # noqa: E402
from networks import HOST, run  # noqa: E402

# Where the tier runner reads, test by test, what has been done: the emulated host may die under us.
PROGRESS = os.environ.get("STRATOVIRT_LAB_PROGRESS")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if Path(__file__).parent in item.path.parents]
    if not os.environ.get("STRATOVIRT_LAB_LONG"):
        for item in mine:
            if item.get_closest_marker("long") or long_on_this_architecture(item):
                item.add_marker(pytest.mark.skip(reason="a long test: `make test LONG=1` runs it"))
    for item in mine:
        reason = not_on_this_architecture(item)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
    if not os.environ.get("STRATOVIRT_LAB"):
        from lab.microvm import can_run_linux

        if not can_run_linux():
            skip = pytest.mark.skip(reason="this machine's KVM cannot run Linux: use `make test TIER=lab-x86`")
            for item in mine:
                item.add_marker(skip)
    if PROGRESS and Path(PROGRESS).exists():
        done = set()
        for text in Path(PROGRESS).read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # the line that was being written when the host died
                line = json.loads(text)
                if line["outcome"] != "started":
                    done.add(line["test"])
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in items if item.nodeid not in done]
    note("", "collected", str(len(items)))


def note(test: str, outcome: str, reason: str = "") -> None:
    """One line of the progress file."""
    if PROGRESS:
        with open(PROGRESS, "a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"test": test, "outcome": outcome, "reason": reason}))


def pytest_runtest_logstart(nodeid: str) -> None:
    note(nodeid, "started")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        note(report.nodeid, "skipped", reason.removeprefix("Skipped: "))
    elif report.failed:
        note(report.nodeid, "failed", report.when or "")
    elif report.when == "call":
        note(report.nodeid, "passed")


_measured: list[str] = []


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Keeps figures that no test fails for: `measured(name, value, unit, …)`. They are printed when the run ends."""

    def keep(what: str, value: float, unit: str, **more: float) -> None:
        line = json.dumps({"test": request.node.name, "case": what, "value": round(value, 3), "unit": unit,
                           **{name: round(number, 3) for name, number in more.items()}})
        _measured.append(line)
        if PROGRESS:
            with open(Path(PROGRESS).parent / "measured.jsonl", "a", encoding="utf-8") as file:
                file.write(line + "\n")

    return keep


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _measured:
        terminalreporter.section("measured")
        for line in _measured:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Kernel or initramfs by its asset name, copied once to where reading it costs nothing."""
    folder = tmp_path_factory.mktemp("assets")

    def get(name: str) -> Path:
        copy = folder / name
        if not copy.exists():
            shutil.copyfile(assets.NAMES[name](), copy)
        return copy

    return get


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A fresh copy of the root disk."""
    copy = tmp_path / "disk.img"
    shutil.copyfile(assets.NAMES["root-disk"](), copy)
    return copy


@pytest.fixture
def file_system(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes ext4 file systems of so many MiB, which have O_DIRECT and holes, and mounts them."""
    if os.geteuid() != 0:
        pytest.skip("mounting takes root")
    mounted: list[Path] = []

    def make(mebibytes: int) -> Path:
        subprocess.run(["modprobe", "-q", "-a", "loop", "ext4"], check=False)  # a kernel may have them built in
        folder, backing = tmp_path / f"fs{len(mounted)}", tmp_path / f"fs{len(mounted)}.ext4"
        folder.mkdir()
        with open(backing, "wb") as file:
            file.truncate(mebibytes << 20)
        for command in (["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0", backing],
                        ["mount", "-o", "loop", backing, folder]):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def make_tap() -> Iterator[Callable[..., str]]:
    """Makes taps, up and with the host's address, and deletes them after the test: `make_tap("multi_queue")`."""
    made: list[str] = []

    def make(*flags: str) -> str:
        name = f"stratotest{len(made)}"
        run("ip", "tuntap", "add", name, "mode", "tap", *flags)
        made.append(name)
        run("ip", "addr", "add", f"{HOST}/24", "dev", name)
        run("ip", "link", "set", name, "up")
        return name

    yield make
    for name in made:
        subprocess.run(["ip", "link", "del", name], check=False, capture_output=True, timeout=DEADLINE)


@pytest.fixture
def tap(make_tap: Callable[..., str]) -> str:
    """A tap of its own."""
    return make_tap()


@pytest.fixture
def boot(request: pytest.FixtureRequest, tmp_path: Path, kernels: Callable[[str], Path]) -> Iterator[Callable[..., Guest]]:
    """Starts guests: `boot(kernel_form, command, smp=…, …)`; what still runs after the test is killed.

    Every guest's console goes to the share, or to the test's own directory outside the lab.
    """
    share = Path("/mnt/share") if Path("/mnt/share").is_mount() else tmp_path
    guests: list[Guest] = []

    def start(kernel: str, command: str = "", **options: object) -> Guest:
        consoles = share / "consoles"
        consoles.mkdir(exist_ok=True)
        log = consoles / f"{request.node.name.replace('/', '_')}.{len(guests)}.log"
        image, ram_disk = KERNELS[kernel]
        guest = Guest(tmp_path, kernels(image), kernels(ram_disk), command, log, **options)  # type: ignore[arg-type]
        guests.append(guest)
        return guest

    yield start
    for guest in guests:
        guest.close()
