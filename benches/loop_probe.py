"""Starts `stratovirt` with a profiler on its main loop: which functions the way of a request or a frame is made of.

Started with a bare interpreter; arguments: the source directory, a file for the result, then those of `stratovirt`. At SIGUSR1
the counting starts anew; at SIGUSR2 it is written down, a line for each function: calls, ns in the function itself, its name.
A profile weighs on every call, so the shares mean more than the sums, and a profiled run is not a timed one.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    source, target, arguments = sys.argv[1], sys.argv[2], sys.argv[3:]
    sys.path.insert(0, source)
    import signal
    import time
    from _lsprof import Profiler
    from _thread import get_ident

    import stratovirt.loop
    from stratovirt import __main__ as program
    from stratovirt.cli import command

    profiler = Profiler(time.monotonic_ns, 1e-9)

    def begin(_number: int, _frame: object) -> None:
        profiler.clear()

    def write(_number: int, _frame: object) -> None:
        lines = []
        for entry in profiler.getstats():
            code = entry.code
            name = code if isinstance(code, str) else f"{code.co_filename.rpartition('/')[2]} {code.co_qualname}"
            lines.append(f"{entry.callcount}\t{round(entry.inlinetime * 1e9)}\t{name}\n")
        with open(f"{target}.new", "w", encoding="utf-8") as file:
            file.writelines(lines)
        os.rename(f"{target}.new", target)

    run, main_thread = stratovirt.loop.EventLoop.run, get_ident()

    def profiled(self: stratovirt.loop.EventLoop) -> None:
        if get_ident() == main_thread:
            signal.signal(signal.SIGUSR1, begin)
            signal.signal(signal.SIGUSR2, write)
            profiler.enable()
        run(self)

    stratovirt.loop.EventLoop.run = profiled  # type: ignore[method-assign]
    config = command.parse(arguments)
    program.run(config)


if __name__ == "__main__":
    main()
