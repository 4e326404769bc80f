"""Sockets between the host and a guest, both ways, with programs on both sides."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from linux_guest import DEADLINE, Guest

pytestmark = pytest.mark.skipif(
    not os.path.exists("/dev/vhost-vsock") and not os.environ.get("STRATOVIRT_LAB"), reason="no /dev/vhost-vsock"
)

MEBIBYTE = 1 << 20
# The guest gets vsockcat as its disk.
PROGRAM = "cp /dev/vda /tmp/vsockcat; chmod +x /tmp/vsockcat;"


@pytest.fixture
def vsockcat(tmp_path: Path, kernels: Callable[[str], Path]) -> Path:
    copy = tmp_path / "vsockcat"
    shutil.copyfile(kernels("vsockcat"), copy)
    return copy


@pytest.fixture
def cid() -> int:
    return random.randrange(1000, 1 << 31)


def vsock_device(cid: int, vhostfd: int | None = None) -> tuple[str, str]:
    return "-device", f"vhost-vsock-device,id=vsock0,guest-cid={cid}" + ("" if vhostfd is None else f",vhostfd={vhostfd}")


def receive_all(connection: socket.socket) -> bytes:
    connection.settimeout(DEADLINE)
    pieces = []
    while piece := connection.recv(1 << 18):
        pieces.append(piece)
    return b"".join(pieces)


@pytest.mark.parametrize(("kernel", "smp"), [pytest.param("stock-elf", 2, marks=pytest.mark.long), ("small-elf", 1)])
def test_10_mib_from_the_host_to_a_listening_guest(
    boot: Callable[..., Guest], vsockcat: Path, cid: int, kernel: str, smp: int
) -> None:
    content = random.randbytes(10 * MEBIBYTE)
    guest = boot(
        kernel, f"{PROGRAM} /tmp/vsockcat listen 5000 </dev/null | md5sum", smp=smp, disk=vsockcat, extra=vsock_device(cid)
    )
    guest.wait_for(b"listening\n", stream=guest.stderr)
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as connection:
        connection.settimeout(DEADLINE)
        connection.connect((cid, 5000))
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        assert receive_all(connection) == b""
    status, output = guest.finish()
    assert (status, output.split()[0]) == (0, hashlib.md5(content).hexdigest())


@pytest.mark.parametrize(("kernel", "smp"), [pytest.param("stock-elf", 2, marks=pytest.mark.long), ("small-elf", 1)])
def test_10_mib_from_a_guest_that_connects_and_back(
    boot: Callable[..., Guest], vsockcat: Path, cid: int, kernel: str, smp: int
) -> None:
    """The host returns every byte inverted, while the guest is still sending."""
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
        listener.settimeout(DEADLINE)
        listener.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
        listener.listen()
        port = listener.getsockname()[1]
        inverted = bytes(255 - value for value in range(256))
        received, returned = hashlib.md5(), hashlib.md5()
        peers = []

        def echo() -> None:
            connection, peer = listener.accept()
            peers.append(peer)
            with connection:
                connection.settimeout(DEADLINE)
                while piece := connection.recv(1 << 16):
                    received.update(piece)
                    returned.update(piece.translate(inverted))
                    connection.sendall(piece.translate(inverted))
                connection.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=echo, daemon=True)
        thread.start()
        guest = boot(
            kernel,
            f"{PROGRAM} head -c {10 * MEBIBYTE} /dev/urandom >/tmp/out;"
            f" /tmp/vsockcat connect 2 {port} </tmp/out >/tmp/in || echo failed; wc -c </tmp/in;"
            " md5sum </tmp/out; md5sum </tmp/in",
            smp=smp,
            disk=vsockcat,
            extra=vsock_device(cid),
        )
        status, output = guest.finish()
        thread.join(DEADLINE)
    assert status == 0
    assert [line.split()[0] for line in output.splitlines()] == [
        str(10 * MEBIBYTE),
        received.hexdigest(),
        returned.hexdigest(),
    ]
    assert [peer[0] for peer in peers] == [cid]


def test_an_inherited_descriptor_with_its_cid_reserved(boot: Callable[..., Guest], vsockcat: Path, cid: int) -> None:
    """What Kata does: it opens /dev/vhost-vsock and sets the CID, then hands the descriptor over."""
    import fcntl

    descriptor = os.open("/dev/vhost-vsock", os.O_RDWR)
    try:
        fcntl.ioctl(descriptor, 0x4008AF60, cid.to_bytes(8, "little"))  # VHOST_VSOCK_SET_GUEST_CID
        os.set_inheritable(descriptor, True)
        guest = boot(
            "small-elf",
            f"{PROGRAM} echo hello | /tmp/vsockcat listen 5000",
            disk=vsockcat,
            extra=vsock_device(cid, descriptor),
            descriptors=(descriptor,),
        )
        guest.wait_for(b"listening\n", stream=guest.stderr)
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as connection:
            connection.settimeout(DEADLINE)
            connection.connect((cid, 5000))
            connection.sendall(b"from the host\n")
            connection.shutdown(socket.SHUT_WR)
            assert receive_all(connection) == b"hello\n"
        assert guest.finish() == (0, "from the host\n")
    finally:
        os.close(descriptor)


def test_a_cid_in_use_is_refused(boot: Callable[..., Guest], vsockcat: Path, cid: int) -> None:
    first = boot("small-elf", f"{PROGRAM} /tmp/vsockcat listen 5000 </dev/null", disk=vsockcat, extra=vsock_device(cid))
    first.wait_for(b"listening\n", stream=first.stderr)
    second = boot("small-elf", "echo up", extra=vsock_device(cid))
    assert second.wait_end() == 1
    assert "another guest on this host has this CID" in second.errors
    third = boot("small-elf", "echo up", extra=vsock_device(4294967295))
    assert third.wait_end() == 1
    assert "guest-cid" in third.errors and "4294967294" in third.errors


def test_sockets_work_again_after_a_reset(boot: Callable[..., Guest], vsockcat: Path, cid: int) -> None:
    guest = boot(
        "small-elf", f"{PROGRAM} /tmp/vsockcat listen 5000 </dev/null", disk=vsockcat, qmp=True, extra=vsock_device(cid)
    )
    for count in range(1, 4):
        guest.wait_for(b"listening\n", stream=guest.stderr, count=count)
        if count < 3:
            guest.execute("system_reset")
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as connection:
        connection.settimeout(DEADLINE)
        connection.connect((cid, 5000))
        connection.sendall(b"after the reset\n")
        connection.shutdown(socket.SHUT_WR)
        assert receive_all(connection) == b""
    assert guest.finish() == (0, "after the reset\n")
