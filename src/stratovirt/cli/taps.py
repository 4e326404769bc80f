"""What `-netdev tap` and the network device in front of it say together. Imported for those who have one."""

from __future__ import annotations

from stratovirt.config.options import MAX_QUEUE_PAIRS
from stratovirt.config.vm import NetdevConfig
from stratovirt.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from stratovirt.config.schema import OptionValues

_OPTION = "-netdev tap"


def read_tap(id: str, values: OptionValues, text: str, others: Iterable[NetdevConfig] = ()) -> NetdevConfig:
    """The tap that a `-netdev tap` describes; `others` are there already. Raises: ConfigError."""
    taken = {fd for other in others for fd in (*other.fds, *other.vhost_fds)}
    fds = _descriptors(values, "fd", text, taken)
    vhost_fds = _descriptors(values, "vhostfd", text, taken.union(fds))
    ifname = values.optional_string("ifname") or ""
    if not fds and not ifname:
        raise ConfigError("Tap device is missing, use 'ifname' or 'fd' to configure a tap device", option=_OPTION,
                          value=text, accepted="ifname=NAME or fd=N")
    queues, vhost = values.integer("queues"), values.boolean("vhost")
    if fds and queues > len(fds):
        raise ConfigError(f"{queues} queue pairs and {len(fds)} descriptors", option=f"{_OPTION},queues", value=str(queues),
                          accepted="as many as there are fds")
    netdev = NetdevConfig(id, ifname, fds, queues, vhost, vhost_fds)
    if vhost_fds and not vhost:
        raise ConfigError("Argument 'vhostfd' or 'vhostfds' are not needed for virtio-net device", option=_OPTION, value=text,
                          accepted="vhost=on with them")
    if vhost_fds and len(vhost_fds) != netdev.queues:
        raise ConfigError("The num of vhostfds must equal to fds", option=f"{_OPTION},vhostfds",
                          value=":".join(map(str, vhost_fds)), accepted=f"{netdev.queues} of them, one for each queue pair")
    return netdev


def _descriptors(values: OptionValues, name: str, text: str, taken: set[int]) -> tuple[int, ...]:
    """Those of the key `name`, or of its plural. Raises: ConfigError."""
    one, several = values.optional_integer(name), f"{name}s"
    if one is not None and several in values.given:
        raise ConfigError(f"{name} and {several} are one key", option=_OPTION, value=text, accepted="one of them")
    if several in values.given:
        name, fds = several, values.integers(several)
    else:
        fds = () if one is None else (one,)
    if len(fds) > MAX_QUEUE_PAIRS or len(taken.union(fds)) < len(taken) + len(fds):
        raise ConfigError("too many queue pairs" if len(fds) > MAX_QUEUE_PAIRS else "a descriptor is named twice",
                          option=f"{_OPTION},{name}", value=":".join(map(str, fds)),
                          accepted=f"1 to {MAX_QUEUE_PAIRS} descriptors, one for each queue pair, that nothing else uses")
    return fds


def check_pairs(netdev: NetdevConfig, values: OptionValues, title: str) -> None:
    """`mq=off` over several queues of a tap cannot be. Raises: ConfigError."""
    if values.optional_boolean("mq") is False and netdev.queues > 1:
        raise ConfigError(f"the netdev {netdev.id} has {netdev.queues} queue pairs", option=f"{title},mq", value="off",
                          accepted="on, or a netdev with one queue pair")
