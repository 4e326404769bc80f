"""Disks and network cables that come and go under unmodified Linux: what is plugged in is there, and nothing is left behind."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from linux_guest import DEADLINE, Guest

MEBIBYTE = 1 << 20
ROUNDS = 20
MARK = b"written by the guest"

# /dev/vda, where this script lies, is under load throughout. For each disk that comes into slot 1: its size, checksum and
# serial number, then a mark at its end.
FOLLOW = f"""
(while [ ! -f /tmp/end ]; do
    dd if=/dev/vda of=/dev/null bs=64k count=32 iflag=direct 2>/dev/null || echo "vda failed"
    dd if=/dev/zero of=/dev/vda bs=64k count=8 seek=4 oflag=direct 2>/dev/null || echo "vda failed"
done) &
size() {{ cat /sys/block/vdb/size; }}
pause() {{ sleep 0.05 2>/dev/null || sleep 1; }}
echo "empty $(size)"
round=0
while [ $round -lt {ROUNDS} ]; do
    while [ "$(size)" = 0 ]; do pause; done
    sectors=$(size)
    sum=$(md5sum </dev/vdb)
    echo "in $sectors ${{sum%% *}} $(cat /sys/block/vdb/serial)"
    printf '{MARK.decode()}' >/tmp/mark
    dd if=/tmp/mark of=/dev/vdb bs=512 seek=$((sectors - 1)) conv=sync,notrunc,fsync 2>/dev/null && echo written
    while [ "$(size)" != 0 ]; do pause; done
    head -c 512 /dev/vdb | wc -c
    echo "out $round"
    round=$((round + 1))
done
touch /tmp/end
wait
"""


def blank(path: Path, mebibytes: int = 8) -> Path:
    with open(path, "wb") as file:
        file.truncate(mebibytes * MEBIBYTE)
    return path


# A kernel command line has no room for a long command.
RUN_THE_DISK = "head -c 4096 /dev/vda | tr -d '\\0' >/tmp/script; sh /tmp/script"


def with_script(path: Path, script: str) -> Path:
    """An image of 8 MiB that begins with a script."""
    blank(path)
    with open(path, "r+b") as file:
        file.write(script.encode())
    return path


def wait_lines(guest: Guest, start: str, count: int) -> str:
    """The rest of the line that begins with `start`, the `count`th of them."""
    guest.wait_for(f"{start} ".encode(), stream=guest.stdout, count=count)
    found = [line for line in guest.stdout.decode().splitlines(keepends=True) if line.startswith(f"{start} ")]
    while not found[count - 1].endswith("\n"):
        guest.wait_for(b"\n", stream=guest.stdout, count=guest.stdout.count(b"\n") + 1)
        found = [line for line in guest.stdout.decode().splitlines(keepends=True) if line.startswith(f"{start} ")]
    return found[count - 1].removeprefix(start).strip()


@pytest.mark.parametrize("kernel", [pytest.param("stock-elf", marks=pytest.mark.long), "small-elf"])
def test_a_disk_comes_and_goes_twenty_times_under_load_on_another(
    boot: Callable[..., Guest], tmp_path: Path, kernel: str
) -> None:
    guest = boot(kernel, RUN_THE_DISK, smp=2, disk=with_script(tmp_path / "root", FOLLOW), qmp=True)
    guest.execute("query-status")
    assert wait_lines(guest, "empty", 1) == "0"
    for number in range(ROUNDS):
        image = tmp_path / f"image{number}"
        content = hashlib.sha512(str(number).encode()).digest() * ((1 + number % 3) * MEBIBYTE // 64)
        image.write_bytes(content)
        name = f"drive-{number:016x}"
        guest.execute("blockdev-add", **{
            "driver": "raw", "node-name": name, "read-only": False,
            "file": {"driver": "file", "filename": str(image), "aio": ("threads", "io_uring", "off")[number % 3]},
            "cache": {"direct": False}})
        guest.execute("device_add", id=name, driver="virtio-blk-mmio", drive=name, addr="1", romfile="", serial=f"n{number}")
        answer = wait_lines(guest, "in", number + 1)
        assert answer.split() == [str(len(content) // 512), hashlib.md5(content).hexdigest(), f"n{number}"]
        guest.wait_for(b"written\n", stream=guest.stdout, count=number + 1)
        guest.execute("device_del", id=name)
        assert guest.wait_event("DEVICE_DELETED")["data"] == {"device": name, "path": name}
        assert image.read_bytes() == content[:-512] + MARK.ljust(512, b"\0")
        image.unlink()
        assert wait_lines(guest, "out", number + 1) == str(number)
    status, output = guest.finish()
    assert status == 0
    assert "vda failed" not in output
    assert output.count("\n0\n") == ROUNDS  # nothing can be read from an empty drive
    assert "Traceback" not in guest.errors


def test_slots_are_names_in_the_guest(boot: Callable[..., Guest], tmp_path: Path) -> None:
    """Kata tells the guest which node to wait for: slot n is the disk with letter n, whatever was plugged before."""
    guest = boot("small-elf", "while [ $(cat /sys/block/vdd/size) = 0 ]; do sleep 1; done\n"
                 "for name in a b c d; do echo $name $(cat /sys/block/vd$name/size); done",
                 disk=blank(tmp_path / "root"), qmp=True)
    for slot, size in ((2, 5), (1, 6), (3, 7)):
        path = blank(tmp_path / f"image{slot}", size)
        guest.execute("blockdev-add", **{"node-name": f"n{slot}", "file": {"driver": "file", "filename": str(path)},
                                         "cache": {"direct": False}})
        guest.execute("device_add", id=f"n{slot}", driver="virtio-blk-mmio", drive=f"n{slot}", addr=hex(slot))
    status, output = guest.finish()
    sizes = dict(line.split() for line in output.splitlines())
    assert (status, sizes) == (0, {"a": "16384", "b": str(6 * 2048), "c": str(5 * 2048), "d": str(7 * 2048)})


def test_a_read_only_image_cannot_be_written(boot: Callable[..., Guest], tmp_path: Path) -> None:
    image = blank(tmp_path / "image", 1)
    guest = boot("small-elf", "while [ $(cat /sys/block/vda/size) = 0 ]; do sleep 1; done\n"
                 "echo x | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null && echo written\n"
                 "head -c 512 /dev/vda | wc -c", qmp=True)
    guest.execute("blockdev-add", **{"node-name": "n", "read-only": True, "file": {"driver": "file", "filename": str(image)},
                                     "cache": {"direct": False}})
    guest.execute("device_add", id="n", driver="virtio-blk-device", drive="n")
    assert guest.finish() == (0, "512\n")
    assert image.read_bytes() == bytes(MEBIBYTE)


def test_a_disk_stays_in_its_slot_over_a_reset(boot: Callable[..., Guest], tmp_path: Path) -> None:
    guest = boot("small-elf", "while [ $(cat /sys/block/vdb/size) = 0 ]; do sleep 1; done; echo there; sleep 1000",
                 disk=blank(tmp_path / "root"), qmp=True)
    path = blank(tmp_path / "image", 1)
    guest.execute("blockdev-add", **{"node-name": "n", "file": {"driver": "file", "filename": str(path)},
                                     "cache": {"direct": False}})
    guest.execute("device_add", id="d", driver="virtio-blk-device", drive="n", addr="1")
    guest.wait_for(b"there\n", stream=guest.stdout)
    guest.execute("system_reset")
    guest.wait_for(b"there\n", stream=guest.stdout, count=2)
    guest.execute("device_del", id="d")
    guest.execute("quit")
    assert guest.wait_end() == 0


# -- network

HOST, GUEST = "10.78.0.1", "10.78.0.2"
CARRIER = f"""
ip link set eth0 up
ip addr add {GUEST}/24 dev eth0
round=0
while [ $round -lt 10 ]; do
    while [ "$(cat /sys/class/net/eth0/carrier)" != 1 ]; do sleep 1; done
    ping -c 2 -W 20 {HOST} >/dev/null && echo "up $round"
    while [ "$(cat /sys/class/net/eth0/carrier)" != 0 ]; do sleep 1; done
    echo "down $round"
    round=$((round + 1))
done
"""


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=DEADLINE)


@pytest.fixture
def tap() -> Iterator[str]:
    if not os.path.exists("/dev/net/tun"):
        pytest.skip("this host has no /dev/net/tun")
    name = "stratoplug0"
    run("ip", "tuntap", "add", name, "mode", "tap")
    run("ip", "addr", "add", f"{HOST}/24", "dev", name)
    run("ip", "link", "set", name, "up")
    yield name
    subprocess.run(["ip", "link", "del", name], check=False, capture_output=True, timeout=DEADLINE)


@pytest.mark.parametrize("kernel", [pytest.param("stock-elf", marks=pytest.mark.long), "small-elf"])
def test_a_network_cable_comes_and_goes_ten_times(boot: Callable[..., Guest], tap: str, kernel: str) -> None:
    guest = boot(kernel, CARRIER, qmp=True)
    for number in range(10):
        guest.execute("netdev_add", id="net0", type="tap", ifname=tap)
        guest.execute("device_add", id="net0", driver="virtio-net-mmio", netdev="net0", addr="0")
        assert wait_lines(guest, "up", number + 1) == str(number)
        guest.execute("device_del", id="net0")
        assert guest.wait_event("DEVICE_DELETED")["data"]["device"] == "net0"
        assert wait_lines(guest, "down", number + 1) == str(number)
    assert guest.finish()[0] == 0
