"""Tests of what there is in Python and as compiled code: the fixture `implementation` has them run with each of them.

A module says `pytestmark = pytest.mark.usefixtures("implementation")`. A test that watches what the Python version calls has
the mark `reference`, and runs with that alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stratovirt import native
from stratovirt.virtio import queue


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "implementation" in metafunc.fixturenames:
        alone = metafunc.definition.get_closest_marker("reference") is not None
        metafunc.parametrize("implementation", ["python"] if alone else ["compiled", "python"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """"compiled" or "python"."""
    name: str = request.param
    with pytest.MonkeyPatch.context() as patch:
        if name == "python":
            patch.setattr(queue, "compiled", None)
        elif native.compiled is None:
            pytest.skip(f"the compiled module is not there: {native.why}")
        yield name
