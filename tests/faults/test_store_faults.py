"""Damaged and foreign stores: refused before anything is allocated, one typed error each."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from jmoe.errors import CheckpointError, ConfigError, JmoeError
from jmoe.quant.spec import parse_spec
from jmoe.store.converted_model import ConvertedModel
from jmoe.store.safetensors_file import read_header
from tests.store.small_stores import edit_manifest, write_manifest, write_store, write_tensors

_QUANT = "attn4-experts4"
_EXPERTS = "experts-00001.safetensors"
_SHARED = "shared.safetensors"

Damage = Callable[[Path], object]


class Fault(NamedTuple):
    """A way to damage a store, and words that its error must hold."""

    damage: Damage
    words: tuple[str, ...]
    error: type[JmoeError] = CheckpointError


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stores") / "store"
    write_store(directory, _QUANT)
    return directory


@pytest.fixture
def store(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "store"))


def _manifest(**changes: Any) -> Damage:
    return lambda directory: edit_manifest(directory, lambda raw: raw.update(changes))


def _without(key: str) -> Damage:
    return lambda directory: edit_manifest(directory, lambda raw: raw.pop(key))


def _files(change: Callable[[dict[str, Any]], object]) -> Damage:
    return lambda directory: edit_manifest(directory, lambda raw: change(raw["files"]))


def _write(name: str, contents: bytes) -> Damage:
    return lambda directory: (directory / name).write_bytes(contents)


def _cut(name: str) -> Damage:
    return lambda directory: os.truncate(directory / name, (directory / name).stat().st_size - 10)


def _append(name: str) -> Damage:
    def apply(directory: Path) -> None:
        with open(directory / name, "ab") as file:
            file.write(b"more")

    return apply


def _edit_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_bytes()) | changes
    (directory / "config.json").write_text(json.dumps(config))


def _flip(name: str) -> Damage:
    """Changes one byte, the last; which no size tells."""

    def apply(directory: Path) -> None:
        contents = bytearray((directory / name).read_bytes())
        contents[-1] ^= 1
        (directory / name).write_bytes(contents)

    return apply


def _read(path: Path) -> dict[str, np.ndarray]:
    dtypes = {"U8": np.uint8, "BF16": np.dtype("bfloat16"), "F32": np.float32}
    contents = path.read_bytes()
    return {
        name: np.frombuffer(contents[info.offset :][: info.num_bytes], dtypes[info.dtype]).reshape(
            info.shape
        )
        for name, info in read_header(path).items()
        if not name.startswith("_padding")
    }


def _rewrite(name: str, change: Callable[[dict[str, np.ndarray]], object], **layout: Any) -> Damage:
    """Writes a file anew with other tensors, and a manifest that knows of it."""

    def apply(directory: Path) -> None:
        tensors = _read(directory / name)
        change(tensors)
        write_tensors(directory / name, tensors, **layout)
        write_manifest(directory, parse_spec(_QUANT).to_json())

    return apply


def _replace(name: str, tensor: str, change: Callable[[np.ndarray], np.ndarray]) -> Damage:
    return _rewrite(name, lambda tensors: tensors.update({tensor: change(tensors[tensor])}))


def _requantize(text: str) -> Damage:
    return _manifest(quant=parse_spec(text).to_json())


def _other_model(**changes: Any) -> Damage:
    """Puts another model's configuration into the store, and a manifest that knows of it."""

    def apply(directory: Path) -> None:
        _edit_config(directory, **changes)
        write_manifest(directory, parse_spec(_QUANT).to_json())

    return apply


def _nothing(tensors: dict[str, np.ndarray]) -> None:
    pass


def _shift(tensors: dict[str, np.ndarray]) -> None:
    """Lets all tensors begin four bytes later."""
    rest = dict(tensors)
    tensors.clear()
    tensors.update({"_padding": np.zeros(4, np.uint8)} | rest)


_DAMAGED = "manifest.json is damaged"

FAULTS: dict[str, Fault] = {
    # The manifest itself.
    "not_json": Fault(_write("manifest.json", b"{"), ("manifest.json is not JSON", "convert")),
    "not_an_object": Fault(_write("manifest.json", b"[]"), ("must hold a JSON object", "list")),
    "not_utf8": Fault(_write("manifest.json", b'{"\xff": 1}'), ("manifest.json is not JSON",)),
    "of_another_program": Fault(
        _write("manifest.json", b'{"manifest_version": 3, "name": "an extension"}'),
        ("not that of a converted store", "got: no format", "expected: jmoe-store"),
    ),
    "other_format": Fault(_manifest(format="mlx"), ("not that of a converted store", "got: mlx")),
    "newer_version": Fault(
        _manifest(format_version=2), ("newer format version", "got: 2", "expected: 1", "update")
    ),
    "former_version": Fault(_manifest(format_version=0), ("former format version", "convert")),
    "version_text": Fault(_manifest(format_version="1"), (_DAMAGED, "format_version", "malformed")),
    "version_true": Fault(_manifest(format_version=True), (_DAMAGED, "format_version")),
    "no_version": Fault(_without("format_version"), (_DAMAGED, "format_version is missing")),
    "no_quant": Fault(_without("quant"), (_DAMAGED, "quant is missing")),
    "no_method": Fault(_without("method"), (_DAMAGED, "method is missing")),
    "no_source": Fault(_without("source"), (_DAMAGED, "source is missing")),
    "no_config_hash": Fault(_without("config_sha256"), (_DAMAGED, "config_sha256 is missing")),
    "no_files": Fault(_without("files"), (_DAMAGED, "files is missing")),
    "unknown_method": Fault(_manifest(method="gptq"), (_DAMAGED, "method is malformed", "gptq")),
    "unknown_bits": Fault(
        _manifest(quant={"experts": "5g64"}), ("a quantization that jmoe does not know", "5g64")
    ),
    "unknown_component": Fault(
        _manifest(quant={"router": "4g64"}), ("a quantization that jmoe does not know", "router")
    ),
    "quant_text": Fault(_manifest(quant="int4"), (_DAMAGED, "quant is malformed", "int4")),
    "source_text": Fault(_manifest(source="a model"), (_DAMAGED, "source is malformed")),
    "short_hash": Fault(_manifest(config_sha256="abc"), (_DAMAGED, "config_sha256 is malformed")),
    "files_list": Fault(_manifest(files=[_SHARED]), (_DAMAGED, "files is malformed")),
    "file_without_size": Fault(
        _files(lambda files: files[_SHARED].pop("bytes")), (_DAMAGED, f"files, {_SHARED}")
    ),
    "file_of_negative_size": Fault(
        _files(lambda files: files[_SHARED].update(bytes=-1)), (_DAMAGED, f"files, {_SHARED}")
    ),
    "file_without_hash": Fault(
        _files(lambda files: files[_SHARED].update(sha256=None)), (_DAMAGED, f"files, {_SHARED}")
    ),
    "file_outside": Fault(
        _files(lambda files: files.update({"../x": files[_SHARED]})),
        ("not a file of a store", "../x", "trust"),
    ),
    # Files unlike the manifest.
    "layer_not_listed": Fault(
        _files(lambda files: files.pop(_EXPERTS)),
        ("does not list the files of a store of 2 layers", f"no {_EXPERTS}"),
    ),
    "foreign_file_listed": Fault(
        _files(lambda files: files.update({"experts-00002.safetensors": files[_EXPERTS]})),
        ("does not list the files of a store of 2 layers", "experts-00002.safetensors"),
    ),
    "layer_missing": Fault(
        lambda directory: (directory / _EXPERTS).unlink(),
        (f"{_EXPERTS} is missing, which manifest.json lists", "copy the whole directory"),
    ),
    "layer_renamed": Fault(
        lambda directory: (directory / _EXPERTS).rename(directory / "experts-1.safetensors"),
        (f"{_EXPERTS} is missing",),
    ),
    "layer_truncated": Fault(_cut(_EXPERTS), (f"{_EXPERTS} is truncated", "as manifest.json says")),
    "layer_empty": Fault(_write(_EXPERTS, b""), (f"{_EXPERTS} is truncated", "0 bytes")),
    "shared_truncated": Fault(_cut(_SHARED), (f"{_SHARED} is truncated",)),
    "shared_longer": Fault(_append(_SHARED), (f"{_SHARED} is longer than it was",)),
    "config_changed": Fault(
        lambda directory: _edit_config(directory, rope_theta=1e6),
        ("config.json was changed after the conversion", "sha256", "put the former"),
    ),
    "config_changed_in_layers": Fault(
        lambda directory: _edit_config(directory, num_hidden_layers=3),
        ("config.json was changed after the conversion",),
    ),
    "config_missing": Fault(
        lambda directory: (directory / "config.json").unlink(),
        ("config.json is missing",),
        ConfigError,
    ),
    "config_not_json": Fault(_write("config.json", b"{"), ("config.json is not",), ConfigError),
    "config_of_another_family": Fault(
        _other_model(model_type="gpt2"), ("model_type", "gpt2"), ConfigError
    ),
    # Contents unlike configuration and formats.
    "more_layers_in_config": Fault(
        _other_model(num_hidden_layers=3),
        ("does not list the files of a store of 3 layers", "no experts-00002.safetensors"),
    ),
    "more_experts_in_config": Fault(
        _other_model(num_local_experts=8), ("does not hold the experts of a layer", "U8 [8, ")
    ),
    "other_width_in_config": Fault(
        _other_model(intermediate_size=256), ("does not hold the experts of a layer",)
    ),
    "group_that_does_not_divide": Fault(
        _requantize("attention=4g64,experts=4g128"),
        ("formats of manifest.json do not fit its config.json", "groups of 128 in rows of 64"),
    ),
    "experts_of_other_bits": Fault(
        _requantize("attn4-experts3"), ("does not hold the experts of a layer", "blobs: U8 [4, ")
    ),
    "attention_of_other_bits": Fault(
        _requantize("attn3-experts4"), (_SHARED, "of another shape", "q_proj.codes")
    ),
    "attention_of_other_kind": Fault(
        _requantize("attention=4g64s,experts=4g64"),
        (_SHARED, "that the model does not have", "q_proj.zeros"),
    ),
    "attention_dense": Fault(
        _requantize("experts=4g64"), (_SHARED, "8 tensors missing", "layers.0.attention.k_proj")
    ),
    "embeddings_of_other_type": Fault(
        _requantize("attention=4g64,experts=4g64,embeddings=f32"),
        (_SHARED, "1 tensor of another type", "embed_tokens: BF16 instead of F32"),
    ),
    "blobs_of_other_size": Fault(
        _replace(_EXPERTS, "blobs", lambda blobs: blobs[:, :-64]),
        ("does not hold the experts of a layer", "got: blobs: U8 [4, ", "expected: blobs: U8 [4, "),
    ),
    "blobs_of_other_type": Fault(
        _replace(_EXPERTS, "blobs", lambda blobs: blobs.view(np.float32)),
        ("does not hold the experts of a layer", "got: blobs: F32"),
    ),
    "blobs_under_another_name": Fault(
        _rewrite(_EXPERTS, lambda tensors: tensors.update(experts=tensors.pop("blobs"))),
        ("does not hold the experts of a layer", "got: experts: U8"),
    ),
    "experts_file_of_nothing": Fault(
        _rewrite(_EXPERTS, dict.clear), ("does not hold the experts of a layer", "no tensors")
    ),
    "experts_file_of_more": Fault(
        _rewrite(_EXPERTS, lambda tensors: tensors.update(more=np.zeros(1, np.uint8))),
        ("does not hold the experts of a layer", "more: U8 [1]"),
    ),
    "tensor_missing": Fault(
        _rewrite(_SHARED, lambda tensors: tensors.pop("final_norm.scale")),
        (_SHARED, "1 tensor missing: final_norm.scale"),
    ),
    "tensor_extra": Fault(
        _rewrite(_SHARED, lambda tensors: tensors.update(bias=np.zeros(1, np.uint8))),
        (_SHARED, "1 tensor that the model does not have: bias"),
    ),
    "tensor_of_other_shape": Fault(
        _replace(_SHARED, "layers.1.router", np.transpose),
        (_SHARED, "layers.1.router: [64, 4] instead of [4, 64]"),
    ),
    "tensor_of_other_type": Fault(
        _replace(_SHARED, "layers.0.attention.q_proj.nested", lambda a: a.astype(np.uint8)),
        (_SHARED, "q_proj.nested: U8 instead of F32"),
    ),
    "norm_of_codes": Fault(
        _replace(_SHARED, "final_norm.scale", lambda a: a.astype(np.uint8)),
        (_SHARED, "final_norm.scale: U8 instead of BF16 or F16 or F32"),
    ),
    "data_section_not_aligned": Fault(
        _rewrite(_EXPERTS, _nothing, alignment=64), ("blobs is not aligned", "multiple of 4096")
    ),
    "tensor_not_aligned": Fault(
        _rewrite(_SHARED, _shift, padding=False),
        ("is not aligned in shared.safetensors", "a multiple of 64"),
    ),
    "header_damaged": Fault(
        lambda directory: _overwrite_header(directory / _EXPERTS), ("not valid JSON",)
    ),
    # Interrupted conversions.
    "journal_instead_of_manifest": Fault(
        lambda directory: (directory / "manifest.json").rename(directory / "progress.json"),
        ("the conversion of this model was interrupted", "--resume"),
    ),
    "no_manifest": Fault(
        lambda directory: (directory / "manifest.json").unlink(), ("manifest.json is missing",)
    ),
}


def _overwrite_header(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(8)
        file.write(b"[[[[")


@pytest.mark.parametrize("name", FAULTS)
def test_a_damaged_store_is_one_error(name: str, store: Path):
    fault = FAULTS[name]
    fault.damage(store)
    with pytest.raises(fault.error) as caught:
        ConvertedModel.open(store)
    for word in fault.words:
        assert word in str(caught.value)
    assert caught.value.do is not None or name == "config_of_another_family"


def test_the_store_is_sound(store: Path):
    ConvertedModel.open(store, verify=True)


@pytest.mark.parametrize("name", [_EXPERTS, _SHARED])
def test_changed_contents_show_when_they_are_verified(name: str, store: Path):
    _flip(name)(store)
    ConvertedModel.open(store)
    with pytest.raises(CheckpointError, match=f"{name} does not hold what") as caught:
        ConvertedModel.open(store, verify=True)
    assert "as manifest.json says" in str(caught.value)


def test_the_directory_of_a_conversion_is_not_a_model(store: Path):
    partial = store.rename(store.with_name("store.partial"))
    with pytest.raises(CheckpointError, match="interrupted"):
        ConvertedModel.open(partial)


@pytest.mark.parametrize("kind", ["mmap", "ram"])
def test_a_file_that_is_cut_after_it_was_opened(kind: str, store: Path):
    model = ConvertedModel.open(store)
    _cut(_EXPERTS)(store)
    with pytest.raises(CheckpointError, match=f"{_EXPERTS} became shorter"):
        model.open_experts(kind)


def test_shared_parameters_that_are_cut_after_they_were_opened(store: Path):
    model = ConvertedModel.open(store)
    experts = model.open_experts("mmap")
    os.truncate(store / _SHARED, 5000)
    with pytest.raises(CheckpointError, match=f"{_SHARED} became shorter"):
        list(model.parameters(experts, "float32"))
