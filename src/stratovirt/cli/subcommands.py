"""The subcommands for people: `run`, `doctor`, `snapshot`, `help`. Each is imported when it is asked for."""

from __future__ import annotations


def dispatch(name: str, arguments: list[str]) -> int:
    """Run the subcommand `name`; returns the exit status."""
    if name == "run":
        from stratovirt.cli import run

        return run.main(arguments)
    if name == "doctor":
        from stratovirt.cli import doctor

        return doctor.main(arguments)
    if name == "snapshot":
        from stratovirt.cli import snapshot

        return snapshot.main(arguments)
    from stratovirt.cli import help

    return help.print_usage()
