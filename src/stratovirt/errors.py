"""The error tree.

    StratoVirtError
    ├── ConfigError   the user asked for something that cannot be: names the option, the value, what is accepted
    ├── HostError     a system call failed: keeps the operation and errno, says what to do next
    ├── GuestError    the guest broke a rule: names the device, the rule and the specification section
    └── StateError    a request came at the wrong moment of the machine's life: names both states

A ConfigError or HostError before the guest runs ends the process with status 1 and one line on stderr. A GuestError
never leaves the device it happened in: the transport catches it and sets DEVICE_NEEDS_RESET. A StateError reaches the
client that asked.
"""

from __future__ import annotations

import posix


class StratoVirtError(Exception):
    """Root of everything this package raises on purpose."""


class ConfigError(StratoVirtError):
    """What the user asked for is not valid.

    `option` is spelled as the user typed it (`-smp`, `-device virtio-blk-device,queue-size`), `value` is the offending
    text and `accepted` says in words what would have been taken.
    """

    def __init__(self, problem: str, *, option: str = "", value: str | None = None, accepted: str = "") -> None:
        self.problem = problem
        self.option = option
        self.value = value
        self.accepted = accepted
        super().__init__(problem)

    def __str__(self) -> str:
        where = self.option if self.value is None else f"{self.option} {self.value}".strip()
        text = f"{where}: {self.problem}" if where else self.problem
        if self.accepted:
            text = f"{text} (accepted: {self.accepted})"
        if text.isprintable():
            return text
        # What a user typed stays on one line and sends nothing to the terminal but letters.
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class HostError(StratoVirtError):
    """A system call on the host failed. `errno` is 0 when the failure has none (a short read, for example)."""

    def __init__(self, operation: str, errno: int = 0, hint: str = "") -> None:
        self.operation = operation
        self.errno = errno
        self.hint = hint
        super().__init__(operation)

    @classmethod
    def from_os(cls, operation: str, error: OSError, hint: str = "") -> HostError:
        return cls(operation, error.errno or 0, hint)

    def __str__(self) -> str:
        text = f"{self.operation}: {posix.strerror(self.errno)}" if self.errno else self.operation
        return f"{text}; {self.hint}" if self.hint else text


class GuestError(StratoVirtError):
    """The guest broke a rule of a device's interface."""

    def __init__(self, device: str, rule: str, spec: str = "") -> None:
        self.device = device
        self.rule = rule
        self.spec = spec
        super().__init__(f"{device}: {rule}" + (f" ({spec})" if spec else ""))


class StateError(StratoVirtError):
    """An operation was asked for in a state that does not allow it."""

    def __init__(self, operation: str, state: str, needed: str) -> None:
        self.operation = operation
        self.state = state
        self.needed = needed
        super().__init__(f"{operation} needs the machine to be {needed}, but it is {state}")
