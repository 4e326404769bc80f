"""A Linux guest whose disk and network are other processes': saved in the middle of its work, it goes on in another machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from backends import Backend
from guest import assets
from linux_guest import Guest
from networks import CONFIGURE, GUEST, HOST, run
from test_snapshot import lines_of, wait_for_line
from test_vhost_user import blk_device, needs_storage_daemon, storage_daemon, virtiofsd
from test_vhost_user import fs_device as share_device
from test_vhost_user_net import TESTPMD, network, start_testpmd

BLOCKS, STEPS = 128, 40


def work(step: str) -> str:
    """Numbered blocks to the disk, one after the other, and meanwhile numbered steps, each told if it succeeds."""
    return f"""
(i=0; while [ $i -lt {BLOCKS} ]; do printf '%065535d\\n' $i; i=$((i + 1)); done |
    dd of=/dev/vda bs=65536 iflag=fullblock oflag=direct 2>/tmp/dd; echo "written $?" >/dev/hvc0) &
writer=$!
i=0
while [ $i -lt {STEPS} ]; do
    {step} && echo "step $i" >/dev/hvc0
    i=$((i + 1))
done
wait $writer
echo "sum $(md5sum </dev/vda)" >/dev/hvc0
echo complete >/dev/hvc0
"""


class Moved:
    """A guest with a disk of qemu-storage-daemon's that is saved twice, the second time on top of the first, and goes on."""

    def __init__(self, boot: Callable[..., Guest], place: Path, command: str, *devices: str) -> None:
        self._boot, self._place, self._command, self._devices = boot, place, command, devices
        self.image = place / "image"
        self.image.write_bytes(bytes(BLOCKS << 16))

    def start(self, name: str, *more: str) -> Guest:
        return self._boot("small-elf", self._command, shared=True, qmp=True, extra=(
            *blk_device(self._place / "disk"), *self._devices, "-chardev", f"file,id=c0,path={self._place / name}",
            "-device", "virtio-serial-device,id=ser0", "-device", "virtconsole,id=con0,chardev=c0", *more))

    def first(self) -> Guest:
        guest, place = self.start("first"), self._place
        for name, line, more in (("base", "step 5", {}), ("snapshot", "step 12", {"base": str(place / "base")})):
            wait_for_line(guest, place / "first", line)
            began = time.monotonic()
            guest.execute("migrate", uri=f"file:{place / name}", **more)
            print(f"{name}: saved in {time.monotonic() - began:.2f} s, {(place / name / 'memory').stat().st_blocks >> 11} MiB")
            content = self.image.read_bytes()
            if name == "base":
                guest.execute("cont")
        guest.execute("quit")
        assert guest.wait_end() == 0
        time.sleep(1)
        assert self.image.read_bytes() == content, "what the back end had taken was there when the snapshot was"
        return guest

    def second(self) -> Guest:
        began = time.monotonic()
        guest = self.start("second", "-incoming", f"file:{self._place / 'snapshot'}")
        wait_for_line(guest, self._place / "second", "step ")
        print(f"a step further {time.monotonic() - began:.2f} s after the start of the process that goes on")
        return guest

    def check(self, first: Guest, second: Guest, lost: int) -> None:
        wait_for_line(second, self._place / "second", "complete")
        assert second.wait_end() == 0, second.account()
        lines = lines_of(self._place / "first") + lines_of(self._place / "second")
        steps = [int(line.split()[1]) for line in lines if line.startswith("step ")]
        assert steps == sorted(set(steps)) and len(steps) >= STEPS - lost, steps
        assert "written 0" in lines
        assert self.image.read_bytes() == b"".join(b"%065535d\n" % number for number in range(BLOCKS))
        assert b"I/O error" not in first.console + second.console
        assert "disk0" not in first.errors + second.errors


@needs_storage_daemon
def test_a_disk_of_another_process_goes_on_in_another_machine(
    boot: Callable[..., Guest], backend: Callable[..., Backend], place: Path
) -> None:
    moved = Moved(boot, place, work("sleep 0.05"))
    backend(place / "disk", *storage_daemon(place / "disk", moved.image))
    first = moved.first()
    moved.check(first, moved.second(), 0)


@pytest.mark.long  # DPDK's threads never sleep, and leave the guest little of the emulated host
@needs_storage_daemon
@pytest.mark.skipif(not os.path.exists(TESTPMD), reason="no dpdk-testpmd: Debian's dpdk-dev")
def test_disk_and_network_go_on_in_another_machine(
    boot: Callable[..., Guest], backend: Callable[..., Backend], place: Path
) -> None:
    moved = Moved(boot, place, CONFIGURE + work(f"ping -c 1 -W 2 -q {HOST} >/tmp/ping"), *network(place / "net"))
    backend(place / "disk", *storage_daemon(place / "disk", moved.image))
    start_testpmd(backend, place / "net")
    first = moved.first()
    second = moved.second()
    run(str(assets.busybox()), "ping", "-c", "3", "-q", GUEST)
    moved.check(first, second, 5)


@needs_storage_daemon
def test_a_share_of_an_old_virtiofsd_is_refused_before_anything_is_written(
    boot: Callable[..., Guest], backend: Callable[..., Backend], place: Path
) -> None:
    (place / "shared").mkdir()
    backend(place / "socket", *virtiofsd(place / "socket", place / "shared"))
    guest = boot("small-elf", "echo up >&2; cat >/dev/null </dev/console", shared=True, qmp=True,
                 extra=share_device(place / "socket"))
    guest.wait_for(b"up\n", stream=guest.stderr)
    with pytest.raises(Exception, match=r"vhost-user-fs device fs0 cannot be saved: .*DEVICE_STATE"):
        guest.execute("migrate", uri=f"file:{place / 'snapshot'}")
    assert not (place / "snapshot").exists()
    assert guest.execute("query-status")["status"] == "running"
