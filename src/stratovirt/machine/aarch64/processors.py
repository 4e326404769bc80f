"""The processors of an arm64 machine and its GIC, as KVM makes them.

KVM wants the vCPUs before the GIC is initialized, and that before any irqfd. So all of it happens in `create_interrupt_chips`.
"""

from __future__ import annotations

import posix

from stratovirt.arch.aarch64 import gic, layout
from stratovirt.arch.aarch64.registers import mpidr
from stratovirt.errors import ConfigError, HostError
from stratovirt.firmware.fdt import GICV2, GICV3, GICV3_ITS
from stratovirt.hypervisor.kvm import _uapi as common
from stratovirt.hypervisor.kvm import _uapi_arm64 as uapi
from stratovirt.hypervisor.kvm.arm64 import Arm64Vcpu, Arm64Vm, KvmDevice, set_attribute

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from stratovirt.config.vm import VmConfig
    from stratovirt.hypervisor.kvm.system import KvmSystem
    from stratovirt.loop import EventLoop
    from stratovirt.machine import kvm
    from stratovirt.machine.aarch64.saved_processors import Prepared
    from stratovirt.machine.vcpus import VcpuThreads
    from stratovirt.memory import RamRegion
    from stratovirt.snapshot.saved import Saved

    class LevelLine(Protocol):
        def set_level(self, high: bool) -> None: ...

    class Wiring(kvm.Wiring, Protocol):
        def create_level_line(self, spi: int) -> LevelLine:
            """A level-triggered line into the interrupt controller."""


class Processors:
    """All processors of `vm`. Thread: the main loop's. Raises: ConfigError, HostError."""

    def __init__(self, system: KvmSystem, config: VmConfig) -> None:
        cpus = config.smp.cpus
        self.vm = Arm64Vm(system, layout.address_bits(cpus, config.memory_size))
        self.vcpus: list[Arm64Vcpu] = []
        self._system = system
        self._cpus = cpus
        self._ram_size = config.memory_size
        self._pmu, self._sve, self._steal_time = config.cpu_pmu, config.cpu_sve, config.cpu_steal_time
        self._gic: Gic | None = None
        self._prepared: Prepared | None = None

    @classmethod
    def create_ahead(cls, system: KvmSystem, config: VmConfig | None, memory: list[RamRegion]) -> Processors | None:
        """None: the width of addresses and the GIC depend on the size of memory and the number of CPUs."""
        return None

    def become(self, config: VmConfig) -> bool:
        """Be the processors of that machine, which is the one that they were made for."""
        return True

    def let_go(self) -> None:
        """Nobody wants them."""
        from stratovirt.hypervisor.kvm.teardown import let_go

        for fd in [*(vcpu.fd for vcpu in self.vcpus), *(device.fd for device in self.devices)]:
            posix.close(fd)
        let_go(self.vm.fd)

    def create_interrupt_chips(self) -> str:
        """The vCPUs and the GIC, if they are not there yet. The name of the GIC."""
        if self._gic is not None:
            return self._gic.kind
        limit = self._system.check_extension(common.KVM_CAP_MAX_VCPUS)
        if self._cpus > limit:
            raise ConfigError(f"this KVM has no more than {limit} vCPUs", option="-smp", value=str(self._cpus))
        if self.vm.has_device(uapi.KVM_DEV_TYPE_ARM_VGIC_V3):
            kind = GICV3_ITS if self.vm.has_device(uapi.KVM_DEV_TYPE_ARM_VGIC_ITS) else GICV3
        elif self.vm.has_device(uapi.KVM_DEV_TYPE_ARM_VGIC_V2):
            kind = GICV2
            if self._cpus > layout.GICV2_MAX_CPUS:
                raise ConfigError(f"the interrupt controller of this host, GICv2, has {layout.GICV2_MAX_CPUS} CPUs at most",
                                  option="-smp", value=str(self._cpus), accepted=f"at most {layout.GICV2_MAX_CPUS}")
        else:
            raise HostError("this KVM can make neither a GICv3 nor a GICv2 for its guests", 0,
                            "look for messages of kvm in the kernel log (dmesg)")
        features = self._features()
        mmap_size = self._system.vcpu_mmap_size()
        self._target = self.vm.preferred_target()
        for index in range(self._cpus):
            self.vcpus.append(Arm64Vcpu(self.vm, index, mmap_size))
        self._init(features)
        if self._sve:
            for vcpu in self.vcpus:
                vcpu.finalize(uapi.KVM_ARM_VCPU_SVE)
        if self._steal_time:
            for index, vcpu in enumerate(self.vcpus):
                address = (layout.STEAL_TIME + layout.STEAL_TIME_EACH * index).to_bytes(8, "little")
                set_attribute(vcpu.fd, "steal time", uapi.KVM_ARM_VCPU_PVTIME_CTRL, uapi.KVM_ARM_VCPU_PVTIME_IPA, address)
        self._gic = Gic(self.vm, kind, self._cpus, self._ram_size)
        if self._pmu:
            for vcpu in self.vcpus:
                number = (layout.PMU_PPI + 16).to_bytes(4, "little")
                set_attribute(vcpu.fd, "PMU", uapi.KVM_ARM_VCPU_PMU_V3_CTRL, uapi.KVM_ARM_VCPU_PMU_V3_IRQ, number)
                set_attribute(vcpu.fd, "PMU", uapi.KVM_ARM_VCPU_PMU_V3_CTRL, uapi.KVM_ARM_VCPU_PMU_V3_INIT)
        return kind

    def _features(self) -> int:
        check = self._system.check_extension
        features = 1 << uapi.KVM_ARM_VCPU_PSCI_0_2
        for wanted, key, capability, feature in (
            (self._pmu, "pmu", uapi.KVM_CAP_ARM_PMU_V3, uapi.KVM_ARM_VCPU_PMU_V3),
            (self._sve, "sve", uapi.KVM_CAP_ARM_SVE, uapi.KVM_ARM_VCPU_SVE),
        ):
            if wanted and check(capability) <= 0:
                raise ConfigError("this host has none for its guests", option=f"-cpu host,{key}", value="on", accepted="off")
            features |= wanted << feature
        if self._steal_time and check(uapi.KVM_CAP_STEAL_TIME) <= 0:
            raise ConfigError("this host has none for its guests", option="-cpu host,kvm-steal-time", value="on",
                              accepted="off")
        if check(uapi.KVM_CAP_ARM_PTRAUTH_ADDRESS) > 0 and check(uapi.KVM_CAP_ARM_PTRAUTH_GENERIC) > 0:
            # KVM takes neither without the other
            features |= 1 << uapi.KVM_ARM_VCPU_PTRAUTH_ADDRESS | 1 << uapi.KVM_ARM_VCPU_PTRAUTH_GENERIC
        self._enabled = features
        return features

    def _init(self, features: int) -> None:
        """All vCPUs into the state of power-on: the first is on, the others wait for a CPU_ON of PSCI."""
        for vcpu in self.vcpus:
            vcpu.init(self._target, features | (1 << uapi.KVM_ARM_VCPU_POWER_OFF if vcpu.id else 0))

    def create_all(self) -> None:
        """The vCPUs and the GIC, for `prepare`. After memory. Raises: ConfigError, HostError."""
        self.create_interrupt_chips()

    @property
    def devices(self) -> list[KvmDevice]:
        """What has a descriptor of its own, beside the vCPUs."""
        return self._gic.devices if self._gic is not None else []

    def create(self) -> None:
        """They are there already."""

    def reset(self) -> None:
        """Back to where `create_interrupt_chips` left them. Call it while no vCPU runs."""
        self._init(self._enabled)
        if self._gic is not None:
            self._gic.reset()

    def save(self) -> dict[str, object]:
        """What a snapshot keeps of them. Call it while no vCPU runs. Raises: HostError."""
        from stratovirt.machine.aarch64 import saved_processors

        assert self._gic is not None  # made with the vCPUs
        return saved_processors.save(self.vcpus, self._gic)

    def prepare(self, state: Saved) -> None:
        """The first part of `restore`, which may come long before: all but what moves on by itself. After memory.

        Raises: SnapshotError, HostError.
        """
        from stratovirt.machine.aarch64 import saved_processors

        assert self._gic is not None
        self._prepared = saved_processors.prepare(self.vcpus, self._gic, state)

    def restore(self, state: Saved) -> None:
        """Go on from what `save` gave. Call it after `create`, before any vCPU runs. Raises: SnapshotError, HostError."""
        if self._prepared is None:
            self.prepare(state)
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            prepared.finish()

    def watch(self, loop: EventLoop, threads: VcpuThreads, is_running: Callable[[], bool], on_dead: Callable[[], None]) -> None:
        """There is nothing to watch: kernels switch off with PSCI, and KVM says so."""


class Gic:
    """The interrupt controller, of the kind that the FDT names, in the kernel. All vCPUs exist."""

    def __init__(self, vm: Arm64Vm, kind: str, cpus: int, ram_size: int) -> None:
        self.kind = kind
        self.cpus = cpus
        self.its: KvmDevice | None = None
        address = uapi.KVM_DEV_ARM_VGIC_GRP_ADDR
        if kind == GICV2:
            self.device = device = vm.create_device("GICv2", uapi.KVM_DEV_TYPE_ARM_VGIC_V2)
            device.set_u64(address, uapi.KVM_VGIC_V2_ADDR_TYPE_DIST, layout.GIC_DISTRIBUTOR)
            device.set_u64(address, uapi.KVM_VGIC_V2_ADDR_TYPE_CPU, layout.GICV2_CPU)
        else:
            self.device = device = vm.create_device("GICv3", uapi.KVM_DEV_TYPE_ARM_VGIC_V3)
            device.set_u64(address, uapi.KVM_VGIC_V3_ADDR_TYPE_DIST, layout.GIC_DISTRIBUTOR)
            for index, (base, count) in enumerate(layout.redistributors(cpus, ram_size)):
                # bits 63-52 how many, 51-16 of the base, 11-0 the index of the region
                device.set_u64(address, uapi.KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION, count << 52 | base | index)
        device.set_u32(uapi.KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, layout.GIC_INTERRUPTS)
        device.set(uapi.KVM_DEV_ARM_VGIC_GRP_CTRL, uapi.KVM_DEV_ARM_VGIC_CTRL_INIT)
        if kind == GICV3_ITS:
            self.its = vm.create_device("GICv3 ITS", uapi.KVM_DEV_TYPE_ARM_VGIC_ITS)
            self.its.set_u64(address, uapi.KVM_VGIC_ITS_ADDR_TYPE, layout.GIC_ITS)
            self.its.set(uapi.KVM_DEV_ARM_VGIC_GRP_CTRL, uapi.KVM_DEV_ARM_VGIC_CTRL_INIT)

    @property
    def devices(self) -> list[KvmDevice]:
        return [self.device, *([] if self.its is None else [self.its])]

    def reset(self) -> None:
        """Every register as in a GIC that was just made. Call it while no vCPU runs."""
        device = self.device
        distributor = uapi.KVM_DEV_ARM_VGIC_GRP_DIST_REGS
        if self.its is not None:
            self.its.set(uapi.KVM_DEV_ARM_VGIC_GRP_CTRL, uapi.KVM_DEV_ARM_ITS_CTRL_RESET)
        if self.kind == GICV2:
            for index in range(self.cpus):
                for offset, value in gic.v2_distributor(layout.GIC_INTERRUPTS, index == 0):
                    device.set_u32(distributor, index << 32 | offset, value)
                for offset, value in gic.V2_CPU_INTERFACE:
                    device.set_u32(uapi.KVM_DEV_ARM_VGIC_GRP_CPU_REGS, index << 32 | offset, value)
            return
        for offset, value in gic.v3_distributor(layout.GIC_INTERRUPTS):
            device.set_u32(distributor, offset, value)
        for index in range(self.cpus):
            affinity = mpidr(index) << 32
            for offset, value in gic.v3_redistributor():
                device.set_u32(uapi.KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, affinity | offset, value)
            for encoding, value in gic.V3_CPU_INTERFACE:
                device.set_u64(uapi.KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, affinity | encoding, value)
