"""The benches' look at a guest that goes round, with KVM's counters in files and this process in the place of the vCPU."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from benches import spinning


def _work(nanoseconds: int) -> None:
    until = time.thread_time_ns() + nanoseconds
    while time.thread_time_ns() < until:
        pass


@pytest.fixture
def counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / f"{os.getpid()}-7"
    (folder / "vcpu0").mkdir(parents=True)
    (folder / "vcpu0/pid").write_text(f"{os.getpid()}\n")
    (folder / "exits").write_text("100\n")
    (folder / "irq_exits").write_text("40\n")
    monkeypatch.setattr(spinning, "_KVM", tmp_path)
    monkeypatch.setattr(spinning, "_WORK", 20_000_000)
    return folder


def test_a_vcpu_that_works_and_leaves_only_for_the_hosts_interrupts_goes_round(counters: Path) -> None:
    watcher = spinning.Spinning(os.getpid())
    assert not watcher.look()
    _work(40_000_000)
    (counters / "exits").write_text("110\n")
    (counters / "irq_exits").write_text("50\n")
    assert watcher.look()


def test_a_vcpu_that_leaves_by_itself_is_alive(counters: Path) -> None:
    watcher = spinning.Spinning(os.getpid())
    assert not watcher.look()
    _work(40_000_000)
    (counters / "exits").write_text("101\n")
    assert not watcher.look()


def test_a_process_without_a_vcpu_is_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spinning, "_KVM", tmp_path)
    assert not spinning.Spinning(os.getpid()).look()
