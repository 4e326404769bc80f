"""Any argument to any command: the answer is of the declared type or an error of ours, and no descriptor is left open."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from fuzz.fuzzing import fuzz
from stratovirt.control.commands import COMMANDS
from stratovirt.control.protocol import ABSENT, Request, encode_error, encode_return
from stratovirt.control.table import Command
from stratovirt.control.types import Array, Enum, Object, Scalar, Type
from stratovirt.errors import StratoVirtError
from unit.qmp_board import Board

# Those that change whether the machine runs need one.
_LEFT_OUT = {"quit", "stop", "cont", "system_powerdown", "system_reset"}
_TABLE = {command.name: command for command in COMMANDS if command.name not in _LEFT_OUT}


def strings(generator: random.Random, board: Board) -> str:
    return generator.choice((
        "n0", "n1", "n2", "blk0", "rootfs", "", "0", "1", "3", "0x2", "4", "virtio-blk-mmio", "virtio-net-mmio", "raw", "tap",
        "on", str(board.folder / "disk0"), str(board.folder / "disk1"), "/dev/null", "\0", "\ud800", "²", "x" * 300,
        "".join(map(chr, generator.choices(range(1, 0x3000), k=generator.randrange(8)))), str(generator.randrange(20))))


_NAMES = ("n0", "n1", "n2", "blk0", "rootfs")
# What makes sense, by the name of the member, so that much of what is asked for can be done.
_SENSIBLE = {
    **dict.fromkeys(("node-name", "id", "drive", "netdev", "fdname", "fds", "name", "device"), _NAMES),
    "driver": ("virtio-blk-mmio", "virtio-blk-device", "virtio-net-mmio", "raw", "file"), "media": ("disk",),
    "addr": ("0", "1", "2", "0x3"), "discard": ("on", "unmap", "off"), "backing": ("",), "options": ("",), "type": ("tap",),
    "mac": ("52:54:00:00:00:01",), "aio": ("off", "threads", "io_uring", "native"), "direct": (False,),
}


def value(generator: random.Random, board: Board, type: Type, name: str = "") -> object:
    """Mostly of `type` and sensible, now and then of any."""
    if name == "filename" and generator.random() < 0.8:
        return str(board.folder / f"disk{generator.randrange(2)}")
    if name in _SENSIBLE and generator.random() < 0.9:
        return generator.choice(_SENSIBLE[name])
    if generator.random() < 0.01:
        return generator.choice((None, True, -1, 1.5, "x", [], {}, [[1]], {"x": None}, 2**70))
    if isinstance(type, Object):
        likely = ("file", "drive", "cache", "direct")
        made = {member.name: value(generator, board, member.type, member.name) for member in type.members
                if generator.random() < (0.05 if member.optional and member.name not in likely else 0.97)}
        if generator.random() < 0.02:
            made["surplus"] = 1
        return made
    if isinstance(type, Array):
        return [value(generator, board, type.element) for _ in range(generator.randrange(3))]
    if isinstance(type, Enum):
        return generator.choice(type.values)
    if isinstance(type, Scalar) and type.kind is bool:
        return generator.random() < 0.5
    if isinstance(type, Scalar) and type.kind is int:
        low, high = type.bounds or (0, 0)
        return generator.choice((low, high, 0, 1, 2, 3, high + 1))
    return strings(generator, board)


def ask(board: Board, command: Command, arguments: object) -> None:
    if arguments is not None and not isinstance(arguments, dict):
        return  # the parser refuses it
    try:
        answer = COMMANDS.dispatch(board, Request(command.name, arguments, ABSENT), board.descriptors)
        command.returns.check(answer, command.name)
        encode_return(answer)
    except StratoVirtError as error:
        encode_error("GenericError", str(error))


def test_any_sequence_of_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one(generator: random.Random) -> None:
        before = set(os.listdir("/proc/self/fd"))
        board = Board(tmp_path, root=True)
        board.vcpu_thread_ids = lambda: [1]
        for number in range(2):
            board.image(f"disk{number}", 8)
        names = generator.choices(list(_TABLE), k=20) + generator.choices(
            ("blockdev-add", "device_add", "device_del", "blockdev-del", "netdev_add", "netdev_del", "getfd"), k=40)
        generator.shuffle(names)
        for name in names:
            if generator.random() < 0.1:
                board.descriptors.arrive([os.open(os.devnull, os.O_RDONLY)])
            arguments = None if generator.random() < 0.02 else value(generator, board, _TABLE[name].arguments)
            ask(board, _TABLE[name], arguments)
        for occupied in list(board.hotplug._slots.values()):
            if occupied.id:
                ask(board, _TABLE["device_del"], {"id": occupied.id})
            assert not occupied.id
        for node in list(board.hotplug._nodes):
            ask(board, _TABLE["blockdev-del"], {"node-name": node})
        for netdev in list(board.hotplug._netdevs):
            ask(board, _TABLE["netdev_del"], {"id": netdev})
        board.descriptors.close()
        board.close()
        assert set(os.listdir("/proc/self/fd")) <= before

    def no_tap(*_arguments: object) -> int:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr("stratovirt.backends.tap.fcntl.ioctl", no_tap)  # no interfaces of random names on this host
    fuzz(one, 150)
