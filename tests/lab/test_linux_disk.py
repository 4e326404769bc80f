"""What a guest writes to its disk is in the image, byte for byte, and a read-only disk stays as it is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from linux_guest import Guest

MEBIBYTE = 1 << 20
BLOCKS = 256
FILL = b"stratovirt 0123456789abcdef\n"

# 256 blocks of 1 MiB, each begun by its number. A third of them bypasses the page cache.
WRITE = f"""
yes '{FILL.decode().strip()}' | head -c {MEBIBYTE - 16} >/tmp/fill
i=0
while [ $i -lt {BLOCKS} ]; do
    printf '%015d\\n' $i >/tmp/block
    cat /tmp/fill >>/tmp/block
    flags=; [ $((i % 3)) != 0 ] || flags=oflag=direct
    dd if=/tmp/block of=/dev/vda bs=1M count=1 seek=$i conv=notrunc $flags 2>/dev/null || exit 1
    i=$((i + 1))
done
sync
"""


@pytest.mark.parametrize(("kernel", "smp"), [("stock-elf", 2), ("small-elf", 1)])
def test_256_mib_written_by_the_guest_are_on_the_image(
    boot: Callable[..., Guest], tmp_path: Path, kernel: str, smp: int
) -> None:
    image = tmp_path / "image"
    with open(image, "wb") as file:
        file.truncate(BLOCKS * MEBIBYTE)
    status, _ = boot(kernel, WRITE, smp=smp, disk=image, end="poweroff" if kernel == "stock-elf" else "reboot").finish(900)
    assert status == 0
    fill = (FILL * (MEBIBYTE // len(FILL) + 1))[: MEBIBYTE - 16]
    assert image.stat().st_size == BLOCKS * MEBIBYTE
    with open(image, "rb") as file:
        for number in range(BLOCKS):
            block = file.read(MEBIBYTE)
            assert block == b"%015d\n" % number + fill, f"block {number} differs"
    image.unlink()


def test_the_guest_reads_what_the_image_holds(boot: Callable[..., Guest], tmp_path: Path) -> None:
    image = tmp_path / "image"
    content = b"".join(hashlib.sha512(number.to_bytes(8, "little")).digest() for number in range(16 * MEBIBYTE // 64))
    image.write_bytes(content)
    status, output = boot(
        "small-elf", "md5sum </dev/vda; dd if=/dev/vda bs=1M iflag=direct 2>/dev/null | md5sum", disk=image
    ).finish()
    digest = hashlib.md5(content).hexdigest()
    assert (status, [line.split()[0] for line in output.splitlines()]) == (0, [digest, digest])


@pytest.mark.parametrize("kernel", ["stock-elf", "small-elf"])
def test_a_read_only_disk_refuses_writes(boot: Callable[..., Guest], disk: Path, kernel: str) -> None:
    before = hashlib.sha256(disk.read_bytes()).digest()
    command = (
        "cat /sys/block/vda/ro; dd if=/dev/zero of=/dev/vda bs=4096 count=1 2>/dev/null; echo dd $?;"
        "blockdev --setrw /dev/vda; dd if=/dev/zero of=/dev/vda bs=4096 count=1 oflag=direct 2>/dev/null; echo forced $?;"
        "head -c 15 /dev/vda"
    )
    status, output = boot(kernel, command, disk=disk, read_only=True).finish()
    lines = output.splitlines()
    assert status == 0
    assert lines[0] == "1"
    assert lines[1].startswith("dd ") and lines[1] != "dd 0"
    assert lines[2].startswith("forced ") and lines[2] != "forced 0"
    assert lines[3] == "stratovirt disk"
    assert hashlib.sha256(disk.read_bytes()).digest() == before
