"""Debian packages as raw material: resolved, downloaded and unpacked into the cache, never installed.

The version that a name stood for is remembered beside the entry, so that a cached package needs neither the network nor
apt's lists again; `make clean-cache` forgets it.

Packages of another architecture come from the same mirrors, through an apt whose lists, status and archives are in the cache:
this machine's own package database knows nothing of them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from guest import cache


class PackageError(Exception):
    """A package cannot be had; the text says which and what to do."""


def tree(meta: str, architecture: str = "") -> Path:
    """The unpacked content of `meta`, or of the one package that `meta` stands for (`linux-image-amd64`).

    `architecture` is Debian's name of one ("arm64"), "" for this machine's own.
    """
    suffix = f".{architecture}" if architecture else ""
    kept = _pinned(meta + suffix)
    if kept is not None:
        return kept
    package, version = _resolve(meta, architecture)
    folder = cache.entry(
        f"deb.{package}",
        {"package": package, "version": version, "recipe": "2" + suffix},
        lambda target: _unpack(package, version, architecture, target),
        f"downloading and unpacking {package} {version}{suffix}",
    )
    _pin(meta + suffix, folder)
    return folder


def system(
    name: str,
    packages: tuple[str, ...],
    architecture: str,
    inputs: Mapping[str, str | bytes],
    build: Callable[[Path, Path], None],
) -> Path:
    """The cache entry that `build(unpacked, target)` makes of `packages` and everything they depend on.

    `unpacked` has their files, none of them configured, and goes when the entry is built. The entry is kept for the versions
    that were current when it was made first; `inputs` are what else goes into it.
    """
    key = f"{name}.{architecture}." + cache.digest({**inputs, "packages": " ".join(packages)})
    kept = _pinned(key)
    if kept is not None:
        return kept
    versions = _closure(packages, architecture)

    def unpack_and_build(target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=target) as folder:
            _unpack_all(packages, architecture, Path(folder))
            build(Path(folder), target)

    entry = cache.entry(
        f"{name}.{architecture}",
        {**inputs, "packages": versions, "recipe": "1"},
        unpack_and_build,
        f"downloading and unpacking {len(versions.split())} packages of Debian {architecture}",
    )
    _pin(key, entry)
    return entry


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


def _pinned(name: str) -> Path | None:
    pin = cache.root() / "pins" / f"{_release()}.{name}"
    if not pin.exists():
        return None
    kept = cache.root() / pin.read_text(encoding="utf-8").strip()
    return kept if kept.is_dir() else None


def _pin(name: str, folder: Path) -> None:
    cache.write_atomically(cache.root() / "pins" / f"{_release()}.{name}", folder.name)


def _apt_state(architecture: str) -> Path:
    return cache.root() / "apt" / f"{_release()}.{architecture}"


def _apt_options(architecture: str) -> list[str]:
    """Options that make any apt command one of `architecture`, with a state of its own; none for this machine's own."""
    if not architecture:
        return []
    state = _apt_state(architecture)
    for folder in ("lists/partial", "archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    values = {
        "APT::Architecture": architecture,
        "APT::Architectures::": architecture,
        "APT::Sandbox::User": "root",  # the cache may lie where apt's own user cannot go
        "Dir::State": state,
        "Dir::State::lists": state / "lists",
        "Dir::State::status": state / "status",
        "Dir::Cache": state,
        "Dir::Cache::archives": state / "archives",
        "Debug::NoLocking": "1",
    }
    return [word for name, value in values.items() for word in ("-o", f"{name}={value}")]


def _update(architecture: str) -> None:
    cache.say(f"apt-get update (apt knows no package lists{' of ' + architecture if architecture else ''})")
    command = ["apt-get", *_apt_options(architecture), "-qq", "update"]
    # A source that has nothing for this architecture is an error to apt; what is then missing is reported by name.
    subprocess.run(command if architecture else as_root(*command), check=False, stdout=subprocess.DEVNULL)


def _resolve(meta: str, architecture: str) -> tuple[str, str]:
    """Follow a meta-package to the versioned package it depends on. Asks for fresh lists once when apt knows nothing."""
    for attempt in (1, 2):
        shown = subprocess.run(
            ["apt-cache", *_apt_options(architecture), "show", "--no-all-versions", meta],
            capture_output=True,
            text=True,
            check=False,
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
            _update(architecture)
    raise PackageError(f"apt knows no package {meta}: check the network and /etc/apt/sources.list")


def _closure(packages: tuple[str, ...], architecture: str) -> str:
    """`packages` and what they depend on as NAME=VERSION, sorted, separated by blanks."""
    command = ["apt-get", *_apt_options(architecture), "-q", "-y", "-s", "--no-install-recommends", "install", *packages]
    for attempt in (1, 2):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = re.findall(r"^Inst (\S+) \((\S+) ", done.stdout, re.MULTILINE)
        if done.returncode == 0 and found:
            return " ".join(sorted(f"{name}={version}" for name, version in found))
        if attempt == 1:
            _update(architecture)
    raise PackageError(f"apt cannot resolve {' '.join(packages)} for {architecture}: {done.stderr.strip()[-500:]}")


def _unpack_all(packages: tuple[str, ...], architecture: str, target: Path) -> None:
    command = ["apt-get", *_apt_options(architecture), "-q", "-y", "-d", "--no-install-recommends", "install", *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    files = sorted((_apt_state(architecture) / "archives").glob("*.deb"))
    if done.returncode or not files:
        raise PackageError(f"cannot download packages for {architecture}: {done.stderr.strip()[-500:]}")
    # What debootstrap does first on a system with one /usr: the packages' files go through these links.
    for name in ("bin", "sbin", "lib"):
        (target / "usr" / name).mkdir(parents=True)
        (target / name).symlink_to(f"usr/{name}")
    for file in files:
        content = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(file)], stdout=subprocess.PIPE)
        tar = ["tar", "-x", "--keep-directory-symlink", "--no-same-owner", "-C", str(target)]
        subprocess.run(tar, stdin=content.stdout, check=True)
        if content.wait():
            raise PackageError(f"{file.name} is damaged")
    for file in files:
        file.unlink()


def _unpack(package: str, version: str, architecture: str, target: Path) -> None:
    download = target / "download"
    download.mkdir()
    if os.geteuid() == 0:
        download.chmod(0o777)  # apt's own user writes into it; without the right, apt warns and goes on as root
    done = subprocess.run(
        ["apt-get", *_apt_options(architecture), "-q", "download", f"{package}={version}"],
        cwd=download,
        capture_output=True,
        text=True,
        check=False,
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
