"""The back ends of devices on vhost-user, as the command line names them. Imported for those who have one."""

from __future__ import annotations

from stratovirt.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.config.vm import VmConfig


def claim(config: VmConfig, chardev: str, title: str, id: str) -> None:
    """Take the character device `chardev` for the device or netdev `id`, `title` being its option. Raises: ConfigError.

    Kata writes `server,nowait` although the back end listens: that is passed over.
    """
    found = config.chardevs.pop(chardev, None)
    if found is None:
        raise ConfigError(f'Chardev "{chardev}" not found or is in use', option=f"{title},chardev", value=chardev,
                          accepted="the id of a -chardev socket,path=PATH that nothing else uses")
    if found.kind != "socket" or not found.path:
        raise ConfigError("vhost-user needs a unix socket", option=f"{title},chardev", value=chardev,
                          accepted="the id of a -chardev socket,path=PATH")
    if config.ram is None or not config.ram.share:
        device = title.partition(" ")[2]
        raise ConfigError(f"When configuring the {device} device, the memory must be shared: its back end maps it",
                          option=title, value=f"id={id}",
                          accepted="with -machine mem-share=on, or with -object memory-backend-memfd,id=ID,size=SIZE,share=on "
                                   "and -machine memory-backend=ID")
    config.vhost_users[chardev] = found


def keep_spare(config: VmConfig, taken: set[str]) -> None:
    """Sockets that nothing listens on or uses are those of back ends for what is plugged in later; `taken`: used by ports.

    Raises: ConfigError.
    """
    for id, chardev in list(config.chardevs.items()):
        if chardev.kind == "socket" and chardev.path and not chardev.server and id not in taken:
            if config.ram is None or not config.ram.share:
                raise ConfigError("the back end of a vhost-user device maps the guest's memory, which must be shared",
                                  option="-chardev socket", value=f"id={id}",
                                  accepted="with -machine mem-share=on; or server,nowait for a socket to listen on")
            config.vhost_users[id] = config.chardevs.pop(id)
            config.spare_backends.append(id)
