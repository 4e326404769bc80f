"""The boot of an x86_64 kernel: boot parameters or PVH start info, firmware tables, page tables, start-up registers."""

from __future__ import annotations

import posix

from stratovirt.arch.x86_64 import boot_params, layout, pvh, registers
from stratovirt.firmware import acpi, mptable
from stratovirt.loader.image import place
from stratovirt.loader.kernel import identify_kernel
from stratovirt.machine import boot
from stratovirt.machine.x86_64.processors import topology_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.arch.x86_64.layout import Slot
    from stratovirt.config.vm import VmConfig
    from stratovirt.hypervisor.kvm.vcpu import KvmVcpu
    from stratovirt.memory import GuestMemory


class Boot(boot.Boot):
    """`slots` are what the tables announce; there is one interrupt controller only. Raises: ConfigError as its base."""

    def __init__(self, config: VmConfig, slots: list[Slot], interrupt_controller: str) -> None:
        self._apic_ids = topology_of(config.smp).apic_ids
        self._slots = slots
        self._has_serial = config.serial is not None
        self._generation = posix.urandom(16)  # a restored snapshot has another (machine/snapshot.py)
        super().__init__(config, layout.ram_ranges(config.memory_size))
        words = layout.command_line_words(slots)
        self._command_line = boot_params.command_line(config.kernel_cmdline + words, self.kernel.cmdline_size)

    def identify(self, path: str, ram: list[tuple[int, int]]) -> int:
        self.kernel = identify_kernel(self._kernel_file.map(), path)
        return place(self.kernel, ram)

    def write_tables(self, memory: GuestMemory) -> None:
        self._write_firmware_tables(memory)
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

    def _write_firmware_tables(self, memory: GuestMemory) -> None:
        ids = self._apic_ids
        ioapic_id = mptable.ioapic_id(ids)
        memory.write(layout.MP_FLOATING_POINTER, mptable.floating_pointer(layout.MP_TABLE))
        memory.write(layout.MP_TABLE, mptable.configuration_table(ids, layout.LAPIC, layout.IOAPIC))
        tables = acpi.AcpiConfig(
            processors=ids, lapic=layout.LAPIC, ioapic=layout.IOAPIC, ioapic_id=ioapic_id,
            reset=(layout.KEYBOARD_CONTROLLER_PORT, layout.KEYBOARD_CONTROLLER_RESET),
            sleep=(layout.SLEEP_CONTROL_PORT, layout.SLEEP_STATUS_PORT, layout.SLEEP_TYPE_S5),
            serial=(layout.SERIAL_PORT, layout.SERIAL_PORTS, layout.SERIAL_IRQ) if self._has_serial else None,
            generation=(layout.GENERATION_ID, layout.GENERATION_IRQ),
            virtio=[(slot.number, slot.acpi_base, layout.VIRTIO_MMIO_SIZE, slot.irq) for slot in self._slots],
        )
        memory.write(layout.GENERATION_ID, self._generation)
        memory.write(layout.ACPI_TABLES, acpi.build(tables, layout.ACPI_TABLES))

    def enter(self, vcpu: KvmVcpu) -> None:
        sregs = vcpu.get_sregs()
        if self.kernel.protocol == "pvh":
            vcpu.set_sregs(registers.protected_mode_sregs(sregs))
            vcpu.set_regs(registers.pvh_regs(self.kernel.entry, layout.PVH_START_INFO))
        else:
            vcpu.set_sregs(registers.long_mode_sregs(sregs))
            vcpu.set_regs(registers.linux64_regs(self.kernel.entry, layout.ZERO_PAGE))
