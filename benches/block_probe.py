"""Runs `stratovirt` with a profiler on its main loop, and leaves a table of where the loop's time went.

Started with a bare interpreter; arguments: the source directory, the file for the table, then those of `stratovirt`. The table
is a JSON list, the most expensive function first; `seconds` are a function's own, without those it calls.
"""

from __future__ import annotations

import sys


def main() -> None:
    source, target, arguments = sys.argv[1], sys.argv[2], sys.argv[3:]
    sys.path.insert(0, source)
    import cProfile
    import json
    from _thread import get_ident

    from stratovirt import __main__ as program
    from stratovirt.cli import command
    from stratovirt.loop import EventLoop

    table = open(target, "w", encoding="utf-8")  # noqa: SIM115 - now: behind its filters the program makes no files
    serve = EventLoop.run
    main_thread = get_ident()

    def profiled(loop: EventLoop) -> None:
        if get_ident() != main_thread:
            serve(loop)
            return
        profile = cProfile.Profile()
        profile.runcall(serve, loop)
        entries = sorted(((entry.inlinetime, entry.callcount, _name(entry.code)) for entry in profile.getstats()), reverse=True)
        # Waiting for events is no work; the system call that fetches them is counted with the loop's thread.
        json.dump([{"function": name, "calls": calls, "seconds": seconds} for seconds, calls, name in entries
                   if "poll" not in name], table)
        table.close()

    EventLoop.run = profiled  # type: ignore[method-assign,assignment]
    program.run(command.parse(arguments))


def _name(code: object) -> str:
    """module.function of ours, or what the profiler calls a built-in one."""
    if isinstance(code, str):
        return code.removeprefix("<").removesuffix(">")
    path, name = code.co_filename, code.co_qualname  # type: ignore[attr-defined]
    return f"{path.rpartition('stratovirt/')[2].removesuffix('.py')}: {name}"


if __name__ == "__main__":
    main()
