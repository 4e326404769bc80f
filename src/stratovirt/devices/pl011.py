"""The PL011 serial port.

Layout, 32-bit registers of which the guest may use the low bytes:
    000  UARTDR     rw  data; on a read bits 8-11 are errors, and there are none but overrun
    004  UARTRSR    rw  receive status; a write clears it
    018  UARTFR     r   flags: TXFE 7, RXFF 6, TXFF 5, RXFE 4, BUSY 3, DCD 2, DSR 1, CTS 0
    024  UARTIBRD   rw  divisor             028  UARTFBRD  rw
    02C  UARTLCR_H  rw  bit 4: FIFOs on     030  UARTCR    rw  bits: RXE 9, TXE 8, LBE 7, UARTEN 0
    034  UARTIFLS   rw  FIFO levels         038  UARTIMSC  rw  interrupt mask
    03C  UARTRIS    r   raw interrupts      040  UARTMIS   r   masked interrupts
    044  UARTICR    w   clears interrupts   048  UARTDMACR rw  no DMA is ever done
    FE0-FFC         r   identification, a byte each

The line is infinitely fast: a byte written to UARTDR is out at once, and the transmit FIFO is full only while the character
device is. Behind the 16-byte receive FIFO lies a larger buffer; input that has no room is not dropped, its source is paused.
The receive interrupt comes with the first byte, for fewer than the level of the FIFO would be announced by its time-out, and
there is no time on an infinitely fast line. The interrupt output is a level.
Spec: Arm PrimeCell UART (PL011) Technical Reference Manual, DDI 0183, chapter 3.
Thread: register accesses come from vCPU threads, input and its flow control from the loop's thread.
"""

from __future__ import annotations

from _thread import allocate_lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from stratovirt.snapshot.saved import Saved

    class LevelLine(Protocol):
        def set_level(self, high: bool) -> None: ...

    class CharacterDevice(Protocol):
        can_write: bool

        def write(self, data: bytes) -> None: ...

        def set_receiver(self, receive: Callable[[bytes], None], can_receive: Callable[[], int],
                         writable: Callable[[], None] | None = None) -> None: ...

        def resume_input(self) -> None: ...


DR, RSR, FR, ILPR, IBRD, FBRD, LCR_H, CR, IFLS, IMSC, RIS, MIS, ICR, DMACR = (
    0x000, 0x004, 0x018, 0x020, 0x024, 0x028, 0x02C, 0x030, 0x034, 0x038, 0x03C, 0x040, 0x044, 0x048)
_ID = 0xFE0
IDENTIFICATION = (0x11, 0x10, 0x14, 0x00, 0x0D, 0xF0, 0x05, 0xB1)

FR_CTS, FR_DSR, FR_DCD, FR_BUSY, FR_RXFE, FR_TXFF, FR_RXFF, FR_TXFE = (1 << bit for bit in range(8))
LCR_FEN = 1 << 4
CR_LBE, CR_TXE, CR_RXE = 1 << 7, 1 << 8, 1 << 9
INT_RX, INT_TX, INT_RT, INT_OE = 1 << 4, 1 << 5, 1 << 6, 1 << 10
INT_ALL = 0x7FF

# register: (value after reset, bits that can be written)
_PLAIN = {ILPR: (0, 0xFF), IBRD: (0, 0xFFFF), FBRD: (0, 0x3F), LCR_H: (0, 0xFF), CR: (0x300, 0xFF87), IFLS: (0x12, 0x3F),
          IMSC: (0, INT_ALL), DMACR: (0, 7)}

# The names that they have in a snapshot.
_SAVED = {"ILPR": ILPR, "IBRD": IBRD, "FBRD": FBRD, "LCR_H": LCR_H, "CR": CR, "IFLS": IFLS, "IMSC": IMSC, "DMACR": DMACR}

FIFO_SIZE = 16
RECEIVE_BUFFER_SIZE = 1024
_OVERRUN_BIT = 1 << 11  # in a read of UARTDR
_RSR_OVERRUN = 1 << 3
_BYTES = tuple(bytes((value,)) for value in range(256))


class Pl011:
    """A PL011. `char` is None for a port with nothing plugged in: output vanishes, input never comes."""

    def __init__(self, irq: LevelLine, char: CharacterDevice | None = None) -> None:
        self._irq = irq
        self._char = char
        self._lock = allocate_lock()  # guards all below, the order of changes of the line included
        self._receive = bytearray()
        self._power_on()
        if char is not None:
            char.set_receiver(self._take_input, self._room, self._output_drained)

    def _power_on(self) -> None:
        self._plain = {register: value for register, (value, _) in _PLAIN.items()}
        self._raised = 0
        self._overrun = False
        self._input_paused = False
        self._output = False
        self._receive.clear()

    # -- registers

    def read(self, offset: int, size: int) -> int:
        return self._read(offset) & (1 << 8 * size) - 1

    def _read(self, offset: int) -> int:
        if offset == FR:
            return self._flags()
        if offset == DR:
            return self._read_data()
        if offset in self._plain:
            return self._plain[offset]
        if offset == RIS:
            return self._raised
        if offset == MIS:
            return self._raised & self._plain[IMSC]
        if offset == RSR:
            return _RSR_OVERRUN if self._overrun else 0
        if offset >= _ID:
            index = (offset - _ID) >> 2
            return IDENTIFICATION[index] if offset & 3 == 0 and index < len(IDENTIFICATION) else 0
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == DR:
            self._write_data(value & 0xFF)
            return
        resume = False
        with self._lock:
            if offset == ICR:
                self._raised &= ~value
                if self._receive:
                    self._raised |= INT_RX | INT_RT  # the time-out of what has not been read yet comes at once
            elif offset == RSR:
                self._overrun = False
            elif offset in _PLAIN:
                self._plain[offset] = value & _PLAIN[offset][1]
                resume = offset == CR and self._take_resume()
            self._update()
        if resume and self._char is not None:
            self._char.resume_input()

    def _flags(self) -> int:
        waiting = len(self._receive)
        flags = FR_CTS | FR_DSR | FR_DCD
        flags |= FR_TXFE if self._transmitter_ready() else FR_TXFF | FR_BUSY
        if not waiting:
            flags |= FR_RXFE
        elif waiting >= (FIFO_SIZE if self._plain[LCR_H] & LCR_FEN else 1):
            flags |= FR_RXFF
        return flags

    def _read_data(self) -> int:
        resume = False
        with self._lock:
            if not self._receive:
                return 0
            value = self._receive.pop(0)
            if self._overrun:
                value |= _OVERRUN_BIT
                self._overrun = False
            if not self._receive:
                self._raised &= ~(INT_RX | INT_RT)
            if self._input_paused and len(self._receive) <= RECEIVE_BUFFER_SIZE // 2:
                resume = self._take_resume()
            self._update()
        if resume and self._char is not None:
            self._char.resume_input()
        return value

    def _write_data(self, value: int) -> None:
        char = self._char
        if not self._plain[CR] & CR_LBE:
            if char is not None:
                char.write(_BYTES[value])
            if self._raised & INT_TX and (char is None or char.can_write):
                return  # nearly always: there was room, and there is
            with self._lock:
                # Looked at under the lock, which `_output_drained` takes too: it cannot come in between and be forgotten.
                if char is None or char.can_write:
                    self._raised |= INT_TX
                else:
                    self._raised &= ~INT_TX
                self._update()
            return
        with self._lock:
            if len(self._receive) < FIFO_SIZE:
                self._receive.append(value)
                self._raised |= INT_RX | INT_RT | INT_TX
            else:
                self._overrun = True
                self._raised |= INT_OE
            self._update()

    def _transmitter_ready(self) -> bool:
        return self._char is None or bool(self._plain[CR] & CR_LBE) or self._char.can_write

    def _update(self) -> None:
        """Bring the line to where the masked interrupts want it. Called with the lock held, for the order of changes counts."""
        output = bool(self._raised & self._plain[IMSC])
        if output != self._output:
            self._output = output
            self._irq.set_level(output)

    def _take_resume(self) -> bool:
        resume, self._input_paused = self._input_paused, False
        return resume

    # -- the character device's side; loop thread

    def _room(self) -> int:
        """How many bytes of input fit now. After a 0 the source waits for `resume_input`."""
        with self._lock:
            room = 0 if self._plain[CR] & CR_LBE else RECEIVE_BUFFER_SIZE - len(self._receive)
            self._input_paused = room <= 0
            return max(0, room)

    def _take_input(self, data: bytes) -> None:
        with self._lock:
            self._receive += data
            self._raised |= INT_RX | INT_RT
            self._update()

    def _output_drained(self) -> None:
        with self._lock:
            self._raised |= INT_TX
            self._update()

    # -- life cycle

    def reset(self) -> None:
        """Back to power-on, the receive buffer emptied."""
        with self._lock:
            resume = self._take_resume()
            self._power_on()
            self._irq.set_level(False)
        if resume and self._char is not None:
            self._char.resume_input()

    def save(self) -> dict[str, object]:
        """What a snapshot keeps: the registers, and the unread input. What has been written belongs to this process."""
        with self._lock:
            raised = self._raised
            if not self._transmitter_ready():
                raised |= INT_TX  # a driver that waits for room finds it in the machine that goes on from here
            return {**{name: self._plain[register] for name, register in _SAVED.items()}, "raised": raised,
                    "overrun": self._overrun, "receive": bytes(self._receive).hex()}

    def restore(self, state: Saved) -> None:
        """Take over what `save` gave. Raises: SnapshotError; nothing is changed then."""
        values = {register: state.integer(name, 0, _PLAIN[register][1]) for name, register in _SAVED.items()}
        raised, overrun = state.integer("raised", 0, INT_ALL), state.boolean("overrun")
        receive = state.data("receive", limit=RECEIVE_BUFFER_SIZE + FIFO_SIZE)
        state.end()
        with self._lock:
            self._plain, self._raised, self._overrun = values, raised, overrun
            self._receive[:] = receive
            self._output = not self._raised & values[IMSC]  # the line is told in any case
            self._update()
            resume = self._take_resume()
        if resume and self._char is not None:
            self._char.resume_input()
