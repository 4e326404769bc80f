"""Ten clones of a Linux guest at once: files, disks, clocks, network and random numbers are right in each, and each its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from guest import assets
from linux_guest import DEADLINE, ROOT, Guest
from networks import run

CLONES = 10
FIRST = 0x10  # the last byte of the first clone's MAC address, and of its IP address
HOST = "10.78.0.1"
# Content in memory (a file of tmpfs) and on a disk, and then the word of whoever is at the console's other end. The time of the
# template's last line tells how long a clone believes to have slept.
WORK = f"""
dd if=/dev/urandom of=/tmp/data bs=64k count=16 2>/dev/null
sum=$(md5sum </tmp/data | cut -c1-32)
dd if=/tmp/data of=/dev/vda bs=64k oflag=direct 2>/dev/null
read before idle </proc/uptime
echo ready
read word </dev/hvc0
read after idle </proc/uptime
echo 3 >/proc/sys/vm/drop_caches
memory=$(md5sum </tmp/data | cut -c1-32)
disk=$(dd if=/dev/vda bs=64k count=16 iflag=direct 2>/dev/null | md5sum | cut -c1-32)
printf '%-512s' $word | dd of=/dev/vda bs=512 seek=4096 oflag=direct conv=notrunc 2>/dev/null
own=$(dd if=/dev/vda bs=512 skip=4096 count=1 iflag=direct 2>/dev/null | cut -d' ' -f1)
device=$(basename $(readlink -f /sys/class/net/eth0/device))
echo $device >/sys/bus/virtio/drivers/virtio_net/unbind
echo $device >/sys/bus/virtio/drivers/virtio_net/bind
mac=$(cat /sys/class/net/eth0/address)
ip link set eth0 up; ip addr add 10.78.0.$((0x${{mac##*:}}))/24 dev eth0
ping -c 3 -w 60 -q {HOST} >/dev/null && net=up
random=$(head -c 1024 /dev/hwrng | tail -c 64 | md5sum | cut -c1-32)  # the first were asked for ahead, by the template
echo "$word $sum $memory $disk $own $mac net-$net $random $before $after" >/dev/hvc0
read word </dev/hvc0
"""


@pytest.fixture
def taps() -> Iterator[list[str]]:
    """The template's, and one for each clone, with HOST at this end and a route to the clone's address."""
    taps = [f"clone{number}" for number in range(CLONES + 1)]
    try:
        for number, tap in enumerate(taps):
            run("ip", "tuntap", "add", "dev", tap, "mode", "tap")
            run("ip", "addr", "add", f"{HOST}/32", "dev", tap)
            run("ip", "link", "set", tap, "up")
            if number:
                run("ip", "route", "add", f"10.78.0.{FIRST + number - 1}/32", "dev", tap)
        yield taps
    finally:
        for tap in taps:
            subprocess.run(["ip", "link", "del", tap], check=False, capture_output=True)


class Clone:
    """The other end of a clone's console."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(DEADLINE)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("r", encoding="utf-8", errors="replace")

    def say(self, text: str) -> None:
        self._socket.sendall(f"{text}\n".encode())

    def line(self, begin: str) -> list[str]:
        """The words of the first line that begins so; a terminal gives back what is said to it, too."""
        while line := self._lines.readline():
            words = line.split()
            if words[:1] == [begin] and len(words) > 1:
                return words
        raise AssertionError(f"the console ends without {begin!r}")

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


@pytest.mark.long
def test_ten_clones(boot: Callable[..., Guest], tmp_path: Path, taps: list[str]) -> None:
    stratovirt = str(Path(sys.executable).parent / "stratovirt")
    image, sock = tmp_path / "image", tmp_path / "launcher"
    with open(image, "wb") as file:
        file.truncate(4 << 20)
    launcher = subprocess.Popen([stratovirt, "launcher", "--socket", str(sock)], cwd=ROOT, stdin=subprocess.DEVNULL)
    pids: list[int] = []
    clones: list[Clone] = []
    try:
        first = boot("stock-elf", WORK, memory=192, qmp=True, disk=image, extra=(
            "-netdev", f"tap,id=net0,ifname={taps[0]}", "-device", "virtio-net-device,id=eth0,netdev=net0",
            "-chardev", f"socket,id=c0,path={tmp_path / 'hvc'},server,nowait", "-device", "virtio-serial-device,id=ser0",
            "-device", "virtconsole,id=con0,chardev=c0"))
        first.wait_for(b"ready\n", stream=first.stdout)
        run(stratovirt, "template", "create", "web", "--qmp", str(first.qmp_path), "--socket", str(sock))
        time.sleep(3)  # which no clone must notice
        done = subprocess.run(
            [stratovirt, "clone", "web", "-d", "-n", str(CLONES), "--socket", str(sock), "--tap", "clone%d",
             "--mac", f"52:54:00:00:01:{FIRST:02x}"], capture_output=True, text=True, timeout=DEADLINE, check=False)
        lines = done.stdout.splitlines()
        pids += [int(line.partition("pid=")[2].split()[0]) for line in lines]
        assert done.returncode == 0 and len(lines) == CLONES, done.stderr
        clones += [Clone(tmp_path / f"hvc.web-{number}") for number in range(1, CLONES + 1)]
        for number, clone in enumerate(clones):
            clone.say(f"word{number}")
        told = [clone.line(f"word{number}") for number, clone in enumerate(clones)]
        randoms = set()
        for number, (word, sum, memory, disk, own, mac, net, random, before, after) in enumerate(told):
            assert memory == disk == sum and len(sum) == 32, told[number]
            assert own == word, "its disk has what it wrote there, and nobody else"
            assert (mac, net) == (f"52:54:00:00:01:{FIRST + number:02x}", "net-up"), told[number]
            assert 0 <= float(after) - float(before) < 2.5 + DEADLINE / 4, "its clock did not stop, nor jump"
            randoms.add(random)
        assert len(randoms) == CLONES and all(len(random) == 32 for random in randoms)
        for number in range(CLONES):  # all at once, and from outside
            run(str(assets.busybox()), "ping", "-c", "1", "-w", "60", "-q", f"10.78.0.{FIRST + number}")
        assert first.execute("query-status")["status"] == "running"
        assert image.read_bytes()[2 << 20 : (2 << 20) + 4] == bytes(4), "and none wrote to the template's"
    finally:
        for clone in clones:
            clone.close()
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        launcher.terminate()
        launcher.wait(DEADLINE)
