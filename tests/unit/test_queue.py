"""The split virtqueue against VIRTIO 1.2, 2.7, and against models of it."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratovirt.backends.aio_syscalls import pin
from stratovirt.errors import GuestError
from stratovirt.memory import GuestMemory
from stratovirt.virtio.queue import Chain, Virtqueue, check_geometry, split
from unit.virtio_driver import (
    DATA,
    HIGH_RAM,
    INDIRECT,
    NEXT,
    RAM_SIZE,
    RINGS,
    WRITE,
    GuestQueue,
    guest_memory,
)

SIZE = 8


def pair(size: int = SIZE, memory: GuestMemory | None = None, base: int = RINGS, event_idx: bool = False,
         indirect: bool = True) -> tuple[GuestQueue, Virtqueue]:
    """Both ends of one queue."""
    memory = memory or guest_memory()
    guest = GuestQueue(memory, base, size)
    return guest, Virtqueue("queue", memory, size, guest.desc, guest.avail, guest.used, event_idx, indirect)


# -- chains


def test_an_empty_queue_has_no_chain() -> None:
    assert pair()[1].pop() is None


def test_a_chain_is_its_buffers_in_order() -> None:
    guest, queue = pair()
    guest.memory.write(DATA, b"question")
    head = guest.add([(DATA, 4, False), (DATA + 4, 4, False), (DATA + 0x100, 16, True), (DATA + 0x200, 1, True)])
    chain = queue.pop()
    assert chain is not None
    assert chain.head == head
    assert [bytes(view) for view in chain.readable] == [b"ques", b"tion"]
    assert [len(view) for view in chain.writable] == [16, 1]
    assert (chain.readable_length, chain.writable_length) == (8, 17)
    chain.writable[0][:] = b"x" * 16
    assert guest.memory.read(DATA + 0x100, 16) == b"x" * 16
    assert queue.pop() is None


def test_rings_and_buffers_above_4_gib() -> None:
    memory = guest_memory(high=RAM_SIZE)
    guest, queue = pair(memory=memory, base=HIGH_RAM + RINGS)
    guest.add([(HIGH_RAM + DATA, 8, False), (DATA, 8, True)])
    chain = queue.pop()
    assert chain is not None
    queue.push(chain.head, 8)
    assert guest.collect() == [(0, 8)]


def test_a_buffer_across_the_end_of_a_region_is_not_ram() -> None:
    guest, queue = pair(memory=guest_memory(high=RAM_SIZE))
    guest.add([(RAM_SIZE - 8, 16, True)])
    with pytest.raises(GuestError, match="not RAM"):
        queue.pop()


def test_an_indirect_table_may_lie_anywhere() -> None:
    guest, queue = pair()
    guest.add([(DATA, 8, False), (DATA + 8, 8, True)], indirect_at=DATA + 0x1003)
    chain = queue.pop()
    assert chain is not None
    assert (chain.readable_length, chain.writable_length) == (8, 8)


def test_descriptors_may_precede_an_indirect_one() -> None:
    guest, queue = pair()
    guest.memory.write(DATA + 0x1000, struct.pack("<QIHH", DATA + 16, 4, WRITE, 0))
    guest.describe(0, DATA, 16, NEXT, 1)
    guest.describe(1, DATA + 0x1000, 16, INDIRECT)
    guest.publish(0)
    chain = queue.pop()
    assert chain is not None
    assert (chain.readable_length, chain.writable_length) == (16, 4)


def test_the_write_flag_of_an_indirect_descriptor_means_nothing() -> None:
    guest, queue = pair()
    guest.memory.write(DATA + 0x1000, struct.pack("<QIHH", DATA, 4, 0, 0))
    guest.describe(0, DATA + 0x1000, 16, INDIRECT | WRITE)
    guest.publish(0)
    chain = queue.pop()
    assert chain is not None
    assert chain.readable_length == 4


def test_an_indirect_table_inside_another_is_refused() -> None:
    guest, queue = pair()
    guest.memory.write(DATA + 0x1000, struct.pack("<QIHH", DATA + 0x2000, 16, INDIRECT, 0))
    guest.describe(0, DATA + 0x1000, 16, INDIRECT)
    guest.publish(0)
    with pytest.raises(GuestError, match="indirect table inside another"):
        queue.pop()
    assert guest.collect() == [(0, 0)]


def test_an_indirect_table_needs_the_feature() -> None:
    guest, queue = pair(indirect=False)
    guest.add([(DATA, 8, True)], indirect_at=DATA + 0x1000)
    with pytest.raises(GuestError, match="without the feature"):
        queue.pop()
    assert guest.collect() == [(0, 0)]


def test_a_chain_is_as_long_as_the_queue_at_most() -> None:
    guest, queue = pair()
    guest.add([(DATA + number, 1, True) for number in range(SIZE)], indirect_at=DATA + 0x1000)
    chain = queue.pop()
    assert chain is not None
    assert chain.writable_length == SIZE
    guest.add([(DATA + number, 1, True) for number in range(SIZE + 1)], indirect_at=DATA + 0x1000)
    with pytest.raises(GuestError, match="longer than the queue"):
        queue.pop()


def test_indices_wrap_at_65536() -> None:
    guest, queue = pair(size=2)
    guest.describe(0, DATA, 4, WRITE)
    guest.describe(1, DATA + 4, 4, WRITE)
    for number in range(0x1_0003):
        guest.publish(number & 1)
        chain = queue.pop()
        assert chain is not None
        queue.push(chain.head, number & 0xFF)
    assert queue.pop() is None
    assert guest.used_idx() == 3


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), max_size=6), st.integers(0, 260))
def test_split_cuts_anywhere(lengths: list[int], at: int) -> None:
    whole = bytes(number & 0xFF for number in range(sum(lengths)))
    views, position = [], 0
    for length in lengths:
        views.append(memoryview(whole)[position : position + length])
        position += length
    front, back = split(views, at)
    assert b"".join(front) == whole[:at]
    assert b"".join(back) == whole[at:]


# -- geometry


@pytest.mark.parametrize("size", [0, -1, 3, 6, 257])
def test_a_queue_size_is_a_power_of_two(size: int) -> None:
    with pytest.raises(GuestError):
        check_geometry("q", guest_memory(), size, 0x1000, 0x2000, 0x3000)


@pytest.mark.parametrize(("desc", "avail", "used"), [
    (0x1001, 0x2000, 0x3000), (0x1008, 0x2000, 0x3000), (0x1000, 0x2001, 0x3000), (0x1000, 0x2000, 0x3002),
    (RAM_SIZE, 0x2000, 0x3000), (RAM_SIZE - 16, 0x2000, 0x3000), (0x1000, RAM_SIZE - 20, 0x3000),
    (0x1000, 0x2000, RAM_SIZE - 68), ((1 << 64) - 16, 0x2000, 0x3000), (0x1000, (1 << 64) - 2, 0x3000),
])
def test_rings_are_aligned_and_in_ram(desc: int, avail: int, used: int) -> None:
    with pytest.raises(GuestError):
        check_geometry("q", guest_memory(), SIZE, desc, avail, used)


def test_rings_may_end_where_ram_ends() -> None:
    check_geometry("q", guest_memory(), SIZE, RAM_SIZE - 16 * SIZE, RAM_SIZE - 6 - 2 * SIZE, RAM_SIZE - 8 - 8 * SIZE)


# -- notifications, both ways


def test_without_event_index_flags_say_who_wants_to_hear() -> None:
    guest, queue = pair()
    queue.disable_notifications()
    assert guest.used_flags() == 1
    assert not queue.enable_notifications()
    assert guest.used_flags() == 0
    queue.push(0, 0)
    assert queue.needs_interrupt()
    assert not queue.needs_interrupt()  # nothing new
    guest.set_no_interrupt(True)
    queue.push(0, 0)
    assert not queue.needs_interrupt()


def test_a_chain_that_came_before_notifications_were_on_again_is_seen() -> None:
    for event_idx in (False, True):
        guest, queue = pair(event_idx=event_idx)
        queue.disable_notifications()
        assert queue.pop() is None
        guest.add([(DATA, 1, True)])
        assert queue.enable_notifications()
        assert queue.pop() is not None


@settings(deadline=None)
@given(st.integers(0, 0xFFFF), st.lists(st.tuples(st.integers(0, 6), st.integers(-8, 8)), max_size=20))
def test_event_index_interrupts_exactly_when_used_event_is_passed(start: int, batches: list[tuple[int, int]]) -> None:
    guest, queue = pair(event_idx=True)
    queue._next_used = queue._last_signalled = start
    position = start
    for pushes, distance in batches:
        guest.set_used_event(position + distance)
        for _ in range(pushes):
            queue.push(0, 0)
        # model: pushing entry number n interrupts when used_event == n (2.7.7.2)
        expected = 0 <= distance < pushes
        assert queue.needs_interrupt() == expected
        position += pushes


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), max_size=20))
def test_event_index_asks_to_be_told_of_the_next_chain(batches: list[int]) -> None:
    guest, queue = pair(event_idx=True)
    guest.describe(0, DATA, 4, WRITE)
    popped = 0
    for batch in batches:
        for _ in range(batch):
            guest.publish(0)
        while True:
            chain = queue.pop()
            if chain is None:
                break
            queue.push(chain.head, 0)
            popped += 1
        assert not queue.enable_notifications()
        assert guest.avail_event() == popped


# -- anything at all


_descriptor = st.tuples(
    st.one_of(st.integers(0, RAM_SIZE + 64), st.integers(0, 2**64 - 1), st.sampled_from((DATA, RAM_SIZE - 1, 2**64 - 1))),
    st.one_of(st.integers(0, 64), st.integers(0, 2**32 - 1)),
    st.one_of(st.integers(0, 7), st.integers(0, 0xFFFF)),
    st.one_of(st.integers(0, SIZE), st.integers(0, 0xFFFF)),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(_descriptor, min_size=SIZE, max_size=SIZE), st.lists(st.integers(0, SIZE), max_size=SIZE))
def test_whatever_the_rings_hold_each_head_comes_back_once(table: list[tuple[int, int, int, int]], heads: list[int]) -> None:
    guest, queue = pair()
    for index, descriptor in enumerate(table):
        guest.describe(index, *descriptor)
    for head in heads:
        guest.publish(head)
    expected = []
    for head in heads:
        try:
            chain = queue.pop()
        except GuestError:
            if head < SIZE:
                expected.append(head)
            break
        assert chain is not None
        assert chain.head == head
        assert sum(map(len, chain.readable)) == chain.readable_length
        assert sum(map(len, chain.writable)) == chain.writable_length
        assert len(chain.readable) + len(chain.writable) <= SIZE
        queue.push(chain.head, 0)
        expected.append(head)
    assert [head for head, _ in guest.collect()] == expected


def taken(chain: Chain) -> tuple[int, list[tuple[int, int]], int, list[tuple[int, int]], int]:
    """A chain as addresses and lengths: the head, what is readable, what is writable."""
    readable, writable = ([(pin(view)[0], len(view)) for view in views] for views in (chain.readable, chain.writable))
    return chain.head, readable, chain.readable_length, writable, chain.writable_length


# Near to what drivers make, and a value or two off: what is taken in one look must be what a walk would have found.
_address = st.one_of(st.integers(DATA, DATA + 64),
                     st.sampled_from((0, RAM_SIZE - 8, RAM_SIZE, HIGH_RAM, HIGH_RAM + RAM_SIZE - 4)))
_part = st.tuples(_address, st.sampled_from((0, 1, 8, 16, 4096, 2**32 - 1)),
                  st.sampled_from((NEXT, NEXT | WRITE, WRITE, 0, NEXT)), st.integers(-1, 1))
_likely = st.tuples(st.lists(_part, min_size=3, max_size=3), st.sampled_from((-1, -1, -1, 0, 1, 2)), st.booleans(),
                    st.sampled_from((48, 48, 32, 64, 0)))


@settings(deadline=None, max_examples=500)
@given(st.lists(_likely, min_size=1, max_size=5), st.integers(1, 6), st.booleans(), st.sampled_from((2, 16)))
def test_a_batch_is_what_single_pops_are(requests: list, limit: int, feature: bool, size: int) -> None:
    """Requests of three descriptors, most of them sound, in the table or in their own: popped one by one and in batches."""
    memory = guest_memory(high=RAM_SIZE)
    guest, queue = pair(size, memory, indirect=feature)
    _, single = pair(size, memory, indirect=feature)
    tables = DATA + 0x1000
    for number, (parts, odd, indirect, table_size) in enumerate(requests):
        first = 0 if indirect else 3 * number
        flags_of_three = (NEXT, NEXT | WRITE * (number & 1), WRITE)
        table = b""
        for place, (address, length, flags, off) in enumerate(parts):
            if place != odd:
                length, flags, off = length % 4097 or 1, flags_of_three[place], 0
            table += struct.pack("<QIHH", address, length, flags, (first + place + 1 + off) & 0xFFFF)
        if indirect:
            memory.write(tables + 64 * number, table)
            guest.describe(3 * number % size, tables + 64 * number, table_size, INDIRECT)
        else:
            for place in range(3):
                guest.describe((first + place) % size, *struct.unpack_from("<QIHH", table, 16 * place))
    for number in range(min(len(requests), size)):
        guest.publish(3 * number % (size + 1))
    outcomes: list[list[object]] = [[], []]
    try:
        while (chain := single.pop()) is not None:
            outcomes[0].append(taken(chain))
    except GuestError as error:
        outcomes[0].append(str(error))
    back = guest.collect()
    single._used16[single._used_index + 1] = 0
    guest.used_index = 0
    try:
        while chains := queue.pop_batch(limit):
            assert len(chains) <= limit
            outcomes[1] += [taken(chain) for chain in chains]
    except GuestError as error:
        outcomes[1].append(str(error))
    assert outcomes[0] == outcomes[1]
    assert guest.collect() == back  # the malformed one


@settings(deadline=None, max_examples=300)
@given(st.lists(_descriptor, min_size=SIZE, max_size=SIZE), st.lists(st.integers(0, SIZE), max_size=SIZE), st.integers(1, SIZE))
def test_whatever_the_rings_hold_batches_end_where_single_pops_do(table: list[tuple[int, int, int, int]], heads: list[int],
                                                                  limit: int) -> None:
    guest, queue = pair()
    for index, descriptor in enumerate(table):
        guest.describe(index, *descriptor)
    for head in heads:
        guest.publish(head)
    _, single = pair(memory=guest.memory, base=RINGS + 0x8000)
    guest.memory.write(RINGS + 0x8000, guest.memory.read(RINGS, guest.end - RINGS))
    outcomes: list[list[object]] = [[], []]
    try:
        while chains := queue.pop_batch(limit):
            outcomes[0] += [taken(chain) for chain in chains]
    except GuestError as error:
        outcomes[0].append(str(error))
    try:
        while (chain := single.pop()) is not None:
            outcomes[1].append(taken(chain))
    except GuestError as error:
        outcomes[1].append(str(error))
    assert outcomes[0] == outcomes[1]


def test_a_malformed_chain_is_the_error_of_the_call_after_those_before_it() -> None:
    guest, queue = pair(16)
    for _ in range(2):
        guest.add([(DATA, 16, False), (DATA, 8, True), (DATA, 1, True)])
    bad = guest.add([(DATA, 16, False), (DATA, 0, True), (DATA, 1, True)])
    guest.add([(DATA, 16, False), (DATA, 8, True), (DATA, 1, True)])
    assert [chain.head for chain in queue.pop_batch(16)] == [0, 3]
    assert guest.collect() == []
    with pytest.raises(GuestError, match="zero bytes"):
        queue.pop_batch(16)
    assert guest.collect() == [(bad, 0)]


def test_what_was_not_begun_goes_back() -> None:
    guest, queue = pair()
    heads = [guest.add([(DATA, 1, True)]) for _ in range(4)]
    assert [chain.head for chain in queue.pop_batch(3)] == heads[:3]
    queue.unpop(2)
    assert [chain.head for chain in queue.pop_batch(8)] == heads[1:]
    assert queue.pop_batch(8) == [] and queue.pop_batch(0) == []


def test_an_index_too_far_ahead_ends_a_batch_too() -> None:
    guest, queue = pair()
    guest.publish(0, move=SIZE + 1)
    with pytest.raises(GuestError, match="ahead in a queue"):
        queue.pop_batch(1)
