"""Every form of kernel boots to its init, with every processor, and finds every device exactly once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from linux_guest import SERIAL, Guest

LOOK = f"""
echo processors $(nproc) $(grep -c ^processor /proc/cpuinfo)
for device in /sys/bus/virtio/devices/*; do echo device $(cat $device/device); done
echo disks $(ls -d /sys/class/block/vd*)
echo mark $(head -c 15 /dev/vda)
echo random $(cat /sys/class/misc/hw_random/rng_current) $(head -c 64 /dev/hwrng | wc -c)
echo serial $(grep -c {SERIAL} /proc/consoles)
echo lines $(grep -c virtio /proc/interrupts)
echo input $(ls /sys/class/tty | grep -c '^{SERIAL[:-1]}[0-9]')
"""


@pytest.mark.parametrize("smp", [1, 2, 4])
@pytest.mark.parametrize("kernel", ["stock-bzimage", "stock-elf", "small-elf"])
def test_boots_to_init_and_sees_its_devices(boot: Callable[..., Guest], disk: Path, kernel: str, smp: int) -> None:
    status, output = boot(kernel, LOOK, smp=smp, disk=disk).finish()
    lines = output.splitlines()
    assert status == 0
    assert f"processors {smp} {smp}" in lines
    assert sorted(line for line in lines if line.startswith("device")) == ["device 0x0002", "device 0x0004"]
    assert "disks /sys/class/block/vda" in lines
    assert "mark stratovirt disk" in lines
    assert "random virtio_rng.0 64" in lines
    assert "serial 1" in lines


@pytest.mark.parametrize("kernel", [
    "stock-gzip", *(pytest.param(f"small-{size}k-pages", marks=pytest.mark.long) for size in (16, 64)),
])
def test_an_image_in_every_form(boot: Callable[..., Guest], disk: Path, kernel: str) -> None:
    """Packed with gzip, and with pages of 16 and 64 KiB; stolen time lies in memory that is kept from each of them."""
    status, output = boot(kernel, LOOK + "getconf PAGESIZE 2>/dev/null || grep -m1 KernelPageSize /proc/self/smaps\n", smp=2,
                          disk=disk, extra=("-cpu", "host,kvm-steal-time=on")).finish()
    assert status == 0
    assert "processors 2 2" in output.splitlines() and "mark stratovirt disk" in output.splitlines()
    size = kernel.partition("-")[2].partition("k-")[0] if "pages" in kernel else "4"
    assert f"KernelPageSize: {size} kB" in " ".join(output.split())


@pytest.mark.parametrize("kernel", ["small-bzimage", "small-flat"])
def test_other_forms_of_the_small_kernel(boot: Callable[..., Guest], disk: Path, kernel: str) -> None:
    status, output = boot(kernel, LOOK, smp=2, disk=disk).finish()
    assert status == 0
    assert "processors 2 2" in output.splitlines()
    assert output.count("device 0x0002") == 1 and output.count("device 0x0004") == 1


def test_a_kernel_mounts_its_root_disk_without_initramfs_tools(boot: Callable[..., Guest], disk: Path) -> None:
    status, output = boot(
        "stock-elf",
        "mount -t ext4 /dev/vda /mnt && ls /mnt/sbin/bootport && echo x >/mnt/new && cat /mnt/new",
        disk=disk,
    ).finish()
    assert (status, output) == (0, "/mnt/sbin/bootport\nx\n")


@pytest.mark.parametrize("kernel", ["stock-elf", "small-elf"])
def test_a_stock_boot_sits_through_no_probe(boot: Callable[..., Guest], kernel: str) -> None:
    """No driver of a legacy device complains, and none waits: the largest gap between two kernel messages is short.

    The gap is measured on the guest's own clock and compared with the time-outs it would show (i8042: 5 s, RTC: 10 s).
    """
    status, output = boot(kernel, "dmesg", words="").finish()
    assert status == 0
    assert "i8042: Can't read CTR" not in output and "i8042: No controller found" not in output
    stamps = [float(line[1:].split("]")[0]) for line in output.splitlines() if line.startswith("[")]
    gaps = [later - earlier for earlier, later in itertools.pairwise(stamps)]
    assert max(gaps) < 4.0


def test_output_of_every_byte_passes_the_serial_port(boot: Callable[..., Guest]) -> None:
    every_byte = r'i=0; while [ $i -lt 256 ]; do printf "\\$(printf %03o $i)"; i=$((i + 1)); done'
    guest = boot("small-elf", f"{every_byte}; printf 'problem' >&2; exit 42")
    status = guest.wait_end()
    assert status == 0
    assert bytes(guest.stdout) == bytes(range(256))
    assert bytes(guest.stderr) == b"problem"
    assert guest._decoder.finish() == 42


def test_a_shell_on_the_serial_port(boot: Callable[..., Guest]) -> None:
    guest = boot("small-elf")
    guest.wait_for(b"A shell in the guest")
    guest.type("echo $((6 * 7)) answer\n")
    guest.wait_for(b"42 answer")
    # More than the receive FIFO and any buffer behind it: nothing is lost, in order.
    text = "0123456789" * 90
    guest.type(f"cat >/tmp/in <<EOF\n{text}\nEOF\nmd5sum </tmp/in\n")
    import hashlib

    guest.wait_for(hashlib.md5(f"{text}\n".encode()).hexdigest().encode())
    guest.type("exit\n")
    assert guest.wait_end() == 0
