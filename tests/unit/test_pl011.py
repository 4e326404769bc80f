"""The PL011: output, input with flow control, and a level-triggered line that says the truth at every moment."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from stratovirt.devices import pl011
from stratovirt.devices.pl011 import CR, DR, FR, ICR, IMSC, INT_OE, INT_RT, INT_RX, INT_TX, LCR_H, MIS, RIS, Pl011
from stratovirt.snapshot.saved import Saved, SnapshotError


class Line:
    def __init__(self) -> None:
        self.high = False
        self.changes = 0

    def set_level(self, high: bool) -> None:
        self.high = high
        self.changes += 1


class Char:
    def __init__(self) -> None:
        self.written = bytearray()
        self.can_write = True
        self.resumed = 0

    def write(self, data: bytes) -> None:
        self.written += data

    def set_receiver(self, receive: Callable[[bytes], None], can_receive: Callable[[], int],
                     writable: Callable[[], None] | None = None) -> None:
        self.receive, self.room, self.writable = receive, can_receive, writable

    def resume_input(self) -> None:
        self.resumed += 1


@pytest.fixture
def port() -> tuple[Pl011, Line, Char]:
    line, char = Line(), Char()
    return Pl011(line, char), line, char


def test_identification_and_reset_values(port: tuple[Pl011, Line, Char]) -> None:
    uart, _, _ = port
    assert bytes(uart.read(0xFE0 + 4 * index, 4) for index in range(8)) == bytes.fromhex("1110140 00df005b1".replace(" ", ""))
    assert uart.read(CR, 4) == 0x300
    assert uart.read(pl011.IFLS, 4) == 0x12
    assert uart.read(FR, 4) == pl011.FR_TXFE | pl011.FR_RXFE | pl011.FR_CTS | pl011.FR_DSR | pl011.FR_DCD
    assert uart.read(0x777, 4) == 0


def test_output_goes_out_byte_by_byte(port: tuple[Pl011, Line, Char]) -> None:
    uart, _, char = port
    for byte in b"hello":
        uart.write(DR, 4, byte)
    uart.write(DR, 1, ord("!"))
    uart.write(DR, 2, 0x100 | ord("?"))
    assert char.written == b"hello!?"


def test_input_raises_the_line_until_it_is_read(port: tuple[Pl011, Line, Char]) -> None:
    uart, line, char = port
    uart.write(IMSC, 4, INT_RX | INT_RT)
    assert not line.high
    char.receive(b"ab")
    assert line.high and uart.read(MIS, 4) == INT_RX | INT_RT
    assert not uart.read(FR, 4) & pl011.FR_RXFE
    assert uart.read(DR, 4) == ord("a") and line.high
    assert uart.read(DR, 4) == ord("b") and not line.high
    assert uart.read(DR, 4) == 0
    assert line.changes == 2


def test_clearing_the_interrupt_does_not_strand_unread_input(port: tuple[Pl011, Line, Char]) -> None:
    """Linux clears the receive interrupts when it opens the port, with input in the FIFO."""
    uart, line, char = port
    char.receive(b"ab")
    uart.write(ICR, 4, INT_RX | INT_RT)
    uart.write(IMSC, 4, INT_RX | INT_RT)
    assert line.high


def test_the_transmit_interrupt_follows_the_room_in_the_device(port: tuple[Pl011, Line, Char]) -> None:
    uart, line, char = port
    uart.write(IMSC, 4, INT_TX)
    assert not line.high  # the FIFO has not been filled, and so has not become empty
    uart.write(DR, 4, ord("x"))
    assert line.high
    char.can_write = False
    uart.write(DR, 4, ord("y"))
    assert not line.high and uart.read(FR, 4) & pl011.FR_TXFF
    char.can_write = True
    assert char.writable is not None
    char.writable()
    assert line.high and uart.read(FR, 4) & pl011.FR_TXFE
    uart.write(ICR, 4, INT_TX)
    assert not line.high


def test_input_without_room_is_paused_and_taken_up_again(port: tuple[Pl011, Line, Char]) -> None:
    uart, _, char = port
    taken = 0
    while room := char.room():
        char.receive(bytes(min(room, 100)))
        taken += min(room, 100)
    assert taken == pl011.RECEIVE_BUFFER_SIZE and char.resumed == 0
    assert uart.read(FR, 4) & pl011.FR_RXFF
    for _ in range(taken // 2):
        uart.read(DR, 4)
    assert char.resumed == 1


def test_loop_back_and_overrun(port: tuple[Pl011, Line, Char]) -> None:
    uart, line, char = port
    uart.write(CR, 4, 0x381)
    uart.write(LCR_H, 4, 0x70)
    assert char.room() == 0
    for byte in range(17):
        uart.write(DR, 4, byte)
    assert char.written == b"" and uart.read(RIS, 4) & INT_OE
    assert [uart.read(DR, 4) & 0xFF for _ in range(16)] == list(range(16))
    uart.write(CR, 4, 0x301)
    assert char.resumed == 1
    uart.write(IMSC, 4, 0xFFFF)
    assert line.high
    uart.write(ICR, 4, 0xFFFF)
    assert not line.high


def test_reset_and_saved_state(port: tuple[Pl011, Line, Char]) -> None:
    uart, line, char = port
    uart.write(IMSC, 4, INT_RX)
    char.receive(b"input")
    state = uart.save()
    other_line = Line()
    other = Pl011(other_line)
    other.restore(Saved(state))
    assert other_line.high and other.read(DR, 4) == ord("i")
    uart.reset()
    assert not line.high and uart.read(DR, 4) == 0 and uart.read(IMSC, 4) == 0
    for bad in ({}, {**state, "receive": "zz"}, {**state, "raised": -1}, {**state, "receive": "00" * 2000}, {**state, "x": 1}):
        with pytest.raises(SnapshotError):
            other.restore(Saved(bad))


def test_a_port_with_nothing_plugged_in() -> None:
    uart = Pl011(Line())
    uart.write(DR, 4, 65)
    assert uart.read(RIS, 4) == INT_TX
    uart.reset()
