"""What this process may ask of the kernel while a guest runs: filters of system calls (seccomp), one for each kind of thread.

    rules.py      the table: call, kinds of threads, reason, arguments
    bpf.py        from rules to a filter's bytes
    tables_*.py   those bytes for each architecture, made by generate.py; with kernel.py all that a start needs
    kernel.py     installs them, and the handler of what they refuse
    report.py     -seccomp-report
"""

from __future__ import annotations

# The kinds of threads.
VCPU, IOTHREAD, MAIN = range(3)
KINDS = (VCPU, IOTHREAD, MAIN)
KIND_NAMES = ("a vCPU thread", "an iothread", "the main thread")


def unconfined(kind: int) -> None:
    """What stands for `Sandbox.confine` in a process without a sandbox."""
