"""Hardware files: presets, files that the user names, and the one that is kept for a machine."""

import dataclasses
import json
from pathlib import Path

import pytest

from jmoe.errors import ConfigError
from jmoe.planning import hardware_files
from jmoe.planning.hardware_files import (
    cache_directory,
    cache_path,
    load_cached,
    load_preset,
    preset_names,
    read_named,
    read_spec,
    save_cached,
)
from jmoe.quant.layout import ExpertLayout
from jmoe.quant.spec import PRESETS
from tests.planning.hardware import small_spec

ROOT = Path(__file__).parents[2]
MIXTRAL = 4096, 14336
HERE = small_spec().fingerprint


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_machines_that_say_where_their_numbers_come_from(name: str):
    spec = load_preset(name)
    assert spec.fingerprint == "" and spec.platform == "gpu"
    assert "assum" in spec.source and len(spec.source) > 200
    for quant in ("bf16", "int4"):
        layout = ExpertLayout.of(*MIXTRAL, PRESETS[quant])
        times = spec.experts_of(layout, activation_bits=8, dtype="bfloat16")
        assert times is not None
        # Copies are slower than computing on the device, and the host is slower than the device.
        copy_s = spec.to_device(layout.num_bytes)
        assert times.device(1) < copy_s and times.device(64) < times.host(64)
        # No host reads an expert faster than its memory.
        assert times.host(1) >= 0.98 * layout.num_bytes / spec.host_bytes_per_s


def test_what_people_plan_for_is_there():
    names = {"rtx6000-xeon6126", "rtx6000ada-xeon8480", "t4-colab", "rtx4090-ddr5", "h100-sxm"}
    assert names <= set(preset_names())


def test_fiddlers_rule_follows_from_its_constants():
    spec = load_preset("rtx6000-xeon6126")
    layout = ExpertLayout.of(*MIXTRAL, PRESETS["bf16"])
    times = spec.experts_of(layout, activation_bits=0, dtype="bfloat16")
    assert times is not None
    copy_s = spec.to_device(layout.num_bytes)
    assert times.host(1) == pytest.approx(7e-3)
    assert copy_s + times.device(1) == pytest.approx(70e-3)
    assert times.tokens_worth_copying(copy_s) == 10  # the CPU below


def test_presets_are_in_the_wheel():
    text = (ROOT / "pyproject.toml").read_text()
    assert '"configs/hardware" = "jmoe/configs/hardware"' in text


def test_presets_are_found_in_an_installed_package(tmp_path: Path, monkeypatch):
    (tmp_path / "mine.json").write_text(json.dumps(small_spec().to_json()))
    installed, source = hardware_files._DIRECTORIES
    assert installed.parts[-3:] == ("jmoe", "configs", "hardware")
    monkeypatch.setattr(hardware_files, "_DIRECTORIES", (tmp_path, source / "not here"))
    assert preset_names() == ("mine",)
    assert load_preset("mine") == small_spec()


def test_a_kept_machine_is_found_again(tmp_path: Path):
    directory = tmp_path / "not" / "there" / "yet"
    assert load_cached(HERE, directory) == (None, None)
    assert save_cached(small_spec(), directory) is None
    assert load_cached(HERE, directory) == (small_spec(), None)
    assert list(directory.iterdir()) == [cache_path(HERE, directory)]
    newer = small_spec(spread=0.5)
    assert save_cached(newer, directory) is None  # replaces
    assert load_cached(HERE, directory) == (newer, None)
    assert load_cached("another machine", directory) == (None, None)


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ("", ["not JSON"]),
        (json.dumps(small_spec().to_json())[:-300], ["not JSON"]),
        ("[]", ["JSON object"]),
        (json.dumps(small_spec().to_json() | {"version": 0}), ["another version", "0"]),
        (json.dumps(small_spec().to_json() | {"num_cores": -1}), ["num_cores", "-1"]),
        (
            json.dumps(small_spec(fingerprint="jax 0.1").to_json()),
            ["another machine", "jax 0.1"],
        ),
    ],
    ids=["empty", "cut short", "list", "version", "nonsense", "foreign"],
)
def test_what_is_damaged_stale_or_foreign_is_ignored_and_said(contents, words, tmp_path: Path):
    path = cache_path(HERE, tmp_path)
    path.write_text(contents)
    spec, problem = load_cached(HERE, tmp_path)
    assert spec is None and problem is not None and "\n" not in problem
    for word in ("ignored", str(path), *words):
        assert word in problem
    assert save_cached(small_spec(), tmp_path) is None
    assert load_cached(HERE, tmp_path) == (small_spec(), None)


def test_a_directory_in_the_files_place_is_not_fatal(tmp_path: Path):
    cache_path(HERE, tmp_path).mkdir()
    spec, problem = load_cached(HERE, tmp_path)
    assert spec is None and problem is not None
    assert save_cached(small_spec(), tmp_path) is not None


def test_where_nothing_can_be_written_that_is_said(tmp_path: Path):
    (tmp_path / "file").write_text("")
    problem = save_cached(small_spec(), tmp_path / "file" / "directory")
    assert problem is not None and problem.startswith("calibration not kept: ")


def test_a_named_file_is_used_or_refused(tmp_path: Path):
    path = tmp_path / "machine.json"
    path.write_text(hardware_files.to_text(small_spec()))
    assert read_named(str(path)) == read_named(str(path), HERE) == small_spec()
    with pytest.raises(ConfigError, match="another machine") as caught:
        read_named(str(path), "this one")
    assert caught.value.got == HERE and caught.value.expected == "this one"
    of_any = dataclasses.replace(small_spec(), fingerprint="")
    path.write_text(hardware_files.to_text(of_any))
    assert read_named(str(path), "this one") == of_any
    path.write_text("{}")
    with pytest.raises(ConfigError, match="another version") as caught:
        read_named(str(path))
    assert caught.value.where == path
    assert read_named("h100-sxm", HERE) == load_preset("h100-sxm")
    for name in ("h200", "", "../models/mixtral-8x7b", str(tmp_path / "nothing.json")):
        with pytest.raises(ConfigError, match="no hardware of this name"):
            read_named(name)
    with pytest.raises(ConfigError):
        read_spec(tmp_path)


def test_measurements_lie_where_the_user_keeps_such_things(monkeypatch):
    assert cache_directory({"JMOE_CACHE_DIR": "here", "XDG_CACHE_HOME": "/x"}) == Path("here")
    assert cache_directory({"XDG_CACHE_HOME": "/x"}) == Path("/x/jmoe")
    monkeypatch.setenv("HOME", "/home/someone")
    for environ in ({}, {"XDG_CACHE_HOME": ""}, {"XDG_CACHE_HOME": "relative"}):
        assert cache_directory(environ) == Path("/home/someone/.cache/jmoe")
    monkeypatch.setenv("HOME", "~")
    assert cache_directory({}).is_absolute()
