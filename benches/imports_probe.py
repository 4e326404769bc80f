"""Runs a start under `-X importtime` and marks on stderr where our own imports begin and where the first KVM_RUN is.

Started by `imports.py` with a bare interpreter; arguments: the source directory, then those of `stratovirt`.
"""

from __future__ import annotations

import fcntl
import sys

KVM_RUN = 0xAE80
BEGIN, FIRST_RUN = "bench: begin", "bench: first KVM_RUN"


def watch_for_first_run() -> None:
    """Say when KVM_RUN is first called, and step out of the way."""
    ioctl = fcntl.ioctl

    def first(fd: int, request: int, argument: int | bytes | bytearray = 0, mutate: bool = True) -> int | bytes:
        if request == KVM_RUN:
            sys.stderr.write(FIRST_RUN + "\n")
            fcntl.ioctl = ioctl
        return ioctl(fd, request, argument, mutate)

    fcntl.ioctl = first  # type: ignore[assignment]


def main() -> int:
    watch_for_first_run()
    sys.path.insert(0, sys.argv.pop(1))
    sys.stderr.write(BEGIN + "\n")
    from stratovirt.__main__ import main as start

    return start()


if __name__ == "__main__":
    sys.exit(main())
