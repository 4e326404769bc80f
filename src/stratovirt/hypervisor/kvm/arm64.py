"""What KVM has on arm64 alone: vCPUs with features and registers by number, devices with attributes, level interrupts.

Facts the callers rely on:
- A GIC is initialized after all vCPUs are made, and irqfds can be made only after that.
- KVM has a routing from GSI n to SPI n from the beginning.
- An irqfd raises its line and lowers it again at once: right for an edge, lost for a level that nobody has taken yet. What is
  level-triggered goes through KVM_IRQ_LINE.
- KVM_ARM_VCPU_INIT resets a vCPU that has run; the interface to the GIC is not part of it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from stratovirt.errors import ConfigError, HostError
from stratovirt.hostmap import address_of
from stratovirt.hypervisor.kvm import _uapi as common
from stratovirt.hypervisor.kvm import _uapi_arm64 as uapi
from stratovirt.hypervisor.kvm.system import KvmSystem
from stratovirt.hypervisor.kvm.vcpu import KvmVcpu
from stratovirt.hypervisor.kvm.vm import KvmVm

_DEFAULT_ADDRESS_BITS = 40
_MAX_REGISTERS = 1 << 16


class LevelLine:
    """A level-triggered interrupt line into the GIC. Thread: any."""

    __slots__ = ("_fd", "irq")

    def __init__(self, fd: int, irq: int) -> None:
        self._fd = fd
        self.irq = irq

    def set_level(self, high: bool) -> None:
        # struct kvm_irq_level { u32 irq; u32 level; }
        fcntl.ioctl(self._fd, uapi.KVM_IRQ_LINE, struct.pack("<II", self.irq, high))


class Arm64Vm(KvmVm):
    """A virtual machine whose physical addresses have `address_bits` bits. Raises: ConfigError when KVM has fewer."""

    def __init__(self, system: KvmSystem, address_bits: int) -> None:
        limit = system.check_extension(uapi.KVM_CAP_ARM_VM_IPA_SIZE) or _DEFAULT_ADDRESS_BITS
        if address_bits > limit:
            raise ConfigError(f"this needs physical addresses of {address_bits} bits, and this host's guests have {limit}",
                              option="-m", accepted=f"what ends below {1 << limit - 30} GiB of address space, from 1 GiB on")
        # 0 is 40 bits, which older kernels know alone
        super().__init__(system, 0 if limit == _DEFAULT_ADDRESS_BITS else max(32, min(limit, max(address_bits, 40))))

    def preferred_target(self) -> bytes:
        """struct kvm_vcpu_init { u32 target; u32 features[7]; } for the host's own processor, without features."""
        target = bytearray(32)
        self._ioctl("KVM_ARM_PREFERRED_TARGET", uapi.KVM_ARM_PREFERRED_TARGET, target)
        return bytes(target)

    def create_level_line(self, spi: int) -> LevelLine:
        return LevelLine(self.fd, uapi.KVM_ARM_IRQ_TYPE_SPI | spi + 32)

    def has_device(self, kind: int) -> bool:
        """Whether this KVM can make a device of that type. Nothing is made."""
        argument = bytearray(struct.pack("<III", kind, 0, uapi.KVM_CREATE_DEVICE_TEST))
        try:
            fcntl.ioctl(self.fd, uapi.KVM_CREATE_DEVICE, argument, True)
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.EINVAL, errno.ENXIO):
                return False
            raise HostError.from_os("KVM_CREATE_DEVICE", error) from error
        return True

    def create_device(self, name: str, kind: int) -> KvmDevice:
        # struct kvm_create_device { u32 type, fd, flags; }
        argument = bytearray(struct.pack("<III", kind, 0, 0))
        self._ioctl(f"KVM_CREATE_DEVICE {name}", uapi.KVM_CREATE_DEVICE, argument)
        return KvmDevice(name, struct.unpack_from("<I", argument, 4)[0])


class KvmDevice:
    """A device in the kernel, set up through attributes. Raises: HostError naming the device."""

    __slots__ = ("fd", "name")

    def __init__(self, name: str, fd: int) -> None:
        self.name = name
        self.fd = fd

    def set(self, group: int, attribute: int, value: bytes = b"") -> None:
        set_attribute(self.fd, self.name, group, attribute, value)

    def set_u32(self, group: int, attribute: int, value: int) -> None:
        self.set(group, attribute, struct.pack("<I", value))

    def set_u64(self, group: int, attribute: int, value: int) -> None:
        self.set(group, attribute, struct.pack("<Q", value))

    def get(self, group: int, attribute: int, size: int) -> bytes:
        """The attribute's value, which has `size` bytes."""
        return get_attribute(self.fd, self.name, group, attribute, size)

    def get_u32(self, group: int, attribute: int) -> int:
        return int.from_bytes(self.get(group, attribute, 4), "little")

    def get_u64(self, group: int, attribute: int) -> int:
        return int.from_bytes(self.get(group, attribute, 8), "little")

    def close(self) -> None:
        os.close(self.fd)


def get_attribute(fd: int, name: str, group: int, attribute: int, size: int) -> bytes:
    """The value of an attribute of a device, or of a vCPU. Raises: HostError."""
    buffer = bytearray(size)
    address, anchor = address_of(buffer)
    try:
        fcntl.ioctl(fd, uapi.KVM_GET_DEVICE_ATTR, struct.pack("<IIQQ", 0, group, attribute, address))
    except OSError as error:
        raise HostError.from_os(f"{name}: KVM_GET_DEVICE_ATTR {group}, {attribute:#x}", error) from error
    del anchor
    return bytes(buffer)


def set_attribute(fd: int, name: str, group: int, attribute: int, value: bytes = b"") -> None:
    """An attribute of a device, or of a vCPU. Raises: HostError."""
    buffer = bytearray(value)
    # struct kvm_device_attr { u32 flags, group; u64 attr, addr; }
    address, anchor = address_of(buffer) if value else (0, None)
    try:
        fcntl.ioctl(fd, uapi.KVM_SET_DEVICE_ATTR, struct.pack("<IIQQ", 0, group, attribute, address))
    except OSError as error:
        raise HostError.from_os(f"{name}: KVM_SET_DEVICE_ATTR {group}, {attribute:#x}", error) from error
    del anchor


class Arm64Vcpu(KvmVcpu):
    """One virtual processor. `init` makes it usable, and resets it later."""

    __slots__ = ()

    def init(self, target: bytes, features: int) -> None:
        """`target` from `preferred_target`; `features` is a mask of KVM_ARM_VCPU_*."""
        word = struct.pack("<I", struct.unpack_from("<I", target, 4)[0] | features)
        self._set("KVM_ARM_VCPU_INIT", uapi.KVM_ARM_VCPU_INIT, target[:4] + word + target[8:])

    def finalize(self, feature: int) -> None:
        """A feature that has to be settled before the vCPU runs. Raises: HostError."""
        self._set("KVM_ARM_VCPU_FINALIZE", uapi.KVM_ARM_VCPU_FINALIZE, struct.pack("<i", feature))

    def register_list(self) -> list[int]:
        """The numbers of all registers that this KVM has for it."""
        size = 1 << 10
        while True:
            # struct kvm_reg_list { u64 n; u64 reg[n]; }: what is missing for the room is said in n
            buffer = bytearray(struct.pack("<Q", size)) + bytes(8 * size)
            try:
                fcntl.ioctl(self.fd, uapi.KVM_GET_REG_LIST, buffer, True)
            except OSError as error:
                count = int.from_bytes(buffer[:8], "little")
                if error.errno == errno.E2BIG and size < count <= _MAX_REGISTERS:
                    size = count
                    continue
                raise HostError.from_os(f"KVM_GET_REG_LIST of vCPU {self.id}", error) from error
            count = int.from_bytes(buffer[:8], "little")
            return list(struct.unpack_from(f"<{count}Q", buffer, 8))

    def get_register(self, number: int) -> int:
        """A register of any size, as a number. Raises: HostError."""
        value = bytearray(register_size(number))
        address, anchor = address_of(value)
        self._set(f"KVM_GET_ONE_REG {number:#x}", uapi.KVM_GET_ONE_REG, struct.pack("<QQ", number, address))
        del anchor
        return int.from_bytes(value, "little")

    def set_register(self, number: int, value: int) -> None:
        data = bytearray(value.to_bytes(register_size(number), "little"))
        address, anchor = address_of(data)
        self._set(f"KVM_SET_ONE_REG {number:#x}", uapi.KVM_SET_ONE_REG, struct.pack("<QQ", number, address))
        del anchor

    def get_events(self) -> bytes:
        """struct kvm_vcpu_events of arm64: an SError that waits."""
        return bytes(self._get("KVM_GET_VCPU_EVENTS", common.KVM_GET_VCPU_EVENTS, common.SIZEOF_VCPU_EVENTS))

    def set_events(self, state: bytes) -> None:
        self._set("KVM_SET_VCPU_EVENTS", common.KVM_SET_VCPU_EVENTS, state)


def register_size(number: int) -> int:
    """How many bytes a register has: its number says so."""
    return 1 << (number >> 52 & 0xF)
