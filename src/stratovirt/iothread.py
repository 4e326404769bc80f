"""An iothread: a thread with an event loop of its own, for devices that are to keep out of the main loop's way.

    created -> running -> stopped

What a device on an iothread shares with others is what it shares on the main loop: registers with vCPU threads, and
`VirtioDevice._work` with whoever resets it. Descriptors may be added to the loop directly before `start` and by its own
callbacks; everybody else goes through `call`.
"""

from __future__ import annotations

from _thread import allocate_lock, get_ident, get_native_id, start_new_thread

from stratovirt import log
from stratovirt.errors import StateError
from stratovirt.loop import EventLoop
from stratovirt.sandbox import IOTHREAD, unconfined

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

MAX_IOTHREADS = 8
STOP_SECONDS = 5.0  # the longest that one callback may take


class IoThread:
    """`on_failure` is called on the thread, its last act, when a callback of ours has a defect; the log has the traceback."""

    def __init__(self, id: str, on_failure: Callable[[], None]) -> None:
        self.id = id
        self.loop = EventLoop()
        self._on_failure = on_failure
        self.native_id = 0  # the kernel's, once the thread runs
        self._ident = 0
        self._running = False
        self._ended = allocate_lock()

    def start(self, confine: Callable[[int], None] = unconfined) -> None:
        """`confine` is called on the new thread, before anything else. Thread: the main loop's."""
        self._running = True
        self._ended.acquire()
        start_new_thread(self._run, (confine,))

    def _run(self, confine: Callable[[int], None]) -> None:
        self._ident = get_ident()
        self.native_id = get_native_id()
        failed = False
        try:
            confine(IOTHREAD)
            self.loop.run()
        except Exception:  # noqa: BLE001  # our own defect: the machine ends with its traceback in the log, it does not hang
            failed = True
            log.defect()
        self._running = False
        self._ended.release()
        if failed:
            self._on_failure()

    def call(self, function: Callable[[], None]) -> None:
        """Run `function` on the loop's thread and wait for it. It must not raise. Raises: StateError when the thread is stuck.

        Thread: any that holds no lock `function` may need. Before `start` and after `stop` it runs at once.
        """
        if not self._running or get_ident() == self._ident:
            function()
            return
        done = allocate_lock()
        done.acquire()

        def run() -> None:
            try:
                function()
            finally:
                done.release()

        self.loop.call_soon(run)
        if not done.acquire(timeout=STOP_SECONDS):
            raise StateError(f"a call on iothread {self.id}", "busy", "ready")

    def stop(self) -> None:
        """End the thread: none of its callbacks runs when this returns. Idempotent. Raises: StateError when it is stuck."""
        self.loop.stop()
        if self._running and not self._ended.acquire(timeout=STOP_SECONDS):
            raise StateError(f"the end of iothread {self.id}", "busy", "ready")
