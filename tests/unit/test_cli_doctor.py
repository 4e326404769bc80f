"""What `stratovirt doctor` concludes from what it finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stratovirt.cli import doctor
from stratovirt.errors import HostError
from stratovirt.hypervisor.kvm import system
from stratovirt.machine import probe


class FakeKvm:
    """A KVM without the capabilities in `missing`."""

    missing: tuple[int, ...] = ()

    def check_extension(self, capability: int) -> int:
        return 0 if capability in self.missing else 255

    def close(self) -> None:
        pass


@pytest.fixture
def kvm(monkeypatch: pytest.MonkeyPatch) -> FakeKvm:
    fake = FakeKvm()
    monkeypatch.setattr(doctor, "KvmSystem", lambda: fake)
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(probe, "probe", lambda _system: probe.Verdict(True, "ran", 5))
    return fake


def test_a_machine_that_can(kvm: FakeKvm) -> None:
    checks, able = doctor.examine_kvm()
    assert able
    assert {check.status for check in checks} == {doctor.OK}
    assert doctor.main(["--can-run-linux"]) == 0


def test_a_probe_guest_that_failed(kvm: FakeKvm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "probe", lambda _system: probe.Verdict(False, "it does not know x87 arithmetic", 3))
    checks, able = doctor.examine_kvm()
    assert not able
    assert checks[-1].status == doctor.PROBLEM
    assert checks[-1].finding == "cannot run Linux: it does not know x87 arithmetic"
    assert "make run" in checks[-1].advice
    assert doctor.main(["--can-run-linux"]) == 1


def test_a_capability_that_is_missing(kvm: FakeKvm) -> None:
    kvm.missing = (doctor.CAPABILITIES["irqfd"],)
    checks, able = doctor.examine_kvm()
    assert not able
    assert any(check.finding == "missing: irqfd" for check in checks)


def test_a_probe_that_could_not_be_made(kvm: FakeKvm, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_system: object) -> probe.Verdict:
        raise HostError("KVM_CREATE_VM", 12)

    monkeypatch.setattr(probe, "probe", fail)
    checks, able = doctor.examine_kvm()
    assert not able
    assert "KVM_CREATE_VM: Cannot allocate memory" in checks[-1].finding


@pytest.mark.parametrize("kind", ["missing", "no right", "not kvm"])
def test_no_kvm_to_use(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kvm"
    if kind == "not kvm":
        path.write_bytes(b"")

    def open_it() -> system.KvmSystem:
        if kind == "no right":  # the tests may run as root, whom no mode keeps out
            raise HostError.from_os("cannot open /dev/kvm", PermissionError(13, ""), "join the group that owns it")
        return system.KvmSystem(str(path))

    monkeypatch.setattr(doctor, "KvmSystem", open_it)
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    (check,), able = doctor.examine_kvm()
    assert not able
    assert check.status == doctor.PROBLEM
    assert check.advice
    assert doctor.main(["--can-run-linux"]) == 1
    assert capsys.readouterr() == ("", "")


def test_another_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.platform, "machine", lambda: "riscv64")
    (check,), able = doctor.examine_kvm()
    assert not able
    assert check.finding == "riscv64" and "aarch64 guests on aarch64 hosts" in check.advice


def test_arm64_has_its_own_needs_and_its_own_probe(kvm: FakeKvm, monkeypatch: pytest.MonkeyPatch) -> None:
    from stratovirt.machine.aarch64 import probe as arm64_probe

    monkeypatch.setattr(doctor.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(arm64_probe, "probe", lambda system: probe.Verdict(False, "no EL2"))
    checks, able = doctor.examine_kvm()
    assert not able and "no EL2" in checks[-1].finding and "EL2" in checks[-1].advice
    assert len(arm64_probe.PROGRAM) == 16 and arm64_probe.PROGRAM[8:12] == bytes.fromhex("020000d4")  # hvc #0


def test_json(kvm: FakeKvm, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["can_run_linux"] is True
    names = [check["name"] for check in report["checks"]]
    assert names[:3] == ["/dev/kvm", "KVM capabilities", "probe guest"]
    assert {"/dev/vhost-net", "/dev/vhost-vsock", "/dev/net/tun", "huge pages"} <= set(names)


@pytest.mark.parametrize("with_rich", [True, False])
def test_report_for_people(with_rich: bool, kvm: FakeKvm, monkeypatch: pytest.MonkeyPatch,
                           capsys: pytest.CaptureFixture[str]) -> None:
    if with_rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    assert "/dev/kvm" in printed
    assert "Linux guests can run here." in printed


def test_the_probe_s_code_does_each_step_once() -> None:
    def steps(code: bytes) -> list[int]:
        ends = [at for at in range(2, len(code)) if code[at : at + 2] == b"\xe6\xf4"]
        return [code[at - 1] for at in ends if code[at - 2] == 0xB0]

    assert steps(probe.program(True)) == [1, 2, 3, 4, 5]
    assert steps(probe.program(False)) == [1, 2, 3, 4]
    assert probe.program(True)[-1:] == b"\xf4"
