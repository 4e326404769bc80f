"""The boot of an arm64 kernel: the Image, the FDT below it, start-up registers."""

from __future__ import annotations

import os

from stratovirt.arch.aarch64 import layout, registers
from stratovirt.errors import ConfigError
from stratovirt.firmware import fdt
from stratovirt.loader import arm64
from stratovirt.machine import boot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.arch.aarch64.layout import Slot
    from stratovirt.config.vm import VmConfig
    from stratovirt.hypervisor.kvm.arm64 import Arm64Vcpu
    from stratovirt.hypervisor.kvm.vcpu import KvmVcpu
    from stratovirt.memory import GuestMemory

_EARLY_CONSOLE = f" earlycon=pl011,mmio,0x{layout.SERIAL:08x}"
_SEED_SIZE, _GENERATION_SIZE = 64, 16


class Boot(boot.Boot):
    """`slots` and the interrupt controller are what the FDT announces. Raises: ConfigError as its base."""

    def __init__(self, config: VmConfig, slots: list[Slot], interrupt_controller: str) -> None:
        self._config = config
        self._slots = slots
        self._gic = interrupt_controller
        self._random = os.urandom(_SEED_SIZE + _GENERATION_SIZE)  # for the first boot
        fdt.load_library()  # a reset, which may be the first to use it, could not any more
        super().__init__(config, layout.ram_ranges(config.memory_size))
        self._command_line = command_line(config.kernel_cmdline + (_EARLY_CONSOLE if config.serial is not None else ""))

    def identify(self, path: str, ram: list[tuple[int, int]]) -> int:
        view = self._kernel_file.map()
        unpacked = arm64.unpack(view, path, self._ram_size)
        if unpacked is not None:
            self._kernel_file = boot.UnpackedFile(path, unpacked)
            view = self._kernel_file.map()
        self.kernel = self._image = arm64.identify_image(view, path, ram)
        return self.kernel.end

    def write_tables(self, memory: GuestMemory) -> None:
        smp = self._config.smp
        random, self._random = self._random or _fresh_random(), b""
        tree = fdt.build(fdt.FdtConfig(
            cpus=smp.cpus, sockets=smp.sockets, clusters=smp.clusters * smp.dies, cores=smp.cores, threads=smp.threads,
            ram=layout.ram_ranges(self._ram_size), gic=self._gic, slots=self._slots, command_line=self._command_line,
            initrd=self._initrd_at, serial=self._config.serial is not None, pmu=self._config.cpu_pmu,
            seed=random[_GENERATION_SIZE:], steal_time=self._config.cpu_steal_time,
        ))
        if len(tree) > layout.FDT_LIMIT:
            raise ConfigError(f"the device tree has {len(tree)} bytes, and there is room for {layout.FDT_LIMIT}",
                              option="-device")
        memory.write(layout.FDT, tree)
        memory.write(layout.GENERATION_ID, random[:_GENERATION_SIZE])  # a restored snapshot has another

    def enter(self, vcpu: KvmVcpu) -> None:
        arm64_vcpu: Arm64Vcpu = vcpu  # type: ignore[assignment]  # this architecture has no other
        self._check_page_size(arm64_vcpu)
        for register, value in registers.entry_state(self.kernel.entry, layout.FDT):
            arm64_vcpu.set_register(register, value)

    def _check_page_size(self, vcpu: Arm64Vcpu) -> None:
        """A kernel with pages that the processor has not got would go to sleep without a word."""
        size = self._image.page_size
        if size and not registers.has_page_size(vcpu.get_register(registers.ID_AA64MMFR0_EL1), size):
            raise ConfigError(f"this kernel has pages of {size >> 10} KiB, which this host's processors have not",
                              option="-kernel", value=self.kernel.path, accepted="a kernel with pages of 4 KiB")


def _fresh_random() -> bytes:
    """For a boot after a reset."""
    from stratovirt.snapshot.state_file import random_bytes

    return random_bytes(_SEED_SIZE + _GENERATION_SIZE)


def command_line(text: str) -> str:
    """The kernel's command line, checked. Raises: ConfigError when it is longer than what the kernel reads."""
    data = text.encode("utf-8", "surrogateescape")
    if len(data) > layout.COMMAND_LINE_LIMIT:
        raise ConfigError(f"the kernel command line is {len(data)} bytes long with what the machine adds, "
                          f"and this kernel reads {layout.COMMAND_LINE_LIMIT}", option="-append")
    if 0 in data:
        raise ConfigError("the kernel command line contains a zero byte", option="-append")
    return text
