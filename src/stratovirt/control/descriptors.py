"""File descriptors that a QMP client passes over its unix socket (SCM_RIGHTS), and the names it gives them with `getfd`.

Both are the client's alone and closed when it leaves. What arrives waits for the next request; a request that does not take it
throws it away, so that nobody fills our descriptor table by attaching descriptors to commands that want none.
"""

from __future__ import annotations

import os

from stratovirt.control.protocol import QmpError
from stratovirt.control.table import DescriptorCommand
from stratovirt.control.types import STR, Member

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from stratovirt.control.table import MachineView

MAX_NAMED = 64
MAX_IN_A_MESSAGE = 16  # the kernel drops what a message has beyond the room that we give it


class Descriptors:
    """The descriptors of one client."""

    __slots__ = ("_arrived", "_named")

    def __init__(self) -> None:
        self._arrived: list[int] = []
        self._named: dict[str, int] = {}

    def arrive(self, fds: list[int]) -> None:
        """`fds` came with a message. They replace what came before and was not taken."""
        self.forget_arrived()
        self._arrived = fds

    def forget_arrived(self) -> None:
        arrived, self._arrived = self._arrived, []
        for fd in arrived:
            os.close(fd)

    def name(self, name: str) -> None:
        """Keep the last descriptor that arrived as `name`. Raises: QmpError when none did, or there are too many."""
        if not self._arrived:
            raise QmpError("Invalid SCM message")
        if name not in self._named and len(self._named) >= MAX_NAMED:
            raise QmpError(f"A client can name at most {MAX_NAMED} descriptors.")
        fd = self._arrived.pop()
        self.forget_arrived()
        if name in self._named:
            os.close(self._named[name])
        self._named[name] = fd

    def take(self, name: str) -> int | None:
        """The descriptor called `name`, which is the caller's from now on."""
        return self._named.pop(name, None)

    def close(self) -> None:
        self.forget_arrived()
        while self._named:
            os.close(self._named.popitem()[1])


def _getfd(_machine: MachineView, arguments: dict[str, Any], descriptors: Descriptors) -> object:
    name = arguments["fdname"]
    if not name or name[0].isdigit():
        raise QmpError("Parameter 'fdname' expects a name not starting with a digit")
    descriptors.name(name)
    return {}


def _closefd(_machine: MachineView, arguments: dict[str, Any], descriptors: Descriptors) -> object:
    fd = descriptors.take(arguments["fdname"])
    if fd is None:
        raise QmpError(f"File descriptor named '{arguments['fdname']}' not found")
    os.close(fd)
    return {}


COMMANDS = (
    DescriptorCommand("getfd", _getfd, "Give a name to the file descriptor that came with this message (SCM_RIGHTS); of "
                      "several the last. The same name again replaces it; the client's end closes it.",
                      arguments=(Member("fdname", STR, "What netdev_add will call it; no digit first."),)),
    DescriptorCommand("closefd", _closefd, "Close a descriptor that getfd has named.",
                      arguments=(Member("fdname", STR, "Its name."),)),
)
