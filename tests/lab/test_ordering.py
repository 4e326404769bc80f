"""Rings under several vCPUs at once: what one processor publishes another sees whole, or not at all.

The host's side of each ring is a thread of its own, on another processor than the guest's: the arm64 lab has two, each
on a thread of the emulator. A completion that is seen before its data, or an entry before its index, leaves a wrong block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from linux_guest import Guest

JOBS, BLOCKS, ROUNDS = 4, 128, 3
BLOCK = 4096

LOAD = f"""
head -c 65536 /dev/hwrng | wc -c &
for job in $(seq 0 {JOBS - 1}); do
    (i=0; while [ $i -lt {BLOCKS} ]; do printf '%0{BLOCK - 1}d\\n' $((job * {BLOCKS} + i)); i=$((i + 1)); done >/tmp/w$job
    for round in $(seq {ROUNDS}); do
        dd if=/tmp/w$job of=/dev/vda bs={BLOCK} seek=$((job * {BLOCKS})) oflag=direct conv=notrunc 2>/dev/null || echo failed
        dd if=/dev/vda of=/tmp/r$job bs={BLOCK} skip=$((job * {BLOCKS})) count={BLOCKS} iflag=direct 2>/dev/null || echo failed
        cmp /tmp/w$job /tmp/r$job || echo different
    done) &
done
wait
dd if=/dev/vda bs=1M iflag=direct 2>/dev/null | md5sum
"""


def test_many_vcpus_share_rings(boot: Callable[..., Guest], tmp_path: Path) -> None:
    image = tmp_path / "image"
    with open(image, "wb") as file:
        file.truncate(JOBS * BLOCKS * BLOCK)
    extra = ("-object", "iothread,id=io0", "-drive", f"id=data,file={image},direct=off",
             "-device", "virtio-blk-device,drive=data,id=data,iothread=io0,num-queues=2,queue-size=16")
    status, output = boot("small-elf", LOAD, smp=4, extra=extra).finish(300)
    content = b"".join(b"%0*d\n" % (BLOCK - 1, number) for number in range(JOBS * BLOCKS))
    assert (status, sorted(output.split())) == (0, sorted(["65536", hashlib.md5(content).hexdigest(), "-"]))
    assert image.read_bytes() == content
