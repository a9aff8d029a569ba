"""Quantization errors of fixed weights are the recorded ones: algorithms do not drift."""

import json

import pytest

from tests.quant import golden
from tests.quant.cases import quant_format

# Another order of additions moves a few zero points of HQQ; a changed algorithm moves more.
TOLERANCE = {"rtn": 1e-4, "hqq": 1e-3}


@pytest.fixture(scope="module")
def expected():
    return json.loads(golden.GOLDEN_FILE.read_text())


@pytest.fixture(scope="module")
def weights():
    return golden.weights()


@pytest.mark.parametrize("method", golden.METHODS)
@pytest.mark.parametrize("text", golden.FORMATS)
def test_errors_are_the_recorded_ones(expected, weights, text, method):
    assert weights.keys() == expected.keys()
    for name, w in weights.items():
        errors = golden.measure(w, quant_format(text), method)
        recorded = expected[name][text][method]
        assert errors == pytest.approx(recorded, rel=TOLERANCE[method])


def test_hqq_beats_round_to_nearest_wherever_it_may_choose(expected):
    """By its own measure; plainly, large weights come at the cost of small ones."""
    for by_format in expected.values():
        for text, by_method in by_format.items():
            rtn, hqq = (by_method[method]["weighted"] for method in ("rtn", "hqq"))
            assert hqq == rtn if "s" in text else hqq < rtn


def test_more_bits_and_smaller_groups_err_less(expected):
    for by_format in expected.values():
        errors = {text: by_method["rtn"]["nmse"] for text, by_method in by_format.items()}
        assert errors["8g64"] < errors["4g64"] < errors["3g64"] < errors["2g16"]
        assert errors["3g32"] < errors["3g64"]
        assert errors["8g64"] < errors["8g64sf"]
