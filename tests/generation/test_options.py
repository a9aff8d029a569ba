"""Generation options: unusable values are refused before any work, defaults are the model's."""

import math

import pytest

from jmoe.errors import RequestError
from jmoe.generation.options import GenerationOptions, check_options, make_options


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("top_k", -1),
        ("top_k", 2.5),
        ("repetition_penalty", 0),
        ("max_new_tokens", 0),
        ("max_new_tokens", 10**12),
        ("seed", -1),
        ("seed", 2**63),
        ("stop", [""]),
        ("stop", [b"x"]),
        ("stop_token_ids", [-1]),
        ("temprature", 1.0),
    ],
)
def test_an_unusable_option_is_refused_by_name(name, value):
    with pytest.raises(RequestError) as caught:
        check_options(**{name: value})
    assert name.split("_")[0] in str(caught.value)


def test_none_means_not_given():
    assert make_options({}, {"temperature": None, "stop": None}, ()) == GenerationOptions()


def test_a_model_has_defaults_and_a_request_wins():
    defaults = {"temperature": 0.6, "top_p": 0.95}
    assert make_options(defaults, {}, (2,)) == GenerationOptions(
        temperature=0.6, top_p=0.95, stop_token_ids=(2,)
    )
    assert make_options(defaults, {"temperature": 0, "stop_token_ids": []}, (2,)) == (
        GenerationOptions(temperature=0, top_p=0.95)
    )


def test_one_stop_string_may_come_without_a_list():
    assert make_options({}, {"stop": "\n\n"}, ()).stop == ("\n\n",)


def test_asking_for_top_p_alone_is_asking_to_sample():
    assert make_options({}, {"top_p": 0.9}, ()).temperature == 1.0
    assert make_options({"temperature": 0.6}, {"top_p": 0.9}, ()).temperature == 0.6
    assert make_options({}, {"top_p": 0.9, "temperature": 0}, ()).is_greedy
