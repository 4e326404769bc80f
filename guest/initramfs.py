"""Builds the guests' file trees: an initramfs for stock kernels, one for the microVM kernel, and the root disk."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from guest import bootport, cache, debian
from guest.cpio import Archive

HERE = Path(__file__).resolve().parent

# Loaded by init before anything else. Everything else is loaded when its device is there, or when the kernel asks.
BUS_MODULES = ("virtio", "virtio_ring", "virtio_mmio", "virtio_pci")
DEVICE_MODULES = (
    "virtio_blk",
    "virtio-rng",
    "virtio_net",
    "virtio_console",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "virtiofs",
    "ext4",
    "crc32c_generic",
    "crc32c-intel",
    "overlay",
    "loop",
)


def busybox(architecture: str = "") -> Path:
    """Debian's static busybox: the installed one, else the package's. `architecture` as for `debian.tree`."""
    own = Path("/bin/busybox")
    if not architecture and debian.installed_version("busybox-static") and own.exists():
        return own
    return debian.tree("busybox-static", architecture) / "bin" / "busybox"


def applets(binary: Path) -> list[str]:
    """The applets of a busybox, which need not run on this machine: the table of their names in its read-only data.

    The names are sorted and end with a NUL each; `[` and `[[` are always the first, and an empty name ends the table.
    """
    found = re.search(rb"\0(\[\0\[\[\0(?:[a-z0-9_.+-]+\0)+)\0", binary.read_bytes())
    if found is None:
        raise ValueError(f"{binary} has no table of applets: is it a busybox?")
    return found[1].decode("ascii").rstrip("\0").split("\0")


def add_busybox(archive: Archive, architecture: str = "") -> None:
    """busybox and a link for each of its applets, and the directories a system expects."""
    binary = busybox(architecture)
    archive.file("bin/busybox", binary.read_bytes(), 0o755)
    for applet in applets(binary):
        if applet != "busybox":
            archive.symlink(f"bin/{applet}", "busybox")
    for folder in ("dev", "proc", "sys", "run", "mnt", "root", "etc", "lib", "usr/bin", "usr/sbin", "sbin"):
        archive.directory(folder)
    archive.directory("tmp", 0o1777)
    archive.symlink("sbin/modprobe", "../bin/busybox")
    archive.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
    archive.file("etc/group", b"root:x:0:\n")
    archive.file("etc/hosts", b"127.0.0.1 localhost\n")


def add_modules(archive: Archive, modules: Path, wanted: tuple[str, ...]) -> list[str]:
    """Modules of one kernel (`.../lib/modules/VERSION`) with all they need, and the indexes for modprobe.

    A module that is built in, or that this flavour of the kernel does not have, is left out. Returns the paths in the
    archive in an order in which insmod can load them.
    """
    dependencies: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text(encoding="ascii").splitlines():
        path, _, needs = line.partition(":")
        dependencies[path] = needs.split()
    by_name = {_module_name(path): path for path in dependencies}
    chosen: list[str] = []
    for name in wanted:
        found = by_name.get(_module_name(name))
        if found is not None:
            # modules.dep names the direct needs first and the deepest last
            chosen += [path for path in (*reversed(dependencies[found]), found) if path not in chosen]
    base = f"lib/modules/{modules.name}"
    for path in chosen:
        archive.copy(f"{base}/{path}", modules / path)
    index = "".join(f"{path}: {' '.join(dependencies[path])}\n" for path in chosen)
    archive.file(f"{base}/modules.dep", index.encode())
    names = {_module_name(path) for path in chosen}
    aliases = [
        line
        for line in (modules / "modules.alias").read_text(encoding="ascii").splitlines()
        if line.rpartition(" ")[2].replace("-", "_") in names
    ]
    archive.file(f"{base}/modules.alias", ("\n".join(aliases) + "\n").encode())
    return [f"/{base}/{path}" for path in chosen]


def stock(kernel: Path, flavour: str, architecture: str = "") -> Path:
    """The initramfs for a stock kernel whose unpacked package is `kernel`: busybox, init, virtio and ext4 modules."""
    modules = next((kernel / "lib" / "modules").iterdir())

    def build(target: Path) -> None:
        archive = Archive()
        _add_system(archive, architecture)
        add_modules(archive, modules, (*BUS_MODULES, *DEVICE_MODULES))
        archive.file("lib/modules/bus", (" ".join(BUS_MODULES) + "\n").encode())
        (target / "initramfs.cpio").write_bytes(archive.finish())

    inputs = {**_inputs(architecture), "kernel": kernel.name, "modules": " ".join((*BUS_MODULES, *DEVICE_MODULES))}
    return cache.entry(f"initramfs.{flavour}", inputs, build) / "initramfs.cpio"


def small(architecture: str = "") -> Path:
    """The initramfs for a kernel that has all drivers built in: busybox and init alone."""

    def build(target: Path) -> None:
        archive = Archive()
        _add_system(archive, architecture)
        (target / "initramfs.cpio").write_bytes(archive.finish())

    return cache.entry("initramfs.microvm", _inputs(architecture), build) / "initramfs.cpio"


def root_disk(mebibytes: int = 64, architecture: str = "") -> Path:
    """An ext4 disk image with the same system (`root=/dev/vda init=/init`). Shared: copy it before writing to it."""

    def build(target: Path) -> None:
        archive = Archive()
        _add_system(archive, architecture, device_nodes=False)  # the kernel mounts /dev itself; making nodes needs root
        with tempfile.TemporaryDirectory(dir=target) as folder:
            subprocess.run(
                [str(busybox()), "cpio", "-i", "-d"], input=archive.finish(), cwd=folder, check=True, stderr=subprocess.DEVNULL
            )
            image = target / "rootfs.ext4"
            with open(image, "wb") as file:
                file.truncate(mebibytes << 20)
            mke2fs = shutil.which("mke2fs", path="/usr/sbin:/sbin:/usr/bin:/bin") or "mke2fs"
            identity = ["-U", "5f0b1c52-6f9b-4b9e-8a3c-7c7c3b1f0a01", "-E", "hash_seed=5f0b1c52-6f9b-4b9e-8a3c-7c7c3b1f0a01"]
            # A mark in the boot sector, which ext4 leaves alone, shows a reader that it sees this very disk.
            subprocess.run([mke2fs, "-q", "-F", "-t", "ext4", "-L", "root", *identity, "-d", folder, str(image)], check=True)
            with open(image, "r+b") as file:
                file.write(b"stratovirt disk\n")

    inputs = {**_inputs(architecture), "size": str(mebibytes), "layout": "1"}
    return cache.entry("rootfs", inputs, build) / "rootfs.ext4"


def _add_system(archive: Archive, architecture: str, *, device_nodes: bool = True) -> None:
    archive.file("init", (HERE / "init").read_bytes(), 0o755)
    archive.file("sbin/bootport", bootport.program() if not architecture else bootport.arm64_program(), 0o755)
    add_busybox(archive, architecture)
    if device_nodes:
        archive.character_device("dev/console", 5, 1)
        archive.character_device("dev/null", 1, 3, 0o666)


def _inputs(architecture: str) -> dict[str, str | bytes]:
    sources = ("init", "bootport.py", "cpio.py", "initramfs.py")
    contents: dict[str, str | bytes] = {name: (HERE / name).read_bytes() for name in sources}
    contents["busybox"] = busybox(architecture).read_bytes()
    return contents


def _module_name(path: str) -> str:
    return re.sub(r"\.ko(\.[gx]z|\.zst)?$", "", path.rpartition("/")[2]).replace("-", "_")
