"""A VM that is made before it is known what for: whoever gets it cannot tell, and what nobody wants is closed."""

from __future__ import annotations

import os
import time

import pytest

from kvm.guests import hello
from stratovirt.machine.kvm import KvmAhead


def open_vms() -> int:
    """Virtual machines among this process's descriptors."""
    links = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")
             if os.path.lexists(f"/proc/self/fd/{name}")]
    return links.count("anon_inode:kvm-vm")


@pytest.mark.parametrize("words", [(), ("-smp", "4")])
def test_a_guest_runs_in_it(machine, tmp_path, words) -> None:
    serial = tmp_path / "serial"
    ahead = KvmAhead()
    built = machine(hello(), *words, "-serial", f"file,path={serial}", ahead=ahead)
    assert built.vm.vm is ahead.vm
    assert open_vms() == 1
    built.run().vm.close()
    assert serial.read_text() == "hello\n"


def test_the_guests_clock_begins_with_the_machine(machine) -> None:
    ahead = KvmAhead()
    time.sleep(0.3)
    before = time.monotonic()
    built = machine(hello(), ahead=ahead)
    assert built.vm.vm.get_clock() <= (time.monotonic() - before) * 1e9


def test_its_descriptors_can_get_other_numbers(machine) -> None:
    ahead = KvmAhead()
    moved = [os.dup(fd) for fd in ahead.descriptors()]
    for fd in ahead.descriptors():
        os.close(fd)
    ahead.renumber(moved)
    machine(hello(), ahead=ahead).run()


def test_nobody_wants_it() -> None:
    before = len(os.listdir("/proc/self/fd"))
    KvmAhead().let_go()
    assert len(os.listdir("/proc/self/fd")) == before
