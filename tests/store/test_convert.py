"""Conversion: what a store holds, byte by byte, and what a resumed one owes to the first run."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from jmoe.errors import CheckpointError, RequestError
from jmoe.models.decoder import abstract_parameters
from jmoe.quant.layout import ExpertLayout
from jmoe.quant.spec import PRESETS, QuantSpec, parse_spec
from jmoe.store import convert as convert_module
from jmoe.store.convert import Conversion, ConversionReport
from jmoe.store.converted_model import ConvertedModel
from jmoe.store.partial import PartialDirectory, partial_path
from jmoe.store.quantize import quantized_parameters
from jmoe.store.safetensors_file import read_header
from jmoe.store.source import CheckpointSource, RandomSource
from tests.faults.checkpoints import TINY_MIXTRAL
from tests.models.configs import mixtral_json
from tests.scripts.processes import run_script
from tests.store import conversion_memory

_QUANT = PRESETS["attn4-experts4"]


def _source(**changes: Any) -> RandomSource:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 65}
    return RandomSource(mixtral_json(**(sizes | changes)), "small")


def _convert(
    output: Path, quant: QuantSpec = _QUANT, *, resume: bool = False, **changes: Any
) -> ConversionReport:
    return Conversion(_source(**changes), output, quant, method="rtn", resume=resume).run()


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# What a store holds.


def test_the_embedded_model_becomes_a_store(tmp_path: Path):
    source = CheckpointSource(TINY_MIXTRAL)
    report = Conversion(source, tmp_path / "out", _QUANT, method="hqq").run()
    assert report.input_bytes == source.total_bytes
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        *(f"experts-{layer:05}.safetensors" for layer in range(12)),
        "shared.safetensors",
        "config.json",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "manifest.json",
    }
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert report.output_bytes == sum(sizes.values()) - sizes["manifest.json"]
    assert not partial_path(tmp_path / "out").exists()
    model = ConvertedModel.open(tmp_path / "out", verify=True)
    assert (model.quant, model.method) == (_QUANT, "hqq")
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (TINY_MIXTRAL / name).read_bytes()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "quant", ["attn4-experts4", "attn3-experts3", "int8", "bf16", "embeddings=8g32,experts=4g16f"]
)
def test_a_store_holds_what_quantizing_on_the_way_gives(quant: str, tied: bool, tmp_path: Path):
    spec, source = parse_spec(quant), _source(tie_word_embeddings=tied)
    Conversion(source, tmp_path / "out", spec, method="rtn").run()
    model = ConvertedModel.open(tmp_path / "out", verify=True)
    store = model.open_experts("mmap")
    paths = abstract_parameters(source.config, "float32", spec)
    expected = quantized_parameters(source, "float32", spec, "rtn")
    read = model.parameters(store, "float32")
    for path, a, b in zip(paths, read, expected, strict=True):
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8), path)
    store.close()


def test_files_are_safetensors_with_data_and_tensors_aligned(tmp_path: Path):
    source = _source(hidden_size=80, intermediate_size=112)  # norms of 160 bytes
    spec = parse_spec("attention=4g16,experts=4g16,head=8g16")
    Conversion(source, tmp_path / "out", spec, method="rtn").run()
    layout = ExpertLayout.of(80, 112, spec)
    for path in (tmp_path / "out").glob("*.safetensors"):
        tensors = read_header(path)
        assert min(info.offset for info in tensors.values()) % 4096 == 0
        for name, info in tensors.items():
            assert info.offset % 64 == 0 or name.startswith("_padding")
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            if path.name.startswith("experts"):
                assert names == ["blobs"]
                assert file.get_tensor("blobs").shape == (4, layout.num_bytes)
        if path.name == "shared.safetensors":
            padding = {name for name in names if name.startswith("_padding")}
            paths = abstract_parameters(source.config, "bfloat16", spec)
            assert padding
            assert set(names) - padding == {p for p in paths if not p.endswith(".blobs")}


def test_the_manifest_has_the_hashes_and_neither_times_nor_paths(tmp_path: Path):
    _convert(tmp_path / "out")
    contents = _contents(tmp_path / "out")
    manifest = json.loads(contents.pop("manifest.json"))
    assert manifest["files"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in contents.items()
    }
    assert manifest["config_sha256"] == hashlib.sha256(contents["config.json"]).hexdigest()
    assert str(tmp_path) not in json.dumps(manifest)
    assert json.loads(contents["config.json"]) == _source().config_json


def test_two_conversions_are_equal(tmp_path: Path):
    for name in ("first", "second"):
        _convert(tmp_path / name)
    assert _contents(tmp_path / "first") == _contents(tmp_path / "second")


def test_the_size_is_known_before(tmp_path: Path):
    for quant in ("attn4-experts2", "bf16", "int8"):
        conversion = Conversion(_source(), tmp_path / quant, PRESETS[quant], method="rtn")
        assert not list(tmp_path.glob(f"{quant}*")), "nothing is written before run"
        conversion.run()
        sizes = [path.stat().st_size for path in (tmp_path / quant).glob("*.safetensors")]
        assert conversion.output_bytes == sum(sizes)


def test_progress_adds_up_to_all_bytes(tmp_path: Path):
    steps: list[int] = []
    Conversion(_source(), tmp_path / "out", _QUANT, method="rtn").run(steps.append)
    assert sum(steps) == _source().total_bytes
    assert len(steps) > 24  # matrix by matrix


# Interruption and resumption. That of killed processes is in tests/faults.


class _Stop(BaseException):
    """As a Ctrl-C: not an error of the conversion."""


def _interrupt_after(num_files: int, monkeypatch: pytest.MonkeyPatch) -> None:
    add = PartialDirectory.add

    def stop(self: PartialDirectory, name: str, entry: Any) -> None:
        add(self, name, entry)
        if len(self.finished) == num_files:
            raise _Stop

    monkeypatch.setattr(PartialDirectory, "add", stop)


def _interrupted(
    output: Path, num_files: int, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> None:
    with monkeypatch.context() as patch:
        _interrupt_after(num_files, patch)
        with pytest.raises(_Stop):
            _convert(output, **changes)
    assert not output.exists()


def test_a_resumed_conversion_is_equal_and_keeps_what_is_finished(tmp_path: Path, monkeypatch):
    _convert(tmp_path / "whole", num_hidden_layers=4)
    for num_files in (1, 3, 4, 5):
        output = tmp_path / str(num_files)
        _interrupted(output, num_files, monkeypatch, num_hidden_layers=4)
        first = partial_path(output) / "experts-00000.safetensors"
        inode = first.stat().st_ino
        steps: list[int] = []
        source = _source(num_hidden_layers=4)
        conversion = Conversion(source, output, _QUANT, method="rtn", resume=True)
        report = conversion.run(steps.append)
        assert report.resumed_files >= num_files
        assert report.input_bytes < source.total_bytes
        assert abs(sum(steps) - source.total_bytes) < 8
        assert (output / first.name).stat().st_ino == inode
        assert _contents(output) == _contents(tmp_path / "whole")
        assert not partial_path(output).exists()


def test_resuming_where_nothing_was_left_converts(tmp_path: Path):
    report = _convert(tmp_path / "out", resume=True)
    assert report.resumed_files == 0
    partial_path(tmp_path / "more").mkdir()  # killed before the journal was written
    _convert(tmp_path / "more", resume=True)
    assert _contents(tmp_path / "more") == _contents(tmp_path / "out")


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_finished_files_that_were_damaged_are_made_again(damage, tmp_path: Path, monkeypatch):
    _convert(tmp_path / "whole")
    _interrupted(tmp_path / "out", 2, monkeypatch)
    file = partial_path(tmp_path / "out") / "experts-00000.safetensors"
    contents = bytearray(file.read_bytes())
    contents[-100] ^= 1
    changed = {"flip": contents, "cut": contents[:-1], "remove": None}[damage]
    file.unlink()
    if changed is not None:
        file.write_bytes(changed)
    assert _convert(tmp_path / "out", resume=True).resumed_files == 1
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")


@pytest.mark.parametrize("step", ["unlink", "rename"])
def test_stopped_between_the_manifest_and_the_name_it_is_still_resumable(
    step: str, tmp_path: Path, monkeypatch
):
    _convert(tmp_path / "whole")

    def stop(*args: Any, **kwargs: Any) -> None:
        raise _Stop

    target: Any = os if step == "rename" else Path
    with monkeypatch.context() as patch:
        patch.setattr(target, step, stop)
        with pytest.raises(_Stop):
            _convert(tmp_path / "out")
    partial = partial_path(tmp_path / "out")
    assert (partial / "manifest.json").exists()
    assert (partial / "progress.json").exists() == (step == "unlink")
    with pytest.raises(CheckpointError, match="--resume"):
        ConvertedModel.open(partial)
    assert _convert(tmp_path / "out", resume=True).resumed_files == 3
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda o: _convert(o, PRESETS["attn3-experts4"], resume=True), ["quant", "3g64"]),
        (
            lambda o: Conversion(_source(), o, _QUANT, method="hqq", resume=True).run(),
            ["method", "hqq", "rtn"],
        ),
        (lambda o: _convert(o, resume=True, num_hidden_layers=3), ["source"]),
        (
            lambda o: Conversion(
                RandomSource(_source().config_json, "small", seed=1),
                o,
                _QUANT,
                method="rtn",
                resume=True,
            ).run(),
            ["source"],
        ),
    ],
    ids=["quant", "method", "layers", "seed"],
)
def test_another_conversion_is_not_resumed(
    change: Callable[[Path], object], words: list[str], tmp_path: Path, monkeypatch
):
    _interrupted(tmp_path / "out", 1, monkeypatch)
    before = _contents(partial_path(tmp_path / "out"))
    with pytest.raises(RequestError, match=f"its {words[0]} differs") as caught:
        change(tmp_path / "out")
    assert all(word in str(caught.value) for word in words)
    assert _contents(partial_path(tmp_path / "out")) == before


def test_a_failure_before_the_first_file_leaves_nothing(tmp_path: Path):
    source = _source()

    def read(path: str, expert: int | None = None) -> np.ndarray:
        w = RandomSource.read(source, path, expert)
        return w * np.nan if path.endswith("experts.w1") else w

    source.read = read  # type: ignore[method-assign]
    conversion = Conversion(source, tmp_path / "out", _QUANT, method="rtn")
    with pytest.raises(CheckpointError, match=r"NaN or infinity in layers\.0\.experts\.w1"):
        conversion.run()
    assert conversion.kept is None
    assert list(tmp_path.iterdir()) == []


# Memory, and the script.


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("quant", ["attn4-experts4", "bf16"])
def test_peak_of_a_conversion_is_below_a_layer(quant: str):
    figures = conversion_memory.measure(quant)
    needed_bytes = figures["peak_bytes"] - figures["baseline_bytes"]
    assert needed_bytes < figures["layer_bytes"]
    assert figures["layer_bytes"] < 0.3 * figures["model_bytes"]


def test_the_script_prints_sizes_in_its_last_line(tmp_path: Path):
    flags = ("--model=mixtral-8x7b", f"--output={tmp_path}/absent/out", "--random_weights")
    assert run_script("convert.py", *flags).returncode == 2
    flags = (f"--model={TINY_MIXTRAL}", "--method=rtn", "--quant=int8")
    result = run_script("convert.py", *flags, f"--output={tmp_path}/text")
    assert result.returncode == 0, result.stderr
    assert result.stderr == b"", "a progress bar without a terminal"
    last = result.stdout.decode().splitlines()[-1]
    pattern = r"0\.032 GiB in, 0\.0\d\d GiB out, \d+\.\d s, \d+\.\d\d GB/s"
    assert re.fullmatch(pattern, last), last

    result = run_script("convert.py", *flags, f"--output={tmp_path}/json", "--output_format=json")
    summary = json.loads(result.stdout)
    assert summary["input_bytes"] == 33863040
    assert summary["quant"] == "int8"
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "json").iterdir()}
    assert summary["output_bytes"] == sum(sizes.values()) - sizes["manifest.json"]
    assert _contents(tmp_path / "text") == _contents(tmp_path / "json")


def test_the_writer_is_one_piece_behind(tmp_path: Path, monkeypatch):
    """At most two blobs wait: memory does not grow when the disk is slow."""
    alive: list[int] = []
    submit = convert_module._Writer._submit

    def count(self: Any, task: Any, *args: Any) -> None:
        submit(self, task, *args)
        alive.append(len(self._pending))

    monkeypatch.setattr(convert_module._Writer, "_submit", count)
    _convert(tmp_path / "out")
    assert max(alive) <= 2
