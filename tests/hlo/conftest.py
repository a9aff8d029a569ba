"""The compiler for the H100, where it is installed."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hlo import h100
from tests.hlo.compiling import Compilations, Report


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Report]]:
    """Reports by name of the case; all cases of this session are compiled from the start."""
    reason = h100.why_unavailable()
    if reason is not None:
        pytest.skip(f"no compiler for GPUs: {reason}")
    cases = [
        str(item.callspec.params["case"])
        for item in request.session.items
        if Path(__file__).parent in item.path.parents
        and isinstance(item, pytest.Function)
        and "compiled" in item.fixturenames
    ]
    compilations = Compilations(dict.fromkeys(cases))
    yield compilations.report
    compilations.close()
