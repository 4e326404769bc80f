"""A VM that is made before it is known what for: whoever gets it cannot tell, and what nobody wants is closed."""

from __future__ import annotations

import os
import time

import pytest

from kvm.conftest import Machine
from kvm.guests import hello
from stratovirt.cli.command import parse
from stratovirt.config.vm import VmConfig
from stratovirt.launcher.command import make_ahead
from stratovirt.machine.kvm import KvmAhead

MSR_TSC = 0x10


def open_vms() -> int:
    """Virtual machines among this process's descriptors."""
    links = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")
             if os.path.lexists(f"/proc/self/fd/{name}")]
    return links.count("anon_inode:kvm-vm")


def open_descriptors() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")}


def ranges_of(built) -> list[tuple[int, int]]:
    return [(region.base, region.size) for region in built.memory.regions]


def guessed(*words: str) -> VmConfig:
    return parse([*(() if "-machine" in words else ("-machine", "microvm")), "-kernel", "/nowhere", *words])


GUESSES = (None, guessed("-m", "256"), guessed("-m", "128"), guessed("-m", "5G"), guessed("-smp", "4"),
           guessed("-smp", "4,sockets=2,cores=2"))


@pytest.mark.parametrize("guess", GUESSES)
@pytest.mark.parametrize("words", [(), ("-smp", "4"), ("-mem-prealloc",), ("-machine", "microvm,mem-share=on"),
                                   ("-machine", "microvm,dump-guest-core=off")])
def test_a_guest_runs_in_it(machine, tmp_path, words, guess) -> None:
    serial = tmp_path / "serial"
    ahead = KvmAhead(guess)
    made = ahead.processors
    assert made is not None
    vm, fits = made.vm, guess is None or guess.smp == guessed(*words).smp
    assert len(made.vcpus) == (0 if guess is None else guess.smp.cpus)
    built = machine(hello(), *words, "-serial", f"file,path={serial}", ahead=ahead)
    assert (built.vm.vm is vm) is fits
    assert open_vms() == 1
    assert ranges_of(built) == [(0, 128 << 20)]
    built.run().vm.close()
    assert serial.read_text() == "hello\n"


def counters(built) -> list[int]:
    return [dict(vcpu.get_msrs([MSR_TSC]))[MSR_TSC] for vcpu in built.vm.accelerator.vcpus]


@pytest.mark.parametrize("guess", [None, guessed("-smp", "2")])
def test_the_guests_clocks_begin_with_the_machine(machine, guess) -> None:
    ahead = KvmAhead(guess)
    time.sleep(1.3)  # a time stamp counter that has run for less than a second goes on
    before = time.monotonic()
    built = machine(hello(), "-smp", "2", ahead=ahead)
    assert built.vm.vm.get_clock() <= (time.monotonic() - before) * 1e9
    fresh = machine(hello(), "-smp", "2")  # whose counters are the host's, where KVM cannot do otherwise
    assert max(counters(built)) <= max(counters(fresh)) + built.vm.accelerator.vcpus[0].tsc_khz() * 1000


def test_its_descriptors_can_get_other_numbers(machine) -> None:
    ahead = KvmAhead()
    moved = [os.dup(fd) for fd in ahead.descriptors()]
    for fd in ahead.descriptors():
        os.close(fd)
    ahead.renumber(moved)
    machine(hello(), ahead=ahead).run()


def test_after_new_numbers_no_descriptor_of_somebody_else_is_closed(machine) -> None:
    """The processors do not fit and are let go, when their old numbers have been given to others."""
    before = open_descriptors()
    ahead = KvmAhead(guessed("-smp", "4"))
    made = open_descriptors() - before
    moved = [os.dup(fd) for fd in ahead.descriptors()]
    for fd in made:
        os.close(fd)
    ahead.renumber(moved)
    read_end, write_end = os.pipe()
    others = [os.dup(write_end) for _ in made]
    machine(hello(), ahead=ahead).run()
    for fd in (write_end, *others):
        os.write(fd, b"1")
    for fd in (read_end, write_end, *others):
        os.close(fd)


@pytest.mark.parametrize("guess", GUESSES)
def test_nobody_wants_it(guess) -> None:
    before = len(os.listdir("/proc/self/fd"))
    KvmAhead(guess).let_go()
    assert len(os.listdir("/proc/self/fd")) == before
    assert open_vms() == 0


def test_more_memory_than_fits_below_the_devices(kernel) -> None:
    """Two slots, made ahead."""
    arguments = ["-machine", "microvm", "-m", "5G", "-kernel", kernel(hello())]
    ahead = KvmAhead(guessed("-m", "5G"))
    built = Machine(arguments, ahead)
    assert len(ranges_of(built)) == 2
    built.run().close()


def test_the_next_machine_is_guessed_from_the_last() -> None:
    def guess(*words: str) -> tuple[list[tuple[int, int]], int]:
        ahead, _sandbox = make_ahead(list(words))
        assert ahead is not None
        assert ahead.processors is not None
        made = [(region.base, region.size) for region in ahead._memory], len(ahead.processors.vcpus)
        ahead.let_go()
        return made

    assert guess("-machine", "microvm", "-m", "192", "-kernel", "/nowhere") == ([(0, 192 << 20)], 1)
    assert guess("-machine", "microvm,mem-share=on", "-m", "192", "-smp", "3", "-kernel", "/nowhere") == ([], 3)
    assert guess("-machine", "microvm", "-smp", "200", "-kernel", "/nowhere") == ([], 0)
    assert guess("-m", "no size") == ([], 0)
    assert guess() == ([], 0)
