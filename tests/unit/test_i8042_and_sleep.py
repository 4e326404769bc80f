"""How a guest resets and switches off: the keyboard controller's reset line, the sleep register."""

from __future__ import annotations

from stratovirt.devices.i8042 import I8042
from stratovirt.devices.sleep_control import SleepControl


def test_only_the_command_fe_pulses_the_reset_line() -> None:
    calls: list[int] = []
    command, data = I8042(True, lambda: calls.append(1)), I8042(False, lambda: calls.append(2))
    for value in range(256):
        data.write(0, 1, value)
        if value != 0xFE:
            command.write(0, 1, value)
    assert calls == []
    command.write(0, 1, 0xFE)
    assert calls == [1]


def test_a_probe_finds_an_empty_socket() -> None:
    for size in (1, 2, 4):
        assert I8042(False, lambda: None).read(0, size) == (1 << 8 * size) - 1
        assert I8042(True, lambda: None).read(0, size) & 0x01, "output buffer full: a flush of it never ends"


def test_a_reboot_does_not_wait_for_the_input_buffer() -> None:
    """Linux polls the status 65,536 times before it gives up on a buffer that stays full."""
    assert not I8042(True, lambda: None).read(0, 1) & 0x02


def test_only_s5_with_sleep_enable_is_power_off() -> None:
    calls: list[int] = []
    control = SleepControl(lambda: calls.append(1))
    for value in range(256):
        control.write(0, 1, value)
    # SLP_TYP in bits 2-4 is 5, SLP_EN in bit 5; bits 0, 1, 6 and 7 do not count
    assert len(calls) == 16
    calls.clear()
    control.write(0, 1, 0x34)
    assert calls == [1]
    control.write(1, 1, 0x34)
    assert calls == [1]


def test_the_sleep_status_never_says_that_the_guest_woke_up() -> None:
    control = SleepControl(lambda: None)
    for offset in (0, 1):
        for size in (1, 2):
            assert control.read(offset, size) == 0
