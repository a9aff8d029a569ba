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
        ("num_beams", 0),
        ("num_beams", 2.0),
        ("num_return_sequences", 0),
        ("length_penalty", math.nan),
        ("length_penalty", 11.0),
        ("early_stopping", "always"),
        ("early_stopping", 1),
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


@pytest.mark.parametrize(
    ("requested", "got"),
    [
        ({"num_return_sequences": 2}, "num_return_sequences=2, num_beams=1"),
        ({"num_beams": 4, "num_return_sequences": 5}, "num_return_sequences=5, num_beams=4"),
        ({"num_beams": 4, "temperature": 0.7}, "num_beams=4, temperature=0.7"),
        ({"num_beams": 4, "top_k": 50}, "num_beams=4, temperature=1.0"),
        ({"num_beams": 4, "top_p": 0.9}, "num_beams=4, temperature=1.0"),
        ({"num_beams": 4, "stop": "end"}, "num_beams=4, stop=['end']"),
        ({"length_penalty": 0.5}, "length_penalty=0.5, num_beams=1"),
        ({"num_beams": 1, "early_stopping": "never"}, "early_stopping='never', num_beams=1"),
    ],
)
def test_settings_of_beams_that_contradict_each_other_are_refused_once(requested, got):
    with pytest.raises(RequestError) as caught:
        check_options(**requested)
    assert caught.value.got == got
    assert caught.value.do


def test_asking_for_beams_is_asking_not_to_sample_and_the_other_way_round():
    sampling = {"temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.1}
    beams = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5}
    assert make_options(sampling, {"num_beams": 2}, ()) == (
        GenerationOptions(num_beams=2, repetition_penalty=1.1)
    )
    assert make_options(beams, {"top_p": 0.9}, ()) == GenerationOptions(temperature=1, top_p=0.9)
    with pytest.raises(RequestError, match="do not sample"):  # if the model asks for both
        make_options(sampling | beams, {}, ())


def test_a_models_beams_count_where_there_are_any():
    beams = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5}
    assert make_options(beams, {}, ()) == GenerationOptions(**beams)
    assert make_options(beams, {"num_beams": 2}, ()) == (
        GenerationOptions(num_beams=2, num_return_sequences=2, length_penalty=0.5)
    )
    assert make_options(beams, {"num_beams": 1}, ()) == GenerationOptions()
    alone = {"length_penalty": 0.5, "early_stopping": True}  # which transformers ignores, too
    assert make_options(alone, {}, ()) == GenerationOptions()
    assert make_options(alone, {"num_beams": 2}, ()).length_penalty == 0.5
