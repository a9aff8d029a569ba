"""check.py: what it prints where, and what it exits with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jmoe.errors import CheckpointError, ConfigError
from jmoe.store import finite, verify
from jmoe.store.checkpoint import Checkpoint
from jmoe.store.finite import NonFinite
from tests.faults.checkpoints import (
    DIRECTORY_FAULTS,
    FIRST_SHARD,
    TINY_MIXTRAL,
    link_model,
    replace,
)

_ROOT = Path(__file__).parents[2]


def _check(*flags: str, platforms: str = "cpu", **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "scripts/check.py", *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(_ROOT), "JAX_PLATFORMS": platforms} | environ,
        cwd=_ROOT,
    )


def _break_first_tensor(directory: Path) -> str:
    """Writes one NaN and two infinities into a copy of the first shard."""
    info = Checkpoint.open(directory).tensors["model.embed_tokens.weight"]
    contents = bytearray(info.file.read_bytes())
    values = np.array([np.nan, np.inf, -np.inf], ml_dtypes.bfloat16)
    contents[info.offset : info.offset + values.nbytes] = values.tobytes()
    replace(directory / FIRST_SHARD, bytes(contents))
    return info.name


def test_without_a_model_the_machine_is_described():
    result = _check()
    assert result.returncode == 0, result.stderr
    labels = [line.split("  ")[0] for line in result.stdout.splitlines() if line[0] != " "]
    assert labels == ["versions", "platform", "host", "device", "cuda", "host kernels"]


def test_whether_there_are_host_kernels_is_said():
    result = _check("--output=json", JMOE_NATIVE="0")
    kernels = json.loads(result.stdout)["machine"]["host_kernels"]
    assert kernels["available"] is False
    assert kernels["isa"] is None
    assert "switched off by JMOE_NATIVE=0" in kernels["reason"]
    assert "host kernels    not available (switched off" in _check(JMOE_NATIVE="0").stdout


@pytest.mark.parametrize("platforms", ["rocm", "nonsense"])
def test_a_machine_without_the_wanted_devices_is_described_too(platforms: str):
    result = _check(platforms=platforms)
    assert result.returncode == 0, result.stderr
    assert "devices         none: " in result.stdout
    assert platforms in result.stdout


def test_a_sound_model():
    result = _check(f"--model={TINY_MIXTRAL}", "--deep")
    assert result.returncode == 0, result.stderr
    assert "16,931,520 parameters" in result.stdout
    assert "375 BF16, in 5 files" in result.stdout
    assert "all finite" in result.stdout
    assert result.stderr == ""


def test_json_is_one_object():
    result = _check(f"--model={TINY_MIXTRAL}", "--output=json")
    report = json.loads(result.stdout)
    assert report["model"] == {
        "directory": str(TINY_MIXTRAL),
        "family": "mixtral",
        "num_shards": 5,
        "num_tensors": 375,
        "num_parameters": 16931520,
        "total_bytes": 33863040,
        "dtypes": {"BF16": 375},
        "non_finite": None,
    }
    assert report["machine"]["versions"]["python"]
    assert report["machine"]["host_memory_bytes"] > report["machine"]["available_host_bytes"] > 0


def test_nan_and_infinity_are_counted_and_are_a_failure(tmp_path: Path):
    name = _break_first_tensor(link_model(tmp_path))
    result = _check(f"--model={tmp_path}", "--deep", "--output=json")
    assert result.returncode == 2
    assert json.loads(result.stdout)["model"]["non_finite"] == {name: {"num_nan": 1, "num_inf": 2}}
    assert "error: tensors that hold NaN or infinity: 1" in result.stderr
    result = _check(f"--model={tmp_path}")
    assert result.returncode == 0
    assert "not read (add --deep)" in result.stdout


def test_a_damaged_model_is_one_error_without_a_traceback(tmp_path: Path):
    DIRECTORY_FAULTS["shard_is_lfs_pointer"].damage(link_model(tmp_path))
    result = _check(f"--model={tmp_path}")
    assert result.returncode == 2
    assert "host kernels" in result.stdout
    assert result.stderr.startswith(f"error: {FIRST_SHARD} is a Git LFS pointer")
    assert "Traceback" not in result.stderr


def test_bad_flag():
    result = _check("--depe")
    assert result.returncode == 2
    assert "error:" in result.stderr


# What the script rests on.


def test_configuration_of_another_shape_is_told_from_the_weights(tmp_path: Path):
    config = json.loads((TINY_MIXTRAL / "config.json").read_bytes())
    link_model(tmp_path)
    replace(tmp_path / "config.json", json.dumps(config | {"num_hidden_layers": 13}).encode())
    with pytest.raises(CheckpointError, match="31 tensors missing") as caught:
        verify.verify_directory(tmp_path)
    assert "model.layers.12." in str(caught.value)


def test_configuration_missing(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        verify.verify_directory(tmp_path)


def test_progress_ends_at_all_bytes():
    steps = []
    verify.find_non_finite(Checkpoint.open(TINY_MIXTRAL), lambda *step: steps.append(step))
    assert steps == sorted(steps)
    assert steps[-1] == (33863040, 33863040)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_non_finite_values_of_every_type(dtype, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(finite, "_CHUNK_ELEMENTS", 4)
    finfo = ml_dtypes.finfo(dtype)
    values = [finfo.max, finfo.min, finfo.tiny, -0.0, np.nan, -np.nan, np.inf, -np.inf, -np.inf]
    sound = np.array(values[:4], dtype)
    save_file(
        {
            "bad": np.array(values, dtype),
            "sound": sound,
            "scalar": np.array(np.inf, dtype),
            "empty": np.zeros((0, 2), dtype),
            "codes": np.full(4, -1, np.int64),
        },
        tmp_path / "model.safetensors",
    )
    assert verify.find_non_finite(Checkpoint.open(tmp_path)) == {
        "bad": NonFinite(num_nan=2, num_inf=3),
        "scalar": NonFinite(num_nan=0, num_inf=1),
    }
