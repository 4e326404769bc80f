"""Starts a launcher for a client that found none. Not on the way of any other start."""

from __future__ import annotations

import os
import sys

IDLE_SECONDS = 600
_CODE = "import sys; sys.path.insert(0, {!r}); from stratovirt.__main__ import main; sys.exit(main())"


def start() -> None:
    """Start one in the background and wait until it serves, or has said on stderr why it does not."""
    import stratovirt

    source = os.path.dirname(os.path.dirname(os.path.abspath(stratovirt.__file__)))
    command = [sys.executable, "-I", "-S", "-c", _CODE.format(source), "launcher", "--daemonize", "--idle", str(IDLE_SECONDS)]
    # No descriptor of this command shall live on in the launcher, inheritable as it may be.
    null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1)]
    environment = {name: value for name, value in os.environ.items() if name not in ("LISTEN_FDS", "LISTEN_PID")}
    pid = os.posix_spawn(sys.executable, command, environment, file_actions=null)
    os.waitpid(pid, 0)
