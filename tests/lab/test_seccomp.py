"""Linux on every device at once under the filters, with strace beside it: what is used is allowed, what is allowed is used."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from linux_guest import DEADLINE, Guest
from networks import CONFIGURE, HOST
from test_console import Client, devices
from test_hotplug import RUN_THE_DISK, blank, with_script

from system_calls import compare, seen

# Every exit of a vCPU is an ioctl and most are a write besides: strace does not look at these, or the guest would stand still.
EVERYWHERE = ("ioctl", "futex", "read", "write")
SCRIPT = f"""{CONFIGURE}for n in 1 2; do
    ip link set eth$n up; ip addr add 10.99.$n.2/24 dev eth$n
    ping -c 1 -W 1 -q 10.99.$n.1 >/tmp/ping
done
ping -c 3 -i 0.2 -q {HOST} >/tmp/ping; echo ping $?
for disk in vdb vdc; do
    dd if=/dev/$disk of=/tmp/$disk bs=64k count=16 iflag=direct 2>/dev/null &&
    dd if=/tmp/$disk of=/dev/$disk bs=64k conv=fsync 2>/dev/null &&
    blkdiscard -l 1048576 /dev/$disk && echo $disk
done
ls -d /sys/class/virtio-ports/vport* >/dev/null && echo ports
head -c 1000 /dev/hwrng | wc -c
echo all-$((1 + 1)) >/dev/console
while [ "$(cat /sys/block/vdd/size 2>/dev/null || echo 0)" = 0 ]; do sleep 0.1; done
dd if=/dev/vdd of=/dev/null bs=4k 2>/dev/null && echo vdd
cat >/dev/null </dev/console
"""


def test_what_strace_sees_is_what_is_allowed(boot: Callable[..., Guest], make_tap: Callable[..., str],
                                             file_system: Callable[[int], Path], tmp_path: Path) -> None:
    assert shutil.which("strace"), "strace is missing: lab/setup.sh test"
    folder, trace, cid = file_system(64), tmp_path / "trace", random.randrange(1000, 1 << 31)
    words = ["-object", "iothread,id=io0"]
    for number, (engine, thread) in enumerate((("threads", ",iothread=io0"), ("off", ""))):
        words += ["-drive", f"file={blank(folder / f'disk{number}')},id=d{number},aio={engine},direct=off,discard=unmap",
                  "-device", f"virtio-blk-device,drive=d{number},id=b{number}{thread}"]
    words += ["-netdev", f"tap,id=net0,ifname={make_tap()}", "-device", "virtio-net-device,id=eth0,netdev=net0,iothread=io0"]
    words += ["-netdev", f"tap,id=net1,ifname={make_tap()},vhost=on", "-device", "virtio-net-device,id=eth1,netdev=net1"]
    words += ["-netdev", f"tap,id=net2,ifname={make_tap()}", "-device", "virtio-net-device,id=eth2,netdev=net2"]
    words += ["-D", str(tmp_path / "log")]
    with open(tmp_path / "log", "wb") as file:
        file.truncate(100 << 20)  # the first line begins a new one
    words += ["-device", f"vhost-vsock-device,id=vsock0,guest-cid={cid}", "-device", "virtio-balloon-device,id=balloon0"]
    words += devices(tmp_path, "con")
    strace = ("strace", "-D", "-f", "--seccomp-bpf", "-ff", "-e", f"trace=!{','.join(EVERYWHERE)}", "-o", str(trace))
    guest = boot("small-elf", RUN_THE_DISK, qmp=True, smp=2, disk=with_script(tmp_path / "script", SCRIPT), extra=tuple(words),
                 prefix=strace)
    console = Client(tmp_path / "con.socket")
    guest.wait_for(b"all-2", seconds=3 * DEADLINE)
    guest.wait_for(b"1000\n", stream=guest.stdout)
    assert guest.stdout.decode().split() == ["ping", "0", "vdb", "vdc", "ports", "1000"], guest.account()
    assert guest.execute("query-status")["running"] is True
    guest.execute("stop")
    guest.execute("cont")
    guest.execute("balloon", value=200 << 20)
    added = {"node-name": "d9", "file": {"driver": "file", "filename": str(blank(folder / "disk9")), "aio": "threads"},
             "cache": {"direct": False}}
    guest.execute("blockdev-add", **added)
    guest.execute("device_add", id="d9", driver="virtio-blk-mmio", drive="d9", addr="0x3")
    guest.wait_for(b"vdd\n", stream=guest.stdout)
    with socket.socket(socket.AF_VSOCK) as nobody:
        nobody.settimeout(DEADLINE)
        assert nobody.connect_ex((cid, 5000)) != 0  # nobody listens, and the guest says so
    guest.execute("device_del", id="d9")
    guest.execute("device_del", id="eth0")
    guest.execute("system_reset")
    guest.wait_for(b"all-2", count=2, seconds=3 * DEADLINE)
    os.kill(guest.process.pid, signal.SIGTERM)  # which is a line of log
    assert guest.wait_end() == 0, guest.account()
    assert (tmp_path / "log1").exists()
    console.socket.close()
    assert "[seccomp]" not in (tmp_path / "log").read_text(errors="replace")
    found = seen(trace)
    for calls in found:
        calls.update(EVERYWHERE)
    forbidden, idle = compare(found)
    assert not any(forbidden.values()), forbidden
    assert not any(idle.values()), f"allowed, and not needed in this run: {idle}"
