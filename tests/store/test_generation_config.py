"""A model's own defaults for generation."""

import json
from pathlib import Path

import pytest

from jmoe.errors import CheckpointError
from jmoe.store.generation_config import GenerationDefaults


def load(directory: Path, raw: dict | None, config: dict | None = None) -> GenerationDefaults:
    if raw is not None:
        (directory / "generation_config.json").write_text(json.dumps(raw))
    return GenerationDefaults.load(directory, config or {"eos_token_id": 2})


def test_without_the_file_generation_is_greedy_and_config_json_ends_it(tmp_path):
    assert load(tmp_path, None) == GenerationDefaults({}, (2,))
    assert load(tmp_path, None, {"eos_token_id": None}) == GenerationDefaults({}, ())


def test_sampling_options_count_only_where_the_model_samples(tmp_path):
    raw = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 7]}
    assert load(tmp_path, raw) == GenerationDefaults({}, (2, 7))
    sampled = load(tmp_path, raw | {"do_sample": True})
    assert sampled == GenerationDefaults({"temperature": 0.6, "top_p": 0.9}, (2, 7))
    assert load(tmp_path, {"do_sample": True}).options == {"temperature": 1.0}


def test_options_of_beams_are_read(tmp_path):
    beams = {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.6}
    options = load(tmp_path, beams | {"early_stopping": True}).options
    assert options == beams | {"early_stopping": True}
    assert load(tmp_path, {"early_stopping": "never"}).options == {"early_stopping": "never"}


@pytest.mark.parametrize(
    "raw",
    [
        {"eos_token_id": "</s>"},
        {"eos_token_id": [2, None]},
        {"eos_token_id": -1},
        {"do_sample": True, "temperature": "0.7"},
        {"num_beams": "4"},
        {"early_stopping": "always"},
    ],
)
def test_a_wrong_type_is_refused(tmp_path, raw):
    with pytest.raises(CheckpointError):
        load(tmp_path, raw)
