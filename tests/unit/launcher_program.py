"""Run by a bare interpreter: a launcher whose "machines" are a few lines of Python, as small as a launcher is.

Arguments: the source directory, the path of the socket, seconds until it is idle, and NAME=NUMBER for constants of
`launcher.server` and `launcher.reception` that are to be others. It says so when it serves.
"""

from __future__ import annotations

import _socket
import os
import sys


def machine(arguments: list[str], attachment: Attachment) -> int:
    """What the words of the arguments say, one after the other; the last is the exit status."""
    for word in arguments[:-1]:
        verb, _, value = word.partition("=")
        if verb == "tell":
            open_fds = sorted(int(name) for name in os.listdir("/proc/self/fd"))
            mask = os.umask(0)
            told = {"argv": arguments, "env": dict(os.environ), "cwd": os.getcwd(), "umask": mask, "fds": open_fds,
                    "session": os.getsid(0), "pid": os.getpid()}
            os.write(1, json.dumps(told).encode())
        elif verb == "write":
            os.write(int(value), b"here")
        elif verb == "signal":
            os.kill(os.getpid(), int(value))
        elif verb == "raise":
            raise ValueError(value)
        elif verb == "copy":
            os.write(1, os.read(0, 100))
        elif verb == "stay":
            loop = EventLoop()
            attachment.watch(loop, loop.stop)
            os.write(1, b"running")
            loop.run()
            os.write(1, b", hung up")
    return int(arguments[-1])


def main() -> int:
    path, idle, constants = sys.argv[2], float(sys.argv[3]), sys.argv[4:]
    for text in constants:
        name, _, value = text.partition("=")
        setattr(server if hasattr(server, name) else reception, name, float(value) if "." in value else int(value))
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    listener.bind(path)
    listener.listen(100)
    loop = EventLoop()
    launcher = server.Launcher(loop, listener, machine, 1024, idle, loop.stop)
    signal.signal(signal.SIGTERM, lambda _number, _frame: loop.stop())
    os.write(1, b"serving\n")
    loop.run()
    launcher.close()
    return 0


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import json
    import signal

    from stratovirt.launcher import reception, server
    from stratovirt.launcher.child import Attachment
    from stratovirt.loop import EventLoop

    sys.exit(main())
