"""The probe guest on a real /dev/kvm: it always ends, and with a verdict that its end supports."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from stratovirt.hypervisor.kvm.system import KvmSystem
from stratovirt.machine import probe

pytestmark = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm to use")


@pytest.fixture
def system() -> Iterator[KvmSystem]:
    opened = KvmSystem()
    yield opened
    opened.close()


def guest(code: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "program", lambda _with_xsave: code)


def test_a_verdict_with_a_reason(system: KvmSystem) -> None:
    before = signal.getsignal(signal.SIGALRM)
    verdict = probe.probe(system)
    assert signal.getsignal(signal.SIGALRM) is before
    if verdict.can_run_linux:
        assert verdict.step >= probe.SWAP_16_BYTES
    else:
        assert verdict.step >= probe.START, "port I/O in long mode works on every KVM"
        assert probe.STEPS[verdict.step] in verdict.reason


def test_a_guest_that_halts_without_results_does_not_pass(system: KvmSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    guest(b"\xf4", monkeypatch)  # hlt
    verdict = probe.probe(system)
    assert not verdict.can_run_linux
    assert "wrong result" in verdict.reason


def test_a_guest_that_does_not_end_is_ended(system: KvmSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    guest(b"\xeb\xfe", monkeypatch)  # jmp .
    monkeypatch.setattr(probe, "SECONDS", 0.1)
    verdict = probe.probe(system)
    assert not verdict.can_run_linux
    assert "did not get past its first instruction" in verdict.reason


def test_a_guest_that_dies_is_named(system: KvmSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    guest(b"\xb0\x04\xe6\xf4\x0f\x0b", monkeypatch)  # step 4; ud2 without an IDT: triple fault
    verdict = probe.probe(system)
    assert (verdict.can_run_linux, verdict.step) == (False, 4)
    assert "cmpxchg16b" in verdict.reason
    assert "KVM_EXIT_SHUTDOWN" in verdict.reason
