"""Runs benches by name: `python -m benches.run [--count N] [NAME…]`; all of them without a name."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from benches import block, boot, boot_arm64, clone, density, disk, exits, imports, launcher, memory, net, phases, rate, start
from benches.report import BenchError

BENCHES: dict[str, Callable[[int], None]] = {
    "start": start.run,
    "launcher": launcher.run,
    "clone": clone.run,
    "memory": memory.run,
    "rate": rate.run,
    "density": density.run,
    "exits": exits.run,
    "imports": imports.run,
    "phases": phases.run,
    "boot": boot.run,
    "disk": disk.run,
    "block": block.run,
    "net": net.run,
}
# What is measured in the arm64 lab, by the same names.
ON_ARM64: dict[str, Callable[[int], None]] = {"boot": boot_arm64.run}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benches.run", description="Side-by-side measurements, JSON lines on stdout.")
    parser.add_argument("--count", type=int, default=20, help="runs of each command (default 20)")
    parser.add_argument("--arch", choices=("x86_64", "aarch64"), default="x86_64", help="of the guests (default x86_64)")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHES))
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error("--count must be at least 1")
    benches = ON_ARM64 if options.arch == "aarch64" else BENCHES
    unknown = [name for name in options.names if name not in benches]
    if unknown:
        parser.error(f"no bench is called {unknown[0]} for {options.arch}; there are: {', '.join(benches)}")
    try:
        for name in options.names or benches:
            benches[name](options.count)
    except BenchError as error:
        print(f"benches: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
