"""What a clone has of its own: what may be asked for, what is filled in, and what two cannot have."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stratovirt.backends import sparse_copy
from stratovirt.cli import command
from stratovirt.errors import ConfigError
from stratovirt.launcher import identity
from stratovirt.launcher.clone_command import words
from stratovirt.launcher.identity import Identity
from stratovirt.launcher.request import read_request, with_arguments
from stratovirt.launcher.template import NET, VSOCK, is_name
from stratovirt.launcher.templates import Templates, root_of
from stratovirt.sparse import unnamed_file

LINE = ["-machine", "microvm", "-kernel", "k", "-netdev", "tap,id=n0,ifname=tap0", "-device",
        "virtio-net-device,id=e0,netdev=n0", "-netdev", "tap,id=n1,ifname=tapb", "-device",
        "virtio-net-device,id=e1,netdev=n1,mac=52:54:00:AA:00:01",
        "-device", "vhost-vsock-device,id=v,guest-cid=7"]


def template(line: list[str] = LINE) -> Any:
    config = command.parse(line)
    return SimpleNamespace(name="web", config=config, devices=lambda driver: [
        device for device in config.devices if device.driver == driver])


def complete(*asked: str, living: list[Identity] | None = None, line: list[str] = LINE) -> Identity:
    _, values = identity.parse(["web", *asked])
    return identity.complete(template(line), values, living or [])


def test_what_is_left_out_is_filled_in() -> None:
    one = complete("tap=a%d,b%d", "qmp=unix:/run/%d")
    assert (one.name, one.number, one.taps, one.cid, one.qmp) == ("web-1", 1, ["a1", "b1"], 8, ["unix:/run/1"])
    assert not one.detach
    other = complete("tap=a%d,b%d", living=[one])
    assert (other.name, other.number, other.taps, other.cid) == ("web-2", 2, ["a2", "b2"], 9)
    assert len({*one.macs, *other.macs, "52:54:00:12:34:56", "52:54:00:aa:00:01"}) == 6
    assert complete("tap=c,d", living=[other]).name == "web-1", "the number of one that has ended is free again"


def test_what_is_asked_for_is_taken() -> None:
    own = complete("name=blue", "mac=02:00:00:00:00:01", "tap=x,y", "cid=99", "detach=1")
    assert (own.name, own.macs[0], own.taps, own.cid, own.detach) == ("blue", "02:00:00:00:00:01", ["x", "y"], 99, True)
    again = identity.read(own.words())
    assert again.words() == own.words()


def test_without_devices_there_is_nothing_to_name() -> None:
    bare = complete(line=["-machine", "microvm", "-kernel", "k"])
    assert (bare.macs, bare.taps, bare.cid) == ([], [], 0)


@pytest.mark.parametrize(("asked", "problem"), [
    (["tap=a,b", "name=a/b"], "clone --name a/b: not a name for a clone"),
    (["tap=a,b", "name="], "clone --name: not a name for a clone"),
    (["tap=a,b", "name=.."], "not a name for a clone"),
    (["tap=a,b", "name=taken"], "clone --name taken: a clone has this name already"),
    (["tap=a,b", "mac=01:00:00:00:00:01"], "not a MAC address"),
    (["tap=a,b", "mac=xx"], "clone --mac xx: not a MAC address"),
    (["tap=a,b", "mac=02:00:00:00:00:0f"], "the template or another clone has this address"),
    (["tap=a,b", "mac=52:54:00:12:34:56"], "the template or another clone has this address"),
    (["tap=a,b", "mac=02:00:00:00:00:01,02:00:00:00:00:01"], "the template or another clone has this address"),
    (["tap=a,b", "mac=02:00:00:00:00:01,02:00:00:00:00:02,02:00:00:00:00:03"], "3 addresses, and the template web has 2"),
    ([], "the -netdev n0 of the template web is on tap0, and a clone needs a tap of its own"),
    (["tap=a"], "the -netdev n1 of the template web is on tapb"),
    (["tap=a,b,c"], "3 taps, and the template web has 2 -netdev"),
    (["tap=a,busy"], "clone --tap busy: another clone is on this tap"),
    (["tap=a,a"], "another clone is on this tap"),
    (["tap=a,/b"], "not the name of a tap"),
    (["tap=a,b", "cid=2"], "clone --cid 2: not a CID (accepted: 3 to 4294967294)"),
    (["tap=a,b", "cid=4294967295"], "not a CID"),
    (["tap=a,b", "cid=x"], "not a CID"),
    (["tap=a,b", "cid=40"], "clone --cid 40: another clone has this CID"),
    (["tap=a,b", *["qmp=unix:/x%d"] * 9], "more than 8 QMP sockets"),
    (["disk=3"], "no such property of a clone (accepted: name, mac, tap, cid, qmp, detach)"),
    (["name=a", "name=b"], "clone name: given twice"),
    (["detach=2", "tap=a,b"], "neither 0 nor 1"),
])
def test_what_cannot_be_is_said_by_name(asked, problem) -> None:
    other = Identity("db", "taken", 1, ["02:00:00:00:00:0f"], ["busy"], 40, [], False)
    with pytest.raises(ConfigError) as caught:
        complete(*asked, living=[other])
    assert problem in str(caught.value)


def test_a_cid_for_a_machine_without_vsock() -> None:
    with pytest.raises(ConfigError, match="the template web has no vhost-vsock-device"):
        complete("cid=5", line=["-machine", "microvm", "-kernel", "k"])


@pytest.mark.parametrize(("text", "answer"), [
    ("web", True), ("web-1.2_x", True), ("1", True), ("a" * 64, True), ("a" * 65, False), ("", False), (".", False),
    ("..", False), ("-x", False), ("a/b", False), ("a b", False), ("a\0", False), ("ä", False), ("a\n", False),
])
def test_names(text, answer) -> None:
    assert is_name(text) is answer


@pytest.mark.parametrize(("asked", "problem"), [
    ([], "no such request"), (["create", "x"], "no such request"), (["create", "a/b", "/x"], "not a name for a template"),
    (["create", "x", "relative"], "not an absolute path"), (["create", "x", "/nowhere"], "/nowhere/template: No such"),
    (["show", "x"], "template x: there is no such template"), (["remove", "x"], "there is no such template"),
    (["list", "x"], "no such request"),
])
def test_orders_that_cannot_be_carried_out(tmp_path, asked, problem) -> None:
    templates = Templates(str(tmp_path))
    assert templates.command(["list"]) == []
    with pytest.raises(ConfigError) as caught:
        templates.command(asked)
    assert problem in str(caught.value)


@pytest.mark.parametrize("text", [
    "", "{", "[]", "{}", '{"version": 9}', "[" * 100_000, '{"version": 1, "created": 0, "directory": 3}',
    '{"version": 1, "created": 0, "directory": "/", "arguments": [], "drives": [], "name": "x", "more": 1}',
    '{"version": 1, "created": 0, "directory": "/", "arguments": [4], "drives": [], "name": "x"}',
    '{"version": 1, "created": 0, "directory": "/", "arguments": ["-x"], "drives": [{"id": "a"}], "name": "x"}',
    '{"version": 1, "created": 0, "directory": "/", "arguments": ["-x"], "drives": [], "name": "x"}',
])
def test_descriptions_that_are_none(tmp_path, text) -> None:
    (tmp_path / "template").write_text(text)
    templates = Templates(str(tmp_path.parent))
    with pytest.raises(ConfigError):
        templates.command(["create", "x", str(tmp_path)])
    templates.find()  # and whatever lies about does not keep a launcher from starting
    assert templates.command(["list"]) == []


def test_where_templates_are() -> None:
    assert root_of("/run/user/5/stratovirt-launcher.sock") == "/run/user/5/stratovirt-templates"
    assert root_of("/tmp/x.sock") == "/tmp/x.sock.templates"


def test_arguments_are_replaced_in_a_message() -> None:
    message = b"\0".join([b"stratovirt 1", b"clone", b"22", b"0,1,2", b"1", b"web", b"A=B"])
    request = read_request(with_arguments(message, ["x", "name=y"]), [3, 4, 5, 6], 100)
    assert (request.kind, request.arguments, request.environment, request.umask) == ("clone", ["x", "name=y"], {"A": "B"}, 0o22)


def options(**given: Any) -> Any:
    return SimpleNamespace(**{"template": "web", "name": None, "mac": [], "tap": [], "cid": None, "qmp": [], "detach": False,
                              **given})


def test_several_are_counted() -> None:
    asked = options(mac=["52:54:00:00:00:ff"], cid="10", tap=["tap%d"], detach=True)
    assert words(asked, 2, 3) == ["web", "mac=52:54:00:00:01:01", "tap=tap%d", "cid=12", "detach=1"]
    assert words(options(mac=["nonsense"], cid="nonsense"), 1, 2) == ["web", "mac=nonsense", "cid=nonsense"]
    assert words(options(qmp=["unix:q"]), 0, 1) == ["web", f"qmp=unix:{os.path.abspath('q')}"]
    for one in ({"name": "x"}, {"tap": ["x"]}, {"qmp": ["unix:x"]}):
        with pytest.raises(ConfigError, match="2 clones cannot have the same"):
            words(options(**one), 0, 2)


def test_kinds_of_devices_are_those_of_the_board() -> None:
    assert {NET, VSOCK} <= {device.driver for device in command.parse(LINE).devices}


# -- copies of disks


def sparse(path: Path) -> bytes:
    with open(path, "wb") as file:
        file.truncate(8 << 20)
        for at in (0, 5000, 3 << 20, (8 << 20) - 10):
            file.seek(at)
            file.write(b"data")
    return path.read_bytes()


@pytest.mark.parametrize("missing", [(), ("ioctl",), ("ioctl", "copy_file_range"), ("ioctl", "copy_file_range", "lseek")])
def test_a_copy_has_the_same_content_and_holes(tmp_path, monkeypatch, missing) -> None:
    content = sparse(tmp_path / "disk")

    def refuse(*_arguments: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "no")

    lseek = os.lseek
    if "ioctl" in missing:
        monkeypatch.setattr(sparse_copy.fcntl, "ioctl", refuse)
    if "copy_file_range" in missing:
        monkeypatch.setattr(os, "copy_file_range", refuse)
    if "lseek" in missing:
        monkeypatch.setattr(os, "lseek", lambda fd, at, how: refuse() if how == os.SEEK_DATA else lseek(fd, at, how))
    source, target = os.open(tmp_path / "disk", os.O_RDONLY), unnamed_file(str(tmp_path))
    try:
        sparse_copy.copy(source, target)
        assert os.pread(target, 9 << 20, 0) == content
        assert os.fstat(target).st_blocks * 512 < 4 << 20
        assert [path.name for path in tmp_path.iterdir()] == ["disk"], "it has no name"
    finally:
        os.close(source)
        os.close(target)


def test_a_full_disk_is_told(tmp_path, monkeypatch) -> None:
    sparse(tmp_path / "disk")

    def full(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "copy_file_range", full)
    source, target = os.open(tmp_path / "disk", os.O_RDONLY), unnamed_file(str(tmp_path))
    monkeypatch.setattr(sparse_copy.fcntl, "ioctl", lambda *_: (_ for _ in ()).throw(OSError(errno.EOPNOTSUPP, "")))
    with pytest.raises(OSError, match="full"):
        sparse_copy.copy(source, target)
    os.close(source)
    os.close(target)
