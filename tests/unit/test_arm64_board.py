"""The arm64 board without KVM: its map, the numbers it has from KVM's interface, the order in which KVM hears of things."""

from __future__ import annotations

import errno
import inspect
import struct
from types import ModuleType
from typing import Any

import pytest

import stratovirt.machine.aarch64.boot as arm_boot
import stratovirt.machine.aarch64.platform as arm_platform
import stratovirt.machine.aarch64.processors as arm_processors
import stratovirt.machine.x86_64.boot as x86_boot
import stratovirt.machine.x86_64.platform as x86_platform
import stratovirt.machine.x86_64.processors as x86_processors
from stratovirt.address_map import AddressMap
from stratovirt.arch.aarch64 import gic, layout, registers
from stratovirt.config.vm import SmpConfig, VmConfig
from stratovirt.errors import ConfigError, HostError
from stratovirt.hypervisor.kvm import _uapi as common
from stratovirt.hypervisor.kvm import _uapi_arm64 as uapi
from stratovirt.hypervisor.kvm import arm64

GIB = 1 << 30


# -- the two architectures have the same names


@pytest.mark.parametrize(("name", "ours", "theirs"), [
    ("Boot", arm_boot, x86_boot), ("PlatformDevices", arm_platform, x86_platform),
    ("Processors", arm_processors, x86_processors),
])
def test_the_architectures_can_take_each_others_place(name: str, ours: ModuleType, theirs: ModuleType) -> None:
    def public(module: ModuleType) -> dict[str, list[str]]:
        members = inspect.getmembers(getattr(module, name), inspect.isfunction)
        return {member: list(inspect.signature(function).parameters) for member, function in members
                if not member.startswith("_") or member == "__init__"}

    assert public(ours) == public(theirs)


# -- the map


def test_slots_have_interrupts_and_addresses_of_their_own() -> None:
    slots = [layout.slot(number) for number in range(layout.VIRTIO_SLOTS)]
    assert [slot.irq for slot in slots[:8]] == [32, 33, 34, 35, 36, 37, 40, 41]
    assert slots[-1].irq == 191
    assert len({slot.irq for slot in slots} | {layout.RTC_IRQ, layout.SERIAL_IRQ}) == len(slots) + 2
    assert slots[-1].base + layout.VIRTIO_MMIO_SIZE <= layout.RAM
    with pytest.raises(ValueError):
        layout.slot(layout.VIRTIO_SLOTS)


def test_redistributors_find_a_place_that_is_not_ram() -> None:
    assert layout.redistributors(123, GIB) == [(0x080A_0000, 123)]
    assert layout.redistributors(124, GIB) == [(0x080A_0000, 123), (0x40_0000_0000, 1)]
    assert layout.redistributors(254, 512 * GIB)[1] == (513 * GIB, 131)
    assert 0x080A_0000 + 123 * layout.GIC_REDISTRIBUTOR_SIZE == layout.SERIAL
    assert layout.address_bits(1, GIB) == 31
    assert layout.address_bits(254, 512 * GIB) == 40


def test_register_numbers_are_those_of_the_interface() -> None:
    """Linux Documentation/virt/kvm/api.rst, KVM_SET_ONE_REG, arm64."""
    assert registers.X[0] == 0x6030_0000_0010_0000
    assert registers.PC == 0x6030_0000_0010_0040
    assert registers.PSTATE == 0x6030_0000_0010_0042
    assert registers.MPIDR_EL1 == 0x6030_0000_0013_C005
    state = dict(registers.entry_state(0x4020_0000, 0x4000_0000))
    assert state[registers.PC] == 0x4020_0000 and state[registers.X[0]] == 0x4000_0000
    assert state[registers.PSTATE] == 0x3C5
    assert [registers.mpidr(index) for index in (0, 15, 16, 253)] == [0, 0xF, 0x100, 0xF0D]


@pytest.mark.parametrize(("mmfr0", "sizes"), [
    (0, {4, 64}), (1 << 20, {4, 16, 64}), (0xFF << 24, set()), (0xF << 28 | 2 << 20, {16, 64}), (0xF << 24 | 1 << 28, {4}),
])
def test_page_sizes_of_a_processor(mmfr0: int, sizes: set[int]) -> None:
    assert {size for size in (4, 16, 64) if registers.has_page_size(mmfr0, size << 10)} == sizes


def test_a_gic_reset_writes_every_register_once() -> None:
    lists = (gic.v3_distributor(224), gic.v3_redistributor(), gic.v2_distributor(224, True), gic.v2_distributor(224, False))
    for values in lists:
        offsets = [offset for offset, _ in values]
        assert len(set(offsets)) == len(offsets) and all(offset % 4 == 0 for offset in offsets)
    offsets = {offset for offset, _ in gic.v3_distributor(224)}
    assert {0x184, 0x198, 0x420, 0x4DC, 0xC08, 0xC34, 0x6100, 0x66FC} <= offsets
    assert not {0x180, 0x19C, 0x41C, 0x4E0, 0xC04, 0xC38, 0x60FC, 0x6700} & offsets


# -- devices of the platform


class Wiring:
    def __init__(self) -> None:
        self.lines: list[int] = []

    def create_level_line(self, spi: int) -> Any:
        self.lines.append(spi)

        class Line:
            def set_level(self, high: bool) -> None: ...

        return Line()


class Char:
    can_write = True

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data

    def set_receiver(self, *functions: object) -> None: ...

    def resume_input(self) -> None: ...


def test_the_boot_time_register_lies_in_the_serial_ports_page() -> None:
    wiring, mmio, times, char = Wiring(), AddressMap(), list[int](), Char()
    platform = arm_platform.PlatformDevices(AddressMap(), mmio, wiring, lambda: 5.0, None, list, list)  # type: ignore[arg-type]
    platform.plug_serial(char, times.append)  # type: ignore[arg-type]
    assert wiring.lines == [38, 39]
    mmio.write(0x0900_0F00, 1, 2)
    mmio.write(0x0900_0F00, 4, 1)
    mmio.write(0x0900_0F04, 4, 1)
    assert times == [2, 1] and mmio.read(0x0900_0F00, 4) == 0
    mmio.write(0x0900_0000, 4, 65)
    assert char.written == b"A"
    assert mmio.read(0x0900_0FE0, 4) == 0x11
    assert mmio.read(0x0901_0000, 4) == 5
    platform.reset()


# -- what KVM is told


class System:
    fd = -1

    def __init__(self, **capabilities: int) -> None:
        self.capabilities = {common.KVM_CAP_MAX_VCPUS: 512, **{int(name[1:]): value for name, value in capabilities.items()}}
        self.kinds: list[int] = []

    def check_extension(self, capability: int) -> int:
        return self.capabilities.get(capability, 0)

    def create_vm(self, kind: int = 0) -> int:
        self.kinds.append(kind)
        return 100

    def vcpu_mmap_size(self) -> int:
        return 4096


class Kvm:
    """Stands in for `fcntl.ioctl`: notes the calls in their order."""

    def __init__(self, devices: set[int]) -> None:
        self.devices = devices
        self.calls: list[tuple[str, int, bytes]] = []
        self.next_fd = 200

    def ioctl(self, fd: int, request: int, argument: Any = 0, mutate: bool = False) -> int:
        names = {number: name for module in (uapi, common) for name, number in vars(module).items() if name.startswith("KVM_")
                 and isinstance(number, int) and number > 0xAE00}
        data = bytes(argument) if isinstance(argument, bytes | bytearray) else argument.to_bytes(8, "little")
        if request == uapi.KVM_CREATE_DEVICE:
            kind, _, flags = struct.unpack("<III", data)
            if kind not in self.devices:
                raise OSError(errno.ENODEV, "no such device")
            if not flags:
                struct.pack_into("<I", argument, 4, 300 + kind)
                self.calls.append((f"create {kind}", fd, data))
            return 0
        self.calls.append((names[request], fd, data))
        if request == common.KVM_CREATE_VCPU:
            self.next_fd += 1
            return self.next_fd
        return 0

    def named(self, name: str) -> list[tuple[int, bytes]]:
        return [(fd, data) for called, fd, data in self.calls if called == name]


class Pages:
    """As if KVM had shared some."""

    def __init__(self, fd: int, size: int, offset: int) -> None:
        self.view = memoryview(bytearray(size))

    def close(self) -> None:
        self.view.release()


@pytest.fixture
def kvm(monkeypatch: pytest.MonkeyPatch) -> Kvm:
    fake = Kvm({uapi.KVM_DEV_TYPE_ARM_VGIC_V3, uapi.KVM_DEV_TYPE_ARM_VGIC_ITS})
    monkeypatch.setattr("fcntl.ioctl", fake.ioctl)
    monkeypatch.setattr("stratovirt.hypervisor.kvm.vcpu.SharedPages", Pages)
    return fake


def processors(cpus: int = 2, pmu: bool = False, sve: bool = False, memory: int = GIB,
               steal_time: bool = False, **capabilities: int) -> Any:
    config = VmConfig()
    config.smp = SmpConfig(cpus, cpus, 1, 1, 1, cpus, 1)
    config.cpu_pmu, config.cpu_sve, config.memory_size = pmu, sve, memory
    config.cpu_steal_time = steal_time
    return arm_processors.Processors(System(**capabilities), config)  # type: ignore[arg-type]


def features(data: bytes) -> int:
    return int(struct.unpack_from("<I", data, 4)[0])


def test_vcpus_come_before_the_gic_is_initialized(kvm: Kvm) -> None:
    assert processors(3).create_interrupt_chips() == "gicv3-its"
    order = [name for name, _, _ in kvm.calls]
    assert order.index("create 7") > max(index for index, name in enumerate(order) if name == "KVM_ARM_VCPU_INIT")
    states = [features(data) for _, data in kvm.named("KVM_ARM_VCPU_INIT")]
    assert states == [0b100, 0b101, 0b101]  # PSCI for all, and all but the first are off
    attributes = [struct.unpack("<IIQQ", data)[:3] for fd, data in kvm.named("KVM_SET_DEVICE_ATTR") if fd == 307]
    assert attributes == [(0, 0, 2), (0, 0, 5), (0, 3, 0), (0, 4, 0)]


def test_other_interrupt_controllers(kvm: Kvm) -> None:
    kvm.devices = {uapi.KVM_DEV_TYPE_ARM_VGIC_V3}
    assert processors().create_interrupt_chips() == "gicv3"
    kvm.devices = {uapi.KVM_DEV_TYPE_ARM_VGIC_V2}
    machine = processors(8)
    assert machine.create_interrupt_chips() == "gicv2"
    machine.reset()
    with pytest.raises(ConfigError, match="8 CPUs at most"):
        processors(9).create_interrupt_chips()
    kvm.devices = set()
    with pytest.raises(HostError, match="neither a GICv3 nor a GICv2"):
        processors().create_interrupt_chips()


def test_features_are_refused_where_the_host_has_none(kvm: Kvm) -> None:
    for option in ("pmu", "sve"):
        with pytest.raises(ConfigError, match=f"-cpu host,{option} on"):
            processors(**{option: True}).create_interrupt_chips()
    processors(1, pmu=True, sve=True, _126=1, _170=1, _171=1, _172=1).create_interrupt_chips()
    assert features(kvm.named("KVM_ARM_VCPU_INIT")[-1][1]) == 0b1111100
    assert kvm.named("KVM_ARM_VCPU_FINALIZE")[0][1] == struct.pack("<i", 4)
    groups = [struct.unpack("<IIQQ", data)[1:3] for fd, data in kvm.named("KVM_SET_DEVICE_ATTR") if fd < 300]
    assert groups == [(0, 0), (0, 1)]


def test_stolen_time_is_told_to_each_processor_in_its_own_place(kvm: Kvm) -> None:
    with pytest.raises(ConfigError, match="-cpu host,kvm-steal-time on"):
        processors(steal_time=True).create_interrupt_chips()
    processors(3, steal_time=True, _187=1).create_interrupt_chips()
    attributes = [struct.unpack("<IIQQ", data)[1:3] for fd, data in kvm.named("KVM_SET_DEVICE_ATTR") if fd < 300]
    assert attributes == [(2, 0)] * 3
    assert layout.STEAL_TIME + 254 * layout.STEAL_TIME_EACH <= layout.GENERATION_ID


def test_too_many_vcpus_and_too_much_memory(kvm: Kvm) -> None:
    with pytest.raises(ConfigError, match="no more than 2 vCPUs"):
        processors(3, **{f"_{common.KVM_CAP_MAX_VCPUS}": 2}).create_interrupt_chips()
    with pytest.raises(ConfigError, match="guests have 36"):
        processors(memory=128 * GIB, _165=36)


def test_the_size_of_physical_addresses(kvm: Kvm) -> None:
    for limit, memory, kind in ((0, GIB, 0), (40, GIB, 0), (36, GIB, 36), (48, GIB, 40)):
        machine = processors(memory=memory, **({"_165": limit} if limit else {}))
        assert machine._system.kinds == [kind]


def test_a_reset_initializes_every_vcpu_and_clears_the_gic(kvm: Kvm) -> None:
    machine = processors(2)
    machine.create_interrupt_chips()
    kvm.calls.clear()
    machine.reset()
    assert [features(data) for _, data in kvm.named("KVM_ARM_VCPU_INIT")] == [0b100, 0b101]
    groups = [struct.unpack("<IIQQ", data)[1] for fd, data in kvm.named("KVM_SET_DEVICE_ATTR") if fd == 307]
    assert {1, 5, 6} == set(groups)
    assert groups.count(6) == 2 * len(gic.V3_CPU_INTERFACE)


def test_a_level_line_says_both_levels(kvm: Kvm) -> None:
    line = arm64.LevelLine(100, uapi.KVM_ARM_IRQ_TYPE_SPI | 39 + 32)
    line.set_level(True)
    line.set_level(False)
    assert [data for _, data in kvm.named("KVM_IRQ_LINE")] == [
        struct.pack("<II", 0x0100_0047, 1), struct.pack("<II", 0x0100_0047, 0)]
