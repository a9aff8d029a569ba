"""The planner's sizes against what conversion writes, and would write."""

from pathlib import Path

import pytest
from safetensors import safe_open

from jmoe.planning import sizes
from jmoe.quant.spec import PRESETS, parse_spec
from jmoe.store import manifest
from jmoe.store.convert import Conversion
from jmoe.store.known_models import read_known_model
from jmoe.store.source import RandomSource
from tests.models.configs import mixtral_json
from tests.planning.test_sizes import PAPER_GIB


def written_sizes(store: Path) -> dict[sizes.Component, int]:
    """Bytes of the tensors in a store's files, by component."""
    written = dict.fromkeys(sizes.COMPONENTS, 0)
    for file in store.glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            for path in tensors.keys():  # noqa: SIM118  (not a dict)
                if path == manifest.BLOBS_NAME:
                    written["experts"] += tensors.get_tensor(path).nbytes
                elif not path.startswith(manifest.PADDING_PREFIX):
                    written[sizes._component(path)] += tensors.get_tensor(path).nbytes
    return written


@pytest.mark.parametrize(
    "quant", ["attn4-experts3", "attn2-experts16", "int8", "f32", "embeddings=8g16,head=f32"]
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_converted_store_has_the_size_that_was_planned(quant: str, tied: bool, tmp_path: Path):
    # Three experts of odd widths: parts of a blob and tensors that need padding.
    config_json = mixtral_json(
        hidden_size=64, intermediate_size=320, num_local_experts=3, tie_word_embeddings=tied
    )
    source, spec = RandomSource(config_json, "a test"), parse_spec(quant)
    Conversion(source, tmp_path / "store", spec, method="rtn").run()
    planned = sizes.stored_sizes(source.config, spec, "bfloat16")
    assert written_sizes(tmp_path / "store") == {
        name: size.num_bytes for name, size in planned.items()
    }


@pytest.mark.parametrize("preset", PAPER_GIB)
def test_converting_mixtral_8x7b_would_write_what_is_planned(preset, tmp_path, monkeypatch):
    monkeypatch.setattr(Conversion, "_check_space", lambda self: None)
    source = RandomSource(read_known_model("mixtral-8x7b"), "mixtral-8x7b")
    conversion = Conversion(source, tmp_path / "store", PRESETS[preset], method="rtn")
    planned = sizes.total(sizes.stored_sizes(source.config, PRESETS[preset])).num_bytes
    # Headers: a page for each of 32 files of experts, and one of many tensors.
    assert 0 <= conversion.output_bytes - planned <= 64 * 4096
