"""The life of a machine: its states, and who may take it from one to the next.

    created -> running <-> paused
                   \\______/ -> shutdown

    start     created -> running, or paused with -S
    pause     running -> paused     STOP        idempotent
    resume    paused -> running     RESUME      idempotent
    reset     stays as it is        RESET       the guest starts from its first instruction
    shutdown  any -> shutdown       SHUTDOWN    final: the main loop ends, the process with it

All of it happens on the main loop's thread. Guests ask for a reset or a shutdown from vCPU threads, through
`EventLoop.call_soon`; what comes after a shutdown finds the state final and does nothing.
"""

from __future__ import annotations

from stratovirt.errors import StateError
from stratovirt.machine.events import EventHub

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.loop import EventLoop

CREATED = "created"
RUNNING = "running"
PAUSED = "paused"
SHUTDOWN = "shutdown"


class Lifecycle:
    """Base of a machine: a board says how vCPUs stop and go and what a reset does, this class when that may happen.

    Thread: the main loop's.
    """

    def __init__(self, loop: EventLoop) -> None:
        self.loop = loop
        self.state = CREATED
        self.events = EventHub()
        self.exit_status = 0

    # -- what a board implements

    def stop_vcpus(self) -> None:
        """No vCPU is in the guest when this returns. Raises: HostError, with the vCPUs running on."""
        raise NotImplementedError

    def continue_vcpus(self) -> None:
        raise NotImplementedError

    def reset_hardware(self) -> None:
        """Put memory, devices and vCPUs into the state of power-on. Called with the vCPUs stopped."""
        raise NotImplementedError

    # -- transitions

    def pause(self) -> None:
        """Raises: HostError when a vCPU does not stop; the machine then runs on."""
        self._require("stop", RUNNING, PAUSED)
        if self.state == RUNNING:
            self.stop_vcpus()
            self.state = PAUSED
        self.events.emit("STOP")

    def resume(self) -> None:
        self._require("cont", RUNNING, PAUSED)
        if self.state == PAUSED:
            self.state = RUNNING
            self.continue_vcpus()
        self.events.emit("RESUME")

    def reset(self, guest: bool) -> None:
        """Start the guest again from its first instruction; a paused machine stays paused. `guest`: it asked for it itself."""
        self._require("system_reset", RUNNING, PAUSED)
        if self.state == RUNNING:
            self.stop_vcpus()
        self.reset_hardware()
        self.events.emit("RESET", {"guest": guest})
        if self.state == RUNNING:
            self.continue_vcpus()

    def powerdown(self) -> None:
        """A microVM has no power button to press: it is switched off."""
        self._require("system_powerdown", RUNNING, PAUSED)
        self.events.emit("POWERDOWN")
        self.shutdown(False, "host-qmp-system-powerdown")

    def shutdown(self, guest: bool, reason: str, status: int = 0) -> None:
        """End the machine and its main loop. Idempotent: the first reason counts. `status`: what the process exits with."""
        if self.state == SHUTDOWN:
            return
        self.state = SHUTDOWN
        self.exit_status = status
        self.events.emit("SHUTDOWN", {"guest": guest, "reason": reason})
        self.loop.stop()

    def _require(self, operation: str, *states: str) -> None:
        if self.state not in states:
            raise StateError(operation, self.state, " or ".join(states))
