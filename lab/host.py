"""The lab hosts' own kernels, initramfs images and, for arm64, root file system: Debian packages, unpacked."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from guest import bzimage, cache, debian, initramfs
from guest.cpio import Archive

HERE = Path(__file__).resolve().parent
ARCHITECTURES = ("x86_64", "aarch64")
PACKAGES = {"x86_64": "linux-image-amd64", "aarch64": "linux-image-arm64"}
DEBIAN = {"x86_64": "", "aarch64": "arm64"}  # as `debian.tree` wants it

_COMMON = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay")
# Loaded in this order, each after what it needs. What a test needs beyond these it loads with modprobe.
MODULES = {
    "x86_64": (*_COMMON, "kvm-amd", "tun", "vhost_net", "vhost_vsock"),
    "aarch64": (*_COMMON, "virtio_blk", "crc32c_generic", "ext4", "tun", "vhost_net", "vhost_vsock"),
}

# The user land of the arm64 host: what lab/inside, the package and its tests call, what tests look at disks with, and the
# monitor that benches compare with.
ARM64_PACKAGES = (
    "base-files",
    "bash",
    "busybox-static",
    "coreutils",
    "dash",
    "e2fsprogs",
    "fio",
    "findutils",
    "grep",
    "iperf3",
    "iproute2",
    "kmod",
    "libc-bin",
    "mount",
    "netcat-openbsd",
    "procps",
    "python3",
    "python3-libfdt",
    "qemu-system-arm",
    "sed",
    "strace",
    "util-linux",
)
_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost lab\n::1 localhost\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "etc/protocols": "ip 0 IP\nicmp 1 ICMP\ntcp 6 TCP\nudp 17 UDP\n",
}


def package(arch: str) -> Path:
    """The kernel's unpacked package; its modules are used from there inside the lab too."""
    return debian.tree(PACKAGES[arch], DEBIAN[arch])


def modules(arch: str) -> Path:
    """`.../lib/modules/VERSION`."""
    return next((package(arch) / "lib" / "modules").iterdir())


def kernel(arch: str) -> Path:
    """The kernel: on x86_64 as ELF, which QEMU enters through its PVH note, so that no emulated processor decompresses it.

    Debian's arm64 kernel is not compressed.
    """
    image = next((package(arch) / "boot").glob("vmlinuz-*"))
    if arch == "aarch64":
        return image

    def build(target: Path) -> None:
        (target / "vmlinux").write_bytes(bzimage.extract_elf(image.read_bytes()))

    inputs: dict[str, str | bytes] = {"package": package(arch).name, "tool": Path(bzimage.__file__).read_bytes()}
    return cache.entry("lab-kernel", inputs, build) / "vmlinux"


def host_initramfs(arch: str) -> Path:
    """busybox, the modules, and lab/init."""

    def build(target: Path) -> None:
        archive = Archive()
        archive.file("init", (HERE / "init").read_bytes(), 0o755)
        initramfs.add_busybox(archive, DEBIAN[arch])
        archive.character_device("dev/console", 5, 1)
        order = initramfs.add_modules(archive, modules(arch), MODULES[arch])
        archive.file("lib/modules/order", ("\n".join(order) + "\n").encode())
        (target / "initramfs.cpio").write_bytes(archive.finish())

    inputs: dict[str, str | bytes] = {
        "package": package(arch).name,
        "modules": " ".join(MODULES[arch]),
        "init": (HERE / "init").read_bytes(),
        "busybox": initramfs.busybox(DEBIAN[arch]).read_bytes(),
        "tools": Path(initramfs.__file__).read_bytes(),
        "self": Path(__file__).read_bytes(),
    }
    return cache.entry("lab-initramfs", inputs, build) / "initramfs.cpio"


def root_image(arch: str) -> Path | None:
    """The disk image with the host's user land, or None where that is this machine's own."""
    if arch == "x86_64":
        return None
    inputs: dict[str, str | bytes] = {"self": Path(__file__).read_bytes()}
    return debian.system("lab-root", ARM64_PACKAGES, DEBIAN[arch], inputs, _make_root) / "root.ext4"


def _make_root(tree: Path, target: Path) -> None:
    for name, text in _FILES.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text, encoding="ascii")
    for name in ("dev", "proc", "sys", "run", "tmp", "root", "mnt/share"):
        (tree / name).mkdir(parents=True, exist_ok=True)
    shell = tree / "usr/bin/sh"
    if not shell.is_symlink():
        shell.symlink_to("dash")
    for name in ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info"):
        shutil.rmtree(tree / name, ignore_errors=True)
    # Packages leave compiling to their installation, and an emulated processor takes a second to compile what it imports.
    # The byte code does not depend on the processor, only on the version of Python.
    library = tree / f"usr/lib/python3.{sys.version_info.minor}"
    if library.is_dir():
        command = [sys.executable, "-m", "compileall", "-q", "-j0", "--invalidation-mode", "unchecked-hash", "-s", str(tree)]
        skip = r"/(test|idlelib|lib2to3|turtledemo)/"
        subprocess.run(
            [*command, "-p", "/", "-x", skip, str(library), str(tree / "usr/lib/python3/dist-packages")], check=False
        )
    used = sum(path.lstat().st_size + 4096 for path in tree.rglob("*"))
    image = target / "root.ext4"
    with open(image, "wb") as file:
        file.truncate((used + used // 5 + (32 << 20)) & -(1 << 20))
    mke2fs = shutil.which("mke2fs", path="/usr/sbin:/sbin:/usr/bin:/bin") or "mke2fs"
    options = ["-O", "^has_journal", "-E", "root_owner=0:0", "-L", "labroot"]
    subprocess.run([mke2fs, "-q", "-F", "-t", "ext4", *options, "-d", str(tree), str(image)], check=True)
