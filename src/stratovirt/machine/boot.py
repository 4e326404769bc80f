"""What a guest finds in memory and registers when it starts: kernel, initrd, boot parameters and firmware tables.

The kernel file is mapped, not read: whole pages of its segments lie copy-on-write in guest RAM, and only the odd ends are
copied. Memory that is a file itself (`mem-share`, `-mem-path`) is read into instead. Everything is put in place again by
`load` after a reset.
"""

from __future__ import annotations

import mmap
import os
import stat

from stratovirt.arch.x86_64 import boot_params, layout, pvh, registers
from stratovirt.errors import ConfigError, HostError
from stratovirt.firmware import acpi, mptable
from stratovirt.hostmap import PAGE_SIZE
from stratovirt.loader.image import page_parts, place
from stratovirt.loader.kernel import identify_kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.arch.x86_64.layout import Slot
    from stratovirt.config.vm import VmConfig
    from stratovirt.hypervisor.kvm.vcpu import KvmVcpu
    from stratovirt.loader.image import Segment
    from stratovirt.memory import GuestMemory


class BootFile:
    """A kernel or initrd file, open for the life of the machine. Raises: ConfigError naming `option`."""

    __slots__ = ("fd", "path", "size")

    def __init__(self, path: str, option: str) -> None:
        self.path = path
        try:
            # O_NONBLOCK: opening a FIFO by mistake must not hang
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            why = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
            raise ConfigError(why, option=option, value=path, accepted="a readable regular file") from error
        status = os.fstat(self.fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(self.fd)
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise ConfigError(f"this is {kind}", option=option, value=path, accepted="a readable regular file")
        self.size = status.st_size

    def map(self) -> memoryview:
        """The whole file as read-only bytes."""
        if self.size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(self.fd, self.size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ))

    def read_into(self, view: memoryview, offset: int) -> None:
        """Copy part of the file straight into guest RAM."""
        while view:
            done = os.preadv(self.fd, [view], offset)
            if done == 0:
                raise HostError(f"{self.path} became shorter while it was read")
            view, offset = view[done:], offset + done


class Boot:
    """The boot of one machine: `apic_ids` and `slots` are what its tables announce.

    Raises: ConfigError when a file is not what its option says, or does not fit.
    """

    def __init__(self, config: VmConfig, apic_ids: list[int], slots: list[Slot]) -> None:
        self._apic_ids = apic_ids
        self._slots = slots
        self._has_serial = config.serial is not None
        self._ram_size = config.memory_size
        ram = layout.ram_ranges(config.memory_size)
        self._kernel_file = BootFile(config.kernel, "-kernel")
        self.kernel = identify_kernel(self._kernel_file.map(), config.kernel)
        kernel_end = place(self.kernel, ram)
        self._initrd_file: BootFile | None = None
        self._initrd_at = (0, 0)
        if config.initrd:
            self._open_initrd(config.initrd, ram, kernel_end)
        words = layout.command_line_words(slots)
        self._command_line = boot_params.command_line(config.kernel_cmdline + words, self.kernel.cmdline_size)

    def _open_initrd(self, path: str, ram: list[tuple[int, int]], kernel_end: int) -> None:
        from stratovirt.loader.initrd import identify_initrd, place_initrd

        file = BootFile(path, "-initrd")
        identify_initrd(file.map(), path)
        address = place_initrd(file.size, ram, self.kernel.initrd_addr_max, kernel_end, path)
        self._initrd_file = file
        self._initrd_at = (address, file.size)

    # -- memory

    def load(self, memory: GuestMemory) -> None:
        """Put everything into RAM, which is zero or holds an earlier load. Thread: main, while no vCPU runs."""
        for segment in self.kernel.segments:
            if memory.region(segment.address, segment.memory_size).fd >= 0:
                self._read_segment(memory, segment)
                continue
            parts = page_parts(segment)
            if parts.mapped is not None:
                self._map(memory, self._kernel_file, *parts.mapped)
            for offset, address, length in parts.copied:
                self._kernel_file.read_into(memory.slice(address, length), offset)
        if self._initrd_file is not None:
            address, size = self._initrd_at
            # Memory with a file of its own is shared with those who would not see a mapping of this process.
            whole = size & -PAGE_SIZE if memory.region(address, size).fd < 0 else 0
            if whole:
                self._map(memory, self._initrd_file, 0, address, whole)
            if size > whole:
                self._initrd_file.read_into(memory.slice(address + whole, size - whole), whole)
        self._write_tables(memory)
        memory.write(layout.COMMAND_LINE, self._command_line)
        e820 = layout.e820(self._ram_size)
        if self.kernel.protocol == "pvh":
            memory.write(layout.PVH_START_INFO, pvh.start_info(e820, self._initrd_at, layout.ACPI_TABLES))
        else:
            page = boot_params.zero_page(self.kernel.setup_header, e820, self._initrd_at, layout.ACPI_TABLES)
            memory.write(layout.ZERO_PAGE, page)
            for address, data in boot_params.page_tables():
                memory.write(address, data)
        for address, data in boot_params.descriptor_tables():
            memory.write(address, data)

    def _read_segment(self, memory: GuestMemory, segment: Segment) -> None:
        """Copy a segment into memory that has a file of its own, which may not have been empty."""
        view = memory.slice(segment.address, segment.memory_size)
        self._kernel_file.read_into(view[: segment.file_size], segment.file_offset)
        view[segment.file_size :] = bytes(segment.memory_size - segment.file_size)

    @staticmethod
    def _map(memory: GuestMemory, file: BootFile, offset: int, address: int, length: int) -> None:
        region = memory.region(address, length)
        region.host.map_file(address - region.base, file.fd, offset, length)

    def _write_tables(self, memory: GuestMemory) -> None:
        ids = self._apic_ids
        ioapic_id = mptable.ioapic_id(ids)
        memory.write(layout.MP_FLOATING_POINTER, mptable.floating_pointer(layout.MP_TABLE))
        memory.write(layout.MP_TABLE, mptable.configuration_table(ids, layout.LAPIC, layout.IOAPIC))
        tables = acpi.AcpiConfig(
            processors=ids, lapic=layout.LAPIC, ioapic=layout.IOAPIC, ioapic_id=ioapic_id,
            reset=(layout.KEYBOARD_CONTROLLER_PORT, layout.KEYBOARD_CONTROLLER_RESET),
            sleep=(layout.SLEEP_CONTROL_PORT, layout.SLEEP_STATUS_PORT, layout.SLEEP_TYPE_S5),
            serial=(layout.SERIAL_PORT, layout.SERIAL_PORTS, layout.SERIAL_IRQ) if self._has_serial else None,
            virtio=[(slot.number, slot.acpi_base, layout.VIRTIO_MMIO_SIZE, slot.irq) for slot in self._slots],
        )
        memory.write(layout.ACPI_TABLES, acpi.build(tables, layout.ACPI_TABLES))

    # -- registers

    def enter(self, vcpu: KvmVcpu) -> None:
        """Point the boot processor at the kernel's entry."""
        sregs = vcpu.get_sregs()
        if self.kernel.protocol == "pvh":
            vcpu.set_sregs(registers.protected_mode_sregs(sregs))
            vcpu.set_regs(registers.pvh_regs(self.kernel.entry, layout.PVH_START_INFO))
        else:
            vcpu.set_sregs(registers.long_mode_sregs(sregs))
            vcpu.set_regs(registers.linux64_regs(self.kernel.entry, layout.ZERO_PAGE))
