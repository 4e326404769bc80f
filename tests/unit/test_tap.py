"""Taps: what `-netdev tap` refuses, and on a machine that lets us make one, what the kernel does with it."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
import subprocess
from collections.abc import Iterator

import pytest

from stratovirt.backends import tap
from stratovirt.config.vm import NetdevConfig
from stratovirt.errors import ConfigError

NAME = f"svt{os.getpid() % 1_000_000}"


def tun(name: str, flags: int) -> int:
    """A descriptor of the tap `name`, opened as somebody else would."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, tap.TUNSETIFF, struct.pack("=16sH22x", name.encode(), flags))
    except OSError:
        os.close(fd)
        raise
    return fd


@pytest.fixture
def may_make_taps() -> None:
    try:
        os.close(tun(NAME, tap.IFF_TAP | tap.IFF_NO_PI))
    except OSError as error:
        pytest.skip(f"no taps here: {os.strerror(error.errno or 0)}")


@pytest.fixture
def pipe() -> Iterator[int]:
    ends = os.pipe()
    yield ends[0]
    for end in ends:
        os.close(end)


@pytest.mark.parametrize("name", ["a" * 16, "tap/0", "tap%d", "ä" * 8])
def test_a_name_that_no_interface_can_have(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tap.open_taps(NetdevConfig("n", name))[0]
    assert (caught.value.option, caught.value.value) == ("-netdev tap,ifname", name)


def test_a_descriptor_that_is_not_a_tap(pipe: int) -> None:
    with pytest.raises(ConfigError, match="not a tap") as caught:
        tap.open_taps(NetdevConfig("n", fds=(pipe,)))[0]
    assert caught.value.value == str(pipe)
    os.fstat(pipe)  # it is not ours to close


@pytest.mark.parametrize("fd", [1 << 20, (1 << 31) - 1])
def test_a_descriptor_that_is_not_open(fd: int) -> None:
    with pytest.raises(ConfigError, match="no such descriptor is open"):
        tap.open_taps(NetdevConfig("n", fds=(fd,)))[0]


@pytest.mark.usefixtures("may_make_taps")
class TestRealTap:
    def test_by_name_it_is_ours_until_closed(self) -> None:
        opened = tap.open_taps(NetdevConfig("n", NAME))[0]
        try:
            assert os.path.exists(f"/sys/class/net/{NAME}")
            assert not os.get_inheritable(opened.fd)
            with pytest.raises(ConfigError, match="another process has this tap open"):
                tap.open_taps(NetdevConfig("m", NAME))[0]
        finally:
            opened.close()
        assert not os.path.exists(f"/sys/class/net/{NAME}")

    def test_an_inherited_descriptor(self) -> None:
        fd = tun(NAME, tap.IFF_TAP | tap.IFF_NO_PI | tap.IFF_VNET_HDR)
        os.set_inheritable(fd, True)
        opened = tap.open_taps(NetdevConfig("n", fds=(fd,)))[0]
        try:
            assert (opened.fd, opened.name) == (fd, NAME)
            assert not os.get_blocking(fd) and not os.get_inheritable(fd)
            size = fcntl.ioctl(fd, 0x800454D7, bytes(4))  # TUNGETVNETHDRSZ
            assert int.from_bytes(size, "little") == 12
        finally:
            opened.close()

    @pytest.mark.parametrize(("flags", "why"), [
        (tap.IFF_TAP | tap.IFF_NO_PI, "without IFF_VNET_HDR"),
        (0x0001 | tap.IFF_NO_PI, "without IFF_TAP, IFF_VNET_HDR"),
        (0x0001 | tap.IFF_NO_PI | tap.IFF_VNET_HDR, "without IFF_TAP"),
        (tap.IFF_TAP | tap.IFF_NO_PI | tap.IFF_VNET_HDR | tap.IFF_MULTI_QUEUE, "with IFF_MULTI_QUEUE"),
    ])
    def test_an_inherited_descriptor_of_another_kind(self, flags: int, why: str) -> None:
        fd = tun(NAME, flags)
        try:
            with pytest.raises(ConfigError, match=why):
                tap.open_taps(NetdevConfig("n", fds=(fd,)))[0]
        finally:
            os.close(fd)

    def test_a_multi_queue_tap_by_name(self) -> None:
        fd = tun(NAME, tap.IFF_TAP | tap.IFF_NO_PI | tap.IFF_VNET_HDR | tap.IFF_MULTI_QUEUE)
        try:
            with pytest.raises(ConfigError, match="not a tap with a single queue"):
                tap.open_taps(NetdevConfig("n", NAME))[0]
        finally:
            os.close(fd)

    def test_several_queues_by_name(self) -> None:
        taps = tap.open_taps(NetdevConfig("n", NAME, queues=3))
        try:
            assert len({each.fd for each in taps}) == 3
            assert len(os.listdir(f"/sys/class/net/{NAME}/queues")) == 6
            for on in (False, True, False):
                taps[2].enable(on)
            with pytest.raises(tap.HostError, match="TUNSETQUEUE"):
                taps[2].enable(False)
            with pytest.raises(ConfigError, match="not a tap with a single queue"):
                tap.open_taps(NetdevConfig("m", NAME))
        finally:
            for each in taps:
                each.close()
        assert not os.path.exists(f"/sys/class/net/{NAME}")

    def test_several_inherited_descriptors(self) -> None:
        kind = tap.IFF_TAP | tap.IFF_NO_PI | tap.IFF_VNET_HDR
        fds = [tun(NAME, kind | tap.IFF_MULTI_QUEUE) for _ in range(2)]
        other = tun(f"{NAME}x", kind | tap.IFF_MULTI_QUEUE)
        single = tun(f"{NAME}y", kind)
        try:
            with pytest.raises(ConfigError, match=f"a queue of {NAME}x, and the first is one of {NAME}"):
                tap.open_taps(NetdevConfig("n", fds=(fds[0], other)))
            with pytest.raises(ConfigError, match="without IFF_MULTI_QUEUE"):
                tap.open_taps(NetdevConfig("n", fds=(fds[0], single)))
            taps = tap.open_taps(NetdevConfig("n", fds=tuple(fds)))
            assert [(each.fd, each.name) for each in taps] == [(fd, NAME) for fd in fds]
            assert not any(map(os.get_inheritable, fds))
        finally:
            for fd in (*fds, other, single):
                os.close(fd)

    def test_a_tap_of_one_queue_by_name_where_several_are_wanted(self) -> None:
        opened = tap.open_taps(NetdevConfig("n", NAME))[0]
        before = len(os.listdir("/proc/self/fd"))
        try:
            with pytest.raises(ConfigError, match="not a tap with several queues"):
                tap.open_taps(NetdevConfig("m", NAME, queues=2))
            assert len(os.listdir("/proc/self/fd")) == before
        finally:
            opened.close()

    def test_reading_and_writing(self) -> None:
        opened = tap.open_taps(NetdevConfig("n", NAME))[0]
        try:
            opened.set_offload(tap.TUN_F_CSUM | tap.TUN_F_TSO4 | tap.TUN_F_TSO6 | (tap.TUN_F_UFO if opened.ufo else 0))
            assert opened.read([memoryview(bytearray(2048))]) == 0
            with pytest.raises(tap.HostError) as caught:
                opened.write([bytes(12), bytes(60)])
            assert caught.value.errno == errno.EIO  # the interface is down
            assert not isinstance(caught.value, tap.TapGoneError)
        finally:
            opened.close()

    def test_a_tap_deleted_by_somebody_else(self) -> None:
        opened = tap.open_taps(NetdevConfig("n", NAME))[0]
        try:
            try:
                subprocess.run(["ip", "link", "del", NAME], check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"ip cannot delete it: {error}")
            poller = select.poll()
            poller.register(opened.fd, 0)
            assert poller.poll(0)[0][1] & select.POLLERR
            for operation in (lambda: opened.read([memoryview(bytearray(100))]), lambda: opened.write([bytes(12), bytes(60)])):
                with pytest.raises(tap.TapGoneError):
                    operation()
        finally:
            opened.close()
