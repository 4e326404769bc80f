"""Who may use an image: byte-range locks that every monitor of QEMU's family takes, so that two machines never write one disk.

The protocol has one byte of the file for each thing that a user does with an image (from 100 on) and one for each thing
that it does not let others do (from 200 on). A user puts a shared lock on the bytes that describe it; then it asks, for
each thing it does, whether somebody has locked "not allowed" for it, and for each thing it does not allow, whether
somebody does it. All locks are shared ones, so taking them never fails among users of the protocol; the asking decides.

    byte   100 / 200   read a consistent image      held by all; not allowed by nobody
           101 / 201   write                        held by writers; not allowed by readers and writers
           103 / 203   change the size              held by nobody; not allowed by readers and writers

They are locks of the open file description (F_OFD_*): they belong to the descriptor and not to the process, so another
descriptor of the same file that is closed does not drop them, and a fork keeps them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from stratovirt import log
from stratovirt.errors import ConfigError

_HELD, _NOT_ALLOWED = 100, 200
_READ, _WRITE, _RESIZE = 0, 1, 3

_F_OFD_GETLK, _F_OFD_SETLK = 36, 37
# struct flock of the 64-bit ABIs: short l_type, l_whence; off_t l_start, l_len; pid_t l_pid (0 for OFD locks)
_FLOCK = struct.Struct("=hh4xqqi4x")
_NO_LOCKS_HERE = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def lock_image(fd: int, path: str, readonly: bool) -> None:
    """Declare this descriptor's use of the image. The locks go when it is closed.

    A file system without locks gives a warning in the log and no protection. Raises: ConfigError when another user's
    declaration excludes this one.
    """
    held = (_READ,) if readonly else (_READ, _WRITE)
    not_allowed = (_WRITE, _RESIZE)
    try:
        for byte in (*(_HELD + use for use in held), *(_NOT_ALLOWED + use for use in not_allowed)):
            fcntl.fcntl(fd, _F_OFD_SETLK, _flock(fcntl.F_RDLCK, byte))
        for use in held:
            if _is_locked(fd, _NOT_ALLOWED + use):
                raise _taken(path, readonly)
        for use in not_allowed:
            if _is_locked(fd, _HELD + use):
                raise _taken(path, readonly)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise _taken(path, readonly) from error  # an exclusive lock: somebody outside the protocol
        why = os.strerror(error.errno or 0)
        if error.errno not in _NO_LOCKS_HERE:
            raise ConfigError(f"cannot be locked: {why}", option="-drive file", value=path) from error
        log.warn(f"{path}: no locks on this file system ({why}); a second writer would not be noticed")


def _flock(kind: int, byte: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)


def _is_locked(fd: int, byte: int) -> bool:
    """Has another descriptor any lock on that byte?"""
    answer = fcntl.fcntl(fd, _F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _taken(path: str, readonly: bool) -> ConfigError:
    kind = "read" if readonly else "write"
    return ConfigError(f"Failed to get {kind} lock on file: {path}; another process uses the image", option="-drive file",
                       value=path, accepted="an image that nobody else writes" if readonly else "an image of its own")
