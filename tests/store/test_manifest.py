"""The manifest of a store: written as it is read, and deterministic."""

import json
from pathlib import Path

import pytest

from jmoe.errors import CheckpointError, ConfigError
from jmoe.quant.spec import parse_spec
from jmoe.store import manifest
from jmoe.store.manifest import FileEntry, Manifest

_HASH = "0123456789abcdef" * 4


def _manifest(quant: str = "attn4-experts3") -> Manifest:
    return Manifest(
        quant=parse_spec(quant),
        method="hqq",
        source={"name": "a model", "kind": "checkpoint"},
        config_sha256=_HASH,
        files={"shared.safetensors": FileEntry(5, _HASH), "config.json": FileEntry(2, _HASH)},
    )


@pytest.mark.parametrize("quant", ["attn4-experts3", "bf16", "embeddings=8g64sf,head=f32"])
def test_what_is_written_is_read(quant: str, tmp_path: Path):
    (tmp_path / "manifest.json").write_bytes(_manifest(quant).to_bytes())
    assert Manifest.read(tmp_path) == _manifest(quant)
    assert Manifest.read(tmp_path).total_bytes == 7


def test_bytes_do_not_depend_on_the_order_in_which_files_were_finished():
    files = dict(list(_manifest().files.items())[::-1])
    other = Manifest(
        quant=parse_spec("attn4-experts3"),
        method="hqq",
        source={"name": "a model", "kind": "checkpoint"},
        config_sha256=_HASH,
        files=files,
    )
    assert other.to_bytes() == _manifest().to_bytes()
    assert other.to_bytes().endswith(b"}\n")


def test_format_and_version_are_in_it():
    raw = json.loads(_manifest().to_bytes())
    assert raw["format"] == "jmoe-store"
    assert raw["format_version"] == 1
    assert raw["quant"]["experts_down"] == "4g64"
    assert raw["files"]["config.json"] == {"bytes": 2, "sha256": _HASH}


def test_a_directory_is_a_store_if_it_has_a_manifest(tmp_path: Path):
    assert not manifest.is_store(tmp_path)
    (tmp_path / "manifest.json").touch()
    assert manifest.is_store(tmp_path)


@pytest.mark.parametrize(
    ("name", "files", "complete"),
    [
        ("model", ["manifest.json"], True),
        ("model", [], True),
        ("model", ["manifest.json", "progress.json"], True),
        ("model", ["progress.json"], False),
        ("model.partial", ["progress.json"], False),
        ("model.partial", ["manifest.json", "progress.json"], False),
        ("model.partial", ["manifest.json"], False),
        # Hugging Face directories may be called anything, and hold anything.
        ("model.partial", ["model.safetensors"], True),
        ("model", ["model.safetensors.index.json", "progress.json"], True),
    ],
)
def test_interrupted_conversions_are_told_from_models(
    name: str, files: list[str], complete: bool, tmp_path: Path
):
    directory = tmp_path / name
    directory.mkdir()
    for file in files:
        (directory / file).touch()
    if complete:
        manifest.require_complete(directory)
    else:
        with pytest.raises(CheckpointError, match="interrupted"):
            manifest.require_complete(directory)


def test_the_quantization_asked_for_is_the_one_in_the_store():
    manifest.check_quant(_manifest(), None)
    manifest.check_quant(_manifest(), "attn4-experts3")
    same = "attention=4g64,experts=3g32,experts_down=4g64"
    manifest.check_quant(_manifest(), same)
    # A format for the down projections may be named or be that of the experts.
    manifest.check_quant(_manifest("experts=4g64"), "experts=4g64,experts_down=4g64")
    with pytest.raises(ConfigError, match="another quantization") as caught:
        manifest.check_quant(_manifest(), "attn4-experts4")
    assert caught.value.got == "attn4-experts3 in the store"
    assert caught.value.expected == "attn4-experts4"
    with pytest.raises(ConfigError, match="unknown quantization"):
        manifest.check_quant(_manifest(), "attn4-experts5")


def test_hashing_tells_how_far_it_is(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(manifest, "_HASH_CHUNK_BYTES", 3)
    (tmp_path / "file").write_bytes(b"12345678")
    pieces = []
    sha256 = manifest.hash_file(tmp_path / "file", pieces.append)
    assert sha256 == "ef797c8118f02dfb649607dd5d3f8c7623048c9c063d532cc95c5ed7a898a64f"
    assert pieces == [3, 3, 2]
