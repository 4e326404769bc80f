"""The processors of an x86_64 machine with their interrupt chips and timer, as KVM makes them."""

from __future__ import annotations

from stratovirt.arch.x86_64 import cpuid, layout, registers
from stratovirt.config.vm import VmConfig
from stratovirt.errors import ConfigError, HostError
from stratovirt.hypervisor.kvm import _uapi as uapi
from stratovirt.hypervisor.kvm.vcpu import KvmVcpu
from stratovirt.hypervisor.kvm.vm import KvmVm
from stratovirt.machine.halt_watch import HaltWatch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from stratovirt.config.vm import SmpConfig
    from stratovirt.hypervisor.kvm.system import KvmSystem
    from stratovirt.loop import EventLoop
    from stratovirt.machine.vcpus import VcpuThreads
    from stratovirt.machine.x86_64.saved_processors import Prepared
    from stratovirt.memory import RamRegion
    from stratovirt.snapshot.saved import Saved


class Processors:
    """All processors of `vm`. Thread: the main loop's. Raises: ConfigError, HostError."""

    def __init__(self, system: KvmSystem, config: VmConfig) -> None:
        self.vm = KvmVm(system)
        self.vcpus: list[KvmVcpu] = []
        self._has_chips = False
        self._system = system
        self._smp = config.smp
        self._prepared: Prepared | None = None

    def create_interrupt_chips(self) -> str:
        """PIC, IOAPIC, local APICs and PIT. After memory, before irqfds and vCPUs. What tables have to be told: nothing."""
        if self._prepared is not None:
            return ""
        if self._has_chips:
            self.vm.set_clock(0)  # the machine begins now
        else:
            self._make_chips()
        return ""

    @classmethod
    def create_ahead(cls, system: KvmSystem, config: VmConfig | None, memory: list[RamRegion]) -> Processors | None:
        """Those of a machine that is like `config`; without, a VM as any machine will want it, and no vCPU yet.

        None where nothing can be made without `config`. Raises: ConfigError, HostError.

        If the VM gets its memory later, that is not expensive, in spite of the chips: the grace period of KVM's that begins
        with them will have passed.
        """
        made = cls(system, config or VmConfig())
        try:
            for region in memory:
                made.vm.add_memory(region)
            if config is not None:
                made.create_all()
            else:
                made._make_chips()
                system.supported_cpuid()
        except (ConfigError, HostError):
            made.let_go()
            raise
        return made

    def become(self, config: VmConfig) -> bool:
        """Be the processors of that machine. False: they are of another kind."""
        if self.vcpus and self._smp != config.smp:
            return False
        self._smp = config.smp
        return True

    def let_go(self) -> None:
        """Nobody wants them."""
        from stratovirt.hypervisor.kvm.teardown import let_go

        for vcpu in self.vcpus:
            vcpu.close()
        let_go(self.vm.fd)

    def create_all(self) -> None:
        """Chips and vCPUs, ahead of the machine. After memory. Raises: ConfigError, HostError."""
        self._make_chips()
        self.create()

    def _make_chips(self) -> None:
        _create_chips(self.vm)
        self._has_chips = True

    @property
    def devices(self) -> list[KvmVm]:
        """What has a descriptor of its own, beside the vCPUs: nothing."""
        return []

    def create(self) -> None:
        """The vCPUs: the first is runnable, the others wait for their start-up IPI."""
        if self._prepared is not None:
            return
        if self.vcpus:  # made ahead: their time stamp counters have run
            for vcpu in self.vcpus:
                vcpu.set_msrs(registers.FIRST_TSC)
        else:
            self.vcpus = create_vcpus(self._system, self.vm, topology_of(self._smp), self._smp.max_cpus)

    def reset(self) -> None:
        """Back to where `create` left them. Call it while no vCPU runs."""
        reset_processors(self._system, self.vm, self.vcpus)

    def save(self) -> dict[str, object]:
        """What a snapshot keeps of them. Call it while no vCPU runs. Raises: SnapshotError, HostError."""
        from stratovirt.machine.x86_64 import saved_processors

        return saved_processors.save(self._system, self.vm, self.vcpus)

    def prepare(self, state: Saved) -> None:
        """The first part of `restore`, which may come long before: all but what moves on by itself.

        Raises: SnapshotError, HostError.
        """
        from stratovirt.machine.x86_64 import saved_processors

        self._prepared = saved_processors.prepare(self._system, self.vcpus, state)

    def restore(self, state: Saved) -> None:
        """Go on from what `save` gave. Call it after `create`, before any vCPU runs. Raises: SnapshotError, HostError."""
        if self._prepared is None:
            self.prepare(state)
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            prepared.finish(self.vm)

    def watch(self, loop: EventLoop, threads: VcpuThreads, is_running: Callable[[], bool], on_dead: Callable[[], None]) -> None:
        """Call `on_dead` when no processor can ever run again."""
        HaltWatch(loop, threads, is_running, on_dead)


def _create_chips(vm: KvmVm) -> None:
    vm.create_interrupt_chips(layout.KVM_IDENTITY_MAP, layout.KVM_TSS)
    vm.create_timer()


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
        _create_chips(fresh_vm)
        # The timer first: its last tick may be on its way to the chips, in a thread of the kernel that KVM_SET_PIT2 waits for.
        vm.set_timer(fresh_vm.get_timer())
        for chip in (uapi.KVM_IRQCHIP_PIC_MASTER, uapi.KVM_IRQCHIP_PIC_SLAVE, uapi.KVM_IRQCHIP_IOAPIC):
            vm.set_interrupt_chip(fresh_vm.get_interrupt_chip(chip))
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
