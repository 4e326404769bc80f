"""A tap device of the host: Ethernet frames, one for each read and write, behind a virtio_net_hdr of 12 bytes.

Facts about Linux that the code here and in `virtio/net.py` rests on: TUNSETIFF on a name that does not exist creates the
device, for as long as the descriptor is open; a read with too little room drops the rest of the frame without a word; of
the 12 bytes in front of a frame the kernel fills in the first ten and leaves the last two (num_buffers) as they were; once
the device is deleted the descriptor shows an error to epoll and EBADFD to everybody else; writing while the interface is
down fails with EIO.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from stratovirt.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.config.vm import NetdevConfig

# linux/if_tun.h
IFF_TAP = 0x0002
IFF_MULTI_QUEUE = 0x0100
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNGETIFF = 0x800454D2
TUNSETVNETHDRSZ = 0x400454D8
TUNSETQUEUE = 0x400454D9
IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE = 0x0200, 0x0400
TUN_F_CSUM = 0x01
TUN_F_TSO4 = 0x02
TUN_F_TSO6 = 0x04
TUN_F_UFO = 0x10

HEADER_SIZE = 12  # struct virtio_net_hdr_v1
IFNAMSIZ = 16
_IFREQ = struct.Struct("=16sH22x")  # struct ifreq { char ifr_name[16]; short ifr_flags; ... }
_WANTED = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
_GONE = (errno.EBADFD, errno.EBADF, errno.ENODEV, errno.ENXIO, errno.ECONNREFUSED, errno.ENOTCONN, errno.EPIPE)


class TapGoneError(HostError):
    """The device was deleted on the host."""


class Tap:
    """An open tap. `ufo`: its kernel knows UDP fragmentation offload. Thread: one at a time."""

    def __init__(self, fd: int, name: str, ufo: bool = False) -> None:
        self.fd = fd
        self.name = name
        self.ufo = ufo
        os.set_blocking(fd, False)

    def set_offload(self, flags: int) -> None:
        """What the reader of this tap can take (TUN_F_*); frames that need more are split by the kernel. Raises: HostError."""
        try:
            fcntl.ioctl(self.fd, TUNSETOFFLOAD, flags)
        except OSError as error:
            raise self._failed("TUNSETOFFLOAD", error) from error

    def enable(self, on: bool) -> None:
        """Let the kernel steer frames to this queue of a multi-queue tap, or not. Raises: HostError, TapGoneError."""
        try:
            fcntl.ioctl(self.fd, TUNSETQUEUE, _IFREQ.pack(b"", IFF_ATTACH_QUEUE if on else IFF_DETACH_QUEUE))
        except OSError as error:
            raise self._failed("TUNSETQUEUE", error) from error

    def read(self, views: list[memoryview]) -> int:
        """Header and frame into `views`; the bytes in all, 0 when none is waiting. Raises: HostError, TapGoneError."""
        try:
            return os.readv(self.fd, views)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._failed("read", error) from error

    def write(self, views: list[bytes | memoryview]) -> bool:
        """Send header and frame. False: the tap is full, try again when it is writable. Raises: HostError, TapGoneError."""
        try:
            os.writev(self.fd, views)
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._failed("write", error) from error
        return True

    def _failed(self, operation: str, error: OSError) -> HostError:
        kind = TapGoneError if error.errno in _GONE else HostError
        return kind.from_os(f"{operation} on tap {self.name}", error)

    def close(self) -> None:
        os.close(self.fd)


class NoTap(Tap):
    """What an interface without a cable is connected to. Nobody reads or writes it."""

    def __init__(self) -> None:
        self.fd = -1
        self.name = "none"
        self.ufo = False

    def close(self) -> None:
        """Nothing is open."""


def open_taps(netdev: NetdevConfig) -> list[Tap]:
    """The queues of the tap of a `-netdev tap`, by name or by descriptors, which stay the caller's after an error.

    Raises: ConfigError.
    """
    several = netdev.queues > 1
    opened: list[int] = []
    try:
        taps: list[Tap] = []
        for fd in netdev.fds:
            taps.append(_set_up(fd, _adopt(fd, several)))
            if taps[-1].name != taps[0].name:
                raise ConfigError(f"a queue of {taps[-1].name}, and the first is one of {taps[0].name}",
                                  option="-netdev tap,fds", value=str(fd), accepted="queues of the same tap")
        for _ in range(0 if netdev.fds else netdev.queues):
            opened.append(_open_by_name(netdev.ifname, several))
            taps.append(_set_up(opened[-1], netdev.ifname))
    except ConfigError:
        for fd in opened:
            os.close(fd)
        raise
    for fd in netdev.fds:
        os.set_inheritable(fd, False)
    return taps


def _set_up(fd: int, name: str) -> Tap:
    try:
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("=i", HEADER_SIZE))
        ufo = _knows_ufo(fd)
    except OSError as error:
        raise ConfigError(f"the tap cannot carry offloads: {os.strerror(error.errno or 0)}", option="-netdev tap",
                          value=name) from error
    return Tap(fd, name, ufo)


def _open_by_name(name: str, several: bool) -> int:
    option = "-netdev tap,ifname"
    encoded = os.fsencode(name)
    if len(encoded) >= IFNAMSIZ or b"/" in encoded or b"%" in encoded:
        raise ConfigError("not a name of a network interface", option=option, value=name,
                          accepted=f"at most {IFNAMSIZ - 1} bytes, without / and %")
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"cannot open /dev/net/tun: {os.strerror(error.errno or 0)}", option=option, value=name,
                          accepted="a host with the tun module and the right to use it") from error
    try:
        fcntl.ioctl(fd, TUNSETIFF, _IFREQ.pack(encoded, _WANTED | (IFF_MULTI_QUEUE if several else 0)))
    except OSError as error:
        os.close(fd)
        why = {
            errno.EBUSY: "another process has this tap open",
            errno.EPERM: "this user may neither use this tap nor create it",
            errno.EINVAL: f"this is not a tap with {_queues(several)}",
        }.get(error.errno or 0, os.strerror(error.errno or 0))
        kind = " multi_queue" if several else ""
        raise ConfigError(why, option=option, value=name, accepted=f"a tap of this user (ip tuntap add NAME mode tap{kind} "
                          "user USER), or CAP_NET_ADMIN") from error
    return fd


def _queues(several: bool) -> str:
    return "several queues" if several else "a single queue"


def _adopt(fd: int, several: bool) -> str:
    """Check that an inherited descriptor is a tap as we use it; the device's name."""
    option = "-netdev tap,fd"
    accepted = f"an inherited descriptor of a tap with IFF_NO_PI and IFF_VNET_HDR, of {_queues(several)}"
    try:
        name, flags = _IFREQ.unpack(fcntl.ioctl(fd, TUNGETIFF, bytes(_IFREQ.size)))
    except (OSError, OverflowError) as error:
        is_open = isinstance(error, OSError) and error.errno != errno.EBADF
        raise ConfigError("the descriptor is not a tap" if is_open else "no such descriptor is open", option=option,
                          value=str(fd), accepted=accepted) from error
    # IFF_NO_PI cannot be checked: to TUNGETIFF the same bit says that no socket filter is attached.
    needed = [(IFF_TAP, "IFF_TAP"), (IFF_VNET_HDR, "IFF_VNET_HDR")]
    if several:
        needed.append((IFF_MULTI_QUEUE, "IFF_MULTI_QUEUE"))
    missing = [word for bit, word in needed if not flags & bit]
    if missing or (flags & IFF_MULTI_QUEUE and not several):
        why = f"opened without {', '.join(missing)}" if missing else "opened with IFF_MULTI_QUEUE"
        raise ConfigError(f"the tap was {why}", option=option, value=str(fd), accepted=accepted)
    return os.fsdecode(name.partition(b"\0")[0])


def _knows_ufo(fd: int) -> bool:
    """Leaves all offloads off. Raises: OSError when the tap has none at all."""
    every = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6
    fcntl.ioctl(fd, TUNSETOFFLOAD, every)
    try:
        fcntl.ioctl(fd, TUNSETOFFLOAD, every | TUN_F_UFO)
        ufo = True
    except OSError:
        ufo = False
    fcntl.ioctl(fd, TUNSETOFFLOAD, 0)
    return ufo
