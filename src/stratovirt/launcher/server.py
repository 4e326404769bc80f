"""The launcher: takes requests for machines and forks a process for each.

    asked (reception.py) -> handed over -> taken -> ended   refused: an "error" answer, and the connection is closed

One child is always forked ahead of its request: the spare. It has left the launcher, has a VM and filters as the last machine
had them and its own copies of the pages that machines write to, and waits at a socket for a request, which makes it a machine.
So the fork, nearly all first writes to shared pages, and most of what KVM takes its time for, are over when the request
comes. The launcher's end is the spare's. A spare says that it has taken the request before it does anything for it: of one that
ends without having said so nobody has seen anything, and another gets the request. So there is one machine, or an error.

A clone is such a machine, forked for its template: its spare has the template's memory mapped and its processors restored.
There is one for the template that was made or used last; clones of others, and the second of several at once, wait for a fork.

The launcher does nothing else, so that there is little to go wrong: no thread (a fork copies only the one that calls it), no
work for a machine that runs, one callback for each step. Of a machine that runs it holds one descriptor, the connection, to
tell its end.

Thread: all of it on the one thread that there is.
"""

from __future__ import annotations

import _socket
import gc
import json
import os
import select
import struct

from stratovirt import log
from stratovirt.errors import StratoVirtError
from stratovirt.launcher import wire
from stratovirt.launcher.child import RESET_SIGNALS, Attachment
from stratovirt.launcher.reception import Reception, close_all, refuse, send
from stratovirt.launcher.request import CLONE, RUN, TEMPLATE, RequestError, read_request, with_arguments
from stratovirt.launcher.spare import HandOver, Makers, Spare, become_machine, rehearse_request
from stratovirt.launcher.written import Written
from stratovirt.loop import READ, EventLoop

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable

    from stratovirt.launcher.identity import Identity
    from stratovirt.launcher.request import Request
    from stratovirt.launcher.template import Template
    from stratovirt.launcher.templates import Templates
    from stratovirt.loop import Timer
    from stratovirt.machine.kvm import KvmAhead
    from stratovirt.sandbox.kernel import Sandbox
else:
    import _signal  # see process.py

SPARE_SECONDS = 0.005
HAND_OVERS = 3  # of one request, if spare after spare is killed
_LAST_WORD_SECONDS = 2.0


class Launcher:
    """Serves `listener`, an AF_UNIX SOCK_SEQPACKET socket, which becomes this object's.

    `rehearse()` runs in a clone's spare child. `make_ahead(last)` runs in all others, with the arguments of the last machine;
    its result is in the attachment later. `start(arguments, attachment)` runs in the child when it has its request, and returns
    the machine's exit status, or ends the process itself.
    `templates` are what clones are made of; without, there are none.
    `serving`: from now on, not from `begin` on.
    `soft_limit` is how many files a machine may have open, `idle` after how many seconds without one `on_idle` is called
    (0: never).
    """

    def __init__(self, loop: EventLoop, listener: _socket.socket, start: Callable[[list[str], Attachment], int],
                 soft_limit: int, idle: float = 0.0, on_idle: Callable[[], None] = lambda: None,
                 rehearse: Callable[[], None] = lambda: None,
                 make_ahead: Callable[[list[str]], tuple[KvmAhead | None, Sandbox | None]] = lambda last: (None, None),
                 templates: Templates | None = None, serving: bool = True) -> None:
        self._loop = loop
        self._reception = Reception(loop, listener, self._on_message)
        self._soft_limit = soft_limit
        self._idle = idle
        self._on_idle = on_idle
        self._makers = Makers(start, rehearse, lambda: make_ahead(self._last))
        self._last: list[str] = []
        self._templates = templates
        self._spare: Spare | None = None
        self._clone_spare: Spare | None = None
        self._closed = False
        self._serving = self._waiting = False
        self._idle_timer: Timer | None = None
        self._machines: dict[int, int] = {}  # process id -> connection
        self._handed: dict[int, HandOver] = {}  # by process id
        self.written = Written()
        self._watch_signals()
        if serving:
            self.begin()

    def begin(self) -> None:
        """Serve who comes to the listener."""
        self._serving, self._waiting = True, False
        self._reception.open()
        self._consider_idling()
        self.make_spare()

    @property
    def machines(self) -> int:
        """How many run."""
        return len(self._machines)

    def _watch_signals(self) -> None:
        self._wake_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wake_write_fd = write_fd
        _signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        _signal.signal(_signal.SIGCHLD, lambda _number, _frame: None)  # the byte in the pipe is what matters
        _signal.signal(_signal.SIGPIPE, _signal.SIG_IGN)
        self._loop.add(self._wake_fd, READ, self._on_signals)

    def _on_signals(self, _events: int) -> None:
        try:
            os.read(self._wake_fd, 4096)
        except BlockingIOError:
            return
        self._reap()

    # -- clients

    def serve(self, connection: _socket.socket) -> None:
        """Serve a client that did not come by the listener."""
        self._reception.serve(connection)

    def start_over(self) -> None:
        """Let go of what was made for the next machine, and make no more until `begin`."""
        self._waiting = True
        self.drop_spare()

    def drop_spare(self) -> None:
        """Let go of the child that waits for the next machine."""
        if self._spare is not None:
            self._spare.close()
            self._spare = None

    def _on_message(self, message: bytes, received: list[int], connection: _socket.socket) -> None:
        """Carry out a request. Raises: RequestError."""
        request = read_request(message, received, self._soft_limit)
        if request.kind == RUN:
            self._last = request.arguments
        try:
            handed = self._carry_out(request, message, received, connection)
        except StratoVirtError as error:
            raise RequestError(str(error)) from error
        if not handed:
            close_all(received)

    def _carry_out(self, request: Request, message: bytes, received: list[int], connection: _socket.socket) -> bool:
        """True: it was handed over, and what was received with it. Raises: RequestError, StratoVirtError."""
        if request.kind == TEMPLATE:
            created = request.arguments[:1] == ["create"]
            self._answer(connection, self._known_templates().command(request.arguments), created)
            return False
        template, clone = None, None
        if request.kind == CLONE:
            template, clone = self._known_templates().allot(request.arguments)
            message = with_arguments(message, clone.words())
            if len(message) > wire.MAX_REQUEST:
                raise RequestError(f"the request is longer than {wire.MAX_REQUEST} bytes")
        if not self._hand_over(message, received, connection, template, clone, HAND_OVERS):
            raise RequestError("no process could be made for the machine")
        # For the next, when this machine has had time to start: until then they would take processors from each other.
        self._loop.call_later(SPARE_SECONDS, lambda: self.make_spare(template))
        return True

    # -- templates

    def _known_templates(self) -> Templates:
        if self._templates is None:
            raise RequestError("this launcher has no templates")
        return self._templates

    def _answer(self, connection: _socket.socket, result: object, created: bool) -> None:
        data = json.dumps(result).encode()
        if len(data) > wire.MAX_DONE - 5:
            raise RequestError("the answer is too long")
        send(connection, b"done " + data)
        connection.close()
        gc.freeze()  # a template stays, and is not to be looked through in every child
        spare, templates = self._clone_spare, self._known_templates()
        if spare is not None and (spare.template is None or not templates.has(spare.template)):
            spare.close()
            self._clone_spare = None
        latest = templates.latest
        if latest is not None and (self._clone_spare is None or created):
            self._loop.call_later(SPARE_SECONDS, lambda: self.make_spare(latest))

    # -- machines

    def _take_spare(self, template: Template | None) -> Spare | None:
        self.make_spare(template)
        if template is not None:
            spare, self._clone_spare = self._clone_spare, None
        else:
            spare, self._spare = self._spare, None
        return spare

    def _hand_over(self, request: bytes, received: list[int], connection: _socket.socket, template: Template | None,
                   clone: Identity | None, attempts: int) -> bool:
        """Give the request to the spare child; True: it is to say that it has taken it. `attempts` are all that may be made."""
        while attempts > 0:
            attempts -= 1
            spare = self._take_spare(template)
            if spare is None:
                return False
            rights = struct.pack(f"{len(received) + 1}i", connection.fileno(), *received)
            try:
                spare.socket.sendmsg([request], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
            except OSError as error:
                log.warn(f"the process that was ready for the next machine is gone: {error.strerror}")
                spare.close()
                continue
            self._await_taken(HandOver(spare, request, received, connection, clone, attempts))
            return True
        return False

    def _await_taken(self, handed: HandOver) -> None:
        pid = handed.spare.pid
        self._handed[pid] = handed
        self._loop.add(handed.spare.socket.fileno(), READ, lambda _events: self._on_word(pid))
        if handed.clone is not None:
            self._known_templates().begun(pid, handed.clone)  # nobody else gets what it has of its own
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    def _on_word(self, pid: int) -> None:
        """A spare has something to say, or has ended."""
        handed = self._handed.get(pid)
        taken = handed.is_taken() if handed is not None else None
        if taken is not None:
            self._settle(pid, taken)

    def _settle(self, pid: int, taken: bool) -> None:
        """A spare has taken its request, and there is a machine; or it has ended before that, and another gets the request."""
        handed = self._handed.pop(pid)
        spare, connection, clone = handed.spare, handed.connection, handed.clone
        self._loop.remove(spare.socket.fileno())
        if taken:
            if clone is not None:
                send(connection, b"clone " + json.dumps(clone.describe()).encode())
            send(connection, b"pid %d" % pid, [spare.pidfd])  # if it has gone, the machine learns it by itself
            self._machines[pid] = connection.detach()
        spare.close()
        if not taken:
            log.warn("the process that was to be a machine has ended before it was one")
            if clone is not None:
                self._known_templates().ended(pid)
            if not self._closed and self._hand_over(handed.request, handed.received, connection, spare.template, clone,
                                                    handed.attempts):
                self._loop.call_later(SPARE_SECONDS, lambda: self.make_spare(spare.template))
                return
            refuse(connection, "no process could be made for the machine")
            self._consider_idling()
        close_all(handed.received)

    def _await_last_word(self, pid: int) -> None:
        """This launcher ends, and its client shall know whether there is a machine."""
        poll = select.poll()
        poll.register(self._handed[pid].spare.socket.fileno(), READ)
        if poll.poll(_LAST_WORD_SECONDS * 1000):
            self._on_word(pid)

    def make_spare(self, template: Template | None = None) -> None:
        """Fork the child that waits for the next request, or the next for a clone of `template`, unless there is one."""
        if self._closed or self._waiting:
            return
        if template is not None:
            spare = self._clone_spare
            if (spare is not None and spare.template is template) or not self._known_templates().has(template):
                return
            if spare is not None:
                spare.close()
                self._clone_spare = None
        elif self._spare is not None:
            return
        try:
            ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        except OSError as error:
            log.warn(f"socketpair: {error.strerror}")
            return
        _signal.pthread_sigmask(_signal.SIG_BLOCK, RESET_SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                self._loop.close()
                spares = [spare.socket for spare in (self._spare, self._clone_spare) if spare is not None]
                handed = [socket for each in self._handed.values() for socket in (each.spare.socket, each.connection)]
                for socket in (*self._reception.sockets, ours, *spares, *handed):
                    socket.detach()  # the number will be somebody else's: no object shall close it
                become_machine(theirs, self._makers, self._soft_limit, self.written, template)
            # Nobody but this loop, later, waits for the child: the number is its, even if it has ended by now.
            spare = Spare(pid, os.pidfd_open(pid), ours, template)
            if template is not None:
                self._clone_spare = spare
                self._known_templates().rehearse(template)
                rehearse_request(template.name, self._soft_limit)
            else:
                self._spare = spare
        except OSError as error:
            log.warn(f"fork: {error.strerror}")
            ours.close()  # a child that has begun ends, for nobody is left at the other side
        finally:
            _signal.pthread_sigmask(_signal.SIG_UNBLOCK, RESET_SIGNALS)
            theirs.close()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if self._forget_spare(pid):
                continue
            handed = self._handed.get(pid)
            if handed is not None:
                taken = bool(handed.is_taken())
                self._settle(pid, taken)
                if not taken:
                    continue  # the number may be another's now
            if self._templates is not None:
                self._templates.ended(pid)
            fd = self._machines.pop(pid, -1)
            if fd >= 0:
                try:
                    os.write(fd, b"ended %d" % status)
                except OSError as error:
                    log.debug(f"a client went away before its machine: {error.strerror}")
                os.close(fd)
        self._consider_idling()

    def _forget_spare(self, pid: int) -> bool:
        """If it was one."""
        for spare in (self._spare, self._clone_spare):
            if spare is not None and spare.pid == pid:
                log.warn("the process that was ready for the next machine has ended")
                spare.close()
                if spare is self._spare:
                    self._spare = None
                else:
                    self._clone_spare = None
                return True
        return False

    def _consider_idling(self) -> None:
        if self._serving and self._idle and not self._machines and not self._handed and self._idle_timer is None:
            self._idle_timer = self._loop.call_later(self._idle, self._on_idle_timer)

    def _on_idle_timer(self) -> None:
        self._idle_timer = None
        self._on_idle()

    def close(self) -> None:
        """Stop serving. Machines run on, and tell their clients themselves how they end."""
        self._closed = True
        for spare in (self._spare, self._clone_spare):
            if spare is not None:
                spare.close()  # and so it ends
        self._spare = self._clone_spare = None
        for pid in list(self._handed):
            self._await_last_word(pid)
        self._reception.close()
        _signal.set_wakeup_fd(-1)
        self._loop.remove(self._wake_fd)
        os.close(self._wake_fd)
        os.close(self._wake_write_fd)
        for fd in self._machines.values():
            if fd >= 0:
                os.close(fd)
        self._machines.clear()
