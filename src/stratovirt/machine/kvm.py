"""KVM as what runs a machine's guest: its processors are made once, stopped and let go, and put back to their first
state by a reset.

`Accelerator` is what the board asks of it. Its other implementation is `hypervisor.test_accel`, which runs nothing.
"""

from __future__ import annotations

import time

from stratovirt.errors import ConfigError, HostError, StateError
from stratovirt.hostmap import HostMapping
from stratovirt.hypervisor.kvm.system import KvmSystem
from stratovirt.machine.board import Processors, layout
from stratovirt.machine.vcpus import VcpuThreads
from stratovirt.memory import RamRegion
from stratovirt.sandbox import unconfined

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from stratovirt.address_map import AddressMap
    from stratovirt.config.vm import VmConfig
    from stratovirt.hypervisor.kvm.vcpu import KvmVcpu
    from stratovirt.loop import EventLoop
    from stratovirt.machine.boot import Boot
    from stratovirt.machine.snapshot import Incoming

    class Holder(Protocol):
        """Who holds a descriptor of KVM's."""

        fd: int

    class InterruptLine(Protocol):
        @property
        def fd(self) -> int:
            """An eventfd: one write to it is one interrupt."""

        def trigger(self) -> None:
            """One edge-triggered interrupt. Thread: any."""

    class Wiring(Protocol):
        """What memory and devices are connected to; `KvmVm` has the details. Raises: HostError."""

        def add_memory(self, region: RamRegion) -> None: ...

        def create_irqfd(self, gsi: int) -> InterruptLine: ...

        def add_ioeventfd(self, fd: int, address: int, length: int, datamatch: int) -> None: ...

    class Accelerator(Protocol):
        """What runs the guest. Thread: the main loop's."""

        @property
        def vm(self) -> Wiring: ...

        @property
        def now(self) -> Callable[[], float]:
            """The guest's time of day, in seconds since 1970."""

        def device_loop(self, loop: EventLoop, call: Callable[[Callable[[], None]], None]) -> EventLoop:
            """`loop` as devices are to see it; its clock and timers are the guest's. `call` runs a function on its thread."""

        def create_interrupt_chips(self) -> str:
            """What interrupts go to, by the name that tables have for it. After memory, before anything with an interrupt."""

        def create_processors(self, boot: Boot | None) -> None:
            """Make them, the first at the entry of `boot`."""

        def start(self, paused: bool, confine: Callable[[int], None] = ...) -> None:
            """Let the guest run, or with `paused` wait for `resume`. `confine` is called on every thread that runs it."""

        def pause(self) -> None:
            """Nothing of the guest runs when this returns. Raises: HostError, with the guest running on."""

        def resume(self) -> None: ...

        def reset_processors(self, boot: Boot | None) -> None:
            """Back to where `create_processors` left them. Call it while paused."""

        def thread_ids(self) -> list[int]:
            """Kernel thread ids, in the order of the vCPUs."""

        def stop(self) -> None:
            """End it, started or not. Raises: HostError when something of it does not end."""

        def close_behind(self) -> None:
            """When the process ends, nobody shall be kept waiting by what is taken apart. After `start`."""


class KvmAhead:
    """What KVM can be asked for before it is known what machine it is for, so that the machine need not wait.

    It is of the process that makes it: a VM cannot be used after a fork. `config` is a guess at what the machine will be, and
    memory and processors are made as it says. `CloneAhead` in `machine/clone.py` has more: the memory of a template, and the
    snapshot that its processors are restored from. Raises: ConfigError, HostError.
    """

    def __init__(self, config: VmConfig | None = None) -> None:
        self.system = KvmSystem()
        self.incoming: Incoming | None = None
        self._memory: list[RamRegion] = []
        try:
            if config is not None and config.ram is None:
                self._memory = self._create_memory(config)
            self.processors = self._create_processors(config)
        except (ConfigError, HostError):
            self.system.close()
            raise

    def _create_memory(self, config: VmConfig) -> list[RamRegion]:
        return [RamRegion(base, HostMapping(size)) for base, size in layout.ram_ranges(config.memory_size)]

    def _create_processors(self, config: VmConfig | None) -> Processors | None:
        return Processors.create_ahead(self.system, config, self._memory)

    def _holders(self) -> list[Holder]:
        made = self.processors
        return [self.system] if made is None else [self.system, made.vm, *made.vcpus, *made.devices]

    def take_processors(self, config: VmConfig) -> Processors | None:
        """None: there are none, or they were for another kind of machine, and have been let go."""
        made = self.processors
        if made is not None and not made.become(config):
            made.let_go()
            self.processors = made = None
        return made

    def take_memory(self, ranges: list[tuple[int, int]]) -> list[RamRegion]:
        """What the VM has in its slots, if that is memory in `ranges`; else [], and it has none any more. After
        `take_processors`. Raises: HostError.
        """
        memory, self._memory = self._memory, []
        if self.processors is None or [(region.base, region.size) for region in memory] == ranges:
            return memory if self.processors is not None else []
        self.processors.vm.remove_memory()
        return []

    def descriptors(self) -> list[int]:
        return [holder.fd for holder in self._holders()]

    def renumber(self, fds: list[int]) -> None:
        """They have other numbers now, in the order of `descriptors`."""
        for holder, fd in zip(self._holders(), fds, strict=True):
            holder.fd = fd

    def let_go(self) -> None:
        """It is not wanted."""
        self.system.close()
        if self.processors is not None:
            self.processors.let_go()


class KvmAccelerator:
    """`on_exit` hears from a vCPU's thread why its run loop ended, `on_dead` when no vCPU can ever run again.

    `ahead` becomes this object's.

    Raises: HostError when there is no KVM to be had.
    """

    now = staticmethod(time.time)

    def __init__(self, config: VmConfig, ports: AddressMap, mmio: AddressMap, loop: EventLoop,
                 on_exit: Callable[[KvmVcpu, str, int], None], on_dead: Callable[[], None],
                 ahead: KvmAhead | None = None) -> None:
        self.system = KvmSystem() if ahead is None else ahead.system
        made = None if ahead is None else ahead.take_processors(config)
        self.processors = made or Processors(self.system, config)
        self.vm = self.processors.vm
        self.threads: VcpuThreads | None = None
        self._ports = ports
        self._mmio = mmio
        self._loop = loop
        self._on_exit = on_exit
        self._on_dead = on_dead
        self._running = False

    def device_loop(self, loop: EventLoop, call: Callable[[Callable[[], None]], None]) -> EventLoop:
        return loop  # the guest's time is the host's

    @property
    def vcpus(self) -> list[KvmVcpu]:
        return self.processors.vcpus

    def create_interrupt_chips(self) -> str:
        return self.processors.create_interrupt_chips()

    def create_processors(self, boot: Boot | None) -> None:
        self.processors.create()
        if boot is not None:
            boot.enter(self.vcpus[0])

    def start(self, paused: bool, confine: Callable[[int], None] = unconfined) -> None:
        self.threads = threads = VcpuThreads(self.vcpus, self._ports, self._mmio, self._on_exit, confine)
        threads.start(paused)
        self._running = not paused
        self.processors.watch(self._loop, threads, lambda: self._running, self._on_dead)

    def pause(self) -> None:
        self._started().pause()
        self._running = False

    def resume(self) -> None:
        self._running = True
        self._started().resume()

    def reset_processors(self, boot: Boot | None) -> None:
        self.processors.reset()
        if boot is not None:
            boot.enter(self.vcpus[0])
        self._started().revive()

    def thread_ids(self) -> list[int]:
        return self._started().native_ids()

    def _started(self) -> VcpuThreads:
        if self.threads is None:
            raise StateError("this", "created", "running")
        return self.threads

    def stop(self) -> None:
        self._running = False
        if self.threads is not None:
            self.threads.stop()

    def close_behind(self) -> None:
        from stratovirt.hypervisor.kvm.teardown import close_behind

        close_behind(self.vm.fd)
