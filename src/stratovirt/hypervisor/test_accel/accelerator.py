"""The test accelerator as the board takes it: in the place of KVM's objects, a socket and a clock."""

from __future__ import annotations

from stratovirt.hypervisor.test_accel.clock import VirtualClock
from stratovirt.hypervisor.test_accel.commands import Bus, Commands
from stratovirt.hypervisor.test_accel.lines import InterruptLine, InterruptLines
from stratovirt.hypervisor.test_accel.peer import Peer
from stratovirt.memory import GuestMemory, RamRegion
from stratovirt.sandbox import unconfined

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from stratovirt.address_map import AddressMap
    from stratovirt.loop import EventLoop


class TestWiring:
    """Memory and interrupt lines, for the commands to get at."""

    def __init__(self) -> None:
        self.regions: list[RamRegion] = []
        self.lines = InterruptLines()

    def add_memory(self, region: RamRegion) -> None:
        self.regions.append(region)

    def create_irqfd(self, gsi: int) -> InterruptLine:
        return self.lines.connect(gsi)

    def create_level_line(self, number: int) -> InterruptLine:
        return self.lines.connect(number)

    def add_ioeventfd(self, fd: int, address: int, length: int, datamatch: int) -> None:
        """Nothing takes the write away from the device, whose register signals the same eventfd."""


class TestAccelerator:
    """Connects to `path` at once, and serves it from `start` on, whether the machine is paused or not.

    Raises: ConfigError when nobody listens there.
    """

    def __init__(self, path: str, ports: AddressMap, mmio: AddressMap, loop: EventLoop,
                 on_hang_up: Callable[[], None]) -> None:
        self.vm = TestWiring()
        self._clock = VirtualClock()
        self.now = self._clock.seconds
        self.device_loop = self._clock.device_loop
        self._ports = ports
        self._mmio = mmio
        self._peer = Peer(path, loop, on_hang_up)

    def create_interrupt_chips(self) -> str:
        """There are none: lines are asked about with query_intx, and no timer ticks for a processor."""
        return ""

    def create_processors(self, boot: object) -> None:
        """There are none: the peer is what loads and stores."""

    def start(self, paused: bool, confine: Callable[[int], None] = unconfined) -> None:
        bus = Bus(GuestMemory(self.vm.regions), self._mmio)
        self._peer.serve(Commands(bus, self._ports, self._clock, self.vm.lines).execute)

    def pause(self) -> None:
        """The devices stand still; the peer may still look at everything."""

    def resume(self) -> None:
        """The devices go on."""

    def reset_processors(self, boot: object) -> None:
        self.vm.lines.lower_all()

    def thread_ids(self) -> list[int]:
        return []

    def stop(self) -> None:
        self._peer.close()

    def close_behind(self) -> None:
        """Nothing takes long."""
