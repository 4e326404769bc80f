"""What CPUID tells each vCPU: topology leaves agree with the APIC ids."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratovirt.arch.x86_64.cpuid import Topology, vcpu_cpuid

ENTRY = struct.Struct("<7I12x")


def supported() -> bytes:
    """As KVM gives it: the leaves that the code touches, and some that it must leave alone."""
    entries = [
        (0, 0, 0, 0x1F, 0x756E6547, 0x6C65746E, 0x49656E69),
        (1, 0, 0, 0x000906EA, 0x05_10_08_77, 0x7FFAFBBF & ~(1 << 31 | 1 << 24), 0xBFEBFBFF & ~(1 << 28)),
        (4, 0, 1, 0x1C004121, 0x01C0003F, 0x3F, 0),
        (4, 1, 1, 0, 0, 0, 0),
        (6, 0, 0, 0x77, 2, 0x9, 0),
        (7, 0, 1, 0, 0x029C67AF, 0, 0),
        (0xA, 0, 0, 0x07300404, 0, 0, 0x603),
        (0xB, 0, 1, 1, 2, 0x100, 9),
        (0xB, 1, 1, 4, 12, 0x201, 9),
        (0x1F, 0, 1, 1, 2, 0x100, 9),
        (0x40000000, 0, 0, 0x40000001, 0x4B4D564B, 0x564B4D56, 0x4D),
        (0x80000008, 0, 0, 0x3027, 0, 0x700F, 0),
        (0x8000001E, 0, 0, 9, 9, 9, 0),
    ]
    return b"".join(ENTRY.pack(*entry) for entry in entries)


def decode(table: bytes) -> dict[tuple[int, int], tuple[int, int, int, int]]:
    found = {}
    for start in range(0, len(table), ENTRY.size):
        function, index, _, *registers = ENTRY.unpack_from(table, start)
        assert (function, index) not in found
        found[function, index] = tuple(registers)
    return found


def tables(topology: Topology, max_cpus: int, tsc_deadline: bool = True) -> list[dict[tuple[int, int], tuple[int, ...]]]:
    return [decode(table) for table in vcpu_cpuid(supported(), topology, max_cpus, tsc_deadline)]


@pytest.mark.parametrize(("cpus", "dies", "cores", "threads", "ids"), [
    (1, 1, 1, 1, [0]),
    (4, 1, 4, 1, [0, 1, 2, 3]),
    (4, 1, 1, 1, [0, 1, 2, 3]),
    (4, 1, 2, 2, [0, 1, 2, 3]),
    (6, 1, 3, 1, [0, 1, 2, 4, 5, 6]),
    (6, 1, 3, 2, [0, 1, 2, 3, 4, 5]),
    (8, 2, 2, 2, [0, 1, 2, 3, 4, 5, 6, 7]),
    (12, 2, 3, 1, [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14]),
])
def test_apic_ids_follow_the_topology(cpus: int, dies: int, cores: int, threads: int, ids: list[int]) -> None:
    assert Topology(cpus, dies, cores, threads).apic_ids == ids


def test_254_cpus_fit_into_8_bits_whatever_the_topology() -> None:
    for dies, cores, threads in ((1, 1, 1), (1, 254, 1), (1, 127, 2), (1, 2, 1), (2, 3, 1), (1, 3, 1), (1, 5, 2)):
        ids = Topology(254, dies, cores, threads).apic_ids
        assert len(set(ids)) == 254
        assert max(ids) < 254


@settings(deadline=None)
@given(cpus=st.integers(1, 254), dies=st.integers(1, 4), cores=st.integers(1, 16), threads=st.integers(1, 4))
def test_every_vcpu_reads_its_own_apic_id_everywhere(cpus: int, dies: int, cores: int, threads: int) -> None:
    topology = Topology(cpus, dies, cores, threads)
    assert len(set(topology.apic_ids)) == cpus
    found = tables(topology, cpus)
    assert len(found) == cpus
    for apic_id, leaves in zip(topology.apic_ids, found, strict=True):
        assert leaves[1, 0][1] >> 24 == apic_id
        assert leaves[0x8000001E, 0][0] == apic_id
        levels = [leaves[0xB, index] for index in range(8) if (0xB, index) in leaves]
        assert all(level[3] == apic_id for level in levels)
        kinds = [level[2] >> 8 & 0xFF for level in levels]
        assert kinds == [1, 2, 0]
        shifts = [level[0] for level in levels[:-1]]
        assert shifts == sorted(shifts)
        assert ((0x1F, 0) in leaves) == (dies > 1)
        if dies > 1:
            assert [leaves[0x1F, index][2] >> 8 & 0xFF for index in range(4)] == [1, 2, 5, 0]


def test_threads_of_a_core_share_what_is_above_the_shift() -> None:
    topology = Topology(8, 1, 2, 2)
    leaves = tables(topology, 8)[0]
    smt, core = leaves[0xB, 0][0], leaves[0xB, 1][0]
    ids = topology.apic_ids
    assert ids[0] >> smt == ids[1] >> smt != ids[2] >> smt
    assert ids[0] >> core == ids[3] >> core != ids[4] >> core


def test_leaf_1_says_hypervisor_hyperthreading_and_the_timer() -> None:
    alone, pair = tables(Topology(1, 1, 1, 1), 1)[0][1, 0], tables(Topology(2, 1, 2, 1), 2)[0][1, 0]
    for leaf in (alone, pair):
        assert leaf[2] >> 31 & 1
        assert leaf[2] >> 24 & 1
        assert leaf[1] & 0xFF == 0x77
        assert leaf[1] >> 8 & 0xFF == 8
    assert not alone[3] >> 28 & 1
    assert pair[3] >> 28 & 1
    assert pair[1] >> 16 & 0xFF == 2
    assert not tables(Topology(1, 1, 1, 1), 1, tsc_deadline=False)[0][1, 0][2] >> 24 & 1


def test_power_management_that_is_not_there_is_not_told() -> None:
    leaves = tables(Topology(1, 1, 1, 1), 1)[0]
    assert not leaves[6, 0][2] >> 3 & 1
    assert leaves[0xA, 0] == (0, 0, 0, 0)  # version 4 of the performance counters


def test_the_rest_is_left_alone() -> None:
    before, after = decode(supported()), tables(Topology(2, 1, 2, 1), 2)[1]
    for key in ((0, 0), (7, 0), (4, 1), (0x40000000, 0)):
        assert after[key] == before[key]
