"""A Linux guest with every device, saved in the middle of its work: another process goes on with it, and nothing is missing."""

from __future__ import annotations

import os
import random
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from guest import assets
from linux_guest import DEADLINE, Guest
from networks import CONFIGURE, GUEST, network, run

LINES, BLOCKS = 600, 384
# Numbered lines with the time since the boot to a virtio console, numbered blocks to a disk, a listener on a socket.
WORK = f"""
cp /dev/vda /tmp/vsockcat; chmod +x /tmp/vsockcat
{CONFIGURE}
(i=0; while [ $i -lt {BLOCKS} ]; do printf '%065535d\\n' $i; i=$((i + 1)); done |
    dd of=/dev/vdb bs=65536 iflag=fullblock oflag=direct 2>/dev/null) &
writer=$!
/tmp/vsockcat listen 5000 </dev/null >/tmp/heard 2>/dev/null &
i=0
while [ $i -lt {LINES} ]; do read up idle </proc/uptime; echo "line $i $up" >/dev/hvc0; i=$((i + 1)); sleep 0.02; done
wait $writer; sync
echo "random $(head -c 64 /dev/hwrng | md5sum)" >/dev/hvc0
echo complete >/dev/hvc0
while [ ! -s /tmp/heard ]; do sleep 0.1; done
echo "heard $(cat /tmp/heard)" >/dev/hvc0
"""


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def wait_for_line(guest: Guest, path: Path, text: str) -> None:
    until = time.monotonic() + DEADLINE
    while not any(line.startswith(text) for line in lines_of(path)):
        assert time.monotonic() < until and guest.process.poll() is None, (text, lines_of(path)[-3:], guest.account())
        time.sleep(0.05)


@pytest.mark.parametrize(("kernel", "vhost"), [("small-elf", "off"), ("stock-elf", "on")])
def test_a_saved_guest_goes_on_where_it_was(
    boot: Callable[..., Guest], tmp_path: Path, kernels: Callable[[str], Path], tap: str, kernel: str, vhost: str
) -> None:
    program, image = tmp_path / "vsockcat", tmp_path / "image"
    shutil.copyfile(kernels("vsockcat"), program)
    with open(image, "wb") as file:
        file.truncate(BLOCKS << 16)
    if vhost == "on":
        run("modprobe", "vhost_net")

    def start(output: Path, cid: int, *more: str) -> Guest:
        return boot(kernel, WORK, smp=2, disk=program, read_only=True, qmp=True, extra=network(
            tap, "-object", "iothread,id=io0", "-drive", f"id=d1,file={image},direct=off,aio=threads",
            "-device", "virtio-blk-device,id=blk1,drive=d1,iothread=io0", "-device", "virtio-balloon-device,id=bal0",
            "-chardev", f"file,id=c0,path={output}", "-device", "virtio-serial-device,id=ser0",
            "-device", "virtconsole,id=con0,chardev=c0", "-device", f"vhost-vsock-device,id=vsock0,guest-cid={cid}", *more,
            netdev_keys=f",vhost={vhost}"))

    cid = random.randrange(1000, 1 << 30)
    first = start(tmp_path / "first", cid)
    wait_for_line(first, tmp_path / "first", "line 50 ")
    began = time.monotonic()
    first.execute("migrate", uri=f"file:{tmp_path / 'snapshot'}")
    mebibytes = (tmp_path / "snapshot" / "memory").stat().st_blocks >> 11
    print(f"saved in {time.monotonic() - began:.2f} s, {mebibytes} MiB on disk")
    assert first.execute("query-status")["status"] == "paused"
    assert first.execute("query-migrate") == {"status": "completed"}
    first.execute("quit")
    assert first.wait_end() == 0
    before = lines_of(tmp_path / "first")
    time.sleep(3)  # which the guest must not notice

    second = start(tmp_path / "second", cid + 1, "-incoming", f"file:{tmp_path / 'snapshot'}")
    wait_for_line(second, tmp_path / "second", "complete")
    run(str(assets.busybox()), "ping", "-c", "3", "-q", GUEST)
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as connection:
        connection.settimeout(DEADLINE)
        connection.connect((cid + 1, 5000))
        connection.sendall(b"from the host")
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)
    wait_for_line(second, tmp_path / "second", "heard from the host")
    assert second.wait_end() == 0, second.account()

    lines = before + lines_of(tmp_path / "second")
    numbered = [line.split() for line in lines if line.startswith("line ")]
    assert [int(words[1]) for words in numbered] == list(range(LINES)), "no line is missing, none comes twice"
    times = [float(words[2]) for words in numbered]
    assert times == sorted(times), "the guest's clock never goes back"
    at = len([line for line in before if line.startswith("line ")])
    assert times[at] - times[at - 1] < 2.5, "nor does it jump"
    assert len([line for line in lines if line.startswith("random ")]) == 1
    assert image.read_bytes() == b"".join(b"%065535d\n" % number for number in range(BLOCKS))
    for trouble in (b"soft lockup", b"rcu_sched detected", b"Call Trace", b"I/O error"):
        assert trouble not in second.console, second.account()
    assert os.path.getsize(tmp_path / "snapshot" / "state") < 1 << 20
