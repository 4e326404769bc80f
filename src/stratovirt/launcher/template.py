"""A template: the snapshot of a machine in a directory, with what is needed to start others from it.

Layout of the directory:

    state, memory   the snapshot (`snapshot/state_file.py`); memory is mapped copy-on-write by every clone
    disk-N          what the N-th drive held at that moment, when it can be written; every clone gets a copy of it
    template        JSON: `version`, `name`, `created` (seconds since 1970), `directory` and `arguments` (where and how the
                    machine was started), `drives`: for each its `id`, `path`, whether that is a `copy`, and its `stamp`:
                    device, inode, bytes, time of the last change in ns

The launcher keeps it decoded, and the memory file open. A file that has another stamp than it had is not used.
"""

from __future__ import annotations

import json
import os
import stat

from stratovirt.cli import command
from stratovirt.config.vm import IncomingConfig
from stratovirt.errors import ConfigError
from stratovirt.machine.clone import MappedTemplate
from stratovirt.snapshot import state_file
from stratovirt.snapshot.chain import Chain
from stratovirt.snapshot.saved import Saved, SnapshotError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from stratovirt.config.vm import DeviceConfig, VmConfig

FILE = "template"
VERSION = 1
MAX_FILE = 1 << 20
MAX_NAME = 64
NET, VSOCK = "virtio-net-device", "vhost-vsock-device"
NAMES_ACCEPTED = f"1 to {MAX_NAME} letters, digits, dots, dashes and underscores, the first a letter or digit"
_NAME_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")

Stamp = tuple[int, int, int, int]


def is_name(text: str) -> bool:
    """What is used as a name also becomes part of a path."""
    return 0 < len(text) <= MAX_NAME and text[0].isalnum() and _NAME_LETTERS.issuperset(text)


def stamp_of(status: os.stat_result) -> Stamp:
    """What changes when the content of a file does. Of a block device only which one it is."""
    if stat.S_ISBLK(status.st_mode):
        return status.st_rdev, 0, 0, 0
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class TemplateDrive:
    """A drive of the template: the file that clones read, shared, or with `copy` get a copy of."""

    __slots__ = ("copy", "id", "path", "stamp")

    def __init__(self, saved: Saved) -> None:
        self.id = saved.text("id")
        self.path = saved.text("path", 4096)
        self.copy = saved.boolean("copy")
        stamp = saved.integers("stamp", 0, (1 << 64) - 1, 4)
        if len(stamp) != 4:
            raise saved.error("stamp", "not four numbers")
        self.stamp: Stamp = (stamp[0], stamp[1], stamp[2], stamp[3])
        saved.end()

    def check(self, template: str, status: os.stat_result) -> None:
        """Raises: ConfigError when it is not what it was."""
        if stamp_of(status) != self.stamp:
            raise ConfigError(f"the disk {self.path} (drive {self.id}) has changed since the template was made",
                              option="clone", value=template, accepted="a template whose disks are as they were; make it anew")


class Template:
    """Reads the one in `directory`. Raises: ConfigError, HostError; nothing is kept open then."""

    def __init__(self, name: str, directory: str) -> None:
        self.name = name
        self.directory = directory
        try:
            self._read()
            self.state = state_file.read(directory)
            self.id = Saved(self.state).data("id", state_file.ID_SIZE).hex()
        except SnapshotError as error:
            raise self._refuse(str(error)) from error
        self.config = self._configure()
        try:
            self.chain = Chain(directory, self.state)
        except SnapshotError as error:
            raise self._refuse(str(error)) from error
        try:
            self._memory = [stamp_of(os.fstat(link.fd)) for link in self.chain.links]
            self.prepare()  # all that can be said against it is said now
        except BaseException:
            self.close()
            raise

    def _refuse(self, problem: str, accepted: str = "") -> ConfigError:
        return ConfigError(problem, option="template create", value=self.name,
                           accepted=accepted or "the directory of a template, as `template create --qmp` makes it")

    def _read(self) -> None:
        path = os.path.join(self.directory, FILE)
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_FILE + 1)
        except (OSError, ValueError) as error:
            why = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
            raise SnapshotError(f"{path}: {why}") from error
        try:
            found = json.loads(data) if len(data) <= MAX_FILE else None
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise SnapshotError(f"{path}: this is not the description of a template")
        saved = Saved(found)
        version = saved.integer("version")
        if version != VERSION:
            raise saved.error("version", f"{version}, and this program knows {VERSION}")
        self.created = saved.integer("created")
        self.cwd = saved.text("directory", 4096)
        self.arguments = saved.texts("arguments", 4096)
        self.drives = {drive.id: drive for drive in map(TemplateDrive, saved.sections("drives"))}
        saved.text("name")
        saved.end()

    # -- what clones are made of

    def _configure(self) -> VmConfig:
        """The configuration of the machine, less what its clones cannot have in common."""
        config = command.parse(self.arguments)
        if config.accel != "kvm":
            raise self._refuse("the test accelerator has no clones", "a machine with -accel kvm")
        if config.vhost_users:
            raise self._refuse("a device whose back end is another process (vhost-user) cannot be cloned")
        for netdev in config.netdevs.values():
            if netdev.fds or netdev.vhost_fds:
                raise self._refuse(f"-netdev {netdev.id} has descriptors, and a clone needs a tap of its own",
                                   "a -netdev with ifname")
        for device in config.devices:
            if device.driver == VSOCK and device.options.optional_integer("vhostfd") is not None:
                raise self._refuse(f"-device {device.id} has a descriptor (vhostfd), and a clone needs one of its own",
                                   "a vhost-vsock-device without vhostfd")
        if set(config.drives) != set(self.drives):
            raise self._refuse("its description has other drives than its arguments")
        config.incoming = IncomingConfig(self.directory, True)
        config.qmp = []
        config.daemonize = config.freeze = False
        config.pidfile = config.log_file = ""
        config.ram = None  # private, whatever the template's was
        return config

    def devices(self, driver: str) -> list[DeviceConfig]:
        return [device for device in self.config.devices if device.driver == driver]

    def prepare(self) -> MappedTemplate:
        """The memory of one clone, for a process that forgets it or becomes that clone. Raises: ConfigError, HostError."""
        return MappedTemplate(self.config, self.state, self.chain)

    def check_memory(self) -> None:
        """Raises: ConfigError when somebody has written to what clones have mapped."""
        if [stamp_of(os.fstat(link.fd)) for link in self.chain.links] != self._memory:
            raise ConfigError(f"its memory, in {self.directory}, has changed since the launcher opened it", option="clone",
                              value=self.name, accepted="a template that nobody writes to; make it anew")

    # -- what is told

    def describe(self) -> dict[str, Any]:
        config = self.config
        return {
            "name": self.name, "directory": self.directory, "created": self.created, "snapshot": self.id,
            "memory": config.memory_size, "cpus": config.smp.cpus, "arguments": self.arguments,
            "drives": [{"id": drive.id, "path": drive.path, "copy": drive.copy} for drive in self.drives.values()],
            "net": [device.id for device in self.devices(NET)], "vsock": [device.id for device in self.devices(VSOCK)],
        }

    def close(self) -> None:
        """Mappings of clones stay."""
        self.chain.close()


