"""Taking a snapshot of a machine, and building a machine from one.

    take     checks → temporary files → pause → drained devices, processors, RAM → sync, rename; the machine stays paused
    restore  state read and checked → RAM mapped → devices into the slots they had → processors set, then the devices

What stands in the way of a snapshot leaves the machine as it was, running if it ran. What stands in the way of a restore
ends the start with one line that names the option, or the field of the state file.

Thread: the main loop's.
"""

from __future__ import annotations

import time

from stratovirt import log
from stratovirt.errors import ConfigError, HostError, StateError, StratoVirtError
from stratovirt.hostmap import ARCHITECTURE
from stratovirt.machine import saved_platform
from stratovirt.machine.board import layout
from stratovirt.machine.drivers import BLOCK, NET
from stratovirt.machine.kvm import KvmAccelerator
from stratovirt.machine.lifecycle import PAUSED, RUNNING
from stratovirt.snapshot import difference, memory_file, state_file
from stratovirt.snapshot.chain import MAX_LINKS, Chain, check_place, coarsen, describe_base
from stratovirt.snapshot.dirty import DirtyPages
from stratovirt.snapshot.saved import Saved, SnapshotError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from stratovirt.arch.x86_64.layout import Slot
    from stratovirt.config.vm import DeviceConfig, VmConfig
    from stratovirt.machine.board import PlatformDevices, Processors
    from stratovirt.machine.microvm import MicroVm
    from stratovirt.machine.slots import OccupiedSlot
    from stratovirt.memory import RamRegion
    from stratovirt.snapshot.chain import Ranges
    from stratovirt.virtio.device import VirtioDevice

# On aarch64 pages were missing from a snapshot that was counted, once in fourteen, and it is not known whose fault that was.
_COUNTED_ON = ("x86_64",)
_EMPTY_KINDS = {"virtio-blk": BLOCK, "virtio-net": NET}  # devices that wait in replaceable slots, by their names


def take(machine: MicroVm, directory: str, base: str | None = None, track: bool | None = None) -> None:
    """Write a snapshot of `machine` into `directory`, and leave it paused; with `base`, what differs from the one there.

    `track`: count from here on what is written, or do not; None: as it is.
    Raises: StateError, SnapshotError, HostError; the machine is then as it was.
    """
    if machine.state not in (RUNNING, PAUSED):
        raise StateError("a snapshot", machine.state, f"{RUNNING} or {PAUSED}")
    accelerator = machine.accelerator
    if not isinstance(accelerator, KvmAccelerator) or machine.platform is None:
        raise SnapshotError("the test accelerator has no processors to save")
    for occupied in machine.slots:
        reason = occupied.device.not_to_save()
        if reason:
            raise SnapshotError(f"the {occupied.device.name} device {occupied.id} cannot be saved: {reason}")
    chain = _open_base(machine, base, directory) if base is not None else None
    try:
        id = _write(machine, accelerator, machine.platform, directory, chain, track)
    finally:
        if chain is not None:
            chain.close()
    machine.lineage.add(id)
    _count_from(machine, id)
    log.info(f"snapshot {id} is in {directory}")


def _open_base(machine: MicroVm, base: str, directory: str) -> Chain:
    """The memory that the new snapshot is to stand on. Raises: SnapshotError."""
    try:
        state = state_file.read(base)
        chain = Chain(base, state)
    except SnapshotError as error:
        raise SnapshotError(f"the base {base}: {error}") from error
    try:
        if chain.links[0].id not in machine.lineage:
            raise SnapshotError(f"the base {base}: this machine was neither saved there nor restored from it")
        if chain.size != machine.memory.size:
            raise SnapshotError(f"the base {base}: memory of {chain.size} bytes, and the machine has {machine.memory.size}")
        if len(chain.links) == MAX_LINKS:
            raise SnapshotError(f"the base {base}: {MAX_LINKS} snapshots stand on each other, and no more can; merge some")
        check_place(chain, directory)
    except SnapshotError:
        chain.close()
        raise
    return chain


def _write(machine: MicroVm, accelerator: KvmAccelerator, platform: PlatformDevices, directory: str,
           chain: Chain | None, track: bool | None) -> str:
    """The id of the snapshot."""
    writer = state_file.Writer(directory)
    was_running = machine.state == RUNNING
    try:
        machine.pause()
        for occupied in machine.slots:
            occupied.device.pause()  # with -S nobody has told them yet
        if machine.is_asked:
            raise SnapshotError("the guest has just asked for a reset or power-off")
        id = state_file.random_bytes(state_file.ID_SIZE).hex()
        state: dict[str, object] = {
            "magic": state_file.MAGIC, "version": state_file.VERSION, "architecture": ARCHITECTURE, "id": id,
            "created": int(time.time()), "base": None, "machine": _describe(machine.config),
            "processors": accelerator.processors.save(),
            "platform": saved_platform.save(platform),
            "slots": [_save_slot(occupied, writer) for occupied in machine.slots],
        }
        regions = machine.memory.regions
        ranges = coarsen(_changed(machine, chain)) if chain is not None else None
        if chain is not None and ranges is not None:
            state["base"] = describe_base(chain, directory, ranges)
        offsets = memory_file.write(writer.memory_fd, regions, id, ranges)
        state["memory"] = [{"base": region.base, "size": region.size, "offset": offset}
                           for region, offset in zip(regions, offsets, strict=True)]
        _track(machine, accelerator, track)
        writer.commit(state)
    except (StratoVirtError, OSError):
        writer.abandon()
        if was_running:
            machine.resume()
        raise
    return id


def _changed(machine: MicroVm, chain: Chain) -> Ranges:
    """The ranges of the memory file in which RAM differs, or may differ, from what `chain` has."""
    dirty = machine.dirty
    if dirty is not None and dirty.since == chain.links[0].id:
        return dirty.written()
    return difference.from_memory(chain, machine.memory.regions)


def _track(machine: MicroVm, accelerator: KvmAccelerator, wanted: bool | None) -> None:
    """Have what is written counted from here on, or not any more. Raises: HostError."""
    if wanted and ARCHITECTURE not in _COUNTED_ON:
        log.info(f"what is written is not counted on {ARCHITECTURE}: the next incremental snapshot compares memory")
    elif wanted:
        if machine.dirty is None:
            from stratovirt.hypervisor.kvm.dirty_log import DirtyLog

            machine.dirty = DirtyPages(machine.memory, DirtyLog(accelerator.vm))
        machine.dirty.start()
    elif wanted is False and machine.dirty is not None:
        machine.dirty.stop()


def _count_from(machine: MicroVm, id: str) -> None:
    """The snapshot is on disk: what is written from here on differs from it."""
    dirty = machine.dirty
    if dirty is None or not dirty.running:
        return
    try:
        dirty.begin(id)
    except HostError as error:
        log.warn(f"{error}; the next incremental snapshot compares memory")
        return
    count_devices(dirty, [occupied.device for occupied in machine.slots])


def count_devices(dirty: DirtyPages, devices: list[VirtioDevice]) -> None:
    """Count as written what they may write without another word: the used rings of their queues, the buffers they hold."""
    for device in devices:
        for queue in device.queues:
            if queue is not None:
                dirty.mark(queue.used_ring, queue.used_size)
        for view in device.outstanding():
            dirty.mark_view(view)


def _describe(config: VmConfig) -> dict[str, object]:
    """What the command line of a restore must say as well."""
    smp = config.smp
    return {
        "type": config.machine_type, "memory": config.memory_size, "cpus": smp.cpus, "max_cpus": smp.max_cpus,
        "sockets": smp.sockets, "dies": smp.dies, "clusters": smp.clusters, "cores": smp.cores, "threads": smp.threads,
    }


def _save_slot(occupied: OccupiedSlot, writer: state_file.Writer) -> dict[str, object]:
    try:
        occupied.device.fetch_state(writer.scratch)
        state = occupied.transport.save()
    except HostError as error:
        raise SnapshotError(f"the {occupied.device.name} device {occupied.id} cannot be saved: {error}") from error
    return {"slot": occupied.slot.number, "id": occupied.id, "kind": occupied.device.name, **state}


class _Told:
    """Errors inside it are said to be those of `-incoming`."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, SnapshotError):
            raise ConfigError(str(error), option="-incoming", value=f"file:{self._directory}") from error


class Incoming:
    """The snapshot that the machine of `config` is built from. Raises: ConfigError from everything; HostError from KVM.

    `read` is its state and `chain` its memory, where somebody has them open already; `chain` stays theirs.
    """

    def __init__(self, config: VmConfig, read: dict[str, Any] | None = None, chain: Chain | None = None) -> None:
        assert config.incoming is not None  # the caller has looked
        self._is_lent = chain is not None
        self._directory, self._mapped = config.incoming.directory, config.incoming.mapped
        self._track = config.incoming.track
        self._told = _Told(self._directory)
        self._processors: Saved | None = None
        with self._told:
            self._read = read if read is not None else state_file.read(self._directory)
            self._state = state = Saved(self._read)
            state.text("magic")
            state.integer("version")
            architecture = state.text("architecture")
            if architecture != ARCHITECTURE:
                raise state.error("architecture", f"{architecture!a}, and this host is {ARCHITECTURE}")
            self._id = state.data("id", state_file.ID_SIZE).hex()
            state.integer("created")
            state.optional_section("base")  # the chain has read it
            self._check_machine(config, state.section("machine"))
            self._slots = self._read_slots(config, state)
            self._open_memory(config, state, chain)

    def _check_machine(self, config: VmConfig, saved: Saved) -> None:
        for name, ours in _describe(config).items():
            if isinstance(ours, str):
                theirs: object = saved.text(name)
            else:
                theirs = saved.integer(name)
            if theirs != ours:
                option = "-m" if name == "memory" else "-machine" if name == "type" else "-smp"
                raise SnapshotError(f"machine.{name}: the snapshot is of a machine with {theirs}, and {option} says {ours}")
        saved.end()

    # -- slots

    def _read_slots(self, config: VmConfig, state: Saved) -> list[tuple[int, str, str, Saved]]:
        """(number, id, kind, state) of each, when all devices of the command line are there, and no others."""
        found: list[tuple[int, str, str, Saved]] = []
        wanted = {device.id for device in config.devices}
        for section in state.sections("slots", layout.VIRTIO_SLOTS):
            number, id, kind = section.integer("slot", 0, layout.VIRTIO_SLOTS - 1), section.text("id"), section.text("kind")
            if any(number == other[0] or (id and id == other[1]) for other in found):
                raise section.error("slot", "another device has the same slot, or the same id")
            if not id and kind not in _EMPTY_KINDS:
                raise section.error("kind", f"{kind!a} is no device of a replaceable slot")
            if id and id not in wanted:
                raise section.error("id", f"the snapshot has a {kind} device {id!a}, and there is no -device with that id")
            if not id and not config.qmp and not section.integer("status", 0, 0xFF):
                continue  # no driver has ever looked at it, and nobody could put anything there
            found.append((number, id, kind, section))
        return found

    def slots_of(self, devices: list[DeviceConfig]) -> list[Slot]:
        """The slot of each device: the one that it had."""
        with self._told:
            numbers = {id: number for number, id, _, _ in self._slots if id}
            for device in devices:
                if device.id not in numbers:
                    raise SnapshotError(f"-device {device.driver},id={device.id}: the snapshot has no such device "
                                        f"({', '.join(sorted(numbers)) or 'none at all'})")
            return [layout.slot(numbers[device.id]) for device in devices]

    def empty_slots(self) -> list[tuple[str, Slot]]:
        """The replaceable slots that nothing was in, each with its kind."""
        return [(_EMPTY_KINDS[kind], layout.slot(number)) for number, id, kind, _ in self._slots if not id]

    # -- memory

    def _open_memory(self, config: VmConfig, state: Saved, chain: Chain | None) -> None:
        """All of the chain is there and fits, before anything is made."""
        self._offsets: dict[int, int] = {}
        expected = layout.ram_ranges(config.memory_size)
        end = 0
        sections = state.sections("memory", 16)
        if len(sections) != len(expected):
            raise state.error("memory", f"{len(sections)} runs of RAM, and the machine has {len(expected)}")
        for section, (base, size) in zip(sections, expected, strict=True):
            for name, value in (("base", base), ("size", size), ("offset", end)):
                if section.integer(name) != value:
                    raise section.error(name, f"not {value}, where this machine has it")
            section.end()
            self._offsets[base] = end
            end += size
        self._chain = chain if chain is not None else Chain(self._directory, self._read)
        self.lineage = set(self._chain.ids)

    def load_memory(self, region: RamRegion) -> None:
        with self._told:
            self._chain.load(region, self._offsets[region.base], self._mapped)

    def prepare(self, processors: Processors) -> None:
        """Set of processors what stands still. `restore` may then come any time later."""
        self._processors = self._state.section("processors")
        with self._told:
            processors.prepare(self._processors)

    # -- the rest, once everything is plugged in

    def restore(self, machine: MicroVm) -> None:
        """Set devices and processors. Before any thread runs."""
        accelerator, platform = machine.accelerator, machine.platform
        with self._told:
            if not isinstance(accelerator, KvmAccelerator) or platform is None:
                raise SnapshotError("only machines with -accel kvm have snapshots")
            if self._track:  # before the devices: from their start on the kernel is to log what it writes for them
                _track(machine, accelerator, True)
                _count_from(machine, self._id)
            if self._processors is None:
                self._processors = self._state.section("processors")
            # Before the devices: to set an interrupt controller is to forget what it has been told meanwhile, and devices raise
            # interrupts from their start on, some from threads and from the kernel.
            accelerator.processors.restore(self._processors)
            waiting = [each.device for each in machine.slots if each.device.waits_for_restore]
            for waiting_device in waiting:
                waiting_device.pause()
            occupied = {each.slot.number: each for each in machine.slots}
            for number, _, kind, state in self._slots:
                device = occupied[number].device
                if device.name != kind:
                    raise state.error("kind", f"{kind!a}, and the machine has {device.name} there")
                occupied[number].transport.restore(state)
            saved_platform.restore(platform, self._state.section("platform"))
            self._state.end()
            if not self._is_lent:
                self._chain.close()
            saved_platform.tell_generation(machine.vm, machine.memory)
        for waiting_device in waiting:
            waiting_device.resume()

    def tell(self) -> None:
        """For the log, once the guest runs: that it waits for no line."""
        log.info(f"restored from snapshot {self._id}")
