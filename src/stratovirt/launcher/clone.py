"""In the child that becomes a clone: the template's configuration with the clone's own identity, and the way to `run`."""

from __future__ import annotations

import gc
import os
import sys
import time

from stratovirt import lockdown, log
from stratovirt.backends import sparse_copy
from stratovirt.cli import command
from stratovirt.errors import ConfigError, StratoVirtError
from stratovirt.launcher import identity
from stratovirt.launcher.template import NET, VSOCK
from stratovirt.machine.clone import CloneAhead, MappedTemplate
from stratovirt.sparse import unnamed_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.config.vm import CharDeviceConfig, DriveConfig, VmConfig
    from stratovirt.launcher.child import Attachment
    from stratovirt.launcher.identity import Identity
    from stratovirt.launcher.template import Template, TemplateDrive
    from stratovirt.sandbox.kernel import Sandbox

_PRIVATE_PATHS = ("file", "socket")


def map_memory(template: Template) -> MappedTemplate | None:
    """While the launcher's descriptors are still here. None: the start will come upon the same, and say so to its client."""
    try:
        return template.prepare()
    except StratoVirtError as error:
        log.debug(f"no memory ahead: {error}")
        return None


def make_ahead(mapped: MappedTemplate | None) -> CloneAhead | None:
    if mapped is None:
        return None
    try:
        return CloneAhead(mapped)
    except StratoVirtError as error:
        log.debug(f"no processors ahead: {error}")
        return None


def make_sandbox(config: VmConfig) -> Sandbox | None:
    """With filters that need not be made any more. None: there are to be none, or the start will come upon the same."""
    if not config.seccomp:
        return None
    try:
        sandbox = lockdown.make_sandbox(config)
    except StratoVirtError as error:
        log.debug(f"no sandbox ahead: {error}")
        return None
    sandbox.prepare()
    return sandbox


def start(template: Template, words: list[str], attachment: Attachment) -> int:
    """Run the clone that `words` describe. The exit status; a machine that has run ends the process itself."""
    from stratovirt.__main__ import run

    started_at = time.monotonic()
    log.LOG.level = log.level_from_name(os.environ.get("STRATOVIRT_LOG_LEVEL"))
    gc.disable()
    try:
        own = identity.read(words)
        attachment.is_clone, attachment.detached = True, own.detach
        return run(configure(template, own), started_at, attachment)
    except StratoVirtError as error:
        sys.stderr.write(f"stratovirt: {error}\n")
        return 1


def configure(template: Template, own: Identity) -> VmConfig:
    """The template's configuration, which this process has for itself, made that of the clone. Raises: ConfigError."""
    config = template.config
    config.name = own.name
    config.arguments = [*template.arguments, "-name", own.name]
    _go_to(template)
    macs = iter(own.macs)
    for device in config.devices:
        if device.driver == NET:
            device.options = device.options.with_value("mac", next(macs))
        elif device.driver == VSOCK:
            device.options = device.options.with_value("guest-cid", own.cid)
    for netdev, tap in zip(config.netdevs.values(), own.taps, strict=True):
        netdev.ifname = tap
    for drive in config.drives.values():
        _give_disk(template, template.drives[drive.id], drive)
    for chardev in (*config.chardevs.values(), *([config.serial] if config.serial is not None else [])):
        _give_path(chardev, own)
    for address in own.qmp:
        command.add_qmp(config, [f"{address},server,nowait"])
    return config


def _go_to(template: Template) -> None:
    """The template's arguments may have relative paths."""
    try:
        os.chdir(template.cwd)
    except OSError as error:
        raise ConfigError(f"its machine was started in {template.cwd}: {os.strerror(error.errno or 0)}", option="clone",
                          value=template.name, accepted="a template whose directory is still there") from error


def _give_path(chardev: CharDeviceConfig, own: Identity) -> None:
    """Two machines cannot listen at one socket, and should not write one file."""
    if chardev.kind in _PRIVATE_PATHS and chardev.path and not chardev.path.startswith("/dev/"):
        chardev.path = f"{chardev.path}.{own.name}"


def _give_disk(template: Template, source: TemplateDrive, drive: DriveConfig) -> None:
    """A disk that nobody writes to, as it is; else a copy that has no name, and goes with its clone."""
    try:
        if not source.copy:
            source.check(template.name, os.stat(source.path))
            drive.file = source.path
            return
        fd = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"the disk {source.path} (drive {source.id}): {os.strerror(error.errno or 0)}", option="clone",
                          value=template.name, accepted="a template whose disks are there; make it anew") from error
    try:
        source.check(template.name, os.fstat(fd))
        target = unnamed_file(template.directory)
        sparse_copy.copy(fd, target)
    except OSError as error:
        raise ConfigError(f"no copy of the disk {source.path} (drive {source.id}) in {template.directory}: "
                          f"{os.strerror(error.errno or 0)}", option="clone", value=template.name,
                          accepted="room for what the clone has of its own") from error
    finally:
        os.close(fd)
    drive.file = f"/proc/self/fd/{target}"
