"""check.py on converted stores: what is in them, and whether it still is."""

import json
from pathlib import Path

import pytest

from jmoe.store.verify_store import verify_store
from tests.scripts.processes import run_script
from tests.store.small_stores import write_store


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(tmp_path / "store", "attn4-experts3")
    return tmp_path / "store"


def test_a_sound_store(store: Path):
    result = run_script("check.py", f"--model={store}", "--deep")
    assert result.returncode == 0, result.stderr
    text = " ".join(result.stdout.decode().split())
    assert "attn4-experts3: attention 4g64, experts 3g32, experts_down 4g64" in text
    assert "found by rtn" in text
    assert "experts 2 x 4 of 16,640 bytes, 0.1 MiB" in text
    assert "all right" in text
    assert result.stderr == b""


def test_json(store: Path):
    result = run_script("check.py", f"--model={store}", "--output=json")
    model = json.loads(result.stdout)["model"]
    report = verify_store(store)
    assert model["directory"] == str(store)
    assert model["quant"] == "attn4-experts3"
    assert model["formats"]["experts"] == "3g32"
    assert model["method"] == "rtn"
    assert model["num_parameters"] == report.num_parameters
    assert model["expert_bytes"] == 2 * 4 * model["blob_bytes"]
    assert model["num_files"] == 4
    assert model["total_bytes"] > model["expert_bytes"] + model["shared_bytes"]
    assert model["hashes_verified"] is False


def test_changed_contents_are_found_by_deep_only(store: Path):
    path = store / "experts-00001.safetensors"
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)
    result = run_script("check.py", f"--model={store}")
    assert result.returncode == 0
    assert b"not verified (add --deep)" in result.stdout
    result = run_script("check.py", f"--model={store}", "--deep")
    assert result.returncode == 2
    assert result.stderr.startswith(b"error: experts-00001.safetensors does not hold what")
    assert b"Traceback" not in result.stderr


def test_an_interrupted_conversion(store: Path):
    (store / "manifest.json").rename(store / "progress.json")
    result = run_script("check.py", f"--model={store}")
    assert result.returncode == 2
    assert result.stderr.startswith(b"error: the conversion of this model was interrupted")


def test_progress_of_verifying_ends_at_all_bytes(store: Path):
    steps: list[tuple[int, int]] = []
    report = verify_store(store, deep=True, progress=lambda *step: steps.append(step))
    assert report.hashes_verified
    assert steps == sorted(steps)
    assert steps[-1] == (report.total_bytes, report.total_bytes)
    # Of this small a model the dense embeddings are the better part.
    assert 5 < report.bits_per_parameter < 8
