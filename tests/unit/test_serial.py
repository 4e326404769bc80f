"""The 16550A against its data sheet, and against what Linux's 8250 driver does to it."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratovirt.devices import serial
from stratovirt.devices.serial import Serial
from stratovirt.snapshot.saved import Saved, SnapshotError

RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7


class Line:
    def __init__(self) -> None:
        self.count = 0

    def trigger(self) -> None:
        self.count += 1


class Char:
    """A character device held in the hand: the test decides when it is full."""

    def __init__(self) -> None:
        self.can_write = True
        self.written = b""
        self.resumed = 0

    def write(self, data: bytes) -> None:
        self.written += data

    def set_receiver(self, receive, can_receive, writable=None) -> None:
        self.receive, self.can_receive, self.writable = receive, can_receive, writable

    def resume_input(self) -> None:
        self.resumed += 1

    def feed(self, data: bytes) -> bytes:
        """Give what the port allows, as a real device does; returns the rest."""
        room = self.can_receive()
        if room:
            self.receive(data[:room])
        return data[room:]


@pytest.fixture
def port():
    irq, char = Line(), Char()
    uart = Serial(irq, char)
    uart.irq, uart.char = irq, char
    return uart


def test_a_byte_written_to_thr_goes_out_and_the_transmitter_is_ready_again(port):
    for value in b"boot":
        port.write(THR, 1, value)
    assert port.char.written == b"boot"
    assert port.read(LSR, 1) == 0x60
    assert port.irq.count == 0


def test_divisor_latch_hides_behind_dlab(port):
    port.write(LCR, 1, 0x83)
    port.write(DLL, 1, 0x34)
    port.write(DLM, 1, 0x12)
    assert (port.read(DLL, 1), port.read(DLM, 1), port.char.written) == (0x34, 0x12, b"")
    port.write(LCR, 1, 0x03)
    assert (port.read(IER, 1), port.read(RBR, 1)) == (0, 0)


def test_enabling_thre_raises_it_once_and_reading_iir_clears_it(port):
    port.write(IER, 1, 0x02)
    assert port.irq.count == 1
    assert port.read(IIR, 1) == 0x02
    assert port.read(IIR, 1) == 0x01
    port.write(THR, 1, 0x41)
    assert port.irq.count == 2
    assert port.read(IIR, 1) == 0x02


def test_linux_probe_for_a_broken_thre_finds_none(port):
    port.write(IER, 1, 0x02)
    first = port.read(IIR, 1)
    port.write(IER, 1, 0)
    port.write(IER, 1, 0x02)
    second = port.read(IIR, 1)
    assert not first & 1 and not second & 1


def test_linux_probe_sees_a_16550a(port):
    port.write(MCR, 1, 0x1A)
    assert port.read(MSR, 1) & 0xF0 == 0x90
    port.write(MCR, 1, 0)
    port.write(FCR, 1, 0x01)
    assert port.read(IIR, 1) >> 6 == 3
    port.write(FCR, 1, 0)
    assert port.read(IIR, 1) >> 6 == 0
    port.write(IER, 1, 0xFF)
    assert port.read(IER, 1) == 0x0F


def test_input_interrupts_by_trigger_level_and_timeout(port):
    port.write(FCR, 1, 0x81)  # FIFO on, trigger at 8
    port.write(IER, 1, 0x01)
    port.char.feed(b"abc")
    assert port.irq.count == 1
    assert port.read(IIR, 1) == 0xCC
    port.char.feed(b"defgh")
    assert port.irq.count == 1, "the output was high already"
    assert port.read(IIR, 1) == 0xC4
    assert bytes(port.read(RBR, 1) for _ in range(8)) == b"abcdefgh"
    assert port.read(IIR, 1) == 0xC1
    assert port.read(LSR, 1) & 0x01 == 0
    port.char.feed(b"i")
    assert port.irq.count == 2


def test_priorities_rls_before_data_before_thre_before_modem(port):
    port.write(FCR, 1, 0)
    port.write(MCR, 1, 0x10)
    port.write(THR, 1, 0x41)
    port.write(THR, 1, 0x42)  # overruns the one-byte buffer
    port.write(IER, 1, 0x0F)
    assert port.read(IIR, 1) == 0x06
    assert port.read(LSR, 1) == 0x63
    assert port.read(LSR, 1) == 0x61, "reading LSR clears the error"
    assert port.read(IIR, 1) == 0x04
    assert port.read(RBR, 1) == 0x42
    assert port.read(IIR, 1) == 0x02
    assert port.read(IIR, 1) == 0x00
    assert port.read(MSR, 1) == 0x0B, "CTS, DSR and DCD have dropped"
    assert port.read(MSR, 1) == 0x00
    assert port.read(IIR, 1) == 0x01


def test_loopback_fifo_holds_sixteen_and_sends_nothing_out(port):
    port.write(FCR, 1, 0x01)
    port.write(MCR, 1, 0x10)
    for value in range(20):
        port.write(THR, 1, value)
    assert port.read(LSR, 1) == 0x63
    assert [port.read(RBR, 1) for _ in range(17)] == [*range(16), 0]
    assert port.char.written == b""


def test_input_waits_during_loopback_and_is_asked_for_afterwards(port):
    port.write(MCR, 1, 0x10)
    assert port.char.feed(b"x") == b"x"
    port.write(MCR, 1, 0)
    assert port.char.resumed == 1
    assert port.char.feed(b"x") == b""
    assert port.read(RBR, 1) == ord("x")


def test_ten_megabytes_of_input_never_pile_up_and_none_is_lost(port):
    """A monitor that queued serial input without bound let its client exhaust the host."""
    sent = bytes(index * 7 & 0xFF for index in range(200_000))
    left, got, paused = sent, bytearray(), False
    while left or port.read(LSR, 1) & 1:
        if not paused:
            before = len(left)
            left = port.char.feed(left)
            paused = bool(left) and len(left) == before
        resumed = port.char.resumed
        for _ in range(100):
            if port.read(LSR, 1) & 1:
                got.append(port.read(RBR, 1))
        assert len(port._receive) <= serial.RECEIVE_BUFFER_SIZE
        paused = paused and port.char.resumed == resumed
    assert bytes(got) == sent


def test_clearing_the_fifo_empties_it_and_resumes_the_source(port):
    assert port.char.feed(bytes(2000)) == bytes(976)
    assert port.char.can_receive() == 0
    port.write(FCR, 1, 0x03)
    assert port.read(LSR, 1) & 1 == 0
    assert port.char.resumed == 1


def test_a_full_device_takes_thre_away_and_room_gives_it_back_with_an_interrupt(port):
    port.write(IER, 1, 0x02)
    port.read(IIR, 1)
    port.char.can_write = False
    port.write(THR, 1, 0x41)
    assert port.read(LSR, 1) & 0x60 == 0
    assert port.read(IIR, 1) == 0x01
    before = port.irq.count
    port.char.can_write = True
    port.char.writable()
    assert port.irq.count == before + 1
    assert port.read(LSR, 1) & 0x60 == 0x60
    assert port.read(IIR, 1) == 0x02


def test_wide_accesses_are_consecutive_registers_and_ones_beyond(port):
    port.write(SCR, 1, 0x5A)
    port.write(LCR, 1, 0x1B)
    assert port.read(LCR, 2) == 0x001B
    assert port.read(SCR, 4) == 0xFFFFFF5A
    port.write(LCR, 2, 0x0B03)
    assert (port.read(LCR, 1), port.read(MCR, 1)) == (0x03, 0x0B)
    port.write(THR, 4, 0x00000041)
    assert port.char.written == b"A"


def test_scratch_writes_are_the_boot_time_port():
    seen = []
    uart = Serial(Line(), None, seen.append)
    uart.write(SCR, 1, 1)
    uart.write(SCR, 1, 2)
    assert (seen, uart.read(SCR, 1)) == ([1, 2], 2)


def test_reset_is_power_on(port):
    fresh = port.save()
    for offset in (LCR, IER, MCR, SCR, FCR):
        port.write(offset, 1, 0xFF)
    port.char.feed(b"typed")
    port.reset()
    assert port.save() == fresh
    assert {name: value for _, name, access, value, _ in serial.REGISTERS if access == "rw"} == {
        name: fresh[name] for name in ("DLL", "IER", "DLM", "LCR", "MCR", "SCR")}


def test_snapshot_round_trip_and_refusal_of_anything_else(port):
    port.write(FCR, 1, 0xC1)
    port.write(IER, 1, 0x05)
    port.char.feed(b"unread")
    state = port.save()
    other = Serial(irq := Line(), Char())
    other.restore(Saved(state))
    assert other.save() == state
    assert irq.count == 1, "an interrupt that was pending is raised again"
    for name, value in (("IER", 256), ("LCR", True), ("receive", "xyz"), ("receive", "00" * 4096), ("SCR", None),
                        ("receive", 3), ("overrun", 1), ("more", 0)):
        with pytest.raises(SnapshotError, match=f"^serial.{name}: "):
            other.restore(Saved({**state, name: value}, "serial"))
    with pytest.raises(SnapshotError, match="missing"):
        other.restore(Saved({}))
    assert other.save() == state


OPERATIONS = st.lists(st.one_of(
    st.tuples(st.just("r"), st.integers(-2, 12), st.sampled_from((1, 2, 4, 8)), st.just(0)),
    st.tuples(st.just("w"), st.integers(-2, 12), st.sampled_from((1, 2, 4, 8)), st.integers(0, 2**64 - 1)),
    st.tuples(st.just("in"), st.just(0), st.just(0), st.integers(0, 3000)),
), max_size=60)


@given(OPERATIONS)
@settings(max_examples=200, deadline=None)
def test_no_sequence_of_accesses_breaks_it(operations):
    irq, char = Line(), Char()
    uart = Serial(irq, char)
    for kind, offset, size, value in operations:
        if kind == "in":
            char.feed(bytes(value))
        elif kind == "w":
            uart.write(offset, size, value % (1 << (8 * size)))
        else:
            assert 0 <= uart.read(offset, size) < 1 << (8 * size)
        assert len(uart._receive) <= serial.RECEIVE_BUFFER_SIZE + serial.FIFO_SIZE
    uart.restore(Saved(uart.save()))


@given(OPERATIONS)
@settings(max_examples=100, deadline=None)
def test_the_interrupt_is_an_edge_whenever_iir_goes_from_none_to_some(operations):
    irq, char = Line(), Char()
    uart = Serial(irq, char)
    pending, edges = False, 0
    for kind, offset, size, value in operations:
        if kind == "in":
            char.feed(bytes(value))
        elif kind == "w" and size == 1:
            uart.write(offset, 1, value & 0xFF)
        elif size == 1:
            uart.read(offset, 1)
        now = uart._cause() != 1
        edges += now and not pending
        pending = now
        assert irq.count >= edges


def test_two_vcpus_writing_at_once_lose_nothing():
    char = Char()
    uart = Serial(Line(), char)

    def write(value):
        for _ in range(2000):
            uart.write(THR, 1, value)

    written = []
    char.write = written.append
    threads = [threading.Thread(target=write, args=(value,)) for value in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(written) == [b"\x01"] * 2000 + [b"\x02"] * 2000
