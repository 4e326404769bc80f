"""A QMP endpoint, in two steps: bound before the guest starts, served once it runs.

Binding is quick and can fail, so it comes first and on the way to the running guest; clients may connect from then on and
wait in the backlog. JSON, the commands and the server are imported by `serve`, when the vCPUs are already running.
"""

from __future__ import annotations

from stratovirt.backends.listen import Listener, listen_tcp, listen_unix

TYPE_CHECKING = False
if TYPE_CHECKING:
    from stratovirt.config.vm import QmpConfig
    from stratovirt.control.server import QmpServer
    from stratovirt.control.table import MachineView


class QmpListener:
    """What one `-qmp` or `-mon` asks for."""

    def __init__(self, config: QmpConfig) -> None:
        self.config = config
        self._listener: Listener | None = None
        self._server: QmpServer | None = None

    def bind(self) -> None:
        """Create the socket and listen. Raises: ConfigError naming the option."""
        config = self.config
        if config.path:
            self._listener = listen_unix(config.path, config.option)
        else:
            self._listener = listen_tcp(config.host, config.port, config.option)

    def serve(self, machine: MachineView) -> None:
        """Accept clients on the machine's loop, from now on. Thread: the loop's."""
        from stratovirt.control.server import QmpServer

        if self._listener is None:
            self.bind()
        if self._listener is not None:
            self._server = QmpServer(self._listener, machine)

    def flush(self, seconds: float) -> None:
        """Send what is queued for clients, the last events above all, waiting at most `seconds`. Thread: the loop's."""
        if self._server is not None:
            self._server.flush(seconds)

    def close(self) -> None:
        """Let the clients go and remove the socket. Idempotent."""
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None
