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
from linux_guest import ARM64, DEADLINE, Guest
from networks import CONFIGURE, GUEST, HOST, Iperf, network, run
from test_block_io import FIO_TOOL, MIX, drive, fio_disk, make_image  # noqa: F401

from stratovirt.snapshot import difference, state_file
from stratovirt.snapshot.chain import Chain

LINES, BLOCKS = 300, 256
# Numbered lines with the time since the boot to a virtio console, numbered blocks to a disk, a listener on a socket.
WORK = f"""
cp /dev/vda /tmp/vsockcat; chmod +x /tmp/vsockcat
echo "generation $(devmem 0x401f0000 64 2>/dev/null)" >/dev/hvc0
{CONFIGURE}
(i=0; while [ $i -lt {BLOCKS} ]; do printf '%065535d\\n' $i; i=$((i + 1)); done |
    dd of=/dev/vdb bs=65536 iflag=fullblock oflag=direct 2>/dev/null) &
writer=$!
/tmp/vsockcat listen 5000 </dev/null >/tmp/heard 2>/dev/null &
i=0
while [ $i -lt {LINES} ]; do read up idle </proc/uptime; echo "line $i $up" >/dev/hvc0; i=$((i + 1)); sleep 0.02; done
wait $writer; sync
echo "random $(head -c 64 /dev/hwrng | md5sum)" >/dev/hvc0
echo "generation $(devmem 0x401f0000 64 2>/dev/null)" >/dev/hvc0
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


def check_counted(guest: Guest, incremental: Path) -> None:
    """The guest stands still where the last snapshot was taken: what was counted as written is all that was written."""
    whole = incremental.parent / f"whole-{incremental.name}"
    guest.execute("migrate", uri=f"file:{whole}")
    chains = [Chain(str(path), state_file.read(str(path))) for path in (incremental, whole)]
    assert difference.between(*chains) == [], "a page was written that nobody counted"
    ranges = chains[0].links[0].ranges or []
    print(f"{sum(end - start for start, end in ranges) >> 10} KiB in {len(ranges)} ranges were written")
    for chain in chains:
        chain.close()
    assert "not counted any more" not in guest.errors


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
    for name, line, arguments in (("base", "line 100 ", {"track": True}), ("snapshot", "", {"base": str(tmp_path / "base")})):
        began = time.monotonic()
        first.execute("migrate", uri=f"file:{tmp_path / name}", **arguments)
        mebibytes = (tmp_path / name / "memory").stat().st_blocks >> 11
        print(f"{name}: saved in {time.monotonic() - began:.2f} s, {mebibytes} MiB on disk")
        if line:
            first.execute("cont")
            wait_for_line(first, tmp_path / "first", line)
    check_counted(first, tmp_path / "snapshot")
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
    if ARM64 and kernel == "stock-elf":  # whose /dev/mem has what the device tree keeps from the kernel
        generations = [int(line.split()[1], 0) for line in lines if line.startswith("generation ")]
        assert len(set(generations)) == 2 and 0 not in generations, generations
    assert image.read_bytes() == b"".join(b"%065535d\n" % number for number in range(BLOCKS))
    for trouble in (b"soft lockup", b"rcu_sched detected", b"Call Trace", b"I/O error"):
        assert trouble not in second.console, second.account()
    assert os.path.getsize(tmp_path / "snapshot" / "state") < 1 << 20


# -- a snapshot that is gone on from twice

FORK = "crng reseeded due to virtual machine fork"
TOLD = f"""
echo ready
until dmesg | grep -q '{FORK}'; do sleep 0.1; done
device=$(head -c 1024 /dev/hwrng | tail -c 64 | md5sum | cut -c1-32)
echo "random $(head -c 64 /dev/urandom | md5sum | cut -c1-32) $device end" >/dev/console
echo "told $(dmesg | grep -c '{FORK}')" >/dev/console
cat >/dev/null </dev/console
"""


def test_two_guests_of_one_snapshot_know_that_they_are_two(boot: Callable[..., Guest], tmp_path: Path) -> None:
    """Debian's full kernel has a driver of the generation ID: it takes fresh entropy, and no two draw the same numbers.

    The first bytes of /dev/hwrng may be the same: its driver asks for the next ones ahead, and they lie in saved memory.
    """
    first = boot("full-elf", TOLD, memory=192, qmp=True)
    first.wait_for(b"ready\n", stream=first.stdout)
    first.execute("migrate", uri=f"file:{tmp_path / 'snapshot'}")
    first.execute("cont")
    both = [boot("full-elf", memory=192, qmp=True, extra=("-incoming", f"file:{tmp_path / 'snapshot'}")) for _ in range(2)]
    drawn: set[bytes] = set()
    for guest in both:
        guest.wait_for(b"told 1")
        (line,) = (line for line in bytes(guest.console).splitlines() if line.startswith(b"random "))
        words = line.split()
        assert len(words) == 4 and words[3] == b"end" and len(words[1]) == len(words[2]) == 32, line
        drawn |= set(words[1:3])
    assert len(drawn) == 4
    assert first.execute("query-status")["status"] == "running"
    assert b"random " not in first.console, "nothing has happened to this one"


# -- under load

LOAD = f"""{CONFIGURE}
{FIO_TOOL.format("vdb").partition("/mnt/ld")[0]}
(iperf3 -c {HOST} -p 5201 -t 25 >/tmp/net 2>&1; echo "net $?" >/dev/hvc0) &
net=$!
(/mnt/ld-linux-*.so.* --library-path /mnt /mnt/fio --thread --name=load --filename=/dev/vda {MIX} --size=24m --rate=1m,1m \
    >/tmp/fio 2>&1; echo "fio $? $(tail -n 1 /tmp/fio | cut -d';' -f3-5)" >/dev/hvc0) &
fio=$!
i=0
while kill -0 $fio 2>/dev/null || kill -0 $net 2>/dev/null; do
    read up idle </proc/uptime; echo "line $i $up" >/dev/hvc0; i=$((i + 1)); sleep 0.1
done
echo "random $(head -c 64 /dev/hwrng | wc -c)" >/dev/hvc0
echo complete >/dev/hvc0
cat >/dev/null </dev/console
"""


@pytest.mark.long
@pytest.mark.parametrize("vhost", ["off", "on"])
def test_a_chain_of_snapshots_under_load(
    boot: Callable[..., Guest], tmp_path: Path, tap: str, file_system: Callable[[int], Path],
    fio_disk: Path, vhost: str,  # noqa: F811
) -> None:
    """fio checks what it reads, iperf3 its connection; and what was counted as written is all that was, vhost's part too."""
    if vhost == "on":
        run("modprobe", "vhost_net")
    image = make_image(file_system(64) / "image", 32 << 20)
    server = Iperf()

    def start(output: Path, *more: str) -> Guest:
        return boot("stock-elf", LOAD, smp=2, memory=384, qmp=True, programs=("iperf3",), extra=network(
            tap, *drive(image, ",aio=native,direct=on"), *drive(fio_disk, ",readonly=on,direct=off", id="tools"),
            "-chardev", f"file,id=c0,path={output}", "-device", "virtio-serial-device,id=ser0",
            "-device", "virtconsole,id=con0,chardev=c0", *more, netdev_keys=f",vhost={vhost}"))

    first = start(tmp_path / "first")
    wait_for_line(first, tmp_path / "first", "line 10 ")
    first.execute("migrate", uri=f"file:{tmp_path / 'a'}", track=True)
    for name, base in (("b", "a"), ("c", "whole-b")):
        first.execute("cont")
        time.sleep(2)
        began = time.monotonic()
        first.execute("migrate", uri=f"file:{tmp_path / name}", base=str(tmp_path / base))
        print(f"{name}: {time.monotonic() - began:.2f} s")
        check_counted(first, tmp_path / name)
    first.execute("quit")
    assert first.wait_end() == 0
    before = lines_of(tmp_path / "first")
    assert not any(line.startswith(("fio", "net")) for line in before), "the load was over too soon"

    second = start(tmp_path / "second", "-incoming", f"file:{tmp_path / 'c'}")
    wait_for_line(second, tmp_path / "second", "complete")
    run(str(assets.busybox()), "ping", "-c", "3", "-q", GUEST)
    second.execute("quit")
    assert second.wait_end() == 0, second.account()
    assert server.finish()["sum_received"]["bytes"] > 1 << 20
    lines = before + lines_of(tmp_path / "second")
    said = {line for line in lines if not line.startswith("line ")}
    assert said >= {"net 0", "fio 0 load;0;0", "random 64", "complete"}, said
    times = [float(line.split()[2]) for line in lines if line.startswith("line ")]
    assert times == sorted(times), "the guest's clock never goes back"
    for trouble in (b"soft lockup", b"rcu_sched detected", b"Call Trace", b"I/O error"):
        assert trouble not in second.console, second.account()
