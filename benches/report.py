"""What a bench says: results as JSON lines on stdout, everything else on stderr."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence


class Report:
    """The results of one bench. Every line has the same keys; those of the peer are null where there is none."""

    def __init__(self, bench: str) -> None:
        self.bench = bench

    def line(self, case: str, value: float, unit: str, peer: str | None = None, peer_value: float | None = None,
             **more: float | str) -> None:
        ratio = value / peer_value if peer_value else None
        fields: dict[str, object] = {
            "bench": self.bench, "case": case, "value": _rounded(value), "unit": unit,
            "peer": peer, "peer_value": _rounded(peer_value), "ratio": _rounded(ratio), **more,
        }
        print(json.dumps(fields), flush=True)

    def spread(self, case: str, values: Sequence[float], unit: str, peer: str | None = None,
               peer_values: Sequence[float] = ()) -> None:
        """Median, 99th percentile and minimum, each beside the peer's."""
        for name, statistic in (("median", statistics.median), ("p99", p99), ("min", min)):
            theirs = statistic(peer_values) if peer_values else None
            self.line(f"{case}, {name}", statistic(values), unit, peer if peer_values else None, theirs)

    def say(self, text: str) -> None:
        """Progress, for people."""
        print(f"{self.bench}: {text}", file=sys.stderr, flush=True)


class BenchError(Exception):
    """The measurement could not be made, or would not have measured what it says."""


def p99(values: Sequence[float]) -> float:
    """The value that 99 % do not exceed; of fewer than a hundred, the largest."""
    ordered = sorted(values)
    return ordered[max(0, -(-99 * len(ordered) // 100) - 1)]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
