"""Loading a model in every form: what is checked before, and that forms agree."""

import json
from pathlib import Path

import numpy as np
import pytest

import jmoe
from jmoe.errors import CapacityError, ConfigError, RequestError
from jmoe.loading import EMBEDDED_MODEL
from jmoe.models.decoder import abstract_parameters
from jmoe.quant.spec import parse_spec
from tests.resident_engine import resident_engine

PROMPT = "def read(self, size):\n    "
SMALL = json.loads(Path("configs/models/mixtral-8x7b.json").read_text()) | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="module")
def shape(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shape") / "small.json"
    path.write_text(json.dumps(SMALL))
    return path


def test_a_model_is_quantized_as_it_is_loaded():
    llm = jmoe.load(quant="attn4-experts4", method="rtn", dtype="float32")
    expected = abstract_parameters(llm.config, "float32", parse_spec("attn4-experts4"))
    got = [(p.shape, p.dtype) for p in resident_engine(llm).parameters]
    assert got == [(p.shape, p.dtype) for p in expected.values()]
    assert llm.num_parameters == jmoe.load().num_parameters
    text = llm.generate(PROMPT, max_new_tokens=12, temperature=0).text
    assert text == llm.generate(PROMPT, max_new_tokens=12, temperature=0).text


def test_formats_of_many_bits_change_the_logits_little():
    token_ids = jmoe.load().tokenize(PROMPT * 8)
    plain = jmoe.load(dtype="float32").engine.logits(token_ids)
    int8 = jmoe.load(dtype="float32", quant="int8").engine.logits(token_ids)
    exact = jmoe.load(dtype="float32", quant="bf16").engine.logits(token_ids)
    assert np.sum((int8 - plain) ** 2) / np.sum(plain**2) < 1e-3
    # The embedded model is stored in bfloat16: nothing was lost, only the path is another.
    assert np.sum((exact - plain) ** 2) / np.sum(plain**2) < 1e-11


@pytest.mark.parametrize("quant", [None, "attention=8g16sf,experts=4g16,experts_down=3g32"])
def test_random_weights_depend_on_the_seed_only(shape, quant):
    def parameters(seed: int) -> list[np.ndarray]:
        llm = jmoe.load(shape, random_weights=True, num_layers=1, quant=quant, seed=seed)
        assert llm.config.num_hidden_layers == 1
        assert np.isfinite(llm.engine.logits([1, 2, 3])).all()
        return [np.asarray(p) for p in resident_engine(llm).parameters]

    first, same, other = parameters(0), parameters(0), parameters(1)
    assert all(np.array_equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"num_layers": 2}, RequestError, ("random weights",)),
        ({"random_weights": True}, RequestError, ("need a shape", "mixtral-8x7b")),
        ({"model": "nothing", "random_weights": True}, ConfigError, ("mixtral-8x22b",)),
        ({"model": "mixtral-8x7b"}, RequestError, ("without weights", "--random_weights")),
        ({"quant": "attn5"}, ConfigError, ("unknown quantization", "attn4-experts4")),
        ({"quant": "experts=4g128"}, ConfigError, ("does not divide", "groups of 128", "4g64")),
        ({"quant": "experts=5g64"}, ConfigError, ("8, 4, 3 or 2 bits",)),
        ({"quant": "experts=4g48"}, ConfigError, ("power of two",)),
        ({"quant": "experts=4g64,experts_down=bf16"}, ConfigError, ("all quantized",)),
        ({"quant": "int4", "method": "gptq"}, ConfigError, ("gptq", "rtn")),
        ({"host_memory": "disk"}, ConfigError, ("disk", "mmap")),
        ({"policy": "resident", "engine": "compiled"}, RequestError, ("engine compiled",)),
        ({"policy": "offload", "tokens_per_call": 2}, ConfigError, ("the engine thread",)),
        ({"engine": "auto", "link_gb_per_s": 1.0}, RequestError, ("engine auto", "1.0 GB/s")),
        ({"engine": "compiled", "tokens_per_call": 0}, ConfigError, ("from 1 to 256",)),
        (
            {"model": "mixtral-8x22b", "random_weights": True, "quant": "int8"},
            CapacityError,
            ("does not fit", "attn4-experts4"),
        ),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_read(arguments, error, words):
    with pytest.raises(error) as caught:
        jmoe.load(**arguments)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_bad_tokenizer_is_found_before_weights_are_read(tmp_path, monkeypatch):
    for file in EMBEDDED_MODEL.iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).symlink_to(file)
    monkeypatch.setattr("jmoe.loading.find.read_parameters", None)
    with pytest.raises(jmoe.CheckpointError, match=r"tokenizer\.json is missing"):
        jmoe.load(tmp_path)


def test_an_orbax_checkpoint_is_a_model_like_any_other(shape, tmp_path):
    llm = jmoe.load(shape, random_weights=True, dtype="bfloat16")
    llm.save_checkpoint(tmp_path / "saved")
    again = jmoe.load(tmp_path / "saved", dtype="bfloat16")
    assert again.tokenizer.encode("a") == llm.tokenizer.encode("a")
    before, after = (model.engine.logits([5, 6, 7, 8]) for model in (llm, again))
    np.testing.assert_array_equal(after, before)

    quantized = jmoe.load(tmp_path / "saved", quant="experts=4g32", method="rtn")
    with pytest.raises(RequestError, match="only plain weights"):
        quantized.save_checkpoint(tmp_path / "other")
