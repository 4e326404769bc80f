"""The microvm board: what is plugged where, and in which order it comes to life.

The order of `build` is the order of start-up, and the reasons for it are KVM's: memory before interrupt chips (a
memory slot costs 70 times as much afterwards), interrupt chips before vCPUs and irqfds. See docs/architecture.md.
What depends on the architecture comes from `machine/board.py`.
"""

from __future__ import annotations

import posix
import time

from stratovirt import log
from stratovirt.address_map import AddressMap
from stratovirt.errors import ConfigError, HostError, StateError
from stratovirt.hostmap import HostMapping
from stratovirt.hypervisor.kvm import run_loop
from stratovirt.machine import drivers
from stratovirt.machine.board import Boot, PlatformDevices, layout
from stratovirt.machine.kvm import KvmAccelerator
from stratovirt.machine.lifecycle import CREATED, PAUSED, RUNNING, Lifecycle
from stratovirt.machine.slots import assign_slots, empty_slots, plug
from stratovirt.memory import GuestMemory, RamRegion
from stratovirt.sandbox import unconfined

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from stratovirt.backends.chardev import CharDevice
    from stratovirt.config.vm import CharDeviceConfig, VmConfig
    from stratovirt.hypervisor.kvm.vcpu import KvmVcpu
    from stratovirt.iothread import IoThread
    from stratovirt.loop import EventLoop
    from stratovirt.machine.hotplug import HotPlug
    from stratovirt.machine.kvm import Accelerator, KvmAhead
    from stratovirt.machine.slots import OccupiedSlot
    from stratovirt.machine.snapshot import Incoming
    from stratovirt.snapshot.dirty import DirtyPages
    from stratovirt.virtio.balloon import VirtioBalloon

# A clone is there for its first instructions. What this thread has to do yet would keep the interpreter from its first exits.
GUEST_FIRST_SECONDS = 0.001
_BOOT_PHASES = {1: "the kernel has started", 2: "the boot is complete"}


class MicroVm(Lifecycle):
    """A microVM: `build` it, `start` it, run the loop, and `close` it whatever happened.

    `started_at` (time.monotonic) is when the process began, for the boot-time port. `ahead` is used if it suits, or let go.
    """

    def __init__(self, config: VmConfig, loop: EventLoop, started_at: float, ahead: KvmAhead | None = None) -> None:
        super().__init__(loop)
        self.config = config
        self._started_at = started_at
        self._ahead = ahead
        self.ports = AddressMap()
        self.mmio = AddressMap()
        self.chardevs: dict[str, CharDevice] = {}
        self.serial_chardev: CharDevice | None = None
        self.platform: PlatformDevices | None = None
        self.iothreads: dict[str, IoThread] = {}
        self.slots: list[OccupiedSlot] = []
        self.balloon: VirtioBalloon | None = None
        self.accelerator: Accelerator | None = None
        self.interrupt_controller = ""  # what tables have to be told of it
        self.boot: Boot | None = None
        self.migration = "none"  # how the last one went, as query-migrate says it
        self.lineage: set[str] = set()  # ids of the snapshots that it was saved in or restored from
        self.dirty: DirtyPages | None = None  # what is written, once somebody wants it counted
        self._incoming: Incoming | None = None
        self._is_ahead = ahead is not None and ahead.incoming is not None  # its memory and its processors are restored already
        self._make_boot: Callable[[], Boot] | None = None  # of a restored machine, which needs it for a reset only
        self._device_loop = loop  # as devices see it
        self._hotplug: HotPlug | None = None
        self._asked: Callable[[], None] | None = None  # what the guest wants done, until it is done

    def build(self) -> None:
        """Make the machine, up to the guest's first instruction or where a snapshot left it. Raises: ConfigError, HostError."""
        config = self.config
        if config.incoming is not None:
            self._incoming = self._open_incoming(config)
            self.lineage |= self._incoming.lineage
        self.accelerator = accelerator = self._create_accelerator()
        self.vm = accelerator.vm
        self.memory = self._create_memory()
        self.interrupt_controller = interrupt_controller = accelerator.create_interrupt_chips()

        devices = [device for device in config.devices if drivers.takes_slot(device)]
        if self._incoming is not None:
            chosen, empty = self._incoming.slots_of(devices), self._incoming.empty_slots()
        else:
            chosen = assign_slots(devices)
            # With nobody to talk to the machine, nothing can ever be plugged in.
            empty = empty_slots(chosen) if config.qmp else []
        announced = sorted([*chosen, *(slot for _, slot in empty)], key=lambda slot: slot.number)
        if self._incoming is not None:
            self._make_boot = lambda: Boot(config, announced, interrupt_controller)
        elif config.kernel:  # the command line sees to it that only the test accelerator goes without
            self.boot = Boot(config, announced, interrupt_controller)
            self.boot.load(self.memory)
        for chardev in config.chardevs.values():
            self.chardevs[chardev.id] = self._create_chardev(chardev, "-chardev")
        self._create_iothreads(accelerator)
        self._device_loop = device_loop = accelerator.device_loop(self.loop, lambda function: function())
        around = drivers.Surroundings(config, self.memory, device_loop, self.chardevs, self.iothreads,
                                      self._on_balloon)
        for device, slot in zip(devices, chosen, strict=True):
            virtio = drivers.create(around, device)
            self.slots.append(plug(virtio, device.id, slot, self.vm, self.memory, self.mmio,
                                   around.loop_of(device)))
        for kind, slot in empty:
            virtio = drivers.create_empty(around, kind, slot.number)
            self.slots.append(plug(virtio, "", slot, self.vm, self.memory, self.mmio, device_loop))
        self.balloon = around.balloon
        self._plug_platform(accelerator, device_loop)
        accelerator.create_processors(self.boot)
        if self._incoming is not None:
            self._incoming.restore(self)

    def _open_incoming(self, config: VmConfig) -> Incoming:
        if self._ahead is not None and self._ahead.incoming is not None:
            return self._ahead.incoming
        from stratovirt.machine.snapshot import Incoming

        return Incoming(config)

    def _create_accelerator(self) -> Accelerator:
        config = self.config
        ahead = self._ahead
        if config.accel == "test":
            if ahead is not None:
                self._ahead = None
                ahead.let_go()
            from stratovirt.hypervisor.test_accel.accelerator import TestAccelerator

            return TestAccelerator(config.mod_test, self.ports, self.mmio, self.loop,
                                   lambda: self.shutdown(False, "host-test-hang-up"))
        return KvmAccelerator(config, self.ports, self.mmio, self.loop, self._on_vcpu_exit,
                              lambda: self.shutdown(True, "guest-shutdown"), ahead)

    @property
    def hotplug(self) -> HotPlug:
        """What is in the replaceable slots. Thread: the main loop's, once the machine is built."""
        if self._hotplug is None:
            from stratovirt.machine.hotplug import HotPlug

            self._hotplug = HotPlug(self.config, self.slots, self.events, self.iothreads, self.memory, self._device_loop)
        return self._hotplug

    def _create_iothreads(self, accelerator: Accelerator) -> None:
        if not self.config.iothreads:
            return
        from stratovirt.iothread import IoThread

        for id in self.config.iothreads:
            iothread = IoThread(id, lambda: self.loop.call_soon(self._on_iothread_failure))
            iothread.loop = accelerator.device_loop(iothread.loop, iothread.call)
            self.iothreads[id] = iothread

    def _create_memory(self) -> GuestMemory:
        config = self.config
        ranges = layout.ram_ranges(config.memory_size)
        ahead, self._ahead = self._ahead, None
        registered = ahead.take_memory(ranges if config.ram is None else []) if ahead is not None else []
        if self._is_ahead:
            return GuestMemory(registered)
        for id in config.memory_backends:
            if id != config.memory_backend:
                log.warn(f"-object id={id}: this memory is not used, -machine memory-backend={id} is missing")
        if config.ram is None:
            try:
                regions = registered or [RamRegion(base, HostMapping(size)) for base, size in ranges]
            except HostError as error:
                raise ConfigError(str(error), option="-m", value=f"{config.memory_size >> 20}M") from error
        else:
            from stratovirt.machine.ram import create_regions

            regions = create_regions(config.ram, ranges, min(posix.cpu_count() or 1, config.smp.cpus))
        for region in regions:
            if not config.dump_guest_core:
                region.host.dont_dump()
            if self._incoming is not None:
                self._incoming.load_memory(region)
            if not registered:
                self.vm.add_memory(region)
        return GuestMemory(regions)

    # -- the platform's own devices

    def _plug_platform(self, accelerator: Accelerator, device_loop: EventLoop) -> None:
        self.platform = PlatformDevices(self.ports, self.mmio, self.vm, accelerator.now, device_loop, self._guest_reset,
                                        self._guest_power_off)
        config = self.config.serial
        if config is None:
            return
        chardev = self.chardevs.get(config.id) if config.id else None
        if chardev is None:
            chardev = self._create_chardev(config, "-serial")
            self.serial_chardev = chardev
            self.chardevs[config.id] = chardev
        self.platform.plug_serial(chardev, self._on_boot_time)

    def _create_chardev(self, config: CharDeviceConfig, option: str) -> CharDevice:
        from stratovirt.backends.chardev import create

        return create(config, self.loop, option)

    def _on_boot_time(self, value: int) -> None:
        phase = _BOOT_PHASES.get(value)
        if phase is not None:
            elapsed = (time.monotonic() - self._started_at) * 1000
            log.LOG.guest_write(log.INFO, f"boot-time port, {value}", f"{phase}: {elapsed:.3f} ms after the process began", 2)

    # -- life cycle

    def start(self, confine: Callable[[int], None] = unconfined) -> None:
        """Let the guest run, or with -S wait for `cont`; `confine` is called on every new thread first. Thread: main."""
        paused = self.config.freeze and self._incoming is None
        self._built().start(paused, confine)
        for iothread in self.iothreads.values():
            iothread.start(confine)
        self.state = PAUSED if paused else RUNNING
        if self._incoming is not None:
            if self._is_ahead:
                time.sleep(GUEST_FIRST_SECONDS)
            self._incoming.tell()
            self._prepare_boot()

    def _prepare_boot(self) -> None:
        """The guest goes on without its kernel file, but a reset needs it."""
        make, self._make_boot = self._make_boot, None
        if make is not None and self.config.kernel:
            try:
                self.boot = make()
            except ConfigError as error:
                log.error(f"{error}; a reset will end this machine")

    def snapshot(self, directory: str, base: str | None = None, track: bool | None = None) -> None:
        """Save the machine into `directory` and leave it paused; of its memory what differs from the snapshot in `base`.

        `track`: count from here on what is written, or do not; None: as it is.
        Raises: StateError, SnapshotError, HostError; it is then as it was.
        """
        from stratovirt.machine import snapshot

        self.migration = "active"
        try:
            snapshot.take(self, directory, base, track)
            self.migration = "completed"
        finally:
            if self.migration == "active":
                self.migration = "failed"

    @property
    def is_asked(self) -> bool:
        """The guest has asked for a reset or power-off, and the main loop has not come to it."""
        return self._asked is not None

    def stop_vcpus(self) -> None:
        self._built().pause()
        for occupied in self.slots:
            occupied.device.pause()

    def continue_vcpus(self) -> None:
        for occupied in self.slots:
            occupied.device.resume()
        self._built().resume()

    def reset(self, guest: bool) -> None:
        if self._incoming is not None and self.boot is None:
            raise HostError("a machine that was restored without -kernel cannot start again")
        super().reset(guest)

    def reset_hardware(self) -> None:
        self._asked = None  # whatever it was, the guest that wanted it is gone
        if self.dirty is not None:
            self.dirty.lose("a reset")
        for occupied in self.slots:
            occupied.transport.reset()
        if self.platform is not None:
            self.platform.reset()
        # Processors before memory: until their MSRs are reset, KVM goes on writing steal time and clocks to where the old
        # kernel wanted them, at every ioctl of a vCPU, and that may be the middle of the new initrd.
        self._built().reset_processors(self.boot)
        for region in self.memory.regions:
            if self._incoming is not None and region.host.fd < 0:
                region.host.unmap_files()
                if not self.config.dump_guest_core:
                    region.host.dont_dump()
            else:
                region.host.discard()
        if self.boot is not None:
            self.boot.load(self.memory)

    def vcpu_thread_ids(self) -> list[int]:
        """Kernel thread ids, in the order of the vCPUs."""
        return self._built().thread_ids()

    def _built(self) -> Accelerator:
        if self.accelerator is None:
            raise StateError("this", "not built", CREATED)
        return self.accelerator

    def close(self) -> None:
        """Stop the vCPUs and iothreads, write out what consoles still hold, give back terminal and sockets."""
        if self.accelerator is not None:
            try:
                self.accelerator.stop()
            except HostError as error:
                log.error(str(error))
        for iothread in self.iothreads.values():
            try:
                iothread.stop()
            except StateError as error:
                log.error(str(error))
        for chardev in (*self.chardevs.values(), self.serial_chardev):
            if chardev is not None:
                chardev.close()

    def close_behind(self) -> None:
        """When the process ends, nobody shall be kept waiting for what is taken apart."""
        self._built().close_behind()

    def _on_balloon(self, guest_bytes: int) -> None:
        self.events.emit("BALLOON_CHANGED", {"actual": guest_bytes})

    # -- what the guest asks for, on vCPU threads

    def _guest_asks(self, what: Callable[[], None]) -> None:
        """Let the main loop call `what`. Until it has, more of the same is not heard: no guest fills the loop's queue."""
        if self._asked is None:
            self._asked = what
            self.loop.call_soon(self._answer)

    def _answer(self) -> None:
        if self._asked is not None:  # else a reset came first
            self._asked()

    def _guest_reset(self) -> None:
        self._guest_asks(self._do_guest_reset)

    def _do_guest_reset(self) -> None:
        if self.state not in (RUNNING, PAUSED):
            return
        if self.config.reboot_action == "reset" and (self._incoming is None or self.boot is not None):
            self.reset(guest=True)
        else:
            self.shutdown(True, "guest-reset")

    def _guest_power_off(self) -> None:
        self._guest_asks(lambda: self.shutdown(True, "guest-shutdown"))

    def _on_vcpu_exit(self, vcpu: KvmVcpu, why: str, errno: int) -> None:
        if why == run_loop.SYSTEM_RESET:
            self._guest_reset()
        elif why == run_loop.TRIPLE_FAULT:
            self._guest_asks(self._on_triple_fault)
        elif why == run_loop.SYSTEM_SHUTDOWN:
            self._guest_power_off()
        else:
            self.loop.call_soon(lambda: self._on_fatal_exit(vcpu, errno))

    def _on_fatal_exit(self, vcpu: KvmVcpu, errno: int) -> None:
        from stratovirt.hypervisor.kvm.exits import describe

        self._fail(describe(vcpu, self.memory, errno))

    def _on_triple_fault(self) -> None:
        if self.config.reboot_action == "reset":
            self._do_guest_reset()
        else:
            self.shutdown(True, "guest-shutdown")

    def _on_iothread_failure(self) -> None:
        self._fail("an iothread has failed: its devices are dead")

    def _fail(self, text: str) -> None:
        for line in text.splitlines():
            log.error(line)
        self.shutdown(False, "internal-error", 1)
