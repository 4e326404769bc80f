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

BLOCKS, PINGS = 192, 60
# Numbered blocks to the disk, one after the other, and numbered answers of the host.
WORK = f"""
{CONFIGURE}
(i=0; while [ $i -lt {BLOCKS} ]; do printf '%065535d\\n' $i; i=$((i + 1)); done |
    dd of=/dev/vda bs=65536 iflag=fullblock oflag=direct 2>/tmp/dd; echo "written $?" >/dev/hvc0) &
writer=$!
i=0
while [ $i -lt {PINGS} ]; do
    ping -c 1 -W 2 -q {HOST} >/tmp/ping && echo "answer $i" >/dev/hvc0
    i=$((i + 1))
done
wait $writer
echo "sum $(md5sum </dev/vda)" >/dev/hvc0
echo complete >/dev/hvc0
"""


@needs_storage_daemon
@pytest.mark.skipif(not os.path.exists(TESTPMD), reason="no dpdk-testpmd: Debian's dpdk-dev")
def test_a_guest_goes_on_with_the_same_back_ends_in_another_machine(
    boot: Callable[..., Guest], backend: Callable[..., Backend], place: Path
) -> None:
    image, disk, net = place / "image", place / "disk", place / "net"
    image.write_bytes(bytes(BLOCKS << 16))
    backend(disk, *storage_daemon(disk, image))
    start_testpmd(backend, net)

    def start(output: Path, *more: str) -> Guest:
        return boot("small-elf", WORK, shared=True, qmp=True, extra=(
            *blk_device(disk), *network(net), "-chardev", f"file,id=c0,path={output}",
            "-device", "virtio-serial-device,id=ser0", "-device", "virtconsole,id=con0,chardev=c0", *more))

    first = start(place / "first")
    for name, line in (("base", "answer 5"), ("snapshot", "answer 15")):
        wait_for_line(first, place / "first", line)
        began = time.monotonic()
        first.execute("migrate", uri=f"file:{place / name}", **({"base": str(place / "base")} if name == "snapshot" else {}))
        print(f"{name}: saved in {time.monotonic() - began:.2f} s, {(place / name / 'memory').stat().st_blocks >> 11} MiB")
        content = image.read_bytes()
        if name == "base":
            first.execute("cont")
    first.execute("quit")
    assert first.wait_end() == 0 and first.errors == ""
    time.sleep(1)
    assert image.read_bytes() == content, "what the back end had taken was there when the snapshot was"

    began = time.monotonic()
    second = start(place / "second", "-incoming", f"file:{place / 'snapshot'}")
    wait_for_line(second, place / "second", "answer ")
    print(f"restored, and an answer from the network after {time.monotonic() - began:.2f} s")
    run(str(assets.busybox()), "ping", "-c", "3", "-q", GUEST)
    wait_for_line(second, place / "second", "complete")
    assert second.wait_end() == 0 and second.errors == "", second.account()
    lines = lines_of(place / "first") + lines_of(place / "second")
    answers = [int(line.split()[1]) for line in lines if line.startswith("answer ")]
    assert answers == sorted(set(answers)) and len(answers) > PINGS - 5, answers
    assert "written 0" in lines
    assert image.read_bytes() == b"".join(b"%065535d\n" % number for number in range(BLOCKS))
    assert b"I/O error" not in first.console + second.console


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
