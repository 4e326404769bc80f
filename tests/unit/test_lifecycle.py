"""The states of a machine and the events between them, with hardware that writes down what is asked of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from stratovirt.errors import HostError, StateError
from stratovirt.loop import EventLoop
from stratovirt.machine.events import EventHub
from stratovirt.machine.lifecycle import CREATED, PAUSED, RUNNING, SHUTDOWN, Lifecycle


class Board(Lifecycle):
    def __init__(self, loop: EventLoop) -> None:
        super().__init__(loop)
        self.calls: list[str] = []
        self.told: list[tuple[str, dict[str, object]]] = []
        self.stuck = False
        self.events.subscribe(lambda name, data, _seconds, _microseconds: self.told.append((name, data)))

    def stop_vcpus(self) -> None:
        if self.stuck:
            raise HostError("vCPU 0 did not stop")
        self.calls.append("stop")

    def continue_vcpus(self) -> None:
        self.calls.append("continue")

    def reset_hardware(self) -> None:
        self.calls.append("reset")


@pytest.fixture
def board():
    loop = EventLoop()
    yield Board(loop)
    loop.close()


def names(board: Board) -> list[str]:
    return [name for name, _ in board.told]


def test_pause_and_resume(board: Board) -> None:
    board.state = RUNNING
    board.pause()
    assert (board.state, board.calls, names(board)) == (PAUSED, ["stop"], ["STOP"])
    board.resume()
    assert (board.state, board.calls, names(board)) == (RUNNING, ["stop", "continue"], ["STOP", "RESUME"])


def test_pause_and_resume_are_idempotent(board: Board) -> None:
    board.state = RUNNING
    board.pause()
    board.pause()
    assert board.calls == ["stop"]
    board.resume()
    board.resume()
    assert board.calls == ["stop", "continue"]
    assert board.state == RUNNING


def test_a_pause_that_fails_leaves_the_machine_running(board: Board) -> None:
    board.state = RUNNING
    board.stuck = True
    with pytest.raises(HostError):
        board.pause()
    assert board.state == RUNNING
    assert board.told == []


@pytest.mark.parametrize("guest", [True, False])
def test_reset_happens_with_the_vcpus_stopped(board: Board, guest: bool) -> None:
    board.state = RUNNING
    board.reset(guest)
    assert board.calls == ["stop", "reset", "continue"]
    assert board.told == [("RESET", {"guest": guest})]
    assert board.state == RUNNING


def test_a_paused_machine_stays_paused_over_a_reset(board: Board) -> None:
    board.state = PAUSED
    board.reset(False)
    assert board.calls == ["reset"]
    assert board.state == PAUSED


def test_shutdown_is_final_and_told_once(board: Board) -> None:
    board.state = RUNNING
    board.shutdown(True, "guest-shutdown")
    board.shutdown(False, "host-qmp-quit", 1)
    assert board.told == [("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})]
    assert board.state == SHUTDOWN
    assert board.exit_status == 0
    board.loop.run()  # returns at once


def test_powerdown_is_told_before_the_shutdown(board: Board) -> None:
    board.state = RUNNING
    board.powerdown()
    assert board.told == [("POWERDOWN", {}), ("SHUTDOWN", {"guest": False, "reason": "host-qmp-system-powerdown"})]


@pytest.mark.parametrize("state", [CREATED, SHUTDOWN])
@pytest.mark.parametrize("call", [Board.pause, Board.resume, lambda board: board.reset(False), Board.powerdown])
def test_what_comes_too_early_or_too_late_names_both_states(board: Board, state: str, call: Callable[[Board], None]) -> None:
    board.state = state
    with pytest.raises(StateError, match=f"needs the machine to be running or paused, but it is {state}"):
        call(board)
    assert board.calls == []
    assert board.told == []
    assert board.state == state


def test_subscribers_come_and_go() -> None:
    hub, seen = EventHub(), []

    def once(name: str, data: dict[str, object], seconds: int, microseconds: int) -> None:
        seen.append((name, data))
        assert seconds > 1_600_000_000
        assert 0 <= microseconds < 1_000_000
        hub.unsubscribe(once)

    hub.subscribe(once)
    hub.subscribe(lambda *event: seen.append(event[:2]))
    hub.emit("STOP")
    hub.emit("RESET", {"guest": True})
    assert seen == [("STOP", {}), ("STOP", {}), ("RESET", {"guest": True})]
