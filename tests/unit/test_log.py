"""The log: its line format, rotation, and what guests can do to it (little)."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import threading

import pytest

import stratovirt
from stratovirt import log
from stratovirt.errors import ConfigError
from stratovirt.log import DEBUG, ERROR, INFO, TRACE, WARN, Log, escape, level_from_name

SOURCES = os.path.dirname(os.path.dirname(stratovirt.__file__))
NOON = 1_772_366_400 * 10**9  # 2026-03-01T12:00:00 UTC


class Clock:
    def __init__(self):
        self.now = NOON + 123_456_789

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def logger(tmp_path, clock):
    logger = Log(INFO, clock)
    logger.path = tmp_path / "vm.log"
    logger.open(str(logger.path))
    yield logger
    logger.close()


def test_the_line_is_as_documented(logger):
    logger.write(WARN, "the guest asked for a reboot")
    line = logger.path.read_text()
    number = test_the_line_is_as_documented.__code__.co_firstlineno + 1
    assert line == (f"2026-03-01T12:00:00.123456789: [{os.getpid()}][{threading.get_native_id()}][test_log.py:{number}]:WARN: "
                    "the guest asked for a reboot\n")


def test_module_functions_blame_their_caller_and_default_to_stderr():
    code = "from stratovirt import log\nlog.info('one')\nlog.debug('two')\nlog.error('three')\nlog.guest_warn('blk', 'four')\n"
    cases = {"": "one three four", "Debug": "one two three four", "ERROR": "three", "loud": "one three four"}
    for level, expected in cases.items():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                              env={"PYTHONPATH": SOURCES, "STRATOVIRT_LOG_LEVEL": level})
        assert [line.split()[-1] for line in done.stderr.splitlines()] == expected.split()
        assert all("[<string>:" in line for line in done.stderr.splitlines())


@pytest.mark.parametrize(("name", "level"), [
    ("error", ERROR), ("WARN", WARN), (" Info ", INFO), ("debug", DEBUG), ("Trace", TRACE), ("", INFO), (None, INFO),
    ("5", INFO),
])
def test_levels_by_name(name, level):
    assert level_from_name(name) == level


def test_nothing_above_the_level_is_written(logger):
    logger.level = ERROR
    logger.write(WARN, "no")
    logger.guest_write(WARN, "serial", "no")
    assert logger.path.read_bytes() == b""


def test_the_file_is_appended_to_and_not_for_others(logger, tmp_path):
    assert stat.S_IMODE(logger.path.stat().st_mode) & ~0o640 == 0
    logger.write(INFO, "first")
    again = Log(INFO)
    again.open(str(logger.path))
    again.write(INFO, "second")
    again.close()
    assert [line.split()[-1] for line in logger.path.read_text().splitlines()] == ["first", "second"]


def test_a_file_that_cannot_be_opened_names_the_option(tmp_path):
    for path in (str(tmp_path), str(tmp_path / "no" / "file"), "a\0b"):
        with pytest.raises(ConfigError) as caught:
            Log().open(path)
        assert (caught.value.option, caught.value.value) == ("-D", path)


def test_rotation_by_size_keeps_seven_files_and_every_recent_line(logger, tmp_path, monkeypatch):
    monkeypatch.setattr(log, "ROTATE_SIZE", 200)
    for number in range(20):
        logger.write(INFO, f"line {number} " + "x" * 100)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["vm.log", "vm.log1", "vm.log2", "vm.log3", "vm.log4", "vm.log5", "vm.log6"]
    newest_first = [int(re.search(r"line (\d+)", (tmp_path / name).read_text())[1]) for name in files]
    assert newest_first == [19, 18, 17, 16, 15, 14, 13]


def test_only_one_thread_begins_new_files_once_they_are_confined(logger, tmp_path, clock):
    asked = []
    moved = []
    logger.rotate_through(asked.append, moved.append)
    logger.write(INFO, "yesterday")
    clock.now += 86_400 * 10**9
    os.utime(logger.path, ns=(NOON, NOON))

    def other():
        logger.write(INFO, "from another thread")
        logger.write(INFO, "and again")

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(asked) == 1
    assert len(logger.path.read_text().splitlines()) == 3
    asked[0]()
    logger.write(INFO, "today")
    assert logger.path.read_text().splitlines()[-1].endswith("today")
    assert len((tmp_path / "vm.log1").read_text().splitlines()) == 3
    assert moved == [logger.fd]
    assert not os.get_inheritable(logger.fd)


def test_the_place_of_a_defect_needs_no_file_and_no_import(logger, monkeypatch):
    monkeypatch.setattr(log, "LOG", logger)
    try:
        raise KeyError("missing\n")
    except KeyError:
        log.defect()
    first, second = logger.path.read_text().splitlines()
    assert "a defect of this program: KeyError: 'missing" in first
    assert second.endswith(" in test_the_place_of_a_defect_needs_no_file_and_no_import")

def test_rotation_at_a_change_of_day(logger, tmp_path, clock):
    logger.write(INFO, "today")
    clock.now += 86_400 * 10**9
    logger.write(INFO, "tomorrow")
    logger.write(INFO, "still tomorrow")
    assert "today" in (tmp_path / "vm.log1").read_text()
    assert len(logger.path.read_text().splitlines()) == 2


def test_a_full_disk_does_not_end_the_program_and_is_told_later(logger, tmp_path):
    full = os.open("/dev/full", os.O_WRONLY)
    mine, logger._fd = logger._fd, full
    logger.write(INFO, "lost")
    logger.write(INFO, "lost too")
    logger._fd = mine
    os.close(full)
    logger.write(INFO, "back")
    text = logger.path.read_text()
    assert "2 lines lost" in text and text.endswith("back\n")


def test_a_reader_of_stderr_that_is_stuck_costs_lines_and_not_time(clock):
    logger = Log(INFO, clock)
    reader, logger._fd = os.pipe()
    for number in range(200):
        logger.write(INFO, f"line {number} " + "\n" * 2000)
    assert logger._lost > 0
    got = os.read(reader, 1 << 20)
    logger.write(INFO, "last")
    got += os.read(reader, 1 << 20)
    assert all(len(line) < 4096 and b"[test_log.py:" in line for line in got.splitlines())
    assert re.search(rb"\((\d+) lines lost\) 2026.*last\n", got)
    assert got.count(b"\n") + int(re.search(rb"\((\d+) lines lost", got)[1]) == 201
    os.close(reader)
    os.close(logger._fd)
    logger._fd = 2


def test_a_guest_gets_one_line_a_second_for_each_source(logger, clock):
    for _ in range(1000):
        logger.guest_write(WARN, "virtio-blk disk0", "bad descriptor")
    logger.guest_write(WARN, "serial", "other sources are not affected")
    clock.now += 10**9
    logger.guest_write(WARN, "virtio-blk disk0", "bad descriptor")
    messages = [line.split(":WARN: ")[1] for line in logger.path.read_text().splitlines()]
    assert messages == ["virtio-blk disk0: bad descriptor", "serial: other sources are not affected",
                        "virtio-blk disk0: bad descriptor (999 more since the last such line)"]


def test_a_clock_that_goes_back_silences_nobody_for_long(logger, clock):
    logger.guest_write(WARN, "serial", "one")
    clock.now -= 3600 * 10**9
    logger.guest_write(WARN, "serial", "two")
    assert "two" in logger.path.read_text()


@pytest.mark.parametrize(("text", "shown"), [
    ("plain", "plain"), ("\x1b[2Jgone", "\\x1b[2Jgone"), ("two\nlines\r", "two\\x0alines\\x0d"), ("\x7f\x85", "\\x7f\\x85"),
    ("Grüße", "Grüße"), ("\u202eevil", "\\u{202e}evil"), ("\ud800", "\\u{d800}"),
])
def test_control_characters_are_escaped(text, shown):
    assert escape(text) == shown


def test_a_long_message_is_cut(logger):
    logger.write(INFO, "\n" * 100_000)
    assert logger.path.stat().st_size <= log.MAX_LINE


def test_importing_it_formats_and_opens_nothing():
    code = (
        "import sys, stratovirt.log; "
        "print(*[m for m in ('logging', 'typing', 'traceback', 'datetime') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": SOURCES})
    assert done.stdout.strip() == ""
