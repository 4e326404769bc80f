"""What client and launcher say to each other, and where they meet. Only modules that are part of the interpreter itself.

The socket is AF_UNIX, SOCK_SEQPACKET: a request is one message and comes whole or not at all.

Layout of the request, fields separated by NUL, which none of them can contain:

    "stratovirt 1", "run", umask in octal, descriptor numbers "0,1,2,7", count of the arguments, arguments…, "NAME=VALUE"…

A clone of a template is asked for by "clone" in the place of "run". Its arguments are the template's name and what the clone
is to have of its own: "name=…", "mac=…", "cid=…", "tap=…", "qmp=…", "detach=1" (`identity.py`). "template" is a question or an
order about templates: "create" NAME DIRECTORY, "list", "show" NAME, "remove" NAME.

With it come descriptors (SCM_RIGHTS): the working directory first, then those that the numbers name, in that order.

Layout of the answers, a message each:

    "pid N"       the machine has a process; with it comes its pidfd
    "status N"    from the machine itself, its last act: it ends with exit status N
    "ended N"     from the launcher: it has ended, with wait status N
    "error TEXT"  there is no machine
    "clone JSON"  before "pid": what the clone has of its own
    "running"     from a clone: its guest runs; after "detach=1" nobody need listen any longer
    "done JSON"   the answer to "template", and the last

A machine of a short life may tell its status before the launcher tells its pid; "ended" and "error" are always last.
The machine keeps the connection, too. It ends when its client hangs up, and its status arrives without the launcher.
"""

from __future__ import annotations

import posix

GREETING = b"stratovirt 1"
MAX_REQUEST = 128 << 10  # bytes
MAX_DESCRIPTORS = 252  # one less than SCM_MAX_FD of Linux: the launcher hands them on together with the connection
MAX_ANSWER = 4096
MAX_DONE = 128 << 10  # of a "done"
SOCKET_NAME = b"stratovirt-launcher.sock"


def default_socket() -> tuple[bytes, bytes]:
    """(path, directory that is to be made for it or ""): in $XDG_RUNTIME_DIR if that is this user's, else in /tmp."""
    user = posix.geteuid()
    directory = posix.environ.get(b"XDG_RUNTIME_DIR", b"")
    if directory[:1] == b"/":
        try:
            if posix.lstat(directory).st_uid == user:
                return directory.rstrip(b"/") + b"/" + SOCKET_NAME, b""
        except OSError:
            pass  # what is not there, or not to be seen, is not used
    directory = b"/tmp/stratovirt-%d" % user
    return directory + b"/" + SOCKET_NAME, directory


def trouble_with(directory: bytes) -> str:
    """Why the private directory in /tmp cannot be trusted, "" if it can. Raises: OSError."""
    status = posix.lstat(directory)
    if status.st_mode & 0o170000 != 0o040000:
        return "it is not a directory"
    if status.st_uid != posix.geteuid():
        return f"it belongs to user {status.st_uid}"
    if status.st_mode & 0o077:
        return f"others have rights to it (mode {status.st_mode & 0o777:o}, not 700)"
    return ""
