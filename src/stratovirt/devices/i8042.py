"""The keyboard controller of a PC, as far as it is not about keyboards: the reset line, and quick answers to a probe.

Port 64 is the status (read) and command (write) port, port 60 the data port. Command FE pulses the processor's reset line,
which is how Linux reboots with `reboot=k`. Before it sends that, it waits until the status says that the input buffer is
free, 65,536 reads long; so that bit is clear. All others are set, as in an empty socket: a kernel that probes for the
controller finds an output buffer that never empties, and gives up at once instead of waiting for answers.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

COMMAND_PULSE_RESET = 0xFE
STATUS_INPUT_BUFFER_FULL = 0x02


class I8042:
    """One of its two ports. `on_reset` is called when the guest pulses the reset line. Thread: any vCPU."""

    __slots__ = ("_is_command_port", "_on_reset")

    def __init__(self, is_command_port: bool, on_reset: Callable[[], None]) -> None:
        self._is_command_port = is_command_port
        self._on_reset = on_reset

    def read(self, offset: int, size: int) -> int:
        ones = (1 << (8 * size)) - 1
        return ones & ~STATUS_INPUT_BUFFER_FULL if self._is_command_port else ones

    def write(self, offset: int, size: int, value: int) -> None:
        if self._is_command_port and value & 0xFF == COMMAND_PULSE_RESET:
            self._on_reset()
