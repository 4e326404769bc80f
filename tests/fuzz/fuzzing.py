"""The frame of every fuzz test: seeds one after the other, the same on every machine, and the seed told when one fails.

    STRATOVIRT_FUZZ_ITERATIONS=10    ten times as many seeds as usual (a factor; 0.1 for a tenth)
    STRATOVIRT_FUZZ_SECONDS=60       go on for so long instead, in each test
    STRATOVIRT_FUZZ_SEED=4711        start at this seed: the first one repeats a failure
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable


def fuzz(one: Callable[[random.Random], None], iterations: int) -> None:
    """Call `one` with a generator for each seed. Raises AssertionError that names the seed at the first failure."""
    seed = int(os.environ.get("STRATOVIRT_FUZZ_SEED", "1"))
    seconds = float(os.environ.get("STRATOVIRT_FUZZ_SECONDS", "0"))
    count = max(1, int(iterations * float(os.environ.get("STRATOVIRT_FUZZ_ITERATIONS", "1"))))
    deadline = time.monotonic() + seconds
    done = 0
    while time.monotonic() < deadline if seconds else done < count:
        try:
            one(random.Random(seed))
        except Exception as error:
            raise AssertionError(f"STRATOVIRT_FUZZ_SEED={seed}: {type(error).__name__}: {error}") from error
        seed += 1
        done += 1


def mutate(generator: random.Random, data: bytes, most: int = 8) -> bytes:
    """A damaged copy: bytes flipped, numbers made extreme, pieces cut out, doubled or moved, the end cut off."""
    copy = bytearray(data)
    for _ in range(generator.randint(1, most)):
        if not copy:
            return b""
        at = generator.randrange(len(copy))
        if generator.random() < 0.6:
            at = min(at, generator.randrange(min(len(copy), 1024)))  # headers are where it hurts
        kind = generator.randrange(8)
        if kind == 0:
            copy[at] ^= 1 << generator.randrange(8)
        elif kind == 1:
            copy[at] = generator.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            size = generator.choice((2, 4, 8))
            number = generator.choice((0, 1, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 63, (1 << 64) - 1,
                                       generator.getrandbits(64)))
            copy[at : at + size] = (number & (1 << 8 * size) - 1).to_bytes(size, "little")
        elif kind == 3:
            del copy[at : at + generator.randint(1, 64)]
        elif kind == 4:
            copy[at:at] = copy[at : at + generator.randint(1, 64)]
        elif kind == 5:
            copy[at : at + 16] = generator.randbytes(16)
        elif kind == 6:
            del copy[at:]
        else:
            other = generator.randrange(len(copy))
            copy[at : at + 8] = copy[other : other + 8]
    return bytes(copy)
