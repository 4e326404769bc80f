"""A KVM virtual machine: memory slots, the in-kernel interrupt chips and timer, irqfd and ioeventfd.

Facts the callers rely on:
- A memory slot that is registered before the interrupt chips exist costs 0.1 ms; afterwards KVM waits for an SRCU grace
  period, 7 ms, unless that has passed meanwhile: after some 20 ms it is 0.2 ms. So memory comes first, or much later.
- An irqfd on an edge-triggered GSI raises and lowers the line for each event: one interrupt, no acknowledgement needed.
- An ioeventfd swallows the matching guest write in the kernel: the vCPU does not leave the guest for longer than that.
"""

from __future__ import annotations

import fcntl
import posix
import struct

from stratovirt.errors import HostError
from stratovirt.hostmap import address_of, ioctl_address
from stratovirt.hypervisor.kvm import _uapi as uapi
from stratovirt.hypervisor.kvm.system import KvmSystem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.memory import RamRegion

_PIC_IMR = 8 + 2  # struct kvm_irqchip { u32 chip_id, pad; struct kvm_pic_state { u8 last_irr, irr, imr, ...; }; }


class IrqFd:
    """An edge-triggered interrupt line: one eventfd write is one interrupt. Thread: any."""

    __slots__ = ("fd", "gsi")

    def __init__(self, fd: int, gsi: int) -> None:
        self.fd = fd
        self.gsi = gsi

    def trigger(self) -> None:
        posix.eventfd_write(self.fd, 1)


class KvmVm:
    """One virtual machine. Raises: HostError from every call that KVM refuses."""

    def __init__(self, system: KvmSystem, kind: int = 0) -> None:
        self.system = system
        self.fd = system.create_vm(kind)
        self.slots: list[RamRegion] = []

    def _ioctl(self, name: str, request: int, argument: int | bytes | bytearray) -> int:
        try:
            if isinstance(argument, bytearray):
                return int(fcntl.ioctl(self.fd, request, argument, True))
            result = fcntl.ioctl(self.fd, request, argument)
            return result if isinstance(result, int) else 0
        except OSError as error:
            raise HostError.from_os(name, error) from error

    def add_memory(self, region: RamRegion) -> None:
        """Let the guest see `region`."""
        self._set_slot(len(self.slots), region, 0)
        self.slots.append(region)

    def _set_slot(self, number: int, region: RamRegion, flags: int) -> None:
        # struct kvm_userspace_memory_region { u32 slot, flags; u64 guest_phys_addr, memory_size, userspace_addr; }
        slot = struct.pack("<IIQQQ", number, flags, region.base, region.size, region.host.address)
        self._ioctl("KVM_SET_USER_MEMORY_REGION", uapi.KVM_SET_USER_MEMORY_REGION, slot)

    def log_writes(self, wanted: bool) -> None:
        """Keep a log of the pages that are written (`dirty_log.py`), in all slots, or none."""
        for number, region in enumerate(self.slots):
            self._set_slot(number, region, uapi.KVM_MEM_LOG_DIRTY_PAGES if wanted else 0)

    def read_log(self, slot: int, bitmap: bytearray) -> None:
        address, _anchor = address_of(bitmap)
        # struct kvm_dirty_log { u32 slot, padding; u64 dirty_bitmap; }
        self._ioctl("KVM_GET_DIRTY_LOG", uapi.KVM_GET_DIRTY_LOG, struct.pack("<IIQ", slot, 0, address))

    def clear_log(self, slot: int, pages: int, bitmap: bytearray) -> None:
        address, _anchor = address_of(bitmap)
        # struct kvm_clear_dirty_log { u32 slot, num_pages; u64 first_page, dirty_bitmap; }
        self._ioctl("KVM_CLEAR_DIRTY_LOG", uapi.KVM_CLEAR_DIRTY_LOG, bytearray(struct.pack("<IIQQ", slot, pages, 0, address)))

    def enable_capability(self, capability: int, argument: int) -> None:
        # struct kvm_enable_cap { u32 cap, flags; u64 args[4]; u8 pad[64]; }
        self._ioctl("KVM_ENABLE_CAP", uapi.KVM_ENABLE_CAP, struct.pack("<IIQ24x64x", capability, 0, argument))

    def remove_memory(self) -> None:
        """Take all of it away again."""
        while self.slots:
            self.slots.pop()
            nothing = struct.pack("<IIQQQ", len(self.slots), 0, 0, 0, 0)
            self._ioctl("KVM_SET_USER_MEMORY_REGION", uapi.KVM_SET_USER_MEMORY_REGION, nothing)

    def create_interrupt_chips(self, identity_map_address: int, tss_address: int) -> None:
        """PIC, IOAPIC and local APICs in the kernel. The two addresses are scratch pages for Intel processors."""
        self._ioctl("KVM_SET_IDENTITY_MAP_ADDR", uapi.KVM_SET_IDENTITY_MAP_ADDR, struct.pack("<Q", identity_map_address))
        try:
            ioctl_address(self.fd, uapi.KVM_SET_TSS_ADDR, tss_address)
        except OSError as error:
            raise HostError.from_os("KVM_SET_TSS_ADDR", error) from error
        self._ioctl("KVM_CREATE_IRQCHIP", uapi.KVM_CREATE_IRQCHIP, 0)
        # The PICs come up open, with vector base 0, and no firmware closes them here. A line that is raised before a kernel
        # has taken them over, or in one that never does (hardware-reduced ACPI), would arrive as an exception.
        for chip in (uapi.KVM_IRQCHIP_PIC_MASTER, uapi.KVM_IRQCHIP_PIC_SLAVE):
            state = self.get_interrupt_chip(chip)
            state[_PIC_IMR] = 0xFF
            self.set_interrupt_chip(state)

    def create_timer(self) -> None:
        """The 8254 timer in the kernel, with a dummy speaker port."""
        self._ioctl("KVM_CREATE_PIT2", uapi.KVM_CREATE_PIT2, struct.pack("<I60x", uapi.KVM_PIT_SPEAKER_DUMMY))

    def create_irqfd(self, gsi: int) -> IrqFd:
        """An eventfd that raises `gsi`."""
        fd = posix.eventfd(0, posix.EFD_CLOEXEC | posix.EFD_NONBLOCK)
        # struct kvm_irqfd { u32 fd, gsi, flags, resamplefd; u8 pad[16]; }
        self._ioctl("KVM_IRQFD", uapi.KVM_IRQFD, struct.pack("<IIII16x", fd, gsi, 0, 0))
        return IrqFd(fd, gsi)

    def add_ioeventfd(self, fd: int, address: int, length: int, datamatch: int) -> None:
        """Signal `fd` when the guest writes the `length`-byte value `datamatch` to the MMIO `address`."""
        self._ioeventfd(fd, address, length, datamatch, uapi.KVM_IOEVENTFD_FLAG_DATAMATCH)

    def _ioeventfd(self, fd: int, address: int, length: int, datamatch: int, flags: int) -> None:
        # struct kvm_ioeventfd { u64 datamatch, addr; u32 len; s32 fd; u32 flags; u8 pad[36]; }
        argument = struct.pack("<QQIiI36x", datamatch, address, length, fd, flags)
        self._ioctl("KVM_IOEVENTFD", uapi.KVM_IOEVENTFD, argument)

    def get_interrupt_chip(self, chip: int) -> bytearray:
        """struct kvm_irqchip of the master PIC, slave PIC or IOAPIC."""
        state = bytearray(uapi.SIZEOF_IRQCHIP)
        struct.pack_into("<I", state, 0, chip)
        self._ioctl("KVM_GET_IRQCHIP", uapi.KVM_GET_IRQCHIP, state)
        return state

    def set_interrupt_chip(self, state: bytearray) -> None:
        self._ioctl("KVM_SET_IRQCHIP", uapi.KVM_SET_IRQCHIP, state)

    def get_timer(self) -> bytearray:
        """struct kvm_pit_state2."""
        state = bytearray(uapi.SIZEOF_PIT2)
        self._ioctl("KVM_GET_PIT2", uapi.KVM_GET_PIT2, state)
        return state

    def set_timer(self, state: bytearray) -> None:
        self._ioctl("KVM_SET_PIT2", uapi.KVM_SET_PIT2, bytes(state))

    def get_clock(self) -> int:
        """What the guest's kvmclock says, in nanoseconds since the machine was made."""
        # struct kvm_clock_data { u64 clock; u32 flags, pad0; u64 realtime, host_tsc; u32 pad[4]; }
        state = bytearray(uapi.SIZEOF_CLOCK)
        self._ioctl("KVM_GET_CLOCK", uapi.KVM_GET_CLOCK, state)
        (clock,) = struct.unpack_from("<Q", state)
        return int(clock)

    def set_clock(self, nanoseconds: int) -> None:
        self._ioctl("KVM_SET_CLOCK", uapi.KVM_SET_CLOCK, struct.pack("<Q40x", nanoseconds))

    def create_vcpu(self, vcpu_id: int) -> int:
        """A file descriptor for a new vCPU; its local APIC id is `vcpu_id`."""
        return self._ioctl("KVM_CREATE_VCPU", uapi.KVM_CREATE_VCPU, vcpu_id)

    def close(self) -> None:
        posix.close(self.fd)
