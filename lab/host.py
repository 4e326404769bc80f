"""The lab host's own kernel and initramfs: Debian's linux-image-amd64 and busybox."""

from __future__ import annotations

from pathlib import Path

from guest import bzimage, cache, debian, initramfs
from guest.cpio import Archive

HERE = Path(__file__).resolve().parent
PACKAGE = "linux-image-amd64"

# Loaded in this order, each after what it needs. What a test needs beyond these it loads with modprobe.
MODULES = (
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
    "kvm-amd",
    "tun",
    "vhost_net",
    "vhost_vsock",
)


def package() -> Path:
    """The kernel's unpacked package; its modules are used from there inside the lab too."""
    return debian.tree(PACKAGE)


def modules() -> Path:
    """`.../lib/modules/VERSION`."""
    return next((package() / "lib" / "modules").iterdir())


def kernel() -> Path:
    """The kernel as ELF: QEMU enters it through its PVH note, so that no emulated processor has to decompress it."""
    image = next((package() / "boot").glob("vmlinuz-*"))

    def build(target: Path) -> None:
        (target / "vmlinux").write_bytes(bzimage.extract_elf(image.read_bytes()))

    inputs: dict[str, str | bytes] = {"package": package().name, "tool": Path(bzimage.__file__).read_bytes()}
    return cache.entry("lab-kernel", inputs, build) / "vmlinux"


def host_initramfs() -> Path:
    """busybox, the modules, and lab/init."""

    def build(target: Path) -> None:
        archive = Archive()
        archive.file("init", (HERE / "init").read_bytes(), 0o755)
        initramfs.add_busybox(archive)
        archive.character_device("dev/console", 5, 1)
        order = initramfs.add_modules(archive, modules(), MODULES)
        archive.file("lib/modules/order", ("\n".join(order) + "\n").encode())
        (target / "initramfs.cpio").write_bytes(archive.finish())

    inputs: dict[str, str | bytes] = {
        "package": package().name,
        "modules": " ".join(MODULES),
        "init": (HERE / "init").read_bytes(),
        "busybox": initramfs.busybox().read_bytes(),
        "tools": Path(initramfs.__file__).read_bytes(),
        "self": Path(__file__).read_bytes(),
    }
    return cache.entry("lab-initramfs", inputs, build) / "initramfs.cpio"
