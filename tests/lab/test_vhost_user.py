"""Devices whose back end is another process, with Debian's own back ends: virtiofsd and qemu-storage-daemon."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from backends import Backend
from linux_guest import Guest

VIRTIOFSD = "/usr/lib/qemu/virtiofsd"
STORAGE_DAEMON = "/usr/bin/qemu-storage-daemon"
MEBIBYTE = 1 << 20

needs_virtiofsd = pytest.mark.skipif(not os.path.exists(VIRTIOFSD), reason="no virtiofsd: Debian's qemu-system-common")
needs_storage_daemon = pytest.mark.skipif(
    not os.path.exists(STORAGE_DAEMON), reason="no qemu-storage-daemon: Debian's qemu-system-common"
)

def virtiofsd(socket: Path, place: Path) -> tuple[str, ...]:
    # The lab's file system is entered with chroot, where the default, a mount namespace with its root replaced, is refused.
    return VIRTIOFSD, f"--socket-path={socket}", "-o", f"source={place},sandbox=chroot,cache=auto"


def fs_device(socket: Path) -> tuple[str, ...]:
    return "-chardev", f"socket,id=fsd,path={socket}", "-device", "vhost-user-fs-device,id=fs0,chardev=fsd,tag=shared"


def storage_daemon(socket: Path, image: Path, queues: int = 1) -> tuple[str, ...]:
    return (
        STORAGE_DAEMON, "--blockdev", f"driver=file,filename={image},node-name=disk", "--export",
        f"type=vhost-user-blk,id=disk,node-name=disk,addr.type=unix,addr.path={socket},writable=on,num-queues={queues}",
    )


def blk_device(socket: Path, more: str = "", chardev: str = "") -> tuple[str, ...]:
    return (
        "-chardev", f"socket,id=bd,path={socket}{chardev}",
        "-device", f"vhost-user-blk-device,id=disk0,chardev=bd{more}",
    )


# -- virtio-fs


def fill(place: Path, directories: int, files: int) -> str:
    """So many directories with so many files each, all of different content; the digest of `md5sum`'s sorted output."""
    lines = []
    for directory in range(directories):
        (place / f"d{directory:03}").mkdir(parents=True)
        for file in range(files):
            name = f"d{directory:03}/f{file:03}"
            content = hashlib.sha512(name.encode()).digest() * (1 + (directory * files + file) % 97)
            (place / name).write_bytes(content)
            lines.append(f"{hashlib.md5(content).hexdigest()}  ./{name}\n")
    return hashlib.md5("".join(lines).encode()).hexdigest()


MOUNT = "mount -t virtiofs shared /mnt && cd /mnt || exit 1;"
CHECK = "find . -type f | sort | xargs md5sum | md5sum;"


@needs_virtiofsd
@pytest.mark.parametrize(("kernel", "smp"), [("small-elf", 1), pytest.param("stock-elf", 2, marks=pytest.mark.long)])
def test_10000_files_of_the_host_are_in_the_guest(
    boot: Callable[..., Guest], backend: Callable[..., Backend], place: Path, kernel: str, smp: int
) -> None:
    shared, socket = place / "shared", place / "socket"
    digest = fill(shared, 100, 100)
    backend(socket, *virtiofsd(socket, shared))
    guest = boot(
        kernel,
        f"{MOUNT} {CHECK} find . -type f | wc -l; dd if=/dev/urandom of=written bs=64k count=64 2>/dev/null;"
        " md5sum <written; mkdir new; mv d000/f000 new/moved; ln -s moved new/link; rm d000/f001; cd /; umount /mnt; echo $?",
        smp=smp, shared=True, extra=fs_device(socket))
    status, output = guest.finish(600)
    lines = [line.split()[0] for line in output.splitlines()]
    written = hashlib.md5((shared / "written").read_bytes()).hexdigest()
    assert (status, lines) == (0, [digest, "10000", written, "0"])
    assert (shared / "written").stat().st_size == 4 * MEBIBYTE
    assert (shared / "new/moved").exists() and (shared / "new/link").is_symlink()
    assert not (shared / "d000/f000").exists() and not (shared / "d000/f001").exists()


@needs_virtiofsd
def test_a_directory_is_shared_again_after_a_reset(
    boot: Callable[..., Guest], backend: Callable[..., Backend], place: Path
) -> None:
    shared, socket = place / "shared", place / "socket"
    digest = fill(shared, 2, 10)
    backend(socket, *virtiofsd(socket, shared))
    guest = boot("small-elf", f"{MOUNT} {CHECK} cat >/dev/null </dev/console", shared=True, qmp=True, extra=fs_device(socket))
    guest.wait_for(digest.encode(), stream=guest.stdout)
    guest.execute("system_reset")
    guest.wait_for(digest.encode(), stream=guest.stdout, count=2)
    guest.execute("quit")
    guest.wait_end()


@needs_virtiofsd
def test_programs_in_the_guest_get_errors_when_virtiofsd_dies(
    boot: Callable[..., Guest], backend: Callable[..., Backend], place: Path
) -> None:
    shared, socket = place / "shared", place / "socket"
    fill(shared, 2, 10)
    process = backend(socket, *virtiofsd(socket, shared))
    guest = boot("small-elf", f"{MOUNT} echo up >&2; while cat d000/* d001/* >/dev/null; do :; done; ls .; echo ls $?",
                 shared=True, qmp=True, extra=fs_device(socket))
    guest.wait_for(b"up\n", stream=guest.stderr)
    process.kill()
    status, output = guest.finish()
    assert status == 0 and "ls 0" not in output and "ls " in output
    assert "fs0: the back end at" in guest.errors and "closed the connection" in guest.errors


# -- virtio-blk


WRITE = """
i=0
while [ $i -lt 64 ]; do
    flags=; [ $((i % 3)) != 0 ] || flags=oflag=direct
    yes "block $i" | head -c 1048576 >/tmp/block
    dd if=/tmp/block of=/dev/vda bs=1M count=1 seek=$i conv=notrunc $flags 2>/dev/null || exit 1
    i=$((i + 1))
done
sync
"""


def pattern(blocks: int = 64) -> bytes:
    return b"".join((b"block %d\n" % number * MEBIBYTE)[:MEBIBYTE] for number in range(blocks))


@needs_storage_daemon
@pytest.mark.parametrize(("kernel", "smp"), [("small-elf", 1), ("stock-elf", 2)])
def test_what_the_guest_writes_is_in_the_image(
    boot: Callable[..., Guest], backend: Callable[..., Backend], place: Path, kernel: str, smp: int
) -> None:
    image, socket = place / "image", place / "socket"
    image.write_bytes(bytes(64 * MEBIBYTE))
    backend(socket, *storage_daemon(socket, image, smp))
    command = f"{WRITE} echo 3 >/proc/sys/vm/drop_caches; md5sum </dev/vda; ls /sys/block/vda/mq | wc -l"
    guest = boot(kernel, command, smp=smp, shared=True, extra=blk_device(socket, f",num-queues={smp}"))
    status, output = guest.finish()
    assert (status, output.split()) == (0, [hashlib.md5(pattern()).hexdigest(), "-", str(smp)])
    assert image.read_bytes() == pattern()


@needs_storage_daemon
def test_a_disk_is_there_again_after_a_reset(boot: Callable[..., Guest], backend: Callable[..., Backend], place: Path) -> None:
    image, socket = place / "image", place / "socket"
    image.write_bytes(pattern())
    backend(socket, *storage_daemon(socket, image))
    guest = boot("small-elf", "md5sum </dev/vda; echo up >&2; cat /dev/vda >/dev/null; sleep 1000", shared=True, qmp=True,
                 extra=blk_device(socket))
    for count in (1, 2, 3):
        guest.wait_for(b"up\n", stream=guest.stderr, count=count)
        if count < 3:
            guest.execute("system_reset")
    guest.execute("quit")
    guest.wait_end()
    assert guest.stdout.decode().count(hashlib.md5(pattern()).hexdigest()) == 3


@needs_storage_daemon
def test_a_disk_whose_back_end_is_killed_has_errors_and_comes_back(
    boot: Callable[..., Guest], backend: Callable[..., Backend], place: Path
) -> None:
    """Eight writers are at it when it dies, and every one of them ends with an error: none waits for ever."""
    image, socket = place / "image", place / "socket"
    image.write_bytes(bytes(64 * MEBIBYTE))
    process = backend(socket, *storage_daemon(socket, image))
    command = """
    for writer in 0 1 2 3 4 5 6 7; do
        (while dd if=/dev/zero of=/dev/vda bs=64k count=16 seek=$((writer * 16)) oflag=direct conv=notrunc 2>/dev/null
         do :; done
         echo "writer ended") &
    done
    echo up >&2
    wait
    echo "all ended" >&2
    until dd if=/dev/vda of=/dev/null bs=64k count=1 iflag=direct 2>/dev/null; do sleep 1; done
    yes "block 0" | head -c 1048576 | dd of=/dev/vda bs=1M iflag=fullblock count=1 conv=notrunc oflag=direct 2>/dev/null
    echo status $?
    """
    guest = boot("small-elf", command, shared=True, qmp=True, extra=blk_device(socket, chardev=",reconnect=1"))
    guest.wait_for(b"up\n", stream=guest.stderr)
    time.sleep(2)
    process.kill()
    guest.wait_for(b"all ended\n", stream=guest.stderr)
    started = time.monotonic()
    assert guest.execute("query-status")["running"]
    assert time.monotonic() - started < 5
    guest.wait_for(b"writer ended\n", stream=guest.stdout, count=8)
    backend(socket, *storage_daemon(socket, image))
    status, output = guest.finish()
    assert status == 0 and output.endswith("status 0\n")
    assert image.read_bytes()[:MEBIBYTE] == pattern(1)
    assert "disk0: the back end at" in guest.errors
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1)


@needs_storage_daemon
def test_a_paused_machine_leaves_its_disk_alone(
    boot: Callable[..., Guest], backend: Callable[..., Backend], place: Path
) -> None:
    image, socket = place / "image", place / "socket"
    image.write_bytes(bytes(64 * MEBIBYTE))
    backend(socket, *storage_daemon(socket, image))
    guest = boot("small-elf", f"echo up >&2; {WRITE} md5sum </dev/vda", shared=True, qmp=True, extra=blk_device(socket))
    guest.wait_for(b"up\n", stream=guest.stderr)
    for _ in range(3):
        time.sleep(1)
        guest.execute("stop")
        before = hashlib.md5(image.read_bytes()).digest()
        time.sleep(0.5)
        assert hashlib.md5(image.read_bytes()).digest() == before
        guest.execute("cont")
    status, output = guest.finish()
    assert (status, output.split()[0]) == (0, hashlib.md5(pattern()).hexdigest())


FOLLOW = """
size() { cat /sys/block/vda/size; }
round=0
while [ $round -lt 3 ]; do
    while [ "$(size)" = 0 ]; do sleep 0.1; done
    echo "in $(size) $(md5sum </dev/vda)"
    yes "round $round" | head -c 1048576 >/tmp/block
    dd if=/tmp/block of=/dev/vda bs=1M count=1 seek=$round conv=notrunc,fsync 2>/dev/null
    echo "written $?" >&2
    while [ "$(size)" != 0 ]; do sleep 0.1; done
    head -c 512 /dev/vda | wc -c
    round=$((round + 1))
done
"""


@needs_storage_daemon
def test_a_disk_of_another_process_comes_and_goes(
    boot: Callable[..., Guest], backend: Callable[..., Backend], place: Path
) -> None:
    """Into a slot whose driver has been there since the boot, and out again, three times; the filters are on."""
    image, socket = place / "image", place / "socket"
    content = bytearray(4 * MEBIBYTE)
    image.write_bytes(content)
    backend(socket, *storage_daemon(socket, image))
    guest = boot("small-elf", FOLLOW, shared=True, qmp=True, extra=("-chardev", f"socket,id=bd,path={socket}"))
    expected = []
    for number in range(3):
        expected += [f"in {len(content) // 512} {hashlib.md5(content).hexdigest()}  -", "0"]
        guest.execute("device_add", id="disk0", driver="vhost-user-blk-device", chardev="bd")
        guest.wait_for(b"written 0\n", stream=guest.stderr, count=number + 1)
        guest.execute("device_del", id="disk0")
        assert guest.wait_event("DEVICE_DELETED")["data"]["device"] == "disk0"
        content[number * MEBIBYTE : (number + 1) * MEBIBYTE] = (b"round %d\n" % number * MEBIBYTE)[:MEBIBYTE]
        assert image.read_bytes() == content
        guest.wait_for(b"\n0\n", stream=guest.stdout, count=number + 1)
    status, output = guest.finish()
    assert (status, output.splitlines()) == (0, expected)
    assert "[seccomp]" not in guest.errors
