"""All guest assets by name: `python -m guest.assets NAME...` builds what is missing and prints one path a line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from guest import bzimage, cache, debian, initramfs, microvm_kernel, vsockcat

CLOUD_PACKAGE = "linux-image-cloud-amd64"


def stock_package() -> Path:
    """Debian's kernel for virtual machines, unpacked."""
    return debian.tree(CLOUD_PACKAGE)


def stock_bzimage() -> Path:
    """Debian's cloud kernel as it is shipped."""
    return next((stock_package() / "boot").glob("vmlinuz-*"))


def stock_elf() -> Path:
    """The ELF kernel inside the bzImage above."""
    image = stock_bzimage()

    def build(target: Path) -> None:
        (target / "vmlinux").write_bytes(bzimage.extract_elf(image.read_bytes()))

    inputs: dict[str, str | bytes] = {"package": stock_package().name, "tool": Path(bzimage.__file__).read_bytes()}
    return cache.entry("stock-elf", inputs, build) / "vmlinux"


def stock_initramfs() -> Path:
    """busybox, init and the virtio and ext4 modules of the cloud kernel."""
    return initramfs.stock(stock_package(), "stock")


def microvm_elf() -> Path:
    """The small kernel as ELF."""
    return microvm_kernel.folder() / "vmlinux"


def microvm_bzimage() -> Path:
    """The small kernel as bzImage."""
    return microvm_kernel.folder() / "bzImage"


def microvm_flat() -> Path:
    """The small kernel as a flat binary, to be loaded and entered at 16 MiB."""
    return microvm_kernel.folder() / "vmlinux.bin"


NAMES: dict[str, Callable[[], Path]] = {
    "stock-bzimage": stock_bzimage,
    "stock-elf": stock_elf,
    "stock-initramfs": stock_initramfs,
    "microvm-elf": microvm_elf,
    "microvm-bzimage": microvm_bzimage,
    "microvm-flat": microvm_flat,
    "microvm-initramfs": initramfs.small,
    "root-disk": initramfs.root_disk,
    "vsockcat": vsockcat.disk,
}


def main(arguments: list[str]) -> int:
    unknown = [name for name in arguments if name not in NAMES]
    if unknown or not arguments:
        for name, make in NAMES.items():
            print(f"{name:20}{(make.__doc__ or '').splitlines()[0]}", file=sys.stderr)
        return 1
    for name in arguments:
        print(NAMES[name]())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
