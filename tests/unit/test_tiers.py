"""The runner of the tiers: what runs beside the lab is accounted for like the rest."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tiers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiers_under_test", ROOT / "tests/tiers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    return module


def test_a_process_beside_that_leaves_no_results_is_a_failure(tiers: ModuleType, tmp_path: Path,
                                                              capfd: pytest.CaptureFixture[str]) -> None:
    (result,) = tiers.Beside(["no-such-tier"], tmp_path).finish()
    assert result.failures == ["no-such-tier: ended with status 2, without results"]
    assert "no tier 'no-such-tier'" in capfd.readouterr().out


def test_results_beside_are_taken_in_whole(tiers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def noted(result: object, _folder: Path) -> None:
        vars(result).update(passed=3, failures=["a::b"], skips=tiers.Counter({"why": 2}))

    report = tmp_path / "beside.json"
    monkeypatch.setitem(tiers.TIERS, "fuzz", noted)
    monkeypatch.setenv(tiers.REPORT, str(report))
    assert tiers.main(["fuzz"]) == 0
    beside = tiers.Beside(["no-such-tier"], tmp_path)
    beside._printer.join()
    (result,) = beside.finish()
    values = json.loads(report.read_text())[0]
    assert (result.tier, result.passed, result.failures, result.skips) == ("fuzz", 3, ["a::b"], {"why": 2})
    assert result.seconds == values["seconds"]
    monkeypatch.delenv(tiers.REPORT)
    assert tiers.summary([result]) == 1


def test_named_exceptions_of_the_lab_suite_name_tests_that_exist() -> None:
    spec = importlib.util.spec_from_file_location("exceptions_under_test", ROOT / "tests/lab/exceptions.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    files = list((ROOT / "tests/lab").glob("test_*.py"))
    text = "".join(f"{path.name}\n{path.read_text()}" for path in files)
    for words in (*module.NOT_ON_AARCH64, *module.NOT_ON_X86_64, *module.LONG_ON_AARCH64):
        assert words.strip("[-").partition("[")[0] in text, words
