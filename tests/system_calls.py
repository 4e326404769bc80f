"""What strace has seen of a machine, by kind of thread: only from each thread's filter on.

`strace -f -ff -o PREFIX` leaves a file for each thread, PREFIX.TID. A filter's length tells whose it is; a thread that a
confined one has started is of its kind.
"""

from __future__ import annotations

import re
from pathlib import Path

from stratovirt.sandbox import IOTHREAD, KINDS, MAIN, VCPU
from stratovirt.sandbox.kernel import FILTERS
from stratovirt.sandbox.rules import allowed_calls, rules_of

_CALL = re.compile(r"(\w+)\(")
_FILTER = re.compile(r"seccomp\(SECCOMP_SET_MODE_FILTER, .*\{len=(\d+), .*= 0$")
_CLONE = re.compile(r"clone3?\(.* = (\d+)$")

# What a machine may need and a run under strace need not show, and why.
UNSEEN = {
    "clock_gettime": "the vDSO answers; the halt watch looks every two seconds only",
    "restart_syscall": "after SIGSTOP and SIGCONT only, and strace is in between",
    "getpid": "for a line of log, and where the C library sends signals",
    "gettid": "for a line of log",
    "brk": "when the heap of the C library grows",
    "mremap": "when a large buffer grows",
    "mmap": "when the interpreter's or the C library's memory grows",
    "munmap": "when it shrinks",
    "mprotect": "when a heap of the C library grows",
    "madvise": "at a thread's end",
    "rt_sigprocmask": "at a thread's beginning and end, and around signals",
    "exit": "at a thread's end; a process may end first",
    "poll": "stderr as the log, and requests in flight at a reset", "ppoll": "the same",
    "io_uring_enter": "where the host has io_uring", "io_uring_setup": "the same", "io_uring_register": "the same",
    "sendmsg": "vhost-user", "recvmsg": "the same, and QMP's", "socket": "the same", "connect": "the same",
    "io_submit": "where the file system has O_DIRECT", "io_getevents": "the same", "io_setup": "the same",
    "io_destroy": "the same",
    "mkdir": "a snapshot, which machines with vhost devices do not have", "mkdirat": "the same",
    "fstat": "newfstatat in other C libraries", "newfstatat": "fstat in other C libraries",
    "rt_sigreturn": "at a signal's end; signals go to any thread",
    "getdents64": "when a directory of modules has changed since it was read",
    "fcntl": "when a tap is full, and for locks of images",
}
# The same for vCPU threads alone.
UNSEEN_ON_VCPU = {
    "close": "a tap's second number, when a driver is reset while the tap is full", "epoll_ctl": "the same, and vhost's start",
}


def seen(prefix: Path) -> tuple[set[str], ...]:
    """Names of calls, for each kind of thread."""
    texts = {int(path.suffix[1:]): path.read_text(errors="replace").splitlines()
             for path in prefix.parent.glob(f"{prefix.name}.*") if path.suffix[1:].isdigit()}
    kind_of_length = {len(program) // 8: kind for kind, program in zip(KINDS, FILTERS, strict=True)}
    assert len(kind_of_length) == len(KINDS), "filters of the same length: their kinds cannot be told apart"
    found: tuple[set[str], ...] = tuple(set() for _ in KINDS)
    inherited: dict[int, int] = {}
    left = dict(texts)
    while left:
        thread = next((one for one in left if one in inherited), min(left))
        kind = inherited.get(thread)
        for line in left.pop(thread):
            installed = _FILTER.match(line)
            if installed and kind is None:
                kind = kind_of_length[int(installed[1])]
                continue
            if kind is None:
                continue
            call = _CALL.match(line)
            if call:
                found[kind].add(call[1])
            started = _CLONE.match(line)
            if started:
                inherited[int(started[1])] = kind
    return found


def compare(found: tuple[set[str], ...]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """By kind of thread: calls that were seen and are not allowed; calls that are allowed and were not seen, with no excuse."""
    names = {VCPU: "vCPU", IOTHREAD: "iothread", MAIN: "main"}
    answered = {kind: {rule.call for rule in rules_of(kind)} for kind in KINDS}
    forbidden = {names[kind]: sorted(found[kind] - answered[kind]) for kind in KINDS}
    idle = {names[kind]: sorted(allowed_calls(kind) - found[kind] - set(UNSEEN) - set(UNSEEN_ON_VCPU if kind == VCPU else ()))
            for kind in KINDS}
    return forbidden, idle
