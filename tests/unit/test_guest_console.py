"""The decoder of a guest command's output: exact bytes out, console text apart, damage told, bounded memory."""

from __future__ import annotations

import binascii
import random

import pytest

from stratovirt.cli import guest_console
from stratovirt.cli.guest_console import GuestConsole
from stratovirt.errors import GuestError


def frame(letter: str, data: bytes) -> bytes:
    return b"\x1e" + letter.encode() + b" " + binascii.b2a_base64(data, newline=False) + b"\n"


class Sinks:
    def __init__(self) -> None:
        self.out = bytearray()
        self.err = bytearray()
        self.text = bytearray()
        self.console = GuestConsole(self.out.extend, self.err.extend, self.text.extend)

    def feed(self, data: bytes) -> None:
        self.console.feed(data)


def conversation(out: bytes, err: bytes, status: int, size: int = 3000) -> bytes:
    pieces = [b"[    0.1] kernel\r\n", b"\x1eb\n"]
    sent = {"o": 0, "e": 0}
    for letter, data in (("o", out), ("e", err)):
        for start in range(0, len(data), size):
            piece = frame(letter, data[start : start + size])
            sent[letter] += len(piece) - 4
            pieces.append(piece)
    pieces.append(f"\x1ex {status} {sent['o']} {sent['e']}\n".encode())
    return b"".join(pieces) + b"reboot: Restarting\r\n"


@pytest.mark.parametrize("step", [1, 7, 4096, 1 << 20])
def test_every_byte_comes_through_whatever_the_pieces(step: int) -> None:
    out, err = random.Random(1).randbytes(10_000), bytes(range(256)) * 3
    sinks = Sinks()
    whole = conversation(out, err, 7)
    for start in range(0, len(whole), step):
        sinks.feed(whole[start : start + step])
    assert (bytes(sinks.out), bytes(sinks.err)) == (out, err)
    assert bytes(sinks.text) == b"[    0.1] kernel\r\nreboot: Restarting\r\n"
    assert sinks.console.finish() == 7


def test_lines_that_a_terminal_made_end_in_cr_lf_are_frames_too() -> None:
    sinks = Sinks()
    sinks.feed(conversation(b"x", b"", 0).replace(b"\n", b"\r\n"))
    assert bytes(sinks.out) == b"x"
    assert sinks.console.finish() == 0


def test_a_lost_frame_is_an_error() -> None:
    sinks = Sinks()
    sinks.feed(conversation(b"abc" * 2000, b"", 0).replace(frame("o", (b"abc" * 2000)[:3000]), b""))
    with pytest.raises(GuestError, match="damaged"):
        sinks.console.finish()


@pytest.mark.parametrize(("data", "when"), [(b"\x1eb\n", "before the command ended"), (b"panic", "before it could start")])
def test_a_guest_that_ends_early_is_an_error(data: bytes, when: str) -> None:
    sinks = Sinks()
    sinks.feed(data)
    with pytest.raises(GuestError, match=when):
        sinks.console.finish()


@pytest.mark.parametrize(
    "line", [b"o !!!!", b"o", b"x 1", b"x -1 0 0", b"x 1 2 3 4", b"x 9999999999999999999999 0 0", b"z", b"", b"o YQ"]
)
def test_what_is_no_frame_is_console_text(line: bytes) -> None:
    sinks = Sinks()
    sinks.feed(b"\x1e" + line + b"\n")
    assert not sinks.out
    assert bytes(sinks.text) == line + b"\n"
    assert sinks.console.status is None


def test_a_line_without_end_costs_bounded_memory() -> None:
    sinks = Sinks()
    sinks.feed(b"\x1eo ")
    for _ in range(100):
        sinks.feed(b"A" * 5000)
    assert len(sinks.text) >= 100 * 5000 - guest_console.MAX_FRAME - 5000
    sinks.feed(b"\n" + conversation(b"after", b"", 0))
    assert bytes(sinks.out) == b"after"


def test_nothing_counts_after_the_end() -> None:
    sinks = Sinks()
    sinks.feed(conversation(b"a", b"", 3) + frame("o", b"more") + b"\x1ex 0 0 0\n")
    assert bytes(sinks.out) == b"a"
    assert sinks.console.finish() == 3


def test_short_commands_go_inline_and_long_ones_in_the_archive() -> None:
    words = guest_console.kernel_words("echo 'ä' $x", "poweroff")
    assert words.startswith("stratovirt.end=poweroff stratovirt.cmd=")
    assert binascii.a2b_base64(words.rpartition("cmd=")[2]).decode() == "echo 'ä' $x"
    long = "x" * 2000
    assert "cmd" not in guest_console.kernel_words(long)
    archive = guest_console.command_archive(long)
    assert archive.startswith(b"070701") and long.encode() in archive and len(archive) % 4 == 0
