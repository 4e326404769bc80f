"""ACPI tables: found and checked as a kernel does, and taken apart and put together again by ACPICA's own compiler."""

from __future__ import annotations

import shutil
import struct
import subprocess

import pytest

from stratovirt.arch.x86_64 import layout
from stratovirt.firmware import acpi, mptable

CASES = [(1, 0, False), (1, 0, True), (1, 1, True), (2, 6, True), (254, 11, True), (254, 11, False)]


def configuration(processors: int, slots: int, serial: bool) -> acpi.AcpiConfig:
    apic_ids = list(range(processors))
    return acpi.AcpiConfig(
        apic_ids, layout.LAPIC, layout.IOAPIC, mptable.ioapic_id(apic_ids),
        (layout.KEYBOARD_CONTROLLER_PORT, layout.KEYBOARD_CONTROLLER_RESET),
        (layout.SLEEP_CONTROL_PORT, layout.SLEEP_STATUS_PORT, layout.SLEEP_TYPE_S5),
        (layout.SERIAL_PORT, layout.SERIAL_PORTS, layout.SERIAL_IRQ) if serial else None,
        [(slot.number, slot.acpi_base, layout.VIRTIO_MMIO_SIZE, slot.irq) for slot in map(layout.slot, range(slots))],
        (layout.GENERATION_ID, layout.GENERATION_IRQ) if slots else None,
    )


def find_tables(blob: bytes, base: int) -> dict[bytes, bytes]:
    """Every table, by signature, reached from the RSDP at `base`; addresses, lengths and checksums are checked."""

    def at(address: int, size: int) -> bytes:
        assert base <= address
        assert address + size <= base + len(blob)
        return blob[address - base : address - base + size]

    def table(address: int) -> bytes:
        data = at(address, struct.unpack("<I", at(address + 4, 4))[0])
        assert sum(data) & 0xFF == 0
        assert data[10:16] == b"STRATO"
        assert data[16:24] == b"VIRT" + data[:4]
        return data

    rsdp = at(base, 36)
    assert rsdp[:8] == b"RSD PTR "
    assert sum(rsdp[:20]) & 0xFF == 0
    assert sum(rsdp) & 0xFF == 0
    assert rsdp[15] == 2
    assert struct.unpack_from("<I", rsdp, 20)[0] == 36
    xsdt = table(struct.unpack_from("<Q", rsdp, 24)[0])
    tables = {xsdt[:4]: xsdt}
    for address, in struct.iter_unpack("<Q", xsdt[36:]):
        found = table(address)
        tables[found[:4]] = found
    dsdt, x_dsdt = struct.unpack_from("<I", tables[b"FACP"], 40)[0], struct.unpack_from("<Q", tables[b"FACP"], 140)[0]
    assert dsdt == x_dsdt
    tables[b"DSDT"] = table(dsdt)
    return tables


@pytest.mark.parametrize(("processors", "slots", "serial"), CASES)
def test_every_table_is_found_from_the_rsdp(processors, slots, serial):
    blob = acpi.build(configuration(processors, slots, serial), layout.ACPI_TABLES)
    assert len(blob) <= layout.FIRMWARE_END - layout.ACPI_TABLES
    assert set(find_tables(blob, layout.ACPI_TABLES)) == {b"XSDT", b"FACP", b"APIC", b"DSDT"}


def test_the_fadt_declares_a_hardware_reduced_machine_with_reset_and_sleep_ports():
    fadt = find_tables(acpi.build(configuration(1, 0, True), 0xE_0000), 0xE_0000)[b"FACP"]
    assert (len(fadt), fadt[8], fadt[131]) == (276, 6, 3)
    flags, = struct.unpack_from("<I", fadt, 112)
    assert flags >> 20 & 1
    assert flags >> 10 & 1
    boot_flags, = struct.unpack_from("<H", fadt, 109)
    assert boot_flags >> 5 & 1  # no CMOS clock
    assert boot_flags & 3 == 0  # no legacy devices, no 8042
    assert struct.unpack_from("<BBBBQ", fadt, 116) == (1, 8, 0, 1, 0x64)
    assert fadt[128] == 0xFE
    assert struct.unpack_from("<BBBBQ", fadt, 244) == (1, 8, 0, 1, 0xCE9)
    assert struct.unpack_from("<BBBBQ", fadt, 256) == (1, 8, 0, 1, 0xCEA)
    assert fadt[36:40] == bytes(4)  # no FACS
    assert layout.SLEEP_POWER_OFF == 0x34


@pytest.mark.parametrize("processors", [1, 2, 254])
def test_the_madt_has_every_processor_and_the_ioapic(processors):
    madt = find_tables(acpi.build(configuration(processors, 0, True), 0xE_0000), 0xE_0000)[b"APIC"]
    assert struct.unpack_from("<I", madt, 36)[0] == 0xFEE0_0000
    entries: dict[int, list[bytes]] = {}
    position = 44
    while position < len(madt):
        entries.setdefault(madt[position], []).append(madt[position : position + madt[position + 1]])
        position += madt[position + 1]
    assert position == len(madt)
    assert set(entries) == {0, 1, 4}
    assert [(entry[2], entry[3], entry[4]) for entry in entries[0]] == [(n, n, 1) for n in range(processors)]
    ioapic, = entries[1]
    assert struct.unpack_from("<BxII", ioapic, 2) == (mptable.ioapic_id(list(range(processors))), 0xFEC0_0000, 0)
    assert entries[4] == [b"\x04\x06\xff\0\0\x01"]


def test_apic_ids_may_have_gaps_and_uids_do_not():
    config = configuration(1, 0, True)
    config.processors = [0, 1, 4, 5]
    madt = acpi.madt(config)
    assert [tuple(madt[44 + 8 * n : 48 + 8 * n]) for n in range(4)] == [(0, 8, 0, 0), (0, 8, 1, 1), (0, 8, 2, 4), (0, 8, 3, 5)]


def test_an_address_that_no_kernel_would_find_is_a_mistake():
    with pytest.raises(ValueError, match="16-byte aligned"):
        acpi.build(configuration(1, 0, True), 0xE_0008)


@pytest.mark.skipif(shutil.which("iasl") is None, reason="NO iasl: ACPI TABLES ARE NOT COMPILED AGAIN; install acpica-tools")
@pytest.mark.parametrize(("processors", "slots", "serial"), CASES)
def test_iasl_takes_the_tables_apart_and_compiles_them_again(tmp_path, processors, slots, serial):
    def iasl(*arguments: str) -> str:
        done = subprocess.run(["iasl", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
        output = done.stdout + done.stderr
        assert done.returncode == 0, output
        assert "Error " not in output, output
        assert "Warning " not in output, output
        assert "invalid" not in output.lower(), output
        return output

    tables = find_tables(acpi.build(configuration(processors, slots, serial), 0xE_0000), 0xE_0000)
    for signature, data in tables.items():
        name = signature.decode()
        (tmp_path / f"{name}.dat").write_bytes(data)
        iasl("-d", f"{name}.dat")
        assert "0 Errors, 0 Warnings, 0 Remarks" in iasl("-p", name, f"{name}.dsl")
        again = (tmp_path / f"{name}.aml").read_bytes()
        # the same table but for who compiled it, and the checksum over that
        assert again[:9] + again[10:28] + again[36:] == data[:9] + data[10:28] + data[36:]

    source = (tmp_path / "DSDT.dsl").read_text()
    assert source.count('Name (_HID, "LNRO0005")') == slots
    assert ("PNP0501" in source) == serial
    assert "Name (_S5, Package" in source
    for slot in map(layout.slot, range(slots)):
        assert f"0x{slot.acpi_base:08X}," in source
        assert f"0x{slot.irq:08X}," in source
