"""The PL031: the time of day, set and read, and the alarm."""

from __future__ import annotations

from stratovirt.devices.pl031 import CR, DR, ICR, IMSC, LR, MIS, MR, RIS, Pl031


class Line:
    high = False

    def set_level(self, high: bool) -> None:
        self.high = high


class Clock:
    now = 1_700_000_000.5

    def __call__(self) -> float:
        return self.now


def test_time_is_read_and_set() -> None:
    clock = Clock()
    rtc = Pl031(Line(), clock)
    assert rtc.read(DR, 4) == 1_700_000_000 and rtc.read(CR, 4) == 1
    clock.now += 10
    assert rtc.read(DR, 4) == 1_700_000_010
    rtc.write(LR, 4, 5)
    assert (rtc.read(DR, 4), rtc.read(LR, 4)) == (5, 5)
    clock.now += 2
    assert rtc.read(DR, 4) == 7
    rtc.reset()
    assert rtc.read(DR, 4) == 1_700_000_012


def test_identification() -> None:
    rtc = Pl031(Line(), Clock())
    assert bytes(rtc.read(0xFE0 + 4 * index, 4) for index in range(8)) == bytes.fromhex("311004000df005b1")
    assert rtc.read(0xFE1, 1) == 0 and rtc.read(0x800, 4) == 0


def test_the_alarm_raises_the_line_once() -> None:
    clock, line, waits = Clock(), Line(), list[float]()
    rtc = Pl031(line, clock, waits.append)
    rtc.write(IMSC, 4, 1)
    rtc.write(MR, 4, 1_700_000_005)
    assert waits == [5.0] and not line.high
    clock.now += 5
    rtc.check_alarm()
    assert line.high and rtc.read(RIS, 4) == rtc.read(MIS, 4) == 1
    rtc.write(ICR, 4, 1)
    assert not line.high and rtc.read(RIS, 4) == 0
    rtc.write(IMSC, 4, 0)
    rtc.write(MR, 4, 1_700_000_000)  # in the past: at once, but masked
    assert rtc.read(RIS, 4) == 1 and rtc.read(MIS, 4) == 0 and not line.high
    rtc.write(IMSC, 4, 1)
    assert line.high
    rtc.reset()
    assert not line.high


def test_values_at_the_ends() -> None:
    rtc = Pl031(Line(), Clock(), lambda seconds: None)
    rtc.write(LR, 4, 0xFFFF_FFFF)
    rtc.write(MR, 4, 0)
    assert rtc.read(DR, 4) == 0xFFFF_FFFF
    rtc.write(LR, 2, 1)
    assert rtc.read(DR, 4) == 0xFFFF_FFFF
    assert rtc.read(DR, 1) == 0xFF
