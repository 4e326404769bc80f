"""The interrupt controller of an arm64 machine in a snapshot. All vCPUs stand still, and at the restore none has ever run.

Facts about KVM that this rests on:
- What is pending is read and written as it is latched; of a level-triggered line of a GICv3 the level is kept beside it. KVM
  raises the timers' lines by itself, and a GICv2's other lines are set anew by their devices.
- An interrupt gets into the queue of its vCPU in the moment when it is made pending, or its line set high, and then only if it
  and the distributor are enabled. One that was missed never comes by itself: of a level (the timers') KVM hears changes alone.
  So CTLR of the distributor is the first register, and what enables interrupts is written before what makes them pending.
- The ITS and the redistributors write what they keep in caches into tables in guest memory, which the guest has given them.
  That comes before memory is saved, and the way back after memory, redistributors and the ITS's other registers.
"""

from __future__ import annotations

from stratovirt.arch.aarch64 import gic_state as regs
from stratovirt.arch.aarch64 import layout
from stratovirt.arch.aarch64.registers import mpidr
from stratovirt.errors import HostError
from stratovirt.firmware.fdt import GICV2
from stratovirt.hypervisor.kvm import _uapi_arm64 as uapi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.machine.aarch64.processors import Gic
    from stratovirt.snapshot.saved import Saved

    Family = tuple[str, int, int, int]

_DISTRIBUTOR, _REDISTRIBUTOR = uapi.KVM_DEV_ARM_VGIC_GRP_DIST_REGS, uapi.KVM_DEV_ARM_VGIC_GRP_REDIST_REGS
_INTERFACE, _SYSTEM = uapi.KVM_DEV_ARM_VGIC_GRP_CPU_REGS, uapi.KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS
_LEVELS, _ITS, _CONTROL = (uapi.KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, uapi.KVM_DEV_ARM_VGIC_GRP_ITS_REGS,
                           uapi.KVM_DEV_ARM_VGIC_GRP_CTRL)
_PRIVATE, _ALL = layout.PRIVATE_INTERRUPTS, layout.GIC_INTERRUPTS
_EVERY_BIT = 0xFFFF_FFFF


def save(gic: Gic) -> dict[str, object]:
    """Raises: HostError."""
    v2 = gic.kind == GICV2
    if gic.its is not None:
        gic.device.set(_CONTROL, uapi.KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES)
        gic.its.set(_CONTROL, uapi.KVM_DEV_ARM_ITS_SAVE_TABLES)
    bank = _Bank(gic, _DISTRIBUTOR, 0)
    shared = {"IIDR": f"{bank.read(regs.IIDR):08x}", **bank.save(regs.DISTRIBUTOR),
              **bank.save_families(regs.V2_SHARED if v2 else regs.V3_SHARED, _PRIVATE, _ALL)}
    if not v2:
        shared["levels"] = b"".join(_level_word(gic, 0, first) for first in range(_PRIVATE, _ALL, 32)).hex()
    state: dict[str, object] = {"kind": gic.kind, "shared": shared}
    state["vcpus"] = [_save_v2(gic, index) if v2 else _save_v3(gic, index) for index in range(gic.cpus)]
    state["its"] = None
    if gic.its is not None:
        values = {name: f"{gic.its.get_u64(_ITS, offset):016x}" for name, offset in regs.ITS_BEFORE_TABLES}
        state["its"] = {**values, "CTLR": f"{gic.its.get_u64(_ITS, regs.ITS_CTLR):016x}"}
    return state


def _save_v2(gic: Gic, index: int) -> dict[str, object]:
    distributor, interface = _Bank(gic, _DISTRIBUTOR, index << 32), _Bank(gic, _INTERFACE, index << 32)
    return {"private": distributor.save_families(regs.V2_PRIVATE, 0, _PRIVATE), "interface": interface.save(regs.V2_INTERFACE)}


def _save_v3(gic: Gic, index: int) -> dict[str, object]:
    affinity = mpidr(index) << 32
    bank = _Bank(gic, _REDISTRIBUTOR, affinity)
    private = {**bank.save(regs.V3_REDISTRIBUTOR),
               **bank.save_families(regs.V3_PRIVATE, 0, _PRIVATE, regs.V3_PRIVATE_FRAME),
               "levels": _level_word(gic, affinity, 0).hex()}
    control = gic.device.get_u64(_SYSTEM, affinity | regs.ICC_CTLR)
    names = (*regs.V3_INTERFACE, *regs.active_priority_registers(control))
    interface = {name: f"{gic.device.get_u64(_SYSTEM, affinity | encoding):016x}" for name, encoding in names}
    return {"private": private, "interface": interface}


def restore(gic: Gic, state: Saved) -> None:
    """Raises: SnapshotError when the state is not one, or KVM does not take it; HostError."""
    kind = state.text("kind")
    if kind != gic.kind:
        raise state.error("kind", f"{kind!a}, and this host has {gic.kind}")
    v2 = kind == GICV2
    shared, vcpus, its = state.section("shared"), state.sections("vcpus"), state.optional_section("its")
    state.end()
    if len(vcpus) != gic.cpus:
        raise state.error("vcpus", f"{len(vcpus)} of them, and the machine has {gic.cpus}")
    if (its is None) != (gic.its is None):
        raise state.error("its", f"what a machine with {kind} has not" if gic.its is None else "missing")
    bank = _Bank(gic, _DISTRIBUTOR, 0)
    bank.write(shared, "IIDR", regs.IIDR, int.from_bytes(shared.data("IIDR", 4), "big"))
    bank.restore(shared, regs.DISTRIBUTOR)  # before anything is pending: see above
    if not v2:
        # Their tables are in place before interrupts come to them.
        for index, section in enumerate(vcpus):
            _restore_v3(gic, index, section)
    bank.restore_families(shared, regs.V2_SHARED if v2 else regs.V3_SHARED, _PRIVATE, _ALL)
    if v2:
        for index, section in enumerate(vcpus):
            _restore_v2(gic, index, section)
    else:
        levels = shared.data("levels", (_ALL - _PRIVATE) // 8)
        for first in range(_PRIVATE, _ALL, 32):
            _set_level_word(gic, 0, first, levels[(first - _PRIVATE) // 8 :][:4])
    shared.end()
    if its is not None:
        _restore_its(gic, its)


def _restore_v2(gic: Gic, index: int, state: Saved) -> None:
    private, interface = state.section("private"), state.section("interface")
    state.end()
    _Bank(gic, _DISTRIBUTOR, index << 32).restore_families(private, regs.V2_PRIVATE, 0, _PRIVATE)
    private.end()
    _Bank(gic, _INTERFACE, index << 32).restore(interface, regs.V2_INTERFACE)
    interface.end()


def _restore_v3(gic: Gic, index: int, state: Saved) -> None:
    affinity = mpidr(index) << 32
    private, interface = state.section("private"), state.section("interface")
    state.end()
    bank = _Bank(gic, _REDISTRIBUTOR, affinity)
    bank.restore(private, regs.V3_REDISTRIBUTOR)
    bank.restore_families(private, regs.V3_PRIVATE, 0, _PRIVATE, regs.V3_PRIVATE_FRAME)
    _set_level_word(gic, affinity, 0, private.data("levels", 4))
    private.end()
    control = gic.device.get_u64(_SYSTEM, affinity | regs.ICC_CTLR)
    for name, encoding in (*regs.V3_INTERFACE, *regs.active_priority_registers(control)):
        value = int.from_bytes(interface.data(name, 8), "big")
        try:
            gic.device.set_u64(_SYSTEM, affinity | encoding, value)
        except HostError as error:
            raise interface.error(name, f"this host's KVM does not take {value:#x}") from error
    interface.end()


def _restore_its(gic: Gic, state: Saved) -> None:
    values = {name: int.from_bytes(state.data(name, 8), "big") for name, _ in regs.ITS_BEFORE_TABLES}
    control = int.from_bytes(state.data("CTLR", 8), "big")
    state.end()
    assert gic.its is not None  # the caller has looked
    steps = [*((name, offset, values[name]) for name, offset in regs.ITS_BEFORE_TABLES), ("CTLR", regs.ITS_CTLR, control)]
    for name, offset, value in steps:
        try:
            if name == "CTLR":
                gic.its.set(_CONTROL, uapi.KVM_DEV_ARM_ITS_RESTORE_TABLES)
            gic.its.set_u64(_ITS, offset, value)
        except HostError as error:
            raise state.error(name, f"this host's KVM does not take {value:#x}, or the tables in guest memory") from error


def _level_word(gic: Gic, affinity: int, first: int) -> bytes:
    """The levels of 32 lines; what is asked for, bits 10 and up, is 0: the level."""
    return gic.device.get(_LEVELS, affinity | first, 4)


def _set_level_word(gic: Gic, affinity: int, first: int, value: bytes) -> None:
    gic.device.set(_LEVELS, affinity | first, value)


class _Bank:
    """The 32-bit registers of a group of attributes; `select` is what an attribute has beside the offset."""

    def __init__(self, gic: Gic, group: int, select: int) -> None:
        self._device = gic.device
        self._group = group
        self._select = select

    def read(self, offset: int) -> int:
        return self._device.get_u32(self._group, self._select | offset)

    def write(self, state: Saved, name: str, offset: int, value: int) -> None:
        try:
            self._device.set_u32(self._group, self._select | offset, value)
        except HostError as error:
            raise state.error(name, f"this host's KVM does not take {value:#x} in its {self._device.name}") from error

    def save(self, registers: tuple[tuple[str, int, int], ...]) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, offset, size in registers:
            value = sum(self.read(offset + half) << 8 * half for half in range(0, size, 4))
            found[name] = f"{value:0{2 * size}x}"
        return found

    def save_families(self, families: tuple[Family, ...], first: int, last: int, frame: int = 0) -> dict[str, str]:
        return {name: b"".join(self.read(offset).to_bytes(4, "little")
                               for offset in regs.family_offsets(frame + register, width, first, last)).hex()
                for name, register, width, _ in families}

    def restore(self, state: Saved, registers: tuple[tuple[str, int, int], ...]) -> None:
        for name, offset, size in registers:
            value = int.from_bytes(state.data(name, size), "big")
            for half in range(0, size, 4):
                self.write(state, name, offset + half, value >> 8 * half & _EVERY_BIT)

    def restore_families(self, state: Saved, families: tuple[Family, ...], first: int, last: int, frame: int = 0) -> None:
        for name, register, width, clear in families:
            words = state.data(name, (last - first) * width // 8)
            offsets = regs.family_offsets(frame + register, width, first, last)
            for number, offset in enumerate(offsets):
                if clear:
                    self.write(state, name, offset - register + clear, _EVERY_BIT)
                self.write(state, name, offset, int.from_bytes(words[4 * number : 4 * number + 4], "little"))
