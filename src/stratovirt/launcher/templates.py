"""The launcher's templates and the identities of the clones that live.

Templates are found in `root`, one directory each, when the launcher starts, and others are told to it by `create`. Removing
one takes it from the launcher; the files are for the client to remove. Clones that run need neither.
"""

from __future__ import annotations

import os

from stratovirt import log
from stratovirt.errors import ConfigError, StratoVirtError
from stratovirt.launcher import identity, wire
from stratovirt.launcher.identity import Identity
from stratovirt.launcher.template import FILE, NAMES_ACCEPTED, Template, is_name

MAX_TEMPLATES = 64


class Templates:
    """Thread: the launcher's."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._templates: dict[str, Template] = {}
        self._living: dict[int, Identity] = {}  # by process id

    def find(self) -> None:
        """Take over what an earlier launcher has left in `root`."""
        try:
            names = sorted(os.listdir(self.root))
        except (OSError, ValueError):
            return  # there is none yet, or the launcher's socket is in no directory
        for name in names:
            directory = os.path.join(self.root, name)
            if is_name(name) and os.path.exists(os.path.join(directory, FILE)):
                try:
                    self._create(name, directory)
                except StratoVirtError as error:
                    log.warn(f"the template in {directory} is of no use: {error}")

    def get(self, name: str) -> Template:
        """Raises: ConfigError."""
        template = self._templates.get(name)
        if template is None:
            raise ConfigError("there is no such template", option="template", value=name,
                              accepted=", ".join(sorted(self._templates)) or "none: `stratovirt template create` makes one")
        return template

    def has(self, template: Template) -> bool:
        return self._templates.get(template.name) is template

    @property
    def latest(self) -> Template | None:
        """The one that was made last."""
        return next(reversed(self._templates.values()), None)

    # -- orders and questions

    def command(self, words: list[str]) -> object:
        """Carry out a request of the kind "template": what is to be answered. Raises: StratoVirtError."""
        verb, *rest = words or [""]
        if verb == "create" and len(rest) == 2:
            return self._create(*rest).describe()
        if verb == "list" and not rest:
            return [self._summary(template) for _, template in sorted(self._templates.items())]
        if verb == "show" and len(rest) == 1:
            template = self.get(rest[0])
            return {**template.describe(), "clones": [{"pid": pid, **clone.describe()} for pid, clone in self._living.items()
                                                      if clone.template == template.name]}
        if verb == "remove" and len(rest) == 1:
            template = self.get(rest[0])
            del self._templates[template.name]
            template.close()
            return {"name": template.name, "directory": template.directory}
        raise ConfigError("no such request", option="template", value=" ".join(words)[:100],
                          accepted="create NAME DIRECTORY, list, show NAME, remove NAME")

    def _create(self, name: str, directory: str) -> Template:
        if not is_name(name):
            raise ConfigError("not a name for a template", option="template create", value=name, accepted=NAMES_ACCEPTED)
        if name in self._templates:
            raise ConfigError("there is a template of this name", option="template create", value=name,
                              accepted="another name, or `stratovirt template remove` before")
        if len(self._templates) >= MAX_TEMPLATES:
            raise ConfigError(f"the launcher holds {MAX_TEMPLATES} templates, and no more", option="template create",
                              value=name)
        if not os.path.isabs(directory):
            raise ConfigError("not an absolute path", option="template create", value=directory)
        template = Template(name, directory)
        self._templates[name] = template
        return template

    def _summary(self, template: Template) -> dict[str, object]:
        config = template.config
        return {"name": template.name, "created": template.created, "memory": config.memory_size, "cpus": config.smp.cpus,
                "clones": sum(clone.template == template.name for clone in self._living.values()),
                "directory": template.directory}

    # -- clones

    def allot(self, words: list[str]) -> tuple[Template, Identity]:
        """What the clone that is asked for will be. Raises: ConfigError."""
        name, values = identity.parse(words)
        template = self.get(name)
        template.check_memory()
        return template, identity.complete(template, values, self._living.values())

    def rehearse(self, template: Template) -> None:
        """Allot what nobody gets. A fork has shared all pages anew, and the next request need not wait for their copies."""
        try:
            _, clone = self.allot([template.name])
        except ConfigError:
            return  # it needs a tap, for example: whoever asks without one will hear of it
        clone.words()

    def begun(self, pid: int, clone: Identity) -> None:
        self._living[pid] = clone

    def ended(self, pid: int) -> None:
        self._living.pop(pid, None)


def root_of(socket: str) -> str:
    """Where the launcher at `socket` has its templates."""
    folder, name = os.path.split(os.path.abspath(socket))
    return os.path.join(folder, "stratovirt-templates" if name == os.fsdecode(wire.SOCKET_NAME) else f"{name}.templates")
