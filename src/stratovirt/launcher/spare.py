"""The child that is forked ahead of its request: what it does before, and how it becomes the machine."""

from __future__ import annotations

import _socket
import os
import select
import struct

from stratovirt.launcher import wire
from stratovirt.launcher.child import Attachment, adopt, detach, settle
from stratovirt.launcher.request import CLONE, read_request, with_arguments
from stratovirt.loop import READ

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from stratovirt.launcher.identity import Identity
    from stratovirt.launcher.template import Template
    from stratovirt.launcher.written import Written
    from stratovirt.machine.kvm import KvmAhead
    from stratovirt.sandbox.kernel import Sandbox

ROOM_FOR_RIGHTS = _socket.CMSG_SPACE((wire.MAX_DESCRIPTORS + 1) * 4)


class Spare:
    """A child without a request yet, and the socket where it waits for one. `template`: it can be a clone of that only."""

    __slots__ = ("pid", "pidfd", "socket", "template")

    def __init__(self, pid: int, pidfd: int, socket: _socket.socket, template: Template | None = None) -> None:
        self.template = template
        self.pid = pid
        self.pidfd = pidfd
        self.socket = socket

    def close(self) -> None:
        """Let go of it: without a request it ends."""
        self.socket.close()
        os.close(self.pidfd)


class HandOver:
    """A request that a spare has been given, until the spare says that it has it. The launcher closes `received` then."""

    __slots__ = ("attempts", "clone", "connection", "received", "request", "spare")

    def __init__(self, spare: Spare, request: bytes, received: list[int], connection: _socket.socket, clone: Identity | None,
                 attempts: int) -> None:
        self.spare = spare
        self.request = request
        self.received = received
        self.connection = connection
        self.clone = clone
        self.attempts = attempts

    def is_taken(self) -> bool | None:
        """Has the spare the request? False: it has ended before that, and nobody has seen anything of it. None: not yet."""
        try:
            return bool(self.spare.socket.recv(1, _socket.MSG_DONTWAIT))
        except ConnectionResetError:
            return False  # it had not even read the request
        except BlockingIOError:
            return None


class NoRequest(Exception):
    """The launcher has ended, or does not need this child."""


class Makers:
    """What is run in the child: `Launcher` has their meaning."""

    __slots__ = ("make_ahead", "rehearse", "start")

    def __init__(self, start: Callable[[list[str], Attachment], int], rehearse: Callable[[], None],
                 make_ahead: Callable[[], tuple[KvmAhead | None, Sandbox | None]]) -> None:
        self.start = start
        self.rehearse = rehearse
        self.make_ahead = make_ahead


def become_machine(requests: _socket.socket, makers: Makers, soft_limit: int, written: Written,
                   template: Template | None) -> NoReturn:
    """Wait at `requests` for what to be, and be that; with `template` a clone of it. The launcher's descriptors are open."""
    status = 1
    attachment = None
    try:
        if template is not None:
            from stratovirt.launcher import clone

            mapped = clone.map_memory(template)
        source = detach(requests.detach())
        if template is not None and not _is_waiting(source):
            makers.rehearse()
        if template is not None:
            ahead: KvmAhead | None = clone.make_ahead(mapped)
            sandbox = clone.make_sandbox(template.config)
            rehearse_request(template.name, soft_limit)
        else:
            # Whoever is waiting already is served sooner by a VM that is made in its usual order.
            ahead, sandbox = (None, None) if _is_waiting(source) else makers.make_ahead()
        environment = dict(os.environ)
        if not _is_waiting(source):
            written.copy()
        message, received = _await_request(source)
        os.close(source)
        request = read_request(message, received[1:], soft_limit)
        attachment = settle(request, received[0], soft_limit, ahead, environment)
        attachment.sandbox = sandbox
        if template is not None:
            status = clone.start(template, request.arguments, attachment)
        else:
            status = makers.start(request.arguments, attachment)
    except NoRequest:
        status = 0
    except OSError as error:
        os.write(2, f"stratovirt: the machine's process cannot be set up: {error}\n".encode())
    except BaseException:  # noqa: BLE001  # our own defect: it ends here, and never as a second launcher
        import traceback

        os.write(2, traceback.format_exc().encode("utf-8", "backslashreplace"))
    finally:
        if attachment is not None:
            attachment.finish(status)
        os._exit(status)


def rehearse_request(template: str, soft_limit: int) -> None:
    """Read a request for a clone as if it had come: the pages that this writes to are this process's own afterwards."""
    environment = [name + b"=" + value for name, value in os.environb.items()]
    message = b"\0".join([wire.GREETING, CLONE.encode(), b"22", b"0,1,2", b"1", template.encode(), *environment])
    request = read_request(with_arguments(message, [template, "name=rehearsal"]), [0, 1, 2, 3], soft_limit)
    adopt(request.environment, request.environment)


def _is_waiting(source: int) -> bool:
    """Is there a request, or will there never be one?"""
    poll = select.poll()
    poll.register(source, READ)
    return bool(poll.poll(0))


def _await_request(source: int) -> tuple[bytes, list[int]]:
    """A request and what came with it, the connection first. Nothing is done for it before the launcher is told: it is here.

    Raises: NoRequest, OSError.
    """
    socket = _socket.socket(fileno=source)
    message, ancillary, _, _ = socket.recvmsg(wire.MAX_REQUEST, ROOM_FOR_RIGHTS, _socket.MSG_CMSG_CLOEXEC)
    if not message:
        raise NoRequest
    socket.send(b"1", _socket.MSG_NOSIGNAL)
    socket.detach()
    return message, descriptors_of(ancillary)


def descriptors_of(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    received: list[int] = []
    for level, kind, data in ancillary:
        if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS):
            received += struct.unpack(f"{len(data) // 4}i", data[: len(data) & -4])
    return received
