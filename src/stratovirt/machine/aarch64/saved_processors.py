"""The processors of an arm64 machine in a snapshot: every register that KVM lists, and the interrupt controller.

Facts about KVM that this rests on:
- A list of registers has all of a vCPU but its multiprocessor state and pending SError, the timers included. What describes
  the processor is in it, too: it is not written but compared, by writing it, for KVM refuses to change it.
- The counters are the whole machine's: to write one says how far it is from the host's, for every vCPU. So they come last,
  once, with what was read first. The guest's time goes on where it stood, and the timers, whose values are compared with the
  counters, ring when they would have.
- The lengths of vectors (SVE) are settled before the vCPUs get here.
The time of day is the PL031's, and that is the host's.
"""

from __future__ import annotations

from stratovirt.arch.aarch64 import registers
from stratovirt.errors import HostError
from stratovirt.hypervisor.kvm import _uapi as common
from stratovirt.hypervisor.kvm.arm64 import register_size
from stratovirt.machine.aarch64 import saved_gic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.hypervisor.kvm.arm64 import Arm64Vcpu
    from stratovirt.machine.aarch64.processors import Gic
    from stratovirt.snapshot.saved import Saved

_NAME_OF = {register: name for name, register in registers.NAMES.items()}
_LARGEST = 8  # 2 to the power of this many bytes: a vector register of SVE


def save(vcpus: list[Arm64Vcpu], gic: Gic) -> dict[str, object]:
    """Raises: HostError."""
    return {"vcpus": [_save_vcpu(vcpu) for vcpu in vcpus], "gic": saved_gic.save(gic)}


def _save_vcpu(vcpu: Arm64Vcpu) -> dict[str, object]:
    # A CPU_ON that has not come to the vCPU yet is carried out by the first look at a register.
    values = {number: vcpu.get_register(number) for number in sorted(vcpu.register_list(), key=_is_counter, reverse=True)}
    named = {_NAME_OF.get(number, f"{number:016x}"): f"{value:0{2 * register_size(number)}x}"
             for number, value in sorted(values.items())}
    return {"id": vcpu.id, "mp_state": vcpu.get_mp_state(), "events": vcpu.get_events().hex(), "registers": named}


def _is_counter(number: int) -> bool:
    return number in registers.TIMER_COUNTERS


class Prepared:
    """Processors that are restored but for what moves on by itself: the machine's counters."""

    __slots__ = ("_counters", "_vcpu")

    def __init__(self, vcpu: Arm64Vcpu, counters: dict[int, int]) -> None:
        self._vcpu = vcpu
        self._counters = counters

    def finish(self) -> None:
        """Right before the guest goes on. Raises: HostError."""
        for number, value in self._counters.items():
            self._vcpu.set_register(number, value)


def prepare(vcpus: list[Arm64Vcpu], gic: Gic, state: Saved) -> Prepared:
    """Guest memory is there already: the ITS has tables in it.

    Raises: SnapshotError when the state is not one, or of processors that this host has not; HostError.
    """
    sections, gic_state = state.sections("vcpus"), state.section("gic")
    state.end()
    if len(sections) != len(vcpus):
        raise state.error("vcpus", f"{len(sections)} of them, and the machine has {len(vcpus)}")
    counters: dict[int, int] = {}
    for vcpu, section in zip(vcpus, sections, strict=True):
        _restore_vcpu(vcpu, section, counters)
    saved_gic.restore(gic, gic_state)
    return Prepared(vcpus[0], counters)


def _restore_vcpu(vcpu: Arm64Vcpu, state: Saved, counters: dict[int, int]) -> None:
    """`counters` gets those of the first vCPU that has them."""
    if state.integer("id", 0, 0xFFFF_FFFF) != vcpu.id:
        raise state.error("id", f"this processor of the machine is number {vcpu.id}")
    mp_state = state.integer("mp_state", 0, 15)
    events = state.data("events", common.SIZEOF_VCPU_EVENTS)
    section = state.section("registers")
    state.end()
    for name in section.names():
        number = _number_of(section, name)
        value = int.from_bytes(section.data(name, register_size(number)), "big")
        if _is_counter(number):
            counters.setdefault(number, value)
        else:
            _restore_register(vcpu, section, name, number, value)
    vcpu.set_mp_state(mp_state)
    vcpu.set_events(events)


def _number_of(state: Saved, name: str) -> int:
    known = registers.NAMES.get(name)
    if known is not None:
        return known
    try:
        number = int(name, 16) if len(name) == 16 else -1
    except ValueError:
        number = -1
    if number < 0 or number >> 52 & 0xF > _LARGEST:
        raise state.error(name, "not the name of a register, nor its number with 16 hexadecimal digits")
    return number


def _restore_register(vcpu: Arm64Vcpu, state: Saved, name: str, number: int, value: int) -> None:
    """What KVM does not let itself be told must be what it is anyway."""
    if number != registers.SVE_LENGTHS:
        try:
            vcpu.set_register(number, value)
            return
        except HostError:
            pass  # looked at below
    try:
        here = vcpu.get_register(number)
    except HostError as error:
        raise state.error(name, "this host's processors have no such register; -cpu must be as it was") from error
    if here != value:
        raise state.error(name, f"{value:#x} is of another processor or KVM: this host's have {here:#x} there")
