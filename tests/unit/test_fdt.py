"""The device tree, as libfdt and dtc read it."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stratovirt.arch.aarch64 import layout
from stratovirt.errors import HostError
from stratovirt.firmware import fdt

try:
    LIBFDT = fdt.load_library()
except HostError:
    LIBFDT = None
pytestmark = pytest.mark.skipif(LIBFDT is None, reason="the bindings of libfdt are missing: install python3-libfdt")
MIB = 1 << 20


def config(**changes: Any) -> fdt.FdtConfig:
    values: dict[str, Any] = {
        "cpus": 2, "sockets": 1, "clusters": 1, "cores": 2, "threads": 1, "ram": layout.ram_ranges(256 * MIB),
        "gic": fdt.GICV3, "slots": [layout.slot(0), layout.slot(6)], "command_line": "console=ttyAMA0 quiet",
        "initrd": (0x4F00_0000, 12345), "serial": True, "pmu": False, "seed": bytes(range(72)),
    }
    return fdt.FdtConfig(**{**values, **changes})


class Tree:
    def __init__(self, data: bytes) -> None:
        assert LIBFDT is not None
        self.fdt = LIBFDT.Fdt(data)

    def get(self, path: str, name: str) -> bytes:
        return bytes(self.fdt.getprop(self.fdt.path_offset(path), name))

    def cells(self, path: str, name: str) -> list[int]:
        value = self.get(path, name)
        return list(struct.unpack(f">{len(value) // 4}I", value))

    def has(self, path: str) -> bool:
        assert LIBFDT is not None
        return bool(self.fdt.path_offset(path, LIBFDT.QUIET_ALL) >= 0)


CASES = {
    "one": {"cpus": 1, "cores": 1, "serial": False, "initrd": (0, 0), "slots": []},
    "its": {"gic": fdt.GICV3_ITS, "pmu": True},
    "gicv2": {"gic": fdt.GICV2, "cpus": 8, "sockets": 2, "clusters": 2, "cores": 2},
    "largest": {"cpus": 254, "cores": 127, "threads": 2, "gic": fdt.GICV3_ITS,
                "slots": [layout.slot(number) for number in range(layout.VIRTIO_SLOTS)], "ram": layout.ram_ranges(512 << 30)},
}


@pytest.mark.skipif(shutil.which("dtc") is None, reason="dtc is missing: install device-tree-compiler")
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_dtc_has_nothing_to_complain_of(tmp_path: Path, changes: dict[str, Any]) -> None:
    tree = fdt.build(config(**changes))
    assert len(tree) <= layout.FDT_LIMIT
    (tmp_path / "tree.dtb").write_bytes(tree)
    done = subprocess.run(["dtc", "-I", "dtb", "-O", "dts", "-o", "/dev/null", str(tmp_path / "tree.dtb")], capture_output=True,
                          text=True, check=False)
    complaints = [line for line in done.stderr.splitlines() if "unit_address_vs_reg" not in line or "Warning" in line]
    assert (done.returncode, complaints) == (0, [])


DT_VALIDATE = Path(sys.executable).parent / "dt-validate"


def dt_validate(tree: bytes, folder: Path) -> list[str]:
    """What the schemas of the devicetree project have to say about it, a line for each complaint."""
    (folder / "tree.dtb").write_bytes(tree)
    done = subprocess.run([DT_VALIDATE, folder / "tree.dtb"], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return [line for line in (done.stdout + done.stderr).splitlines() if "tree.dtb:" in line]


@pytest.mark.skipif(not DT_VALIDATE.exists(), reason="dt-validate is missing: pip install dtschema")
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_dt_validate_accepts_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    # psci: the schema of its one property is Linux's, not the devicetree project's.
    assert [line for line in dt_validate(fdt.build(config(**changes)), tmp_path) if ": psci " not in line] == []


@pytest.mark.skipif(not DT_VALIDATE.exists(), reason="dt-validate is missing: pip install dtschema")
def test_dt_validate_would_complain(tmp_path: Path) -> None:
    """The judge is awake: what no schema allows is named."""
    tree = fdt.build(config()).replace(b"cpu\0", b"upc\0")
    assert any("device_type" in line for line in dt_validate(tree, tmp_path))


def test_what_a_kernel_is_told() -> None:
    tree = Tree(fdt.build(config()))
    assert tree.get("/chosen", "bootargs") == b"console=ttyAMA0 quiet\0"
    assert tree.get("/chosen", "stdout-path") == b"/pl011@9000000\0"
    assert tree.cells("/chosen", "linux,initrd-start") == [0, 0x4F00_0000]
    assert tree.cells("/chosen", "linux,initrd-end") == [0, 0x4F00_0000 + 12345]
    assert tree.get("/chosen", "kaslr-seed") + tree.get("/chosen", "rng-seed") == bytes(range(72))
    assert tree.cells("/memory@40000000", "reg") == [0, 0x4000_0000, 0, 256 * MIB]
    assert tree.get("/psci", "method") == b"hvc\0"
    assert b"arm,psci-0.2\0" in tree.get("/psci", "compatible")
    assert tree.cells("/timer", "interrupts")[1::3] == [13, 14, 11, 10]
    assert tree.cells("/virtio_mmio@a000000", "interrupts") == [0, 32, 1]
    assert tree.cells("/virtio_mmio@a000c00", "reg") == [0, 0x0A00_0C00, 0, 0x200]
    assert tree.cells("/virtio_mmio@a000c00", "interrupts") == [0, 40, 1]
    assert tree.cells("/pl031@9010000", "interrupts") == [0, 38, 4]
    assert tree.cells("/pl011@9000000", "interrupts") == [0, 39, 4]
    assert not tree.has("/pmu") and not tree.has("/intc@8000000/its@8080000")


def test_the_generation_id_is_in_memory_that_the_kernel_leaves_alone() -> None:
    """Linux Documentation/devicetree/bindings/rng/microsoft,vmgenid.yaml; its driver maps the page as a device's."""
    tree = Tree(fdt.build(config()))
    assert tree.get("/rng@401f0000", "compatible") == b"microsoft,vmgenid\0"
    assert tree.cells("/rng@401f0000", "reg") == [0, 0x401F_0000, 0, 0x1_0000]
    assert tree.cells("/rng@401f0000", "interrupts") == [0, 16, 1]
    assert tree.cells("/reserved-memory/vmgenid@401f0000", "reg") == [0, 0x401F_0000, 0, 0x1_0000]
    assert tree.get("/reserved-memory/vmgenid@401f0000", "no-map") == b""
    assert not tree.has("/reserved-memory/pvtime@401e0000")
    tree = Tree(fdt.build(config(steal_time=True)))
    assert tree.cells("/reserved-memory/pvtime@401e0000", "reg") == [0, 0x401E_0000, 0, 0x1_0000]
    assert layout.FDT + layout.FDT_LIMIT == layout.STEAL_TIME
    assert layout.GENERATION_ID + layout.GENERATION_ID_SIZE == layout.KERNEL
    assert layout.GENERATION_ID % layout.GENERATION_ID_SIZE == 0


def test_a_machine_without_serial_port_and_initrd() -> None:
    tree = Tree(fdt.build(config(serial=False, initrd=(0, 0), seed=b"")))
    assert not tree.has("/pl011@9000000")
    for name in ("stdout-path", "linux,initrd-start", "rng-seed", "kaslr-seed"):
        assert not tree.fdt.hasprop(tree.fdt.path_offset("/chosen"), name) if hasattr(tree.fdt, "hasprop") else True


def test_the_interrupt_controllers() -> None:
    tree = Tree(fdt.build(config(gic=fdt.GICV2, cpus=3, cores=3)))
    assert tree.get("/intc@8000000", "compatible") == b"arm,cortex-a15-gic\0"
    assert tree.cells("/intc@8000000", "reg") == [0, 0x0800_0000, 0, 0x1_0000, 0, 0x0801_0000, 0, 0x1_0000]
    assert tree.cells("/timer", "interrupts")[2] == 0x704  # for three processors, level
    tree = Tree(fdt.build(config(gic=fdt.GICV3_ITS, cpus=130, cores=130, pmu=True)))
    assert tree.cells("/intc@8000000", "reg")[4:] == [0, 0x080A_0000, 0, 123 * 0x2_0000, 0x40, 0, 0, 7 * 0x2_0000]
    assert tree.cells("/intc@8000000/its@8080000", "reg") == [0, 0x0808_0000, 0, 0x2_0000]
    assert tree.cells("/pmu", "interrupts") == [1, 7, 4]


def test_processors_and_their_map() -> None:
    tree = Tree(fdt.build(config(cpus=17, sockets=1, cores=17)))
    assert tree.cells("/cpus/cpu@100", "reg") == [0, 0x100]  # the affinity that KVM gives the 17th
    assert tree.get("/cpus/cpu@0", "enable-method") == b"psci\0"
    tree = Tree(fdt.build(config(cpus=7, sockets=2, clusters=2, cores=1, threads=2)))
    assert tree.cells("/cpus/cpu-map/cluster1/cluster0/core0/thread1", "cpu") == tree.cells("/cpus/cpu@5", "phandle")
    assert tree.has("/cpus/cpu-map/cluster1/cluster1/core0/thread0")
    assert not tree.has("/cpus/cpu-map/cluster1/cluster1/core0/thread1")  # seven of eight are there
    tree = Tree(fdt.build(config(cpus=4, sockets=2, cores=2)))
    assert tree.cells("/cpus/cpu-map/cluster1/core1", "cpu") == tree.cells("/cpus/cpu@3", "phandle")


def test_a_host_without_the_bindings_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import site

    monkeypatch.setitem(sys.modules, "libfdt", None)
    monkeypatch.setattr(site, "getsitepackages", lambda prefixes=None: [])
    with pytest.raises(HostError, match="libfdt") as caught:
        fdt.build(config())
    assert "python3-libfdt" in caught.value.hint


def test_bindings_of_another_architecture_are_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment that a host of another architecture shares has a compiled module that cannot be loaded."""
    for name, text in (("foreign", "raise ImportError('wrong ELF class')"), ("own", "FdtSw = object")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "libfdt.py").write_text(text, encoding="ascii")
    monkeypatch.delitem(sys.modules, "libfdt", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "foreign"), *sys.path])
    monkeypatch.setattr("site.getsitepackages", lambda _prefixes: [str(tmp_path / "foreign"), str(tmp_path / "own")])
    try:
        assert fdt.load_library().__file__ == str(tmp_path / "own/libfdt.py")
    finally:
        sys.modules.pop("libfdt", None)
