"""virtio over MMIO, version 2 (VIRTIO 1.2, 4.2): the register protocol of one slot.

    offset  name              access      offset     name                access
    000     MagicValue        R           050        QueueNotify         W (in the kernel: ioeventfd)
    004     Version           R           060        InterruptStatus     R
    008     DeviceID          R           064        InterruptACK        W
    00c     VendorID          R           070        Status              RW
    010/014 DeviceFeatures    R / Sel W   080-0a4    Queue addresses     W
    020/024 DriverFeatures    W / Sel W   0ac-0bc    shared memory       W / R (none: length is all ones)
    030     QueueSel          W           0fc        ConfigGeneration    R
    034     QueueNumMax       R           100-1ff    config space        RW
    038     QueueNum          W
    044     QueueReady        RW

A slot is decoded in two windows, one announced on the kernel command line and one by ACPI. The window whose driver first
acknowledges the device has it; the other then shows DeviceID 0, which drivers pass over in silence (4.2.2.2), until
the owner resets the device. So a kernel that reads both announcements finds each device once.

Threads: registers on vCPU threads, under `_lock` while they change state; `notify_*` and `needs_reset` on the device's loop.
"""

from __future__ import annotations

import os
from _thread import allocate_lock

from stratovirt.errors import GuestError
from stratovirt.loop import READ
from stratovirt.virtio.device import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1
from stratovirt.virtio.queue import Virtqueue, check_geometry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from stratovirt.loop import EventLoop
    from stratovirt.memory import GuestMemory
    from stratovirt.snapshot.saved import Saved
    from stratovirt.virtio.device import VirtioDevice

    class InterruptLine(Protocol):
        @property
        def fd(self) -> int:
            """An eventfd, each write to which does the same as `trigger`."""

        def trigger(self) -> None:
            """Raise an edge-triggered interrupt."""


MAGIC = 0x74726976  # "virt"
VERSION = 2
CONFIG_SPACE = 0x100
WINDOW_SIZE = 0x200
QUEUE_NOTIFY = 0x050
INTERRUPT_ACK = 0x064

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, DEVICE_NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
_DRIVER_BITS = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED

_U32 = 0xFFFF_FFFF

INTERRUPT_USED = 1
INTERRUPT_CONFIG = 2


class _QueueSetup:
    """What the driver has told about one queue so far."""

    __slots__ = ("addresses", "ready", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.ready = False
        self.addresses = [0, 0, 0, 0, 0, 0]  # desc low, high, driver low, high, device low, high

    def rings(self) -> tuple[int, int, int]:
        low_high = self.addresses
        return (low_high[0] | low_high[1] << 32, low_high[2] | low_high[3] << 32, low_high[4] | low_high[5] << 32)


_ADDRESS_REGISTERS = {0x080: 0, 0x084: 1, 0x090: 2, 0x094: 3, 0x0A0: 4, 0x0A4: 5}


class VirtioMmio:
    """The transport of one slot. `interrupt` is the slot's line; `on_error` hears of every GuestError, for the log."""

    def __init__(self, device: VirtioDevice, memory: GuestMemory, interrupt: InterruptLine,
                 on_error: Callable[[GuestError], None]) -> None:
        self.device = device
        self.memory = memory
        self.interrupt = interrupt
        self.on_error = on_error
        self.notify_fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in device.queue_sizes]
        self.windows = (Window(self), Window(self))
        device.transport = self
        self.acks_vanish = False  # KVM swallows the acknowledgement of INTERRUPT_USED alone
        self._lock = allocate_lock()
        self._clear()

    def _clear(self) -> None:
        self.owner: Window | None = None
        self.status = 0
        self.broken = False  # DEVICE_NEEDS_RESET; apart from `status`, which vCPUs store and the loop must not
        self.config_generation = 0
        self._device_features_sel = 0
        self._driver_features_sel = 0
        self._driver_features = 0
        self._queue_sel = 0
        self._queues = [_QueueSetup(size) for size in self.device.queue_sizes]
        # Two flags and not one register: each is stored whole, by the loop and by vCPUs, without a lock.
        self._used_pending = False
        self._config_pending = False

    # -- registers

    def read(self, window: Window, offset: int, size: int) -> int:
        """A register or config space as `window` shows it. Registers are 4 bytes wide; other widths read as zero."""
        if offset >= CONFIG_SPACE:
            return self.device.read_config(offset - CONFIG_SPACE, size)
        if size != 4 or offset & 3:
            return 0
        if offset == 0x060:
            used = self._used_pending or self.device.others_interrupt  # those set no flag here, and any interrupt may be theirs
            if self.acks_vanish and self.status & DRIVER_OK:
                used = True  # one too many does no harm: the driver looks at its queues
            return (INTERRUPT_USED if used else 0) | (INTERRUPT_CONFIG if self._config_pending else 0)
        if offset == 0x070:
            return self.status | (DEVICE_NEEDS_RESET if self.broken else 0)
        if offset == 0x000:
            return MAGIC
        if offset == 0x004:
            return VERSION
        if offset == 0x008:
            return self.device.device_id if self.owner in (None, window) else 0
        if offset == 0x010:
            select = self._device_features_sel
            return (self.device.features >> (32 * select)) & 0xFFFF_FFFF if select < 2 else 0
        if offset == 0x034:
            sizes = self.device.queue_sizes
            return sizes[self._queue_sel] if self._queue_sel < len(sizes) else 0
        if offset == 0x044:
            return int(self._queue_sel < len(self._queues) and self._queues[self._queue_sel].ready)
        if offset in (0x0B0, 0x0B4, 0x0B8, 0x0BC):
            return 0xFFFF_FFFF  # no shared memory region: its length is all ones (4.2.2.1)
        if offset == 0x0FC:
            return self.config_generation
        return 0

    def write(self, window: Window, offset: int, size: int, value: int) -> None:
        """Store to a register. Writes through a window that does not have the device go nowhere."""
        if self.owner not in (None, window):
            return
        if offset >= CONFIG_SPACE:
            self.device.write_config(offset - CONFIG_SPACE, size, value)
            return
        if size != 4 or offset & 3:
            return
        if offset == INTERRUPT_ACK:
            if value & INTERRUPT_USED:
                self._used_pending = False
            if value & INTERRUPT_CONFIG:
                self._config_pending = False
        elif offset == QUEUE_NOTIFY:
            if value < len(self.notify_fds):
                self.requeue(value)
        elif offset == 0x070:
            with self._lock:
                self._write_status(window, value)
        elif offset == 0x014:
            self._device_features_sel = value
        elif offset == 0x024:
            self._driver_features_sel = value
        elif offset == 0x030:
            self._queue_sel = value
        else:
            with self._lock:
                self._write_setup(offset, value)

    def _write_setup(self, offset: int, value: int) -> None:
        """Registers that only count while the driver sets the device up: after DRIVER_OK they are frozen."""
        if offset == 0x020:
            if self.status & (DRIVER | FEATURES_OK | FAILED) == DRIVER and self._driver_features_sel < 2:
                shift = 32 * self._driver_features_sel
                self._driver_features = self._driver_features & ~(0xFFFF_FFFF << shift) | value << shift
            return
        if self.status & (DRIVER_OK | FEATURES_OK) != FEATURES_OK or self._queue_sel >= len(self._queues):
            return
        queue = self._queues[self._queue_sel]
        if offset == 0x044:
            self._set_ready(queue, value & 1 == 1)
        elif queue.ready:
            return
        elif offset == 0x038:
            if 0 < value <= self.device.queue_sizes[self._queue_sel] and not value & (value - 1):
                queue.size = value
        elif offset in _ADDRESS_REGISTERS:
            queue.addresses[_ADDRESS_REGISTERS[offset]] = value

    def _set_ready(self, queue: _QueueSetup, ready: bool) -> None:
        if ready and not queue.ready:
            try:
                check_geometry(self.device.name, self.memory, queue.size, *queue.rings())
            except GuestError as error:
                self.needs_reset(error)
                return
        queue.ready = ready

    # -- status

    def _write_status(self, window: Window, value: int) -> None:
        if value == 0:
            self.device.reset()
            self._clear()
            return
        if self.owner is None:
            self.owner = window
        status = self.status | value & _DRIVER_BITS  # bits are only ever set, but for a reset
        if status & FEATURES_OK and not self.status & FEATURES_OK and not self._accept_features():
            status &= ~FEATURES_OK
        if status & DRIVER_OK and not self.status & DRIVER_OK:
            if self.broken or status & (FEATURES_OK | FAILED) != FEATURES_OK:
                status &= ~DRIVER_OK
            else:
                self.status = status
                self._activate()
                return
        self.status = status

    def _accept_features(self) -> bool:
        """Only what was offered, and never the legacy interface (VIRTIO 1.2, 2.2.2 and 6.1)."""
        wanted = self._driver_features
        return not wanted & ~self.device.features and bool(wanted >> F_VERSION_1 & 1)

    def _activate(self) -> None:
        device, features = self.device, self._driver_features
        device.driver_features = features
        try:
            queues = self._make_queues()
        except GuestError as error:
            self.needs_reset(error)
            return
        device.activate(queues)
        for number, queue in enumerate(queues):
            if queue is not None:
                self.requeue(number)  # buffers may have been made available before DRIVER_OK

    def _make_queues(self) -> list[Virtqueue | None]:
        features = self._driver_features
        return [Virtqueue(
            f"{self.device.name} queue {number}", self.memory, setup.size, *setup.rings(),
            event_idx=bool(features >> F_EVENT_IDX & 1), indirect=bool(features >> F_INDIRECT_DESC & 1),
        ) if setup.ready else None for number, setup in enumerate(self._queues)]

    # -- snapshots, in a machine that stands still

    def save(self) -> dict[str, object]:
        """Registers and rings, and under `device` what the device has. Raises: HostError."""
        rings = self.device.queues if self.device.active else []
        queues = []
        for number, setup in enumerate(self._queues):
            ring = rings[number] if number < len(rings) else None
            queues.append({"size": setup.size, "ready": setup.ready, "addresses": setup.addresses,
                           "position": ring.position if ring is not None else 0})
        return {
            "window": self.windows.index(self.owner) if self.owner is not None else -1,
            "status": self.status, "broken": self.broken, "config_generation": self.config_generation,
            "device_features_sel": self._device_features_sel, "driver_features_sel": self._driver_features_sel,
            "driver_features": self._driver_features, "queue_sel": self._queue_sel,
            "used_pending": self._used_pending, "config_pending": self._config_pending,
            "queues": queues, "device": self.device.save(),
        }

    def restore(self, state: Saved) -> None:
        """Take over what `save` gave, in a slot that is as after power-on, and let the device work. Raises: SnapshotError."""
        device = self.device
        window = state.integer("window", -1, len(self.windows) - 1)
        self.owner = self.windows[window] if window >= 0 else None
        self.status, self.broken = state.integer("status", 0, _DRIVER_BITS), state.boolean("broken")
        self.config_generation = state.integer("config_generation", 0, _U32)
        self._device_features_sel = state.integer("device_features_sel", 0, _U32)
        self._driver_features_sel = state.integer("driver_features_sel", 0, _U32)
        self._queue_sel = state.integer("queue_sel", 0, _U32)
        self._driver_features = features = state.integer("driver_features")
        self._used_pending, self._config_pending = state.boolean("used_pending"), state.boolean("config_pending")
        own = state.section("device")
        lacking = device.lacks(features, own)
        if self.status & FEATURES_OK and lacking:
            raise state.error("driver_features", f"the guest's driver uses {features:#x}, and {device.provider} lacks "
                              f"{lacking:#x} of that")
        positions = self._restore_queues(state)
        state.end()
        device.driver_features = features if self.status & FEATURES_OK else 0
        if self.status & DRIVER_OK and not self.broken:
            try:
                queues = self._make_queues()
            except GuestError as error:
                raise state.error("queues", str(error)) from error
            for queue, position in zip(queues, positions, strict=True):
                if queue is not None:
                    queue.seek(position)
            device.activate(queues)
        device.restore(own)
        own.end()
        if device.active:
            for number, setup in enumerate(self._queues):
                if setup.ready:
                    self.requeue(number)  # a notification may have been on its way
        # So may an interrupt: one too many does no harm, the driver looks at InterruptStatus.
        if device.active and device.external_queues:
            self._used_pending = True
        if self._used_pending or self._config_pending:
            self.interrupt.trigger()

    def _restore_queues(self, state: Saved) -> list[int]:
        """Set the queues up; the positions of their rings."""
        saved = state.sections("queues")
        if len(saved) != len(self._queues):
            raise state.error("queues", f"{len(saved)} of them, and the device has {len(self._queues)}")
        positions: list[int] = []
        for setup, most, section in zip(self._queues, self.device.queue_sizes, saved, strict=True):
            setup.size, setup.ready = section.integer("size", 1, most), section.boolean("ready")
            if setup.size & (setup.size - 1):
                raise section.error("size", f"{setup.size} is not a power of two")
            addresses = section.integers("addresses", 0, _U32, len(setup.addresses))
            if len(addresses) != len(setup.addresses):
                raise section.error("addresses", f"not {len(setup.addresses)} numbers")
            setup.addresses = addresses
            positions.append(section.integer("position", 0, 0xFFFF))
            section.end()
        return positions

    # -- for the device

    @property
    def interrupt_fd(self) -> int:
        return self.interrupt.fd

    def notify_used(self) -> None:
        if self.status & DRIVER_OK:
            self._used_pending = True
            self.interrupt.trigger()

    def notify_config(self) -> None:
        self.config_generation = (self.config_generation + 1) & 0xFFFF_FFFF
        if self.status & DRIVER_OK:
            self._config_pending = True
            self.interrupt.trigger()

    def needs_reset(self, error: GuestError) -> None:
        self.broken = True
        self.on_error(error)
        self.notify_config()

    def requeue(self, index: int) -> None:
        os.eventfd_write(self.notify_fds[index], 1)

    # -- for the machine

    def replace_device(self, device: VirtioDevice, loop: EventLoop) -> None:
        """Another device in this slot, with queues like those of the present one and for its driver, which is told that the
        config space has changed. Thread: `loop`, which owns both.
        """
        with self._lock:
            old = self.device
            queues = old.hand_over()
            for index, fd in enumerate(self.notify_fds):
                before, after = old.loop_of(index) or loop, device.loop_of(index) or loop
                if before is not after:
                    before.remove(fd)
                    after.add(fd, READ, lambda _events, index=index: self.on_notify(index))  # type: ignore[misc]
            old.transport, device.transport = None, self
            device.driver_features = old.driver_features
            self.device = device
            if old.is_paused:
                device.pause()
            if queues:
                device.activate(queues)
        self.notify_config()
        self.notify_used()  # nobody knows any more what the old one has told the driver
        for index in range(len(self.notify_fds)):
            self.requeue(index)

    def on_notify(self, index: int) -> None:
        """The notification of a queue arrived on its eventfd. Thread: the device's loop."""
        device = self.device
        if device.shares_notifications:
            if not device.take_notification(index):
                return
        else:
            try:
                os.eventfd_read(self.notify_fds[index])
            except BlockingIOError:
                return  # drained already
        device.process(index)

    def reset(self) -> None:
        """Machine reset. Thread: any, while vCPUs are paused."""
        with self._lock:
            self.device.reset()
            self._clear()


class Window:
    """One of the two places where a slot's registers appear. An IoDevice."""

    __slots__ = ("transport",)

    def __init__(self, transport: VirtioMmio) -> None:
        self.transport = transport

    def read(self, offset: int, size: int) -> int:
        return self.transport.read(self, offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self.transport.write(self, offset, size, value)
