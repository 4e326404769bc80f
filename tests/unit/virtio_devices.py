"""Every virtio device there is, ready for a driver, with a back end in a temporary directory."""

from __future__ import annotations

import socket
from pathlib import Path

from stratovirt.backends.block import RawImage
from stratovirt.backends.rng import RandomSource
from stratovirt.backends.tap import Tap
from stratovirt.config.vm import DriveConfig, RngBackendConfig
from stratovirt.errors import HostError, StratoVirtError
from stratovirt.loop import EventLoop
from stratovirt.memory import GuestMemory
from stratovirt.virtio.block import VirtioBlock
from stratovirt.virtio.net import VirtioNet
from stratovirt.virtio.rng import VirtioRng
from unit.virtio_driver import Driver

SECTOR = 512


def disk_content(sectors: int) -> bytes:
    """Bytes that tell where they belong: every sector differs."""
    return b"".join(number.to_bytes(8, "little") * (SECTOR // 8) for number in range(sectors))


class BlockDriver(Driver):
    """virtio-blk over a file; `host_errors` holds what the image reported."""

    def __init__(self, folder: Path, sectors: int = 64, readonly: bool = False, direct: bool | None = False,
                 queue_size: int = 256, serial: str = "disk-1", memory: GuestMemory | None = None) -> None:
        self.path = folder / "disk.img"
        if not self.path.exists():
            self.path.write_bytes(disk_content(sectors))
        self.image = RawImage(DriveConfig("d0", str(self.path), readonly, direct))
        self.host_errors: list[HostError] = []
        super().__init__(VirtioBlock(self.image, queue_size, serial, self.host_errors.append), memory)

    def close(self) -> None:
        super().close()
        self.image.close()


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class RngDriver(Driver):
    """virtio-rng over `filename`, on a loop whose clock stands still until the test moves it."""

    def __init__(self, rate: float | None = None, filename: str = "/dev/urandom", memory: GuestMemory | None = None) -> None:
        self.clock = FakeClock()
        self.loop = EventLoop(self.clock)
        self.source = RandomSource(RngBackendConfig("r0", filename))
        self.host_errors: list[HostError] = []
        super().__init__(VirtioRng(self.source, self.loop, rate, self.host_errors.append), memory)

    def advance(self, seconds: float) -> None:
        """Let time pass and the timers that are due fire; then serve the device."""
        self.clock.now += seconds
        self.loop.run_once(0)
        self.serve()

    def close(self) -> None:
        super().close()
        self.source.close()
        self.loop.close()


class PacketTap(Tap):
    """One end of a socket pair in the place of a tap: it keeps the borders of packets as a tap does."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "tap0")
        self.offload: int | None = None

    def set_offload(self, flags: int) -> None:
        self.offload = flags

    def enable(self, on: bool) -> None:
        """A socket is always attached."""


class NetDriver(Driver):
    """virtio-net with so many queue pairs; `network` is the other end of the first queue of its tap."""

    def __init__(self, memory: GuestMemory | None = None, pairs: int = 1) -> None:
        taps: list[Tap] = []
        self.networks: list[socket.socket] = []
        for _ in range(pairs):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            theirs.setblocking(False)
            self.networks.append(theirs)
            taps.append(PacketTap(ours.detach()))
        self.network, self.tap = self.networks[0], taps[0]
        self.loop = EventLoop()
        self.reported: list[StratoVirtError] = []
        self.net = VirtioNet(taps, bytes.fromhex("525400123456"), self.loop, on_error=self.reported.append)
        super().__init__(self.net, memory)

    def close(self) -> None:
        super().close()
        for network in self.networks:
            network.close()
        self.net.close()
        self.loop.close()
