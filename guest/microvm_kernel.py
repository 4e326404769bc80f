"""Builds the small microVM kernel from Debian's linux-source and guest/microvm.config. Takes a few minutes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from guest import cache, debian

HERE = Path(__file__).resolve().parent
FRAGMENT = HERE / "microvm.config"
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
        lambda target: _build(source, target),
        f"building the microVM kernel from {SOURCE_PACKAGE} {version}",
    )


def _source() -> tuple[Path, str]:
    """The source archive and its version: the installed package's, else a downloaded one's."""
    archive = Path("/usr/src") / f"{SOURCE_PACKAGE}.tar.xz"
    version = debian.installed_version(SOURCE_PACKAGE)
    if version and archive.exists():
        return archive, version
    tree = debian.tree(SOURCE_PACKAGE)
    return tree / "usr" / "src" / f"{SOURCE_PACKAGE}.tar.xz", tree.name


def _build(source: Path, target: Path) -> None:
    subprocess.run([str(HERE.parent / "lab" / "setup.sh"), "kernel"], check=True)
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
    log = target / "build.log"
    with open(log, "wb") as output:

        def run(*command: str) -> None:
            done = subprocess.run(command, cwd=work, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
            if done.returncode:
                raise RuntimeError(
                    f"{' '.join(command)} failed:\n" + "".join(log.read_text(errors="replace").splitlines(True)[-20:])
                )

        run("make", "-s", "tinyconfig")
        run("scripts/kconfig/merge_config.sh", "-m", ".config", str(FRAGMENT))
        run("make", "-s", "olddefconfig")
        missing = unmet(FRAGMENT.read_text(encoding="ascii"), (work / ".config").read_text(encoding="ascii"))
        if missing:
            raise RuntimeError("the kernel's configuration did not take " + ", ".join(missing))
        run("nice", "make", "-s", f"-j{os.cpu_count() or 1}", "vmlinux", "bzImage")
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
