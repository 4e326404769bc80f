"""Which requests of a split virtqueue are lost when the process that served it dies.

The rings tell how many: avail.idx - used.idx. Which ones they tell for certain only if requests were returned in the order in
which they came, for neither ring says what of the other was there when an entry was written. What can be known:

- A head is available or returned in turns. So its latest entry in the available ring, at index i, has been returned if the
  head's latest used entry, at index j, came after it, and is outstanding if that came before.
- When entry i was made available, at most i chains had been returned, and at least i + 1 - size, or the ring would have been
  full. So the use came after if j >= i, and before if j < i + 1 - size.
- It came before as well if j is less than the number of chains known to be returned when an entry before i was made available:
  whoever made a head available a second time had got it back.

What remains undecided is filled up from the newest: in a queue that works in order, those are exactly the ones that are left.
A driver that is given back a head that it has already got calls the queue broken: a wrong guess costs no more than no answer.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def outstanding(size: int, made_available: int, used: int, head: Callable[[int], int],
                returned: Callable[[int], int]) -> list[int]:
    """The heads that the driver waits for, oldest first, at most one entry of the available ring each.

    `made_available` and `used` are the rings' indices, at most `size` apart; `head(index)` and `returned(index)` read an entry.
    """
    count = (made_available - used) & 0xFFFF
    if not count:
        return []
    # From here on indices do not wrap: the newest of the available ring is `size` + something.
    end = 0x2_0000 + made_available
    used_end = end - count
    used_at: dict[int, list[int]] = {}
    for index in range(max(used_end - size, used_end - _served(used, size)), used_end):
        used_at.setdefault(returned(index & 0xFFFF), []).append(index)
    latest: dict[int, int] = {}  # head: index of its newest entry; in the order of those
    known = 0  # so many had certainly been returned when the entry was made
    returned_before: dict[int, int] = {}
    heads = [(index, head(index & 0xFFFF)) for index in range(end - min(size, _served(made_available, size)), end)]
    times: dict[int, int] = {}
    for _, number in heads:
        times[number] = times.get(number, 0) + 1
    for index, number in heads:
        times[number] -= 1
        uses = used_at.get(number, ())
        # Its last use may belong to its newest entry; each entry before that has one use more behind it.
        behind = len(uses) - 2 - times[number]
        if behind >= 0:
            known = max(known, uses[behind] + 1)
        latest.pop(number, None)
        latest[number] = index
        returned_before[number] = max(known, index + 1 - size)
    certain: list[tuple[int, int]] = []
    open_question: list[tuple[int, int]] = []
    for number, index in latest.items():
        uses = used_at.get(number, ())
        if not uses or uses[-1] < returned_before[number]:
            certain.append((index, number))
        elif uses[-1] < index:
            open_question.append((index, number))
    missing = max(count - len(certain), 0)
    chosen = certain[-count:] + (open_question[-missing:] if missing else [])
    return [number for _, number in sorted(chosen)]


def _served(index: int, size: int) -> int:
    """How many entries of a ring have been written: all of them, or fewer while the index is in its first round.

    After 65536 it begins anew, and looks like a first round; what is left out then is only a help.
    """
    return min(index, size) if index < size else size
