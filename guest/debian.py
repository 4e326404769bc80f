"""Debian packages as raw material: resolved, downloaded and unpacked into the cache, never installed.

The version that a name stood for is remembered beside the entry, so that a cached package needs neither the network nor
apt's lists again; `make clean-cache` forgets it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from guest import cache


class PackageError(Exception):
    """A package cannot be had; the text says which and what to do."""


def tree(meta: str) -> Path:
    """The unpacked content of `meta`, or of the one package that `meta` stands for (`linux-image-amd64`)."""
    pin = cache.root() / "pins" / f"{_release()}.{meta}"
    if pin.exists():
        kept = cache.root() / pin.read_text(encoding="utf-8").strip()
        if kept.is_dir():
            return kept
    package, version = _resolve(meta)
    folder = cache.entry(
        f"deb.{package}",
        {"package": package, "version": version, "recipe": "2"},
        lambda target: _unpack(package, version, target),
        f"downloading and unpacking {package} {version}",
    )
    cache.write_atomically(pin, folder.name)
    return folder


def installed_version(package: str) -> str | None:
    """The version of a package that is installed on this machine, or None."""
    done = subprocess.run(
        ["dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", package], capture_output=True, text=True, check=False
    )
    state, _, version = done.stdout.partition(" ")
    return version if state == "installed" else None


def as_root(*command: str) -> list[str]:
    """The command, through sudo when this process is not root."""
    return list(command) if os.geteuid() == 0 else ["sudo", *command]


def _release() -> str:
    text = Path("/etc/os-release").read_text(encoding="utf-8")
    found = re.search(r"^VERSION_CODENAME=(\S+)", text, re.MULTILINE)
    return found[1] if found else "unknown"


def _resolve(meta: str) -> tuple[str, str]:
    """Follow a meta-package to the versioned package it depends on. Asks for fresh lists once when apt knows nothing."""
    for attempt in (1, 2):
        shown = subprocess.run(
            ["apt-cache", "show", "--no-all-versions", meta], capture_output=True, text=True, check=False
        ).stdout
        fields = dict(re.findall(r"^(Package|Version|Depends|Source): (.*)$", shown, re.MULTILINE))
        if fields:
            package = fields["Package"]
            depends = fields.get("Depends", "")
            behind = re.fullmatch(r"(linux-image-\d\S*) \(= (\S+)\)", depends)
            if behind:
                return behind[1], behind[2]
            return package, fields["Version"]
        if attempt == 1:
            cache.say("apt-get update (apt knows no package lists)")
            subprocess.run(as_root("apt-get", "-qq", "update"), check=False, stdout=subprocess.DEVNULL)
    raise PackageError(f"apt knows no package {meta}: check the network and /etc/apt/sources.list")


def _unpack(package: str, version: str, target: Path) -> None:
    download = target / "download"
    download.mkdir()
    if os.geteuid() == 0:
        download.chmod(0o777)  # apt's own user writes into it; without the right, apt warns and goes on as root
    done = subprocess.run(
        ["apt-get", "-q", "download", f"{package}={version}"], cwd=download, capture_output=True, text=True, check=False
    )
    files = list(download.glob("*.deb"))
    if done.returncode or len(files) != 1:
        raise PackageError(f"cannot download {package}={version}: {done.stderr.strip()}; try `apt-get update`")
    subprocess.run(["dpkg-deb", "-x", str(files[0]), str(target)], check=True)
    shutil.rmtree(download)
    for modules in target.glob("lib/modules/*"):
        depmod = shutil.which("depmod", path="/usr/sbin:/sbin:/usr/bin:/bin")
        if depmod is None:
            raise PackageError("depmod is missing: install the package kmod")
        subprocess.run([depmod, "-b", str(target), modules.name], check=True)
