"""Real Linux guests. They run inside the lab (`make test TIER=lab-x86`), or on a machine whose own KVM can run Linux."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from guest import assets, initramfs  # noqa: E402
from linux_guest import KERNELS, Guest  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("STRATOVIRT_LAB"):
        return
    from lab.microvm import can_run_linux

    if not can_run_linux():
        skip = pytest.mark.skip(reason="this machine's KVM cannot run Linux: use `make test TIER=lab-x86`")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(skip)


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
    shutil.copyfile(initramfs.root_disk(), copy)
    return copy


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
