"""The flattened device tree: all that an arm64 kernel without ACPI knows of its machine.

Made with the bindings of libfdt (Debian's python3-libfdt, pylibfdt on PyPI), which only an arm64 machine needs: nothing is
imported before `build` is called.
Spec: Devicetree Specification 0.4; Linux Documentation/devicetree/bindings.
"""

from __future__ import annotations

import struct
import sys

from stratovirt.arch.aarch64 import layout
from stratovirt.arch.aarch64.registers import mpidr
from stratovirt.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from stratovirt.arch.aarch64.layout import Slot

_GIC_PHANDLE, _ITS_PHANDLE, _CLOCK_PHANDLE = 1, 2, 3
_FIRST_CPU_PHANDLE = 0x100
_SPI, _PPI = 0, 1
_EDGE_RISING, _LEVEL_HIGH = 1, 4
_CLOCK_HZ = 24_000_000
_KASLR_SEED = 8  # bytes
_GICV2_CPU_MASK_SHIFT = 8

GICV2, GICV3, GICV3_ITS = "gicv2", "gicv3", "gicv3-its"


class FdtConfig:
    """What the tree describes. `gic` is one of GICV2, GICV3 and GICV3_ITS; `initrd` is (address, size), size 0 for none."""

    __slots__ = ("clusters", "command_line", "cores", "cpus", "gic", "initrd", "pmu", "ram", "seed", "serial", "slots",
                 "sockets", "steal_time", "threads")

    def __init__(self, *, cpus: int, sockets: int, clusters: int, cores: int, threads: int, ram: list[tuple[int, int]],
                 gic: str, slots: list[Slot], command_line: str, initrd: tuple[int, int], serial: bool, pmu: bool,
                 seed: bytes, steal_time: bool = False) -> None:
        self.cpus = cpus
        self.sockets = sockets
        self.clusters = clusters
        self.cores = cores
        self.threads = threads
        self.ram = ram
        self.gic = gic
        self.slots = slots
        self.command_line = command_line
        self.initrd = initrd
        self.serial = serial
        self.pmu = pmu
        self.steal_time = steal_time
        self.seed = seed  # random bytes, for where the kernel lies and for its generator; b"" for none


def build(config: FdtConfig) -> bytes:
    """The tree as it goes into memory. Raises: HostError when libfdt's bindings are missing."""
    tree = _Tree(load_library().FdtSw())
    with tree.node(""):
        tree.strings("compatible", "linux,dummy-virt")
        tree.strings("model", "linux,dummy-virt")
        tree.cells("#address-cells", 2)
        tree.cells("#size-cells", 2)
        tree.cells("interrupt-parent", _GIC_PHANDLE)
        _chosen(tree, config)
        for base, size in config.ram:
            with tree.node(f"memory@{base:x}"):
                tree.strings("device_type", "memory")
                tree.wide("reg", base, size)
        _reserved_memory(tree, config)
        _cpus(tree, config)
        with tree.node("psci"):
            tree.strings("compatible", "arm,psci-1.0", "arm,psci-0.2")
            tree.strings("method", "hvc")
        _interrupt_controller(tree, config)
        _timers(tree, config)
        _platform(tree, config)
        for slot in config.slots:
            with tree.node(f"virtio_mmio@{slot.base:x}"):
                tree.strings("compatible", "virtio,mmio")
                tree.wide("reg", slot.base, layout.VIRTIO_MMIO_SIZE)
                tree.cells("interrupts", _SPI, slot.irq, _EDGE_RISING)
    return tree.finish()


def load_library() -> Any:
    """libfdt, from wherever it is installed: a start without site-packages looks there only now, and only for this."""
    from importlib import import_module

    try:
        return import_module("libfdt")
    except ImportError:
        import site

    for directory in site.getsitepackages([sys.prefix, sys.base_prefix, "/usr"]):
        sys.path.insert(0, directory)  # before the one that has just failed: a module of another architecture, say
        try:
            return import_module("libfdt")
        except ImportError:
            sys.modules.pop("libfdt", None)
        finally:
            sys.path.remove(directory)
    raise HostError("the Python bindings of libfdt are missing", 0,
                    "install the Debian package python3-libfdt, or pylibfdt with pip")


class _Tree:
    """libfdt's sequential writer, with the kinds of values that a tree has."""

    def __init__(self, writer: Any) -> None:
        writer.INC_SIZE = 1 << 16  # it starts all over with so much more room when it has run out of it
        self._writer = writer
        writer.finish_reservemap()

    def node(self, name: str) -> Any:
        """A context in which the node's properties and children are written."""
        return self._writer.add_node(name)

    def strings(self, name: str, *values: str) -> None:
        self.data(name, b"".join(value.encode("utf-8", "surrogateescape") + b"\0" for value in values))

    def cells(self, name: str, *values: int) -> None:
        self.data(name, struct.pack(f">{len(values)}I", *values))

    def wide(self, name: str, *values: int) -> None:
        """Numbers of two cells each."""
        self.data(name, struct.pack(f">{len(values)}Q", *values))

    def data(self, name: str, value: bytes = b"") -> None:
        self._writer.property(name, value)

    def finish(self) -> bytes:
        tree = self._writer.as_fdt()
        tree.pack()
        return bytes(tree.as_bytearray())


def _chosen(tree: _Tree, config: FdtConfig) -> None:
    with tree.node("chosen"):
        tree.strings("bootargs", config.command_line)
        if config.serial:
            tree.strings("stdout-path", f"/pl011@{layout.SERIAL:x}")
        address, size = config.initrd
        if size:
            tree.wide("linux,initrd-start", address)
            tree.wide("linux,initrd-end", address + size)
        if config.seed:
            tree.data("kaslr-seed", config.seed[:_KASLR_SEED])
            tree.data("rng-seed", config.seed[_KASLR_SEED:])


def _reserved_memory(tree: _Tree, config: FdtConfig) -> None:
    """The generation ID and stolen time lie in RAM, where the kernel must not map them, for those who use them do."""
    region = layout.GENERATION_ID, layout.GENERATION_ID_SIZE
    with tree.node("reserved-memory"):
        tree.cells("#address-cells", 2)
        tree.cells("#size-cells", 2)
        tree.data("ranges")
        if config.steal_time:
            with tree.node(f"pvtime@{layout.STEAL_TIME:x}"):  # KVM itself says where it is, by a hypercall
                tree.wide("reg", layout.STEAL_TIME, layout.STEAL_TIME_SIZE)
                tree.data("no-map")
        with tree.node(f"vmgenid@{region[0]:x}"):
            tree.wide("reg", *region)
            tree.data("no-map")
    with tree.node(f"rng@{region[0]:x}"):
        tree.strings("compatible", "microsoft,vmgenid")
        tree.wide("reg", *region)
        tree.cells("interrupts", _SPI, layout.GENERATION_IRQ, _EDGE_RISING)


def _cpus(tree: _Tree, config: FdtConfig) -> None:
    with tree.node("cpus"):
        tree.cells("#address-cells", 2)
        tree.cells("#size-cells", 0)
        with tree.node("cpu-map"):
            _cpu_map(tree, config)
        for index in range(config.cpus):
            with tree.node(f"cpu@{mpidr(index):x}"):
                tree.strings("device_type", "cpu")
                tree.strings("compatible", "arm,armv8")
                if config.cpus > 1:
                    tree.strings("enable-method", "psci")
                tree.wide("reg", mpidr(index))
                tree.cells("phandle", _FIRST_CPU_PHANDLE + index)


def _cpu_map(tree: _Tree, config: FdtConfig) -> None:
    """Sockets are clusters, and so are the clusters in them; a level with one member only is left out, as kernels expect.

    Without threads a core is the leaf. What no processor fills is left out.
    """

    def level(first: int, names: list[tuple[str, int]]) -> None:
        name, count = names[0]
        below = 1
        for _, number in names[1:]:
            below *= number
        for index in range(count):
            start = first + index * below
            if start >= config.cpus:
                return
            with tree.node(f"{name}{index}"):
                if len(names) == 1:
                    tree.cells("cpu", _FIRST_CPU_PHANDLE + start)
                else:
                    level(start, names[1:])

    names = [("cluster", config.sockets), ("cluster", config.clusters), ("core", config.cores)]
    if 1 in (config.sockets, config.clusters):
        names[:2] = [("cluster", config.sockets * config.clusters)]
    level(0, names if config.threads == 1 else [*names, ("thread", config.threads)])


def _interrupt_controller(tree: _Tree, config: FdtConfig) -> None:
    with tree.node(f"intc@{layout.GIC_DISTRIBUTOR:x}"):
        v2 = config.gic == GICV2
        tree.strings("compatible", "arm,cortex-a15-gic" if v2 else "arm,gic-v3")
        tree.data("interrupt-controller")
        tree.cells("#interrupt-cells", 3)
        tree.cells("#address-cells", 2)
        tree.cells("#size-cells", 2)
        tree.data("ranges")
        tree.cells("phandle", _GIC_PHANDLE)
        distributor = (layout.GIC_DISTRIBUTOR, layout.GIC_DISTRIBUTOR_SIZE)
        if v2:
            tree.wide("reg", *distributor, layout.GICV2_CPU, layout.GICV2_CPU_SIZE)
        else:
            runs = layout.redistributors(config.cpus, sum(size for _, size in config.ram))
            room = [(base, layout.GIC_REDISTRIBUTOR_SIZE * count) for base, count in runs]
            tree.cells("#redistributor-regions", len(runs))
            tree.wide("reg", *distributor, *(value for pair in room for value in pair))
        tree.cells("interrupts", _PPI, layout.MAINTENANCE_PPI, _private(config, _LEVEL_HIGH))
        if config.gic == GICV3_ITS:
            with tree.node(f"its@{layout.GIC_ITS:x}"):
                tree.strings("compatible", "arm,gic-v3-its")
                tree.data("msi-controller")
                tree.cells("#msi-cells", 1)
                tree.wide("reg", layout.GIC_ITS, layout.GIC_ITS_SIZE)
                tree.cells("phandle", _ITS_PHANDLE)


def _private(config: FdtConfig, flags: int) -> int:
    """The flags of a private interrupt: with a GICv2 they also say which processors have it."""
    return flags | (1 << config.cpus) - 1 << _GICV2_CPU_MASK_SHIFT if config.gic == GICV2 else flags


def _timers(tree: _Tree, config: FdtConfig) -> None:
    with tree.node("timer"):
        tree.strings("compatible", "arm,armv8-timer")
        tree.data("always-on")
        flags = _private(config, _LEVEL_HIGH)
        tree.cells("interrupts", *(cell for ppi in layout.TIMER_PPIS for cell in (_PPI, ppi, flags)))
    if config.pmu:
        with tree.node("pmu"):
            tree.strings("compatible", "arm,armv8-pmuv3")
            tree.cells("interrupts", _PPI, layout.PMU_PPI, _private(config, _LEVEL_HIGH))


def _platform(tree: _Tree, config: FdtConfig) -> None:
    with tree.node("apb-pclk"):
        tree.strings("compatible", "fixed-clock")
        tree.cells("#clock-cells", 0)
        tree.cells("clock-frequency", _CLOCK_HZ)
        tree.strings("clock-output-names", "clk24mhz")
        tree.cells("phandle", _CLOCK_PHANDLE)
    with tree.node(f"pl031@{layout.RTC:x}"):
        tree.strings("compatible", "arm,pl031", "arm,primecell")
        tree.wide("reg", layout.RTC, layout.RTC_SIZE)
        tree.cells("interrupts", _SPI, layout.RTC_IRQ, _LEVEL_HIGH)
        tree.cells("clocks", _CLOCK_PHANDLE)
        tree.strings("clock-names", "apb_pclk")
    if config.serial:
        with tree.node(f"pl011@{layout.SERIAL:x}"):
            tree.strings("compatible", "arm,pl011", "arm,primecell")
            tree.wide("reg", layout.SERIAL, layout.SERIAL_SIZE)
            tree.cells("interrupts", _SPI, layout.SERIAL_IRQ, _LEVEL_HIGH)
            tree.cells("clocks", _CLOCK_PHANDLE, _CLOCK_PHANDLE)
            tree.strings("clock-names", "uartclk", "apb_pclk")
