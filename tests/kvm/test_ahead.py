"""A VM that is made before it is known what for: whoever gets it cannot tell, and what nobody wants is closed."""

from __future__ import annotations

import os
import time

import pytest

from kvm.conftest import Machine
from kvm.guests import hello
from stratovirt.launcher.command import make_ahead
from stratovirt.machine.kvm import KvmAhead


def open_vms() -> int:
    """Virtual machines among this process's descriptors."""
    links = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")
             if os.path.lexists(f"/proc/self/fd/{name}")]
    return links.count("anon_inode:kvm-vm")


def ranges_of(built) -> list[tuple[int, int]]:
    return [(region.base, region.size) for region in built.memory.regions]


@pytest.mark.parametrize("guess", [0, 64 << 20, 128 << 20, 5 << 30])
@pytest.mark.parametrize("words", [(), ("-smp", "4"), ("-mem-prealloc",), ("-machine", "microvm,mem-share=on"),
                                   ("-machine", "microvm,dump-guest-core=off")])
def test_a_guest_runs_in_it(machine, tmp_path, words, guess) -> None:
    serial = tmp_path / "serial"
    ahead = KvmAhead(guess)
    built = machine(hello(), *words, "-serial", f"file,path={serial}", ahead=ahead)
    assert built.vm.vm is ahead.vm
    assert open_vms() == 1
    assert ranges_of(built) == [(0, 128 << 20)]
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


def test_more_memory_than_fits_below_the_devices(kernel) -> None:
    """Two slots, made ahead."""
    arguments = ["-machine", "microvm", "-m", "5G", "-kernel", kernel(hello())]
    ahead = KvmAhead(5 << 30)
    built = Machine(arguments, ahead)
    assert len(ranges_of(built)) == 2
    built.run().close()


def test_the_next_machines_memory_is_guessed_from_the_last() -> None:
    def guess(*words: str) -> list[tuple[int, int]]:
        ahead = make_ahead(list(words))
        assert ahead is not None
        made = [(region.base, region.size) for region in ahead._memory]
        ahead.let_go()
        return made

    assert guess("-machine", "microvm", "-m", "192", "-kernel", "/nowhere") == [(0, 192 << 20)]
    assert guess("-machine", "microvm,mem-share=on", "-m", "192", "-kernel", "/nowhere") == []
    assert guess("-m", "no size") == []
    assert guess() == []
