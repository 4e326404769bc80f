"""KVM as what runs a machine's guest: its processors are made once, stopped and let go, and put back to their first
state by a reset.

`Accelerator` is what the board asks of it. Its other implementation is `hypervisor.test_accel`, which runs nothing.
"""

from __future__ import annotations

import time

from stratovirt.arch.x86_64 import cpuid, layout, registers
from stratovirt.errors import ConfigError, StateError
from stratovirt.hypervisor.kvm import _uapi as uapi
from stratovirt.hypervisor.kvm.system import KvmSystem
from stratovirt.hypervisor.kvm.vcpu import KvmVcpu
from stratovirt.hypervisor.kvm.vm import KvmVm
from stratovirt.machine.halt_watch import HaltWatch
from stratovirt.machine.vcpus import VcpuThreads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from stratovirt.address_map import AddressMap
    from stratovirt.config.vm import SmpConfig
    from stratovirt.loop import EventLoop
    from stratovirt.machine.boot import Boot
    from stratovirt.memory import RamRegion

    class InterruptLine(Protocol):
        def trigger(self) -> None:
            """One edge-triggered interrupt. Thread: any."""

    class Wiring(Protocol):
        """What memory and devices are connected to; `KvmVm` has the details. Raises: HostError."""

        def add_memory(self, region: RamRegion) -> None: ...

        def create_interrupt_chips(self, identity_map_address: int, tss_address: int) -> None: ...

        def create_timer(self) -> None: ...

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

        def create_processors(self, boot: Boot | None) -> None:
            """Make them, the first at the entry of `boot`."""

        def start(self, paused: bool) -> None:
            """Let the guest run, or with `paused` wait for `resume`."""

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
            """The process is about to end: nobody shall be kept waiting by what is taken apart."""


class KvmAccelerator:
    """`on_exit` hears from a vCPU's thread why its run loop ended, `on_dead` when no vCPU can ever run again.

    Raises: HostError when there is no KVM to be had.
    """

    now = staticmethod(time.time)

    def __init__(self, smp: SmpConfig, ports: AddressMap, mmio: AddressMap, loop: EventLoop,
                 on_exit: Callable[[KvmVcpu, str, int], None], on_dead: Callable[[], None]) -> None:
        self.system = KvmSystem()
        self.vm = KvmVm(self.system)
        self.vcpus: list[KvmVcpu] = []
        self.threads: VcpuThreads | None = None
        self._smp = smp
        self._ports = ports
        self._mmio = mmio
        self._loop = loop
        self._on_exit = on_exit
        self._on_dead = on_dead
        self._running = False

    def device_loop(self, loop: EventLoop, call: Callable[[Callable[[], None]], None]) -> EventLoop:
        return loop  # the guest's time is the host's

    def create_processors(self, boot: Boot | None) -> None:
        self.vcpus = create_vcpus(self.system, self.vm, topology_of(self._smp), self._smp.max_cpus)
        if boot is not None:
            boot.enter(self.vcpus[0])

    def start(self, paused: bool) -> None:
        self.threads = threads = VcpuThreads(self.vcpus, self._ports, self._mmio, self._on_exit)
        threads.start(paused)
        self._running = not paused
        HaltWatch(self._loop, threads, lambda: self._running, self._on_dead)

    def pause(self) -> None:
        self._started().pause()
        self._running = False

    def resume(self) -> None:
        self._running = True
        self._started().resume()

    def reset_processors(self, boot: Boot | None) -> None:
        reset_processors(self.system, self.vm, self.vcpus)
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


def topology_of(smp: SmpConfig) -> cpuid.Topology:
    """Clusters are an arm notion; on x86 they are more cores."""
    return cpuid.Topology(smp.cpus, smp.dies, smp.cores * smp.clusters, smp.threads)


def create_vcpus(system: KvmSystem, vm: KvmVm, topology: cpuid.Topology, max_cpus: int) -> list[KvmVcpu]:
    """All vCPUs with CPUID, MSRs and local APIC set up; the first is runnable, the others wait for their start-up IPI."""
    if topology.cpus > 1:
        limit = system.check_extension(uapi.KVM_CAP_MAX_VCPUS)
        if topology.cpus > limit:
            raise ConfigError(f"this KVM has no more than {limit} vCPUs", option="-smp", value=str(topology.cpus))
    mmap_size = system.vcpu_mmap_size()
    tsc_deadline = system.check_extension(uapi.KVM_CAP_TSC_DEADLINE_TIMER) > 0
    tables = cpuid.vcpu_cpuid(system.supported_cpuid(), topology, max_cpus, tsc_deadline)
    vcpus: list[KvmVcpu] = []
    for apic_id, table in zip(topology.apic_ids, tables, strict=True):
        vcpu = KvmVcpu(vm, apic_id, mmap_size)
        vcpu.set_cpuid(table)
        vcpu.set_msrs(registers.BOOT_MSRS)
        vcpu.set_lapic(registers.virtual_wire_lapic(vcpu.get_lapic()))
        vcpus.append(vcpu)
    return vcpus


def reset_processors(system: KvmSystem, vm: KvmVm, vcpus: list[KvmVcpu]) -> None:
    """Interrupt chips, timer and vCPUs back to their state before the first instruction.

    The values are read from a machine made for the purpose: KVM's own idea of a fresh processor, complete with the MSRs
    that this KVM has. It costs a reset the 20 ms that KVM takes to close a machine with interrupt chips, and a start nothing.
    """
    fresh_vm = KvmVm(system)
    try:
        fresh_vm.create_interrupt_chips(layout.KVM_IDENTITY_MAP, layout.KVM_TSS)
        fresh_vm.create_timer()
        for chip in (uapi.KVM_IRQCHIP_PIC_MASTER, uapi.KVM_IRQCHIP_PIC_SLAVE, uapi.KVM_IRQCHIP_IOAPIC):
            vm.set_interrupt_chip(fresh_vm.get_interrupt_chip(chip))
        vm.set_timer(fresh_vm.get_timer())
        mmap_size = system.vcpu_mmap_size()
        msrs = system.msr_indices()
        for vcpu in vcpus:
            fresh = KvmVcpu(fresh_vm, vcpu.id, mmap_size)
            try:
                _copy_state(fresh, vcpu, msrs)
            finally:
                fresh.close()
    finally:
        fresh_vm.close()


def _copy_state(fresh: KvmVcpu, vcpu: KvmVcpu, msrs: list[int]) -> None:
    # The LAPIC comes before the MSRs, so that a pending TSC deadline is cleared in the mode that it was armed in, and
    # the segment registers before the LAPIC, because they carry its base address and mode.
    vcpu.set_mp_state(fresh.get_mp_state())
    vcpu.set_sregs(fresh.get_sregs())
    vcpu.set_lapic(registers.virtual_wire_lapic(fresh.get_lapic()))
    vcpu.set_rest(fresh.get_rest())
    vcpu.set_msrs(fresh.get_msrs(msrs))
    vcpu.set_msrs(registers.BOOT_MSRS)
    vcpu.set_regs(fresh.get_regs())
