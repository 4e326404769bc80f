"""The CMOS clock against a clock that stands still."""

from __future__ import annotations

import calendar
import time

import pytest

from stratovirt.devices.cmos_rtc import CmosRtc

MOMENT = calendar.timegm((2024, 2, 29, 23, 59, 58))  # a Thursday


def register(rtc: CmosRtc, index: int) -> int:
    rtc.write(0, 1, index)
    return rtc.read(1, 1)


def number(rtc: CmosRtc, index: int) -> int:
    bcd = register(rtc, index)
    assert bcd & 0xF < 10
    return (bcd >> 4) * 10 + (bcd & 0xF)


@pytest.mark.parametrize("moment", [0, 951_782_399, MOMENT, MOMENT + 2, 2**31, 2**32, 946_641_600])
def test_the_time_of_day_in_bcd(moment: int) -> None:
    rtc = CmosRtc(lambda: moment + 0.75)
    date = time.gmtime(moment)
    assert [number(rtc, index) for index in (0, 2, 4, 7, 8)] == \
        [date.tm_sec, date.tm_min, date.tm_hour, date.tm_mday, date.tm_mon]
    assert number(rtc, 0x32) * 100 + number(rtc, 9) == date.tm_year
    assert register(rtc, 6) == (date.tm_wday + 1) % 7 + 1  # Sunday is 1


def test_a_known_thursday() -> None:
    rtc = CmosRtc(lambda: MOMENT)
    assert [register(rtc, index) for index in (0, 2, 4, 6, 7, 8, 9, 0x32)] == [0x58, 0x59, 0x23, 5, 0x29, 0x02, 0x24, 0x20]


def test_the_clock_moves_on() -> None:
    now = [float(MOMENT)]
    rtc = CmosRtc(lambda: now[0])
    assert register(rtc, 0) == 0x58
    now[0] += 2
    assert (register(rtc, 0), register(rtc, 7), register(rtc, 8)) == (0x00, 0x01, 0x03)


def test_status_registers_say_what_a_driver_waits_for() -> None:
    rtc = CmosRtc(lambda: MOMENT)
    assert register(rtc, 0xA) == 0x26  # no update in progress
    assert register(rtc, 0xB) == 0x02  # BCD, 24 hours
    assert register(rtc, 0xC) == 0x00
    assert register(rtc, 0xD) == 0x80  # RAM and time are valid


def test_the_time_and_the_status_cannot_be_written() -> None:
    rtc = CmosRtc(lambda: MOMENT)
    indices = (0, 2, 4, 6, 7, 8, 9, 0xA, 0xB, 0xC, 0xD, 0x32)
    before = [register(rtc, index) for index in indices]
    for index in indices:
        rtc.write(0, 1, index)
        rtc.write(1, 1, 0xFF)
    assert [register(rtc, index) for index in indices] == before


def test_the_rest_is_memory_until_a_reset() -> None:
    rtc = CmosRtc(lambda: MOMENT)
    for index in range(0x0E, 0x80):
        if index != 0x32:
            rtc.write(0, 1, index)
            rtc.write(1, 1, index ^ 0x55)
            assert rtc.read(1, 1) == index ^ 0x55
    rtc.reset()
    assert register(rtc, 0x0F) == 0


def test_the_nmi_bit_of_the_index_means_nothing() -> None:
    rtc = CmosRtc(lambda: MOMENT)
    assert register(rtc, 0x80) == 0x58


def test_ports_are_one_byte_wide() -> None:
    rtc = CmosRtc(lambda: MOMENT)
    rtc.write(0, 1, 0x0F)
    rtc.write(0, 2, 0x0010)
    rtc.write(1, 4, 0xFFFF_FFFF)
    assert rtc.read(1, 1) == 0
    assert rtc.read(0, 1) == 0xFF
    assert rtc.read(1, 2) == 0xFFFF
