"""Disks under real load: every engine, a host that runs out of space, an image that changes, a machine that stops."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from linux_guest import Guest

MEBIBYTE = 1 << 20
ENGINES = ("off", "threads", "native", "io_uring")


def run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)


def make_image(path: Path, size: int) -> Path:
    with open(path, "wb") as file:
        file.truncate(size)
    return path


def drive(image: Path, more: str = "", device: str = "", id: str = "data") -> tuple[str, ...]:
    return ("-drive", f"id={id},file={image}{more}", "-device", f"virtio-blk-device,drive={id},id={id}-disk{device}")


@pytest.fixture(scope="session")
def fio_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with Debian's fio and the libraries it needs."""
    fio = shutil.which("fio")
    if fio is None:
        pytest.skip("there is no fio on this machine: apt-get install fio")
    folder = tmp_path_factory.mktemp("fio")
    tree = folder / "tree"
    tree.mkdir()
    shutil.copy(fio, tree / "fio")
    for line in subprocess.run(["ldd", fio], capture_output=True, text=True, check=True).stdout.splitlines():
        for word in line.split():
            if word.startswith("/"):
                shutil.copy(word, tree)
    image = make_image(folder / "fio.ext4", 128 * MEBIBYTE)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, image)
    shutil.rmtree(tree)
    return image


FIO_TOOL = (
    "modprobe ext4\nmount -t ext4 -o ro /dev/{} /mnt || exit 9\n"
    "/mnt/ld-linux-*.so.* --library-path /mnt /mnt/fio --thread "
)


# Random reads and writes of odd sizes, 32 at a time, checksums on all of it; then all is read back and checked.
MIX = ("--direct=1 --rw=randrw --rwmixread=30 --bsrange=512-32k --iodepth=32 --ioengine=libaio --verify=crc32c "
       "--verify_fatal=1 --do_verify=1 --fsync=64 --minimal")


def test_fio_verifies_a_random_mix_on_every_engine_at_once(
    boot: Callable[..., Guest], file_system: Callable[[int], Path], fio_disk: Path
) -> None:
    """Four disks, an engine each, all under load together."""
    storage = file_system(64)
    extra: list[str] = []
    jobs = ""
    for letter, engine in zip("abcd", ENGINES, strict=True):
        image = make_image(storage / engine, 8 * MEBIBYTE)
        extra += drive(image, f",aio={engine},direct=on", id=engine)
        jobs += f" --name={engine} --filename=/dev/vd{letter}"
    tools = drive(fio_disk, ",readonly=on,direct=off", id="tools")
    load = FIO_TOOL.format("vde") + f"{MIX} --size=6m {jobs} >/tmp/fio 2>&1; status=$?; cut -d';' -f3-5 /tmp/fio; exit $status"
    guest = boot("stock-elf", load, smp=2, memory=512, extra=(*extra, *tools))
    status, output = guest.finish(240)
    assert (status, sorted(output.split())) == (0, sorted(f"{engine};0;0" for engine in ENGINES)), output
    assert "read of" not in guest.errors and "write of" not in guest.errors


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES)
def test_fio_verifies_a_random_mix(
    boot: Callable[..., Guest], file_system: Callable[[int], Path], fio_disk: Path, engine: str
) -> None:
    image = make_image(file_system(128) / "image", 32 * MEBIBYTE)
    load = FIO_TOOL.format("vdb") + (
        f"--name=load --filename=/dev/vda {MIX} --size=24m >/tmp/fio 2>&1; status=$?; cut -d';' -f3-5 /tmp/fio; exit $status"
    )
    extra = (*drive(image, f",aio={engine},direct=on"), *drive(fio_disk, ",readonly=on,direct=off", id="tools"))
    guest = boot("stock-elf", load, smp=2, memory=512, extra=extra)
    status, output = guest.finish(240)
    assert (status, output.strip().splitlines()[-1]) == (0, "load;0;0"), output
    assert "read of" not in guest.errors and "write of" not in guest.errors


SEVERAL = """
for job in 0 1 2 3; do
    (i=0; while [ $i -lt 64 ]; do
        printf '%065535d\\n' $((job * 64 + i)) | dd of=/dev/vda bs=65536 seek=$((job * 64 + i)) iflag=fullblock oflag=direct \
            conv=notrunc 2>/dev/null || echo failed
        i=$((i + 1))
    done) &
done
wait
dd if=/dev/vda bs=1M iflag=direct 2>/dev/null | md5sum
"""


@pytest.mark.parametrize(("kernel", "engine"), [
    ("small-elf", "io_uring"),
    pytest.param("stock-elf", "native", marks=pytest.mark.long),
    pytest.param("small-elf", "threads", marks=pytest.mark.long),
])
def test_several_queues_and_writers(
    boot: Callable[..., Guest], file_system: Callable[[int], Path], kernel: str, engine: str
) -> None:
    image = make_image(file_system(64) / "image", 16 * MEBIBYTE)
    extra = drive(image, f",aio={engine},direct=on", ",num-queues=2,queue-size=64")
    status, output = boot(kernel, SEVERAL + "ls /sys/block/vda/mq | wc -l\n", smp=2, extra=extra).finish(300)
    content = b"".join(b"%065535d\n" % number for number in range(256))
    assert image.read_bytes() == content
    assert (status, output) == (0, f"{hashlib.md5(content).hexdigest()}  -\n2\n")


@pytest.mark.parametrize("engine", ["off", pytest.param("io_uring", marks=pytest.mark.long)])
def test_a_full_host_file_system_gives_io_errors_and_the_machine_lives(
    boot: Callable[..., Guest], file_system: Callable[[int], Path], engine: str
) -> None:
    host = file_system(24)
    image = make_image(host / "image", 64 * MEBIBYTE)
    make_image(host / "room", 0).write_bytes(bytes(4 * MEBIBYTE))
    load = """
    dd if=/dev/zero bs=64k count=1024 2>/dev/null | tr '\\0' x | dd of=/dev/vda bs=64k iflag=fullblock oflag=direct 2>/tmp/e
    echo first $?; grep -c 'nput/output error' /tmp/e
    read answer </dev/console
    dd if=/dev/zero bs=64k count=16 2>/dev/null | tr '\\0' y >/tmp/y
    dd if=/tmp/y of=/dev/vda bs=64k seek=960 oflag=direct 2>/dev/null; echo second $?
    dd if=/dev/vda bs=64k skip=960 count=16 iflag=direct 2>/dev/null | tr -d y | wc -c
    """
    guest = boot("small-elf", load, extra=drive(image, f",aio={engine},direct=on"))
    guest.wait_for(b"first 1\n1\n", stream=guest.stdout, seconds=300)
    (host / "room").unlink()
    guest.type("\n")
    assert guest.finish() == (0, "first 1\n1\nsecond 0\n0\n")
    lines = [line for line in guest.errors.splitlines() if "No space left on device" in line]
    assert 1 <= len(lines) <= 20, guest.errors


def test_an_image_that_grows_is_noticed(boot: Callable[..., Guest], tmp_path: Path) -> None:
    image = make_image(tmp_path / "image", 8 * MEBIBYTE)
    look = """
    cat /sys/block/vda/size
    until [ $(cat /sys/block/vda/size) != 16384 ]; do echo x | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null; done
    cat /sys/block/vda/size
    echo end | dd of=/dev/vda bs=512 seek=32767 conv=notrunc,fsync 2>/dev/null; echo $?
    """
    guest = boot("small-elf", look, extra=drive(image, ",direct=off"))
    guest.wait_for(b"16384\n", stream=guest.stdout)
    os.truncate(image, 16 * MEBIBYTE)
    assert guest.finish() == (0, "16384\n32768\n0\n")
    assert image.read_bytes()[-512:-508] == b"end\n"


@pytest.mark.parametrize("engine", ["threads", pytest.param("native", marks=pytest.mark.long)])
def test_discard_and_zeroes_give_space_back(
    boot: Callable[..., Guest], file_system: Callable[[int], Path], engine: str
) -> None:
    image = make_image(file_system(64) / "image", 16 * MEBIBYTE)
    image.write_bytes(b"\xa5" * 16 * MEBIBYTE)
    full = image.stat().st_blocks
    command = """
    cat /sys/block/vda/queue/discard_max_bytes
    blkdiscard -o 1M -l 4M /dev/vda; echo discard $?
    dd if=/dev/zero of=/dev/vda bs=1M seek=8 count=4 oflag=direct 2>/dev/null; echo zeroes $?
    dd if=/dev/vda bs=1M skip=1 count=4 iflag=direct 2>/dev/null | tr -d '\\0' | wc -c
    dd if=/dev/vda bs=1M skip=8 count=4 iflag=direct 2>/dev/null | tr -d '\\0' | wc -c
    """
    extra = drive(image, f",aio={engine},direct=on,discard=unmap,detect-zeroes=unmap")
    status, output = boot("stock-elf", command, extra=extra).finish()
    assert (status, output) == (0, f"{0x7F_FFFF * 512}\ndiscard 0\nzeroes 0\n0\n0\n")
    assert full - image.stat().st_blocks >= 8 * MEBIBYTE // 512 - 64
    content = image.read_bytes()
    part = b"\xa5" * MEBIBYTE
    assert content == part + bytes(4 * MEBIBYTE) + part * 3 + bytes(4 * MEBIBYTE) + part * 4


@pytest.mark.parametrize("engine", ["native", pytest.param("io_uring", marks=pytest.mark.long)])
def test_stop_and_reset_in_the_middle_of_requests(
    boot: Callable[..., Guest], file_system: Callable[[int], Path], engine: str
) -> None:
    """While the machine is stopped the image stands still; a reset in the middle of it all leads to a working disk."""
    image = make_image(file_system(32) / "image", 8 * MEBIBYTE)
    load = """
    head -c 5 /dev/vda; echo
    for job in 1 2 3 4; do
        while :; do dd if=/dev/urandom of=/dev/vda bs=128k count=8 seek=$((job * 8)) oflag=direct 2>/dev/null; done &
    done
    echo loaded
    wait
    """
    image_bytes = bytearray(8 * MEBIBYTE)
    image_bytes[:5] = b"mark\n"
    image.write_bytes(image_bytes)
    guest = boot("small-elf", load, smp=2, qmp=True, extra=drive(image, f",aio={engine},direct=on"))
    for count in range(1, 4):
        guest.wait_for(b"loaded\n", stream=guest.stdout, count=count)
        for _ in range(3):
            guest.execute("stop")
            before = hashlib.sha256(image.read_bytes()).digest()
            for _ in range(20):
                guest.execute("query-status")
            assert hashlib.sha256(image.read_bytes()).digest() == before
            guest.execute("cont")
        if count < 3:
            guest.execute("system_reset")
            assert guest.wait_event("RESET")["data"]["guest"] is False
    assert bytes(guest.stdout).count(b"mark\n") == 3
    guest.execute("quit")
    assert guest.wait_end() == 0
    assert guest.errors.count("do not end") == 0


def test_two_machines_do_not_write_one_image(boot: Callable[..., Guest], tmp_path: Path) -> None:
    image = make_image(tmp_path / "image", MEBIBYTE)
    first = boot("small-elf", "echo up; read answer </dev/console", extra=drive(image, ",direct=off"))
    first.wait_for(b"up\n", stream=first.stdout)
    for more in (",direct=off", ",direct=off,readonly=on"):
        second = boot("small-elf", "echo up", extra=drive(image, more))
        assert second.wait_end() == 1
        kind = "read" if "readonly" in more else "write"
        assert f"Failed to get {kind} lock on file: {image}" in second.errors
        assert not second.console
    first.type("\n")
    assert first.finish() == (0, "up\n")
    readers = [boot("small-elf", "head -c 1 /dev/vda | wc -c", extra=drive(image, ",direct=off,readonly=on")) for _ in range(2)]
    assert [reader.finish() for reader in readers] == [(0, "1\n"), (0, "1\n")]


def test_a_limit_of_requests_a_second_loses_none(boot: Callable[..., Guest], tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(MEBIBYTE))
    command = "dd if=/dev/vda bs=4k iflag=direct 2>/dev/null | md5sum"
    status, output = boot("small-elf", command, extra=drive(image, ",direct=off,throttling.iops-total=200")).finish()
    assert (status, output.split()[0]) == (0, hashlib.md5(image.read_bytes()).hexdigest())
