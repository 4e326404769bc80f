"""All guest assets by name: `python -m guest.assets [--arch=ARCH] NAME...` builds what is missing, prints one path a line."""

from __future__ import annotations

import gzip
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from guest import bzimage, cache, debian, initramfs, microvm_kernel, vsockcat

CLOUD_PACKAGE = "linux-image-cloud-amd64"
FULL_PACKAGE = "linux-image-amd64"
ARM64_PACKAGE = "linux-image-cloud-arm64"
ARM64 = "arm64"  # Debian's name of aarch64
ARM64_COMPILER = "aarch64-linux-gnu-gcc"


def stock_package() -> Path:
    """Debian's kernel for virtual machines, unpacked."""
    return debian.tree(CLOUD_PACKAGE)


def stock_bzimage() -> Path:
    """Debian's cloud kernel as it is shipped."""
    return next((stock_package() / "boot").glob("vmlinuz-*"))


def stock_elf() -> Path:
    """The ELF kernel inside the bzImage above."""
    return _elf(stock_bzimage(), stock_package(), "stock-elf")


def _elf(image: Path, package: Path, name: str) -> Path:
    def build(target: Path) -> None:
        (target / "vmlinux").write_bytes(bzimage.extract_elf(image.read_bytes()))

    inputs: dict[str, str | bytes] = {"package": package.name, "tool": Path(bzimage.__file__).read_bytes()}
    return cache.entry(name, inputs, build) / "vmlinux"


def full_elf() -> Path:
    """Debian's kernel for all machines, which has drivers that the cloud kernel lacks: of the generation ID, for one."""
    package = debian.tree(FULL_PACKAGE)
    return _elf(next((package / "boot").glob("vmlinuz-*")), package, "full-elf")


def full_initramfs() -> Path:
    """busybox, init and the virtio and ext4 modules of that kernel."""
    return initramfs.stock(debian.tree(FULL_PACKAGE), "full")


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


def arm64_image() -> Path:
    """Debian's cloud kernel for arm64 as it is shipped: an Image with an EFI stub."""
    image = next((debian.tree(ARM64_PACKAGE, ARM64) / "boot").glob("vmlinuz-*"))

    def build(target: Path) -> None:
        shutil.copyfile(image, target / "Image")

    # An entry of its own: `stratovirt run` finds it there.
    return cache.entry("stock-image", {"package": image.parent.parent.name}, build) / "Image"


def arm64_image_gz() -> Path:
    """The same, packed with gzip."""
    image = arm64_image()

    def build(target: Path) -> None:
        (target / "Image.gz").write_bytes(gzip.compress(image.read_bytes(), 6, mtime=0))

    return cache.entry("stock-packed-image", {"image": image.parent.name}, build) / "Image.gz"


def arm64_initramfs() -> Path:
    """busybox, init and the virtio and ext4 modules of the arm64 cloud kernel."""
    return initramfs.stock(debian.tree(ARM64_PACKAGE, ARM64), "arm64-stock", ARM64)


def arm64_microvm_initramfs() -> Path:
    """busybox and init."""
    return initramfs.small(ARM64)


def arm64_vsockcat() -> Path:
    """vsockcat for arm64: made with a cross compiler."""
    return vsockcat.disk(ARM64_COMPILER)


def busybox() -> Path:
    """The busybox that guests of this machine have, which runs on the machine itself, too."""
    return initramfs.busybox(ARM64 if platform.machine() == "aarch64" else "")


X86_64: dict[str, Callable[[], Path]] = {
    "stock-bzimage": stock_bzimage,
    "stock-elf": stock_elf,
    "stock-initramfs": stock_initramfs,
    "full-elf": full_elf,
    "full-initramfs": full_initramfs,
    "microvm-elf": microvm_elf,
    "microvm-bzimage": microvm_bzimage,
    "microvm-flat": microvm_flat,
    "microvm-initramfs": initramfs.small,
    "root-disk": initramfs.root_disk,
    "vsockcat": vsockcat.disk,
}
AARCH64: dict[str, Callable[[], Path]] = {
    "stock-image": arm64_image,
    "stock-image-gz": arm64_image_gz,
    "stock-initramfs": arm64_initramfs,
    "microvm-image": microvm_kernel.arm64_image,
    "microvm-image-16k": lambda: microvm_kernel.arm64_image(16),
    "microvm-image-64k": lambda: microvm_kernel.arm64_image(64),
    "microvm-initramfs": arm64_microvm_initramfs,
    "root-disk": lambda: initramfs.root_disk(architecture=ARM64),
    "vsockcat": arm64_vsockcat,
}
# Kernels that take minutes to build and that only long tests want.
LONG = ("microvm-image-16k", "microvm-image-64k")
# By the name that Linux has for an architecture: what guests of that architecture are made of.
ASSETS = {"x86_64": X86_64, "aarch64": AARCH64}
NAMES = ASSETS.get(platform.machine(), X86_64)


def main(arguments: list[str]) -> int:
    names = NAMES
    if arguments and arguments[0].startswith("--arch="):
        names = ASSETS[arguments.pop(0).removeprefix("--arch=")]
    unknown = [name for name in arguments if name not in names]
    if unknown or not arguments:
        for name, make in names.items():
            print(f"{name:20}{(make.__doc__ or '').partition(chr(10))[0]}", file=sys.stderr)
        return 1
    for name in arguments:
        print(names[name]())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
