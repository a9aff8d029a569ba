"""Conversions that cannot be, or are stopped: one typed error each, no output that is half done."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from jmoe.errors import CapacityError, CheckpointError, ConfigError, JmoeError, RequestError
from jmoe.models import families
from jmoe.quant.spec import PRESETS, parse_spec
from jmoe.store import safetensors_writer
from jmoe.store.convert import Conversion
from jmoe.store.open_source import open_source
from jmoe.store.partial import partial_path
from jmoe.store.source import CheckpointSource, RandomSource
from tests.faults.checkpoints import TINY_MIXTRAL, link_model
from tests.models.configs import mixtral_json
from tests.scripts.processes import ROOT, assert_one_error, command, environment, run_script

_QUANT = PRESETS["attn4-experts4"]
_CONFIG = mixtral_json(hidden_size=64, intermediate_size=128)


def _conversion(output: Path, source: Any = None, **options: Any) -> Conversion:
    options = {"method": "rtn"} | options
    return Conversion(source or RandomSource(_CONFIG, "small"), output, _QUANT, **options)


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# Refused before any work.


def _refused(tmp_path: Path, output: Path, **options: Any) -> JmoeError:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(JmoeError) as caught:
        _conversion(output, **options)
    assert sorted(tmp_path.rglob("*")) == before
    return caught.value


@pytest.mark.parametrize("kind", ["directory", "file", "link to nowhere"])
def test_an_output_that_exists_is_refused(kind: str, tmp_path: Path):
    output = tmp_path / "out"
    match kind:
        case "directory":
            output.mkdir()
        case "file":
            output.touch()
        case _:
            output.symlink_to(tmp_path / "nowhere")
    error = _refused(tmp_path, output)
    assert isinstance(error, RequestError)
    assert "exists already" in str(error)


def test_an_output_without_a_parent_is_refused(tmp_path: Path):
    assert "no directory to put" in str(_refused(tmp_path, tmp_path / "absent" / "out"))
    (tmp_path / "file").touch()
    assert "no directory to put" in str(_refused(tmp_path, tmp_path / "file" / "out"))


@pytest.mark.parametrize("place", ["inside", "deep inside", "around", "through a link"])
def test_output_and_input_inside_each_other_are_refused(place: str, tmp_path: Path):
    model = link_model(tmp_path / "outer" / "model")
    (model / "sub").mkdir()
    (tmp_path / "link").symlink_to(model)
    output = {
        "inside": model / "out",
        "deep inside": model / "sub" / "out",
        "around": tmp_path / "link" / "sub" / ".." / "out",
        "through a link": tmp_path / "link" / "out",
    }[place]
    error = _refused(tmp_path, output, source=CheckpointSource(model))
    assert "inside each other" in str(error)
    # Beside each other is fine, whatever the names have in common.
    _conversion(tmp_path / "outer" / "model-4bit", CheckpointSource(model))


def test_a_group_size_that_does_not_divide_is_refused(tmp_path: Path):
    source = RandomSource(_CONFIG, "small")
    for quant in ("experts=4g128", "attention=4g256", "experts=4g64,experts_down=4g256"):
        with pytest.raises(ConfigError, match="does not divide"):
            Conversion(source, tmp_path / "out", parse_spec(quant), method="rtn")
    with pytest.raises(ConfigError, match="unknown quantization method"):
        Conversion(source, tmp_path / "out", _QUANT, method="gptq")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_refused_before(tmp_path: Path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    error = _refused(tmp_path, tmp_path / "out")
    assert isinstance(error, CapacityError)
    assert "does not fit on the disk" in str(error)


def test_a_read_only_parent_is_refused(tmp_path: Path):
    parent = tmp_path / "parent"
    parent.mkdir()
    parent.chmod(0o555)
    if os.access(parent, os.W_OK):
        pytest.skip("this user may write everywhere")
    assert "read-only" in str(_refused(tmp_path, parent / "out"))


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_directory_that_cannot_be_made_is_one_error(code: int, tmp_path: Path, monkeypatch):
    def fail(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    conversion = _conversion(tmp_path / "out")
    monkeypatch.setattr(os, "mkdir", fail)
    with pytest.raises(RequestError, match="cannot be written"):
        conversion.run()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--output=out"], ["--model is missing"]),
        ([f"--model={TINY_MIXTRAL}"], ["--output is missing"]),
        (["--model=absent/model/", "--output=out"], ["absent/model"]),
        (["--model=mixtral-8x7b", "--output=out"], ["add --random_weights"]),
        ([f"--model={TINY_MIXTRAL}", "--output=out", "--quant=attn5"], ["unknown quantization"]),
        ([f"--model={TINY_MIXTRAL}", "--output=out", "--quant=experts=4g256"], ["does not divide"]),
        ([f"--model={TINY_MIXTRAL}", f"--output={TINY_MIXTRAL}/out"], ["inside each other"]),
        ([f"--model={TINY_MIXTRAL}", "--output=.", "--method=rtn"], ["exists already"]),
        ([f"--model={TINY_MIXTRAL}", "--output=out", "--method=best"], ["method"]),
        ([f"--model={TINY_MIXTRAL}", "--output=out", "--num_layers=2"], ["--random_weights"]),
    ],
    ids=lambda value: value[-1][-24:],
)
def test_a_bad_request_ends_the_script_with_2(flags, words, tmp_path: Path):
    assert_one_error(run_script("convert.py", *flags, cwd=tmp_path), *words)
    assert not list(tmp_path.iterdir())


# Weights.


def test_a_checkpoint_with_nan_is_refused_by_the_name_of_the_tensor(tmp_path: Path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(_CONFIG))
    shapes, _ = families.tensor_shapes(families.config_from_json(_CONFIG, model))
    tensors = {name: np.ones(shape, np.float16) for name, shape in shapes.items()}
    tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"][63, 127] = np.inf
    save_file(tensors, model / "model.safetensors")
    conversion = _conversion(tmp_path / "out", open_source(model))
    with pytest.raises(CheckpointError, match=r"layers\.1\.experts\.w2, expert 3"):
        conversion.run()
    assert not (tmp_path / "out").exists()
    assert conversion.kept == partial_path(tmp_path / "out")


def test_weights_that_become_unreadable_are_one_error(tmp_path: Path):
    model = link_model(tmp_path / "model")
    conversion = _conversion(tmp_path / "out", CheckpointSource(model))
    (model / "model-00003-of-00005.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        conversion.run()
    assert not (tmp_path / "out").exists()


# The disk is full.


def _fail_after(num_writes: int, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write, count = safetensors_writer.NewFile.write, iter(range(10**6))

    def fail(self: Any, contents: Any) -> None:
        if next(count) >= num_writes:
            raise OSError(code, os.strerror(code))
        write(self, contents)

    monkeypatch.setattr(safetensors_writer.NewFile, "write", fail)


@pytest.mark.parametrize("num_writes", [0, 1, 2, 6, 7, 8, 20, 33, 34, 35])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_is_an_error_that_says_how_to_go_on(
    code: int, num_writes: int, tmp_path: Path, monkeypatch
):
    _conversion(tmp_path / "whole").run()
    with monkeypatch.context() as patch:
        _fail_after(num_writes, code, patch)
        with pytest.raises(CapacityError, match="the disk is full") as caught:
            _conversion(tmp_path / "out").run()
    assert "--resume" in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.tmp")), "what was half written still takes space"
    _conversion(tmp_path / "out", resume=True).run()
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")


def test_other_failures_of_the_disk_are_one_error(tmp_path: Path, monkeypatch):
    _fail_after(5, errno.EIO, monkeypatch)
    with pytest.raises(RequestError, match="cannot be written") as caught:
        _conversion(tmp_path / "out").run()
    assert os.strerror(errno.EIO) in str(caught.value)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of one MiB."""
    mountpoint = tmp_path / "disk"
    mountpoint.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mountpoint)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("this user may not mount")
    yield mountpoint
    subprocess.run(["umount", str(mountpoint)], check=True)


def test_a_small_disk_is_refused_before_and_survived_after(
    small_disk: Path, tmp_path: Path, monkeypatch
):
    output = small_disk / "out"
    source = RandomSource(_CONFIG | {"num_hidden_layers": 24}, "small")
    with pytest.raises(CapacityError, match="does not fit on the disk"):
        _conversion(output, source)
    assert not list(small_disk.iterdir())
    # Somebody else fills it meanwhile.
    monkeypatch.setattr(Conversion, "_check_space", lambda self: None)
    with pytest.raises(CapacityError, match="the disk is full") as caught:
        _conversion(output, source).run()
    assert "--resume" in str(caught.value)
    assert [path.name for path in small_disk.iterdir()] == ["out.partial"]
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    report = _conversion(output, source, resume=True).run()
    assert report.resumed_files > 5
    _conversion(tmp_path / "whole", source).run()
    assert _contents(output) == _contents(tmp_path / "whole")


# Two at once, and interruptions.


def test_an_interrupted_conversion_is_not_overwritten(tmp_path: Path):
    partial_path(tmp_path / "out").mkdir()
    with pytest.raises(RequestError, match="an interrupted conversion is in the way") as caught:
        _conversion(tmp_path / "out").run()
    assert "--resume" in str(caught.value)


def test_a_damaged_journal_is_one_error(tmp_path: Path):
    partial = partial_path(tmp_path / "out")
    partial.mkdir()
    for contents in (b"{", b"[]", b"{}", b'{"files": {"a": 1}}'):
        (partial / "progress.json").write_bytes(contents)
        with pytest.raises(CheckpointError, match=r"progress\.json"):
            _conversion(tmp_path / "out", resume=True).run()
        assert (partial / "progress.json").read_bytes() == contents


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path: Path):
    output = tmp_path / "out"
    conversion = _conversion(output)

    def make(num_bytes: int) -> None:
        output.mkdir(exist_ok=True)

    with pytest.raises(RequestError, match="exists already"):
        conversion.run(make)
    assert list(output.iterdir()) == []
    assert conversion.kept == partial_path(output)
    output.rmdir()
    assert _conversion(output, resume=True).run().resumed_files == 3


def _start(*flags: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command("convert.py", *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        cwd=ROOT,
    )


def _wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def slow_model(tmp_path: Path) -> Path:
    """A shape that takes long to convert."""
    (tmp_path / "slow").mkdir()
    config = _CONFIG | {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 200}
    (tmp_path / "slow" / "config.json").write_text(json.dumps(config))
    return tmp_path / "slow"


def test_a_second_process_to_one_place_is_refused_and_ctrl_c_keeps_what_is_finished(
    slow_model: Path, tmp_path: Path
):
    output = tmp_path / "out"
    flags = (f"--model={slow_model}", "--random_weights", f"--output={output}", "--method=rtn")
    first = _start(*flags)
    try:
        _wait_for(partial_path(output) / "experts-00000.safetensors", first)
        for more in ([], ["--resume"]):
            assert_one_error(run_script("convert.py", *flags, *more), "another process")
        first.send_signal(signal.SIGINT)
        stdout, stderr = first.communicate(timeout=60)
    finally:
        first.kill()
    assert first.returncode == 130, stderr
    assert stdout == b""
    assert b"Traceback" not in stderr
    assert b"kept in" in stderr and b"--resume" in stderr
    assert not output.exists()
    assert (partial_path(output) / "progress.json").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    assert_one_error(run_script("convert.py", *flags), "an interrupted conversion", "--resume")


def test_killed_at_any_moment_the_output_is_absent_or_complete():
    """And what is resumed is equal to what is not interrupted: see kill_conversions."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.faults.kill_conversions", "--kills=30"],
        capture_output=True,
        env=environment(),
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr.decode()
    figures = json.loads(result.stdout)
    assert figures["kills"] == 30
    assert len(set(figures["files_left_behind"])) > 3, "the moments are not all alike"
