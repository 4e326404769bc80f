"""The PC's serial port: a 16550A UART.

The guest sees eight byte-wide registers and a 16-byte FIFO; behind it lies a larger receive buffer, so that a burst of
input is taken in one go. The line is infinitely fast: a byte written to THR is out at once, and THRE is taken away only
while the character device is full. Input that has no room is not dropped, its source is paused.

The interrupt output is an edge for the machine: `irq.trigger()` when it goes from low to high. Guests with an
edge-triggered IRQ 4 (every PC) read IIR until it says that nothing is pending, as the data sheet asks.

Spec: National Semiconductor PC16550D data sheet, section 8 (registers); PC convention: base 0x3f8, IRQ 4.
Thread: register accesses come from vCPU threads, input and its flow control from the loop's thread.
"""

from __future__ import annotations

import _thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from stratovirt.snapshot.saved import Saved

    class InterruptLine(Protocol):
        def trigger(self) -> None: ...

    class CharacterDevice(Protocol):
        can_write: bool

        def write(self, data: bytes) -> None: ...

        def set_receiver(self, receive: Callable[[bytes], None], can_receive: Callable[[], int],
                         writable: Callable[[], None] | None = None) -> None: ...

        def resume_input(self) -> None: ...


# offset, name, access, value after reset, what selects it when the offset is shared
REGISTERS = (
    (0, "RBR", "r", 0x00, "DLAB=0: receive buffer"),
    (0, "THR", "w", 0x00, "DLAB=0: transmit holding"),
    (0, "DLL", "rw", 0x0C, "DLAB=1: divisor latch, low byte (9600 baud)"),
    (1, "IER", "rw", 0x00, "DLAB=0: interrupt enable"),
    (1, "DLM", "rw", 0x00, "DLAB=1: divisor latch, high byte"),
    (2, "IIR", "r", 0x01, "interrupt identification"),
    (2, "FCR", "w", 0x00, "FIFO control"),
    (3, "LCR", "rw", 0x00, "line control"),
    (4, "MCR", "rw", 0x00, "modem control"),
    (5, "LSR", "r", 0x60, "line status"),
    (6, "MSR", "r", 0xB0, "modem status"),
    (7, "SCR", "rw", 0x00, "scratch; also the boot-time port"),
)
REGISTER_COUNT = 8

FIFO_SIZE = 16
RECEIVE_BUFFER_SIZE = 1024

IER_RDA, IER_THRE, IER_RLS, IER_MODEM = 0x01, 0x02, 0x04, 0x08
IIR_MODEM, IIR_NONE, IIR_THRE, IIR_RDA, IIR_RLS, IIR_TIMEOUT = 0x00, 0x01, 0x02, 0x04, 0x06, 0x0C
IIR_FIFOS_ENABLED = 0xC0
FCR_ENABLE, FCR_CLEAR_RECEIVE = 0x01, 0x02
FCR_TRIGGER_LEVELS = (1, 4, 8, 14)
LCR_DLAB = 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 0x01, 0x02, 0x04, 0x08, 0x10
LSR_DR, LSR_OE, LSR_THRE, LSR_TEMT = 0x01, 0x02, 0x20, 0x40
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80
MSR_CONNECTED = MSR_CTS | MSR_DSR | MSR_DCD

_BYTES = tuple(bytes((value,)) for value in range(256))


class Serial:
    """A 16550A. `char` is None for a port with nothing plugged in: output vanishes, input never comes.

    `on_boot_time(value)` is told about writes to the scratch register: guests that measure themselves write 1 when the
    kernel starts and 2 when the boot is complete.
    """

    def __init__(self, irq: InterruptLine, char: CharacterDevice | None = None,
                 on_boot_time: Callable[[int], None] | None = None) -> None:
        self._irq = irq
        self._char = char
        self._on_boot_time = on_boot_time
        self._lock = _thread.allocate_lock()  # guards all below; no system call is made under it
        self._receive = bytearray()
        self._input_paused = False
        self._output_high = False
        self._power_on()
        self._readers = (
            self._read_data, self._read_ier, self._read_iir, self._read_lcr,
            self._read_mcr, self._read_lsr, self._read_msr, self._read_scr,
        )
        self._writers = (
            self._write_data, self._write_ier, self._write_fcr, self._write_lcr,
            self._write_mcr, self._write_nothing, self._write_nothing, self._write_scr,
        )
        if char is not None:
            char.set_receiver(self._take_input, self._room, self._output_drained)

    def _power_on(self) -> None:
        reset = {name: value for _, name, _, value, _ in REGISTERS}
        self._dll, self._dlm = reset["DLL"], reset["DLM"]
        self._ier, self._fcr, self._lcr = reset["IER"], reset["FCR"], reset["LCR"]
        self._mcr, self._msr, self._scr = reset["MCR"], reset["MSR"], reset["SCR"]
        self._overrun = False
        self._thre_pending = False
        self._receive.clear()

    # -- register access

    def read(self, offset: int, size: int) -> int:
        """A byte register, or as many consecutive ones as the access is wide; 0xff where there is none."""
        if size == 1 and 0 <= offset < REGISTER_COUNT:
            return self._readers[offset]()
        value = 0
        for index in range(size):
            inside = 0 <= offset + index < REGISTER_COUNT
            value |= (self._readers[offset + index]() if inside else 0xFF) << (8 * index)
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        if size == 1 and 0 <= offset < REGISTER_COUNT:
            self._writers[offset](value & 0xFF)
            return
        for index in range(size):
            if 0 <= offset + index < REGISTER_COUNT:
                self._writers[offset + index]((value >> (8 * index)) & 0xFF)

    def _read_data(self) -> int:
        resume = False
        with self._lock:
            if self._lcr & LCR_DLAB:
                return self._dll
            if not self._receive:
                return 0
            value = self._receive.pop(0)
            if self._input_paused and len(self._receive) <= RECEIVE_BUFFER_SIZE // 2:
                resume = self._take_resume()
            edge = self._update_interrupt()
        self._after(edge, resume)
        return value

    def _write_data(self, value: int) -> None:
        char = self._char
        if not self._lcr & LCR_DLAB and not self._mcr & MCR_LOOP:
            if char is not None:
                char.write(_BYTES[value])
            if not self._ier & IER_THRE:
                return  # nobody waits for THRE, and enabling it looks afresh: a kernel's early console ends here
            with self._lock:
                # `can_write` is looked at after the write; if the device has room again by now it has already told us so.
                if char is None or char.can_write:
                    self._thre_pending = True
                edge = self._update_interrupt()
        else:
            with self._lock:
                if self._lcr & LCR_DLAB:
                    self._dll = value
                    return
                self._loop_back(value)
                self._thre_pending = True
                edge = self._update_interrupt()
        if edge:
            self._irq.trigger()

    def _loop_back(self, value: int) -> None:
        room = FIFO_SIZE if self._fcr & FCR_ENABLE else 1
        if len(self._receive) < room:
            self._receive.append(value)
            return
        self._overrun = True
        if room == 1:
            self._receive[0] = value  # without a FIFO the new character replaces the unread one

    def _read_ier(self) -> int:
        return self._dlm if self._lcr & LCR_DLAB else self._ier

    def _write_ier(self, value: int) -> None:
        with self._lock:
            if self._lcr & LCR_DLAB:
                self._dlm = value
                return
            value &= 0x0F
            if value & IER_THRE and not self._ier & IER_THRE:
                # Enabling the interrupt with THR empty raises it: drivers start transmitting this way.
                self._thre_pending = self._transmitter_ready()
            self._ier = value
            edge = self._update_interrupt()
        if edge:
            self._irq.trigger()

    def _read_iir(self) -> int:
        with self._lock:
            cause = self._cause()
            if cause == IIR_THRE:
                self._thre_pending = False
                edge = self._update_interrupt()
            else:
                edge = False
            value = cause | (IIR_FIFOS_ENABLED if self._fcr & FCR_ENABLE else 0)
        if edge:
            self._irq.trigger()
        return value

    def _write_fcr(self, value: int) -> None:
        resume = False
        with self._lock:
            if (value ^ self._fcr) & FCR_ENABLE or (value & FCR_ENABLE and value & FCR_CLEAR_RECEIVE):
                self._receive.clear()
                resume = self._take_resume()
            self._fcr = value & 0xC9 if value & FCR_ENABLE else 0
            edge = self._update_interrupt()
        self._after(edge, resume)

    def _read_lcr(self) -> int:
        return self._lcr

    def _write_lcr(self, value: int) -> None:
        with self._lock:
            self._lcr = value

    def _read_mcr(self) -> int:
        return self._mcr

    def _write_mcr(self, value: int) -> None:
        resume = False
        with self._lock:
            was_looped = self._mcr & MCR_LOOP
            self._mcr = value & 0x1F
            self._update_modem_status()
            if was_looped and not value & MCR_LOOP:
                resume = self._take_resume()
            edge = self._update_interrupt()
        self._after(edge, resume)

    def _read_lsr(self) -> int:
        with self._lock:
            value = LSR_THRE | LSR_TEMT if self._transmitter_ready() else 0
            if self._receive:
                value |= LSR_DR
            if self._overrun:
                value |= LSR_OE
                self._overrun = False
                self._update_interrupt()
        return value

    def _read_msr(self) -> int:
        with self._lock:
            value = self._msr
            self._msr &= 0xF0  # reading clears the delta bits
            self._update_interrupt()
        return value

    def _read_scr(self) -> int:
        return self._scr

    def _write_scr(self, value: int) -> None:
        self._scr = value
        if self._on_boot_time is not None:
            self._on_boot_time(value)

    def _write_nothing(self, value: int) -> None:
        """LSR is for factory tests, MSR read-only."""

    # -- state that registers are made of; called with the lock held

    def _transmitter_ready(self) -> bool:
        return self._char is None or bool(self._mcr & MCR_LOOP) or self._char.can_write

    def _update_modem_status(self) -> None:
        mcr = self._mcr
        lines = MSR_CONNECTED
        if mcr & MCR_LOOP:
            lines = (
                (MSR_DSR if mcr & MCR_DTR else 0) | (MSR_CTS if mcr & MCR_RTS else 0)
                | (MSR_RI if mcr & MCR_OUT1 else 0) | (MSR_DCD if mcr & MCR_OUT2 else 0)
            )
        changed = (lines ^ self._msr) & 0xF0
        if changed & MSR_RI and lines & MSR_RI:
            changed &= ~MSR_RI  # only the trailing edge of RI counts
        self._msr = lines | (self._msr & 0x0F) | (changed >> 4)

    def _cause(self) -> int:
        """The pending interrupt of the highest priority."""
        ier = self._ier
        if self._overrun and ier & IER_RLS:
            return IIR_RLS
        if self._receive and ier & IER_RDA:
            fifo = self._fcr & FCR_ENABLE
            # Fewer than the trigger level would wait for four character times; the line is infinitely fast.
            return IIR_TIMEOUT if fifo and len(self._receive) < FCR_TRIGGER_LEVELS[self._fcr >> 6] else IIR_RDA
        if self._thre_pending and ier & IER_THRE:
            return IIR_THRE
        if self._msr & 0x0F and ier & IER_MODEM:
            return IIR_MODEM
        return IIR_NONE

    def _update_interrupt(self) -> bool:
        """Whether the interrupt output has just gone from low to high."""
        high = self._cause() != IIR_NONE
        edge = high and not self._output_high
        self._output_high = high
        return edge

    def _take_resume(self) -> bool:
        resume, self._input_paused = self._input_paused, False
        return resume

    def _after(self, edge: bool, resume: bool) -> None:
        if edge:
            self._irq.trigger()
        if resume and self._char is not None:
            self._char.resume_input()

    # -- the character device's side; loop thread

    def _room(self) -> int:
        """How many bytes of input fit now. After a 0 the source waits for `resume_input`."""
        with self._lock:
            room = 0 if self._mcr & MCR_LOOP else RECEIVE_BUFFER_SIZE - len(self._receive)
            self._input_paused = room <= 0
            return max(0, room)

    def _take_input(self, data: bytes) -> None:
        with self._lock:
            self._receive += data
            edge = self._update_interrupt()
        if edge:
            self._irq.trigger()

    def _output_drained(self) -> None:
        with self._lock:
            self._thre_pending = True
            edge = self._update_interrupt()
        if edge:
            self._irq.trigger()

    # -- life cycle

    def reset(self) -> None:
        """Back to power-on, the receive buffer emptied."""
        with self._lock:
            self._power_on()
            self._output_high = False
            resume = self._take_resume()
        self._after(False, resume)

    def save(self) -> dict[str, object]:
        """What a snapshot keeps: the registers, and the unread input. What has been written belongs to this process."""
        with self._lock:
            return {
                "DLL": self._dll, "DLM": self._dlm, "IER": self._ier, "FCR": self._fcr, "LCR": self._lcr,
                "MCR": self._mcr, "MSR": self._msr, "SCR": self._scr, "overrun": self._overrun,
                # A driver that waits for room hears of it where there is some: in the machine that goes on from here.
                "thre_pending": self._thre_pending or not self._transmitter_ready(), "receive": bytes(self._receive).hex(),
            }

    def restore(self, state: Saved) -> None:
        """Take over what `save` gave. Raises: SnapshotError; nothing is changed then."""
        names = ("DLL", "DLM", "IER", "FCR", "LCR", "MCR", "MSR", "SCR")
        dll, dlm, ier, fcr, lcr, mcr, msr, scr = (state.integer(name, 0, 0xFF) for name in names)
        overrun, thre_pending = state.boolean("overrun"), state.boolean("thre_pending")
        receive = state.data("receive", limit=RECEIVE_BUFFER_SIZE + FIFO_SIZE)
        state.end()
        with self._lock:
            self._dll, self._dlm, self._ier, self._fcr = dll, dlm, ier & 0x0F, fcr & 0xC9
            self._lcr, self._mcr, self._msr, self._scr = lcr, mcr & 0x1F, msr, scr
            self._overrun, self._thre_pending = overrun, thre_pending
            self._receive[:] = receive
            self._output_high = False  # an edge too many does no harm, one that was on its way would be missed
            resume = self._take_resume()
            edge = self._update_interrupt()
        self._after(edge, resume)
