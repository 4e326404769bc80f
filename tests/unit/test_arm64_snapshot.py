"""Snapshots of an arm64 machine over a KVM of ours: what is asked, in which order it is given back, what is refused."""

from __future__ import annotations

import ctypes
import errno
import json
import struct
from typing import Any

import pytest

import stratovirt.machine.aarch64.processors as arm_processors
from stratovirt.address_map import AddressMap
from stratovirt.arch.aarch64 import gic_state, layout, registers
from stratovirt.config.vm import SmpConfig, VmConfig
from stratovirt.devices.pl011 import Pl011
from stratovirt.devices.pl031 import Pl031
from stratovirt.hypervisor.kvm import _uapi as common
from stratovirt.hypervisor.kvm import _uapi_arm64 as uapi
from stratovirt.machine import saved_platform
from stratovirt.machine.aarch64.platform import Alarm, PlatformDevices
from stratovirt.snapshot.saved import Saved, SnapshotError
from unit.test_arm64_board import Pages

V0 = 0x6040_0000_0010_0054  # a register of 16 bytes
TIMER_CTL, TIMER_CVAL = (0x6030_0000_0013_0000 | registers.system_encoding(3, 3, 14, crm, op2) for crm, op2 in ((3, 1), (0, 2)))
COUNTER = registers.TIMER_COUNTERS[0]
PSCI_VERSION = 0x6030_0000_0014_0000
FIXED = {registers.MPIDR_EL1: 0x8000_0000, registers.ID_AA64MMFR0_EL1: 0x1122}
LISTED = [registers.X[0], registers.PC, V0, TIMER_CTL, COUNTER, TIMER_CVAL, PSCI_VERSION, *FIXED]
V2, V3, ITS = uapi.KVM_DEV_TYPE_ARM_VGIC_V2, uapi.KVM_DEV_TYPE_ARM_VGIC_V3, uapi.KVM_DEV_TYPE_ARM_VGIC_ITS
DISTRIBUTOR, LEVELS = uapi.KVM_DEV_ARM_VGIC_GRP_DIST_REGS, uapi.KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO
SYSTEM, CONTROL = uapi.KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, uapi.KVM_DEV_ARM_VGIC_GRP_CTRL
# What sets and what clears: the registers of a distributor, and their shadows.
PAIRS = {0x100: 0x180, 0x300: 0x380}


class Kvm:
    """vCPUs with the registers of LISTED, and devices whose registers keep what they are given."""

    def __init__(self, devices: set[int]) -> None:
        self.devices = devices
        self.registers: dict[int, dict[int, int]] = {}
        self.attributes: dict[tuple[int, int, int], bytes] = {}
        self.other: dict[tuple[int, str], bytes] = {}
        self.calls: list[tuple[str, int, int]] = []
        self.next_fd = 200
        self.refused: set[int] = set()

    def ioctl(self, fd: int, request: int, argument: Any = 0, mutate: bool = False) -> int:
        data = bytes(argument) if isinstance(argument, bytes | bytearray) else b""
        if request == common.KVM_CREATE_VCPU:
            self.next_fd += 1
            self.registers[self.next_fd] = {number: FIXED.get(number, 0) for number in LISTED}
            return self.next_fd
        if request == uapi.KVM_CREATE_DEVICE:
            kind, _, flags = struct.unpack("<III", data)
            if kind not in self.devices:
                raise OSError(errno.ENODEV, "no such device")
            if not flags:
                struct.pack_into("<I", argument, 4, 300 + kind)
        elif request == uapi.KVM_GET_REG_LIST:
            (room,) = struct.unpack_from("<Q", data)
            numbers = list(self.registers[fd])
            struct.pack_into("<Q", argument, 0, len(numbers))
            if room < len(numbers):
                raise OSError(errno.E2BIG, "too few")
            struct.pack_into(f"<{len(numbers)}Q", argument, 8, *numbers)
        elif request in (uapi.KVM_GET_ONE_REG, uapi.KVM_SET_ONE_REG):
            self._register(fd, request, *struct.unpack("<QQ", data))
        elif request in (uapi.KVM_GET_DEVICE_ATTR, uapi.KVM_SET_DEVICE_ATTR):
            self._attribute(fd, request, *struct.unpack("<4xIQQ", data))
        elif request in (common.KVM_GET_MP_STATE, common.KVM_GET_VCPU_EVENTS):
            name = "mp" if request == common.KVM_GET_MP_STATE else "events"
            argument[:] = self.other.get((fd, name), bytes(len(argument)))
        elif request in (common.KVM_SET_MP_STATE, common.KVM_SET_VCPU_EVENTS):
            self.other[fd, "mp" if request == common.KVM_SET_MP_STATE else "events"] = data
        return 0

    def _register(self, fd: int, request: int, number: int, address: int) -> None:
        size, values = 1 << (number >> 52 & 15), self.registers[fd]
        if number not in values:
            raise OSError(errno.ENOENT, "no such register")
        if request == uapi.KVM_GET_ONE_REG:
            self.calls.append(("get", fd, number))
            ctypes.memmove(address, values[number].to_bytes(size, "little"), size)
            return
        value = int.from_bytes(ctypes.string_at(address, size), "little")
        self.calls.append(("set", fd, number))
        if (number in FIXED or number in self.refused) and value != values[number]:
            raise OSError(errno.EINVAL, "not to be changed")
        values[number] = value

    def _attribute(self, fd: int, request: int, group: int, attribute: int, address: int) -> None:
        key = fd, group, attribute
        if not address:
            self.calls.append(("control", fd, attribute))
            return
        wide = group in (SYSTEM, uapi.KVM_DEV_ARM_VGIC_GRP_ITS_REGS) or (group == 0)
        if request == uapi.KVM_GET_DEVICE_ATTR:
            value = self.attributes.get(key, bytes(8 if wide else 4))
            ctypes.memmove(address, value, len(value))
            return
        self.calls.append(("attribute", group, attribute))
        value = ctypes.string_at(address, 8 if wide else 4)
        offset = attribute & 0xFF80
        for setting, clearing in PAIRS.items():
            if group != DISTRIBUTOR:
                continue
            if offset == clearing:
                at = fd, group, attribute - clearing + setting
                old = int.from_bytes(self.attributes.get(at, bytes(4)), "little")
                self.attributes[at] = (old & ~int.from_bytes(value, "little")).to_bytes(4, "little")
                return
            if offset == setting:
                old = int.from_bytes(self.attributes.get(key, bytes(4)), "little")
                value = (old | int.from_bytes(value, "little")).to_bytes(4, "little")
        self.attributes[key] = value


class System:
    fd = -1

    def check_extension(self, capability: int) -> int:
        return {common.KVM_CAP_MAX_VCPUS: 512}.get(capability, 0)

    def create_vm(self, kind: int = 0) -> int:
        return 100

    def vcpu_mmap_size(self) -> int:
        return 4096


class Host:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, *devices: int, cpus: int = 2) -> None:
        self.kvm = Kvm(set(devices))
        monkeypatch.setattr("fcntl.ioctl", self.kvm.ioctl)
        monkeypatch.setattr("stratovirt.hypervisor.kvm.vcpu.SharedPages", Pages)
        config = VmConfig()
        config.smp = SmpConfig(cpus, cpus, 1, 1, 1, cpus, 1)
        config.memory_size = 1 << 30
        self.processors = arm_processors.Processors(System(), config)  # type: ignore[arg-type]
        self.processors.create_interrupt_chips()
        self.kvm.calls.clear()


def fill(host: Host) -> None:
    """Every register gets a value of its own."""
    kvm = host.kvm
    for fd, values in kvm.registers.items():
        for number in values:
            if number not in FIXED:
                values[number] = (fd << 32 | number & 0xFFFF_FFFF) & ((1 << 8 * (1 << (number >> 52 & 15))) - 1)
        kvm.other[fd, "mp"] = struct.pack("<I", uapi.KVM_MP_STATE_STOPPED if fd > 201 else 0)
        kvm.other[fd, "events"] = bytes([1, *range(63)])
    device = host.processors._gic.device.fd  # type: ignore[union-attr]
    for group in (DISTRIBUTOR, uapi.KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, LEVELS):
        for select in (0, 1 << 32):
            for offset in range(0, 0x700 if group == LEVELS else 0x1_0500 if group != DISTRIBUTOR else 0x6800, 4):
                kvm.attributes[device, group, select | offset] = struct.pack("<I", (offset * 2654435761 + group) & 0xFFFF_FFFF)
    for select in (0, 1 << 32):
        for number, (_, encoding) in enumerate((*gic_state.V3_INTERFACE, *gic_state.V3_ACTIVE_PRIORITIES)):
            kvm.attributes[device, SYSTEM, select | encoding] = struct.pack("<Q", number + 0x400)


def through_a_file(state: dict[str, object]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(json.dumps(state))
    return loaded


@pytest.mark.parametrize("devices", [(V3,), (V3, ITS), (V2,)], ids=["gicv3", "its", "gicv2"])
def test_what_is_saved_is_what_a_new_machine_gets(monkeypatch: pytest.MonkeyPatch, devices: tuple[int, ...]) -> None:
    first = Host(monkeypatch, *devices)
    fill(first)
    state = through_a_file(first.processors.save())
    second = Host(monkeypatch, *devices)
    second.processors.restore(Saved(state))
    again = through_a_file(second.processors.save())
    counter = f"{COUNTER:016x}"
    # The counter is the machine's: it was set once, on the first vCPU, with what that one had.
    assert again["vcpus"][1]["registers"].pop(counter) == "0" * 16 != state["vcpus"][1]["registers"].pop(counter)
    assert again == state
    assert len(json.dumps(state)) < 40_000


def test_the_order_of_things(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, V3, ITS)
    state = through_a_file(host.processors.save())
    saved = host.kvm.calls[:]
    its, gic = 300 + ITS, 300 + V3
    assert [call for call in saved if call[0] == "control"] == [
        ("control", gic, uapi.KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES), ("control", its, uapi.KVM_DEV_ARM_ITS_SAVE_TABLES)]
    assert saved[0] == ("get", 201, COUNTER), "the guest's time stops first"
    host = Host(monkeypatch, V3, ITS)
    host.processors.restore(Saved(state))
    calls = host.kvm.calls
    assert calls[-1] == ("set", 201, COUNTER), "and goes on last"
    assert ("set", 202, COUNTER) not in calls
    attributes = [(group, attribute) for name, group, attribute in calls if name == "attribute"]
    assert attributes[:2] == [(DISTRIBUTOR, gic_state.IIDR), (DISTRIBUTOR, 0)], "off, it loses what becomes pending"
    for first in (attributes.index((DISTRIBUTOR, 0x104)), attributes.index((DISTRIBUTOR, 0xC08))):
        assert first < attributes.index((DISTRIBUTOR, 0x204)) < attributes.index((LEVELS, 32))
    redistributor = uapi.KVM_DEV_ARM_VGIC_GRP_REDIST_REGS
    for select in (0, 1 << 32):
        assert attributes.index((redistributor, select | 0x78)) < attributes.index((redistributor, select))
        frame = select | gic_state.V3_PRIVATE_FRAME
        for before in (0x100, 0xC04):
            assert attributes.index((redistributor, frame | before)) < attributes.index((redistributor, frame | 0x200))
        assert attributes.index((redistributor, frame | 0x100)) < attributes.index((LEVELS, select))
    tables = calls.index(("control", its, uapi.KVM_DEV_ARM_ITS_RESTORE_TABLES))
    its_registers = [index for index, call in enumerate(calls)
                     if call[:2] == ("attribute", uapi.KVM_DEV_ARM_VGIC_GRP_ITS_REGS)]
    assert [index > tables for index in its_registers] == [False] * 12 + [True]
    assert its_registers[0] > calls.index(("attribute", redistributor, 1 << 32))


def test_a_clone_is_restored_ahead_of_its_request_but_for_the_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    state = through_a_file(Host(monkeypatch, V3, ITS).processors.save())
    host = Host(monkeypatch, V3, ITS)
    host.processors.prepare(Saved(state))
    assert not [call for call in host.kvm.calls if call[0] == "set" and call[2] == COUNTER]
    host.kvm.calls.clear()
    assert host.processors.create_interrupt_chips() == "gicv3-its", "they are there"
    host.processors.restore(Saved({}))
    assert host.kvm.calls == [("set", 201, COUNTER)]
    assert [device.fd for device in host.processors.devices] == [300 + V3, 300 + ITS]


def test_what_describes_a_processor_must_be_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    state = through_a_file(Host(monkeypatch, V3).processors.save())
    host = Host(monkeypatch, V3)
    for values in host.kvm.registers.values():
        values[registers.ID_AA64MMFR0_EL1] = 0x3344
    with pytest.raises(SnapshotError, match=r"vcpus\[0\].registers.603000000013c038: 0x1122 is of another .*0x3344"):
        host.processors.restore(Saved(state))
    host = Host(monkeypatch, V3)
    for values in host.kvm.registers.values():
        del values[PSCI_VERSION]
    with pytest.raises(SnapshotError, match=r"registers.6030000000140000: this host's processors have no such register"):
        host.processors.restore(Saved(state))


@pytest.mark.parametrize(("place", "value", "problem"), [
    (("vcpus", 0, "id"), 7, "number 0"), (("vcpus", 1, "mp_state"), -1, "not a number"),
    (("vcpus", 0, "events"), "00", "64 bytes"), (("vcpus", 0, "registers", "x0"), "00", "8 bytes"),
    (("vcpus", 0, "registers", "x99"), "00" * 8, "not the name"),
    (("vcpus", 0, "registers", "-000000000000001"), "00" * 8, "not the name"),
    (("vcpus", 0, "registers", "60f0000000100000"), "00" * 8, "not the name"),
    (("vcpus",), [], "0 of them"), (("gic", "kind"), "gicv2", "this host has gicv3"), (("gic", "vcpus"), [], "0 of them"),
    (("gic", "its"), {}, "has not"), (("gic", "shared", "IROUTER"), "00", "1536 bytes"), (("gic", "shared", "x"), 1, "unknown"),
    (("gic", "vcpus", 1, "private", "levels"), "", "4 bytes"), (("gic", "vcpus", 0, "interface", "ICC_PMR_EL1"), 5, "8 bytes"),
    (("gic", "vcpus", 0, "extra"), 5, "unknown"), (("gic",), None, "not an object"), (("more",), 1, "unknown"),
])
def test_what_was_edited_by_hand_is_named(monkeypatch: pytest.MonkeyPatch, place: tuple[Any, ...], value: object,
                                          problem: str) -> None:
    state = through_a_file(Host(monkeypatch, V3).processors.save())
    at = state
    for step in place[:-1]:
        at = at[step]
    at[place[-1]] = value
    with pytest.raises(SnapshotError, match=problem):
        Host(monkeypatch, V3).processors.restore(Saved(state))


def test_a_long_list_of_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, V3, cpus=1)
    values = host.kvm.registers[201]
    values.update({0x6030_0000_0013_0000 | number: number for number in range(3000)})
    assert host.processors.vcpus[0].register_list() == list(values)


def test_as_many_active_priorities_as_there_are() -> None:
    names = [[name for name, _ in gic_state.active_priority_registers(bits - 1 << 8)] for bits in (5, 6, 7)]
    assert names[0] == ["ICC_AP0R0_EL1", "ICC_AP1R0_EL1"]
    assert [len(one) for one in names] == [2, 4, 8]
    encodings = dict(gic_state.V3_ACTIVE_PRIORITIES)
    assert encodings["ICC_AP0R3_EL1"] == 0xC647 and encodings["ICC_AP1R0_EL1"] == 0xC648


# -- devices


class Line:
    def __init__(self) -> None:
        self.levels: list[bool] = []

    def set_level(self, high: bool) -> None:
        self.levels.append(high)


class Wiring:
    def __init__(self) -> None:
        self.lines: dict[int, Line] = {}
        self.triggered: list[int] = []

    def create_level_line(self, spi: int) -> Line:
        return self.lines.setdefault(spi, Line())

    def create_irqfd(self, gsi: int) -> Any:
        outer = self

        class Irq:
            def trigger(self) -> None:
                outer.triggered.append(gsi)

        return Irq()


class Loop:
    """Runs nothing by itself."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.timers: list[Any] = []

    def call_soon(self, callback: Any) -> None:
        self.calls.append(callback)

    def call_later(self, delay: float, callback: Any) -> Any:
        from stratovirt.loop import Timer

        self.timers.append(Timer(delay, callback))
        return self.timers[-1]

    def turn(self) -> None:
        calls, self.calls = self.calls, []
        for call in calls:
            call()


def platform(now: float = 1000.0) -> tuple[PlatformDevices, Wiring, Loop]:
    wiring, loop = Wiring(), Loop()
    made = PlatformDevices(AddressMap(), AddressMap(), wiring, lambda: now, loop, list, list)  # type: ignore[arg-type]
    return made, wiring, loop


def test_the_clock_keeps_its_distance_and_its_alarm() -> None:
    devices, _, loop = platform(1000.0)
    devices.rtc.write(0x008, 4, 5000)  # four thousand seconds ahead
    devices.rtc.write(0x004, 4, 5060)
    devices.rtc.write(0x010, 4, 1)
    other, wiring, loop = platform(1100.0)
    saved_platform.restore(other, Saved(through_a_file(saved_platform.save(devices))))
    assert other.rtc.read(0, 4) == 5100
    assert wiring.lines[layout.RTC_IRQ].levels[-1] is True, "the alarm has passed while nobody ran"
    other, wiring, loop = platform(1010.0)
    saved_platform.restore(other, Saved(through_a_file(saved_platform.save(devices))))
    assert wiring.lines[layout.RTC_IRQ].levels[-1] is False
    loop.turn()
    assert [timer.deadline for timer in loop.timers] == [50.0]


def test_an_alarm_is_one_call_of_the_loop_and_one_timer() -> None:
    devices, _, loop = platform()
    for second in range(1001, 2000):
        devices.rtc.write(0x004, 4, second)
    assert len(loop.calls) == 1
    loop.turn()
    devices.rtc.write(0x004, 4, 1005)
    loop.turn()
    assert [(timer.deadline, timer.callback is not None) for timer in loop.timers] == [(999.0, False), (5.0, True)]


def test_an_alarm_that_comes_early_waits_again() -> None:
    now = [1000.0]
    loop, line = Loop(), Line()
    alarm = Alarm(loop)  # type: ignore[arg-type]
    rtc = Pl031(line, lambda: now[0], alarm.set)
    alarm.check = rtc.check_alarm
    rtc.write(0x010, 4, 1)
    rtc.write(0x004, 4, 1002)
    loop.turn()
    now[0] = 1001.99
    loop.timers[-1].callback()
    assert line.levels == []
    loop.turn()
    now[0] = 1002.5
    loop.timers[-1].callback()
    assert line.levels == [True]


def test_the_generation_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[int, bytes]] = []

    class Memory:
        def write(self, address: int, data: bytes) -> None:
            written.append((address, data))

    wiring = Wiring()
    monkeypatch.setattr(saved_platform, "layout", layout)
    for _ in range(2):
        saved_platform.tell_generation(wiring, Memory())  # type: ignore[arg-type]
    assert [address for address, _ in written] == [layout.GENERATION_ID] * 2
    assert len({data for _, data in written}) == 2 and all(len(data) == 16 for _, data in written)
    assert wiring.triggered == [16, 16]


def test_a_serial_port_must_be_there_as_it_was() -> None:
    devices, _, _ = platform()
    state = through_a_file(saved_platform.save(devices))
    state["serial"] = Pl011(Line()).save()
    with pytest.raises(SnapshotError, match="serial: the machine had one"):
        saved_platform.restore(devices, Saved(state))
