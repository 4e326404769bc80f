"""What `-cpu host,…` adds to the processors of an arm64 machine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from linux_guest import Guest

LOOK = """
echo devices $(ls /sys/bus/event_source/devices | grep -c armv8_pmuv3)
echo lines $(grep -c arm-pmu /proc/interrupts)
dmesg | grep 'hw perfevents'
"""


@pytest.mark.parametrize("pmu", ["on", "off"])
def test_performance_counters_are_the_guests_when_asked_for(boot: Callable[..., Guest], pmu: str) -> None:
    status, output = boot("stock-elf", LOOK, smp=2, extra=("-cpu", f"host,pmu={pmu}")).finish()
    lines = output.splitlines()
    if pmu == "off":
        assert lines == ["devices 0", "lines 0"]
        return
    assert (status, lines[:2]) == (0, ["devices 1", "lines 1"])
    counters = int(lines[2].partition("driver, ")[2].split()[0])
    assert "armv8_pmuv3" in lines[2] and counters >= 1


def test_vectors_that_the_host_has_not_are_refused(boot: Callable[..., Guest]) -> None:
    """The lab's processor, a Cortex-A76, has no SVE."""
    guest = boot("small-elf", extra=("-cpu", "host,sve=on"))
    assert guest.wait_end() == 1
    assert "sve" in guest.errors and "this host has none for its guests" in guest.errors
