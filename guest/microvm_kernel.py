"""Builds the small microVM kernel from Debian's linux-source and guest/microvm.config. Takes a few minutes.

For arm64 it is cross-compiled; its configuration is the same but for the platform, with pages of any size.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from guest import cache, debian

HERE = Path(__file__).resolve().parent
FRAGMENT = HERE / "microvm.config"
ARM64_FRAGMENT = HERE / "microvm-arm64.config"
ARM64_PREFIX = "aarch64-linux-gnu-"
PAGE_SIZES = {4: "CONFIG_ARM64_4K_PAGES", 16: "CONFIG_ARM64_16K_PAGES", 64: "CONFIG_ARM64_64K_PAGES"}
_PLATFORM_SECTIONS = ("# Processor and platform", "# Console and raw ports")
SOURCE_PACKAGE = "linux-source-6.1"
# Raise it when the steps below change what they make.
RECIPE = "1"


def folder() -> Path:
    """The cache entry: `vmlinux` (ELF without debug sections), `bzImage`, `vmlinux.bin` (flat binary) and `config`."""
    source, version = _source()
    inputs: dict[str, str | bytes] = {"fragment": FRAGMENT.read_bytes(), "source": version, "recipe": RECIPE}
    return cache.entry(
        "microvm-kernel",
        inputs,
        lambda target: _build(source, target, FRAGMENT.read_text(encoding="ascii")),
        f"building the microVM kernel from {SOURCE_PACKAGE} {version}",
    )


def arm64_image(page_kib: int = 4) -> Path:
    """The arm64 kernel, an Image without an EFI stub, with pages of `page_kib`."""
    source, version = _source()
    fragment = arm64_fragment(page_kib)
    inputs: dict[str, str | bytes] = {"fragment": fragment, "source": version, "recipe": RECIPE}
    folder = cache.entry(
        f"microvm-kernel-arm64-{page_kib}k",
        inputs,
        lambda target: _build(source, target, fragment, arm64=True),
        f"building the arm64 microVM kernel with pages of {page_kib} KiB from {SOURCE_PACKAGE} {version}",
    )
    return folder / "Image"


def arm64_fragment(page_kib: int) -> str:
    """The configuration for arm64: its own platform, and what microvm.config says about everything else."""
    sections = FRAGMENT.read_text(encoding="ascii").split("\n\n")
    common = [section for section in sections[1:] if not section.startswith(_PLATFORM_SECTIONS)]
    pages = "\n".join(f"{name}=y" for size, name in PAGE_SIZES.items() if size == page_kib)
    return "\n\n".join([ARM64_FRAGMENT.read_text(encoding="ascii") + pages, *common])


def _source() -> tuple[Path, str]:
    """The source archive and its version: the installed package's, else a downloaded one's."""
    archive = Path("/usr/src") / f"{SOURCE_PACKAGE}.tar.xz"
    version = debian.installed_version(SOURCE_PACKAGE)
    if version and archive.exists():
        return archive, version
    tree = debian.tree(SOURCE_PACKAGE)
    return tree / "usr" / "src" / f"{SOURCE_PACKAGE}.tar.xz", tree.name


def _build(source: Path, target: Path, fragment: str, arm64: bool = False) -> None:
    groups = ["kernel", "lab-arm"] if arm64 else ["kernel"]
    subprocess.run([str(HERE.parent / "lab" / "setup.sh"), *groups], check=True)
    work = target / "work"
    work.mkdir()
    subprocess.run(["tar", "-xf", str(source), "--strip-components=1"], cwd=work, check=True)
    # The same source and configuration give the same kernel, whoever builds it and when.
    environment = {
        **os.environ,
        "KBUILD_BUILD_TIMESTAMP": "2024-01-01",
        "KBUILD_BUILD_USER": "stratovirt",
        "KBUILD_BUILD_HOST": "guest",
    }
    for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "CMD"):
        environment.pop(name, None)
    if arm64:
        environment |= {"ARCH": "arm64", "CROSS_COMPILE": ARM64_PREFIX}
    (target / "fragment").write_text(fragment, encoding="ascii")
    log = target / "build.log"
    with open(log, "wb") as output:

        def run(*command: str) -> None:
            done = subprocess.run(command, cwd=work, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
            if done.returncode:
                raise RuntimeError(
                    f"{' '.join(command)} failed:\n" + "".join(log.read_text(errors="replace").splitlines(True)[-20:])
                )

        run("make", "-s", "tinyconfig")
        run("scripts/kconfig/merge_config.sh", "-m", ".config", str(target / "fragment"))
        run("make", "-s", "olddefconfig")
        missing = unmet(fragment, (work / ".config").read_text(encoding="ascii"))
        if missing:
            raise RuntimeError("the kernel's configuration did not take " + ", ".join(missing))
        targets = ["Image"] if arm64 else ["vmlinux", "bzImage"]
        run("nice", "make", "-s", f"-j{os.cpu_count() or 1}", *targets)
    if arm64:
        shutil.copy(work / "arch/arm64/boot/Image", target / "Image")
        shutil.copy(work / ".config", target / "config")
        shutil.rmtree(work)
        return
    shutil.copy(work / "arch/x86/boot/bzImage", target / "bzImage")
    shutil.copy(work / ".config", target / "config")
    subprocess.run(["strip", "--strip-debug", "-o", str(target / "vmlinux"), str(work / "vmlinux")], check=True)
    subprocess.run(["objcopy", "-O", "binary", str(target / "vmlinux"), str(target / "vmlinux.bin")], check=True)
    shutil.rmtree(work)


def unmet(fragment: str, configuration: str) -> list[str]:
    """The lines of a fragment that a kernel configuration does not hold."""
    have = dict(line.split("=", 1) for line in configuration.splitlines() if line.startswith("CONFIG_"))
    wrong = []
    for line in fragment.splitlines():
        off = re.fullmatch(r"# (CONFIG_\w+) is not set", line)
        if off:
            name, value = off[1], "n"
        elif line.startswith("CONFIG_"):
            name, value = line.split("=", 1)
        else:
            continue
        if have.get(name, "n") != value:
            wrong.append(f"{name}={value}")
    return wrong
