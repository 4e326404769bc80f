"""What is behind a network interface: the queues of a tap and, with vhost, a kernel thread for each."""

from __future__ import annotations

from stratovirt.backends.tap import open_taps
from stratovirt.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.backends.tap import Tap
    from stratovirt.config.vm import NetdevConfig
    from stratovirt.memory import GuestMemory
    from stratovirt.vhost.net import VhostNet


class NetBackend:
    """`taps` has one for each queue pair; `vhosts` as many, or none."""

    __slots__ = ("taps", "vhosts")

    def __init__(self, taps: list[Tap], vhosts: list[VhostNet]) -> None:
        self.taps = taps
        self.vhosts = vhosts

    @property
    def descriptors(self) -> list[int]:
        return [tap.fd for tap in self.taps] + [vhost.vhost.fd for vhost in self.vhosts]

    def close(self) -> None:
        """For one that no interface was given; an interface closes its own."""
        for vhost in self.vhosts:
            vhost.close()
        for tap in self.taps:
            tap.close()


def open_net_backend(netdev: NetdevConfig, memory: GuestMemory) -> NetBackend:
    """Everything of a `-netdev tap`, open. Descriptors that it names stay the caller's after an error. Raises: ConfigError."""
    taps = open_taps(netdev)
    vhosts: list[VhostNet] = []
    try:
        if netdev.vhost:
            from stratovirt.vhost.net import open_vhost_net

            for number in range(len(taps)):
                vhosts.append(open_vhost_net(netdev.vhost_fds[number] if netdev.vhost_fds else None, memory))
    except ConfigError:
        if not netdev.vhost_fds:
            for vhost in vhosts:
                vhost.close()
        if not netdev.fds:
            for tap in taps:
                tap.close()
        raise
    return NetBackend(taps, vhosts)
