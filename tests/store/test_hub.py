"""The hub: paths never reach it, names ask it for exactly the files that are read."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from jmoe.errors import CheckpointError
from jmoe.store import hub
from tests.faults.checkpoints import FIRST_SHARD, INDEX_NAME, TINY_MIXTRAL, link_model, write_index

_COMMIT = "0123456789abcdef0123456789abcdef01234567"
_SETTINGS = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
]
_SHARDS = [f"model-0000{n}-of-00005.safetensors" for n in range(1, 6)]


# Paths.


@pytest.mark.parametrize(
    "name",
    ["/absent", "./absent", "../absent", "~/absent", "a/b/c", "absent/", "org/name/", "a\\b"],
)
def test_what_looks_like_a_path_is_one(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "_download", None)
    with pytest.raises(CheckpointError, match="there is no directory"):
        hub.resolve(name)


def test_path_objects_are_paths(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "_download", None)
    with pytest.raises(CheckpointError, match="there is no directory org/name"):
        hub.resolve(Path("org/name"))


def test_what_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "_download", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("org/name").mkdir(parents=True)
    Path("file").touch()
    assert hub.resolve("org/name") == Path("org/name")
    assert hub.resolve("~/org") == tmp_path / "org"
    with pytest.raises(CheckpointError, match="file is a file"):
        hub.resolve("file")


def test_home_of_nobody():
    with pytest.raises(CheckpointError, match="there is no directory ~nobody-of-this-name"):
        hub.resolve("~nobody-of-this-name/model")


def test_revision_of_a_directory_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="only for a model on the hub"):
        hub.resolve(tmp_path, revision="main")


@pytest.mark.parametrize("name", ["", "a b", "name-", "org/na--me", "x..y", "é/x", "a\0b", "x.git"])
def test_what_is_neither_path_nor_name(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "_download", None)
    with pytest.raises(CheckpointError, match="neither a directory nor a possible name"):
        hub.resolve(name)


def _run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    guard = (
        "import socket, sys\n"
        "def refuse(*args, **kwargs): raise AssertionError('a socket was opened')\n"
        "socket.socket.__init__ = refuse\n"
        "socket.getaddrinfo = refuse\n"
        "from jmoe.errors import CheckpointError\n"
        "from jmoe.store import hub\n"
    )
    return subprocess.run(
        [sys.executable, "-c", guard + code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        cwd=Path(__file__).parents[2],
    )


def test_a_path_opens_no_socket_and_does_not_import_the_hub():
    result = _run(
        f"print(hub.resolve({str(TINY_MIXTRAL)!r}))\n"
        "try: hub.resolve('./absent')\n"
        "except CheckpointError: print('refused')\n"
        "assert 'huggingface_hub' not in sys.modules\n"
    )
    assert result.stdout.split() == [str(TINY_MIXTRAL), "refused"], result.stderr


# The cache, without network.


def _fill_cache(cache: Path) -> Path:
    """Lays out what huggingface_hub would have downloaded."""
    repo = cache / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(_COMMIT)
    return link_model(repo / "snapshots" / _COMMIT)


def _resolve_offline(cache: Path, name: str = "org/name") -> str:
    result = _run(
        f"try: print(hub.resolve({name!r}))\nexcept CheckpointError as error: print(error)\n",
        HF_HUB_CACHE=str(cache),
        HF_HUB_OFFLINE="1",
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_a_cached_model_is_found_offline(tmp_path: Path):
    snapshot = _fill_cache(tmp_path)
    assert _resolve_offline(tmp_path) == str(snapshot)


def test_a_cached_model_of_one_file_is_found_offline(tmp_path: Path):
    snapshot = _fill_cache(tmp_path)
    (snapshot / INDEX_NAME).unlink()
    (snapshot / "model.safetensors").touch()
    assert _resolve_offline(tmp_path) == str(snapshot)


def test_a_partly_cached_model_offline(tmp_path: Path):
    (_fill_cache(tmp_path) / FIRST_SHARD).unlink()
    message = _resolve_offline(tmp_path)
    assert f"{FIRST_SHARD} missing" in message
    assert "HF_HUB_OFFLINE" in message


def test_a_model_that_is_not_cached_offline(tmp_path: Path):
    message = _resolve_offline(tmp_path, "org/other")
    assert message.startswith("org/other is not (wholly) in the cache, and HF_HUB_OFFLINE is set")
    assert "no directory of this name either" in message
    assert "do: unset HF_HUB_OFFLINE" in message


# On line, with a hub that is not there.


class _Hub:
    """Stands in for huggingface_hub, and notes what it is asked for."""

    def __init__(self, snapshot: Path, files: list[str]):
        self.snapshot, self.files = snapshot, files
        self.asked: list[tuple[object, str]] = []

    def hf_hub_download(self, repo_id: str, file: str, *, revision: str) -> str:
        self.asked.append((file, revision))
        if file not in self.files:
            raise errors.EntryNotFoundError(f"no {file}")
        return str(self.snapshot / file)

    def snapshot_download(self, repo_id: str, *, revision: str, allow_patterns: list[str]) -> str:
        self.asked.append((allow_patterns, revision))
        return str(self.snapshot)


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    return link_model(tmp_path / _COMMIT)


def _patch(monkeypatch: pytest.MonkeyPatch, snapshot: Path, files: list[str]) -> _Hub:
    fake = _Hub(snapshot, files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def test_only_the_files_that_are_read_are_asked_for(monkeypatch, snapshot: Path):
    fake = _patch(monkeypatch, snapshot, [*_SETTINGS, INDEX_NAME, "consolidated.safetensors"])
    assert hub.resolve("org/name", revision="v1") == snapshot
    assert fake.asked == [
        ("config.json", "v1"),
        (INDEX_NAME, _COMMIT),
        ([*_SETTINGS, INDEX_NAME, *_SHARDS], _COMMIT),
    ]


def test_the_configuration_alone(monkeypatch, snapshot: Path):
    fake = _patch(monkeypatch, snapshot, [*_SETTINGS, INDEX_NAME])
    assert hub.resolve("org/name", config_only=True) == snapshot
    assert fake.asked == [("config.json", "main")]


def test_a_model_without_an_index_is_one_file(monkeypatch, snapshot: Path):
    (snapshot / "model.safetensors").touch()
    fake = _patch(monkeypatch, snapshot, _SETTINGS)
    assert hub.resolve("name") == snapshot
    assert fake.asked[0] == ("config.json", "main")
    assert fake.asked[-1] == ([*_SETTINGS, "model.safetensors"], _COMMIT)


def test_a_model_without_safetensors(monkeypatch, snapshot: Path):
    _patch(monkeypatch, snapshot, _SETTINGS)
    with pytest.raises(CheckpointError, match="use a model with safetensors weights"):
        hub.resolve("org/name")


def test_a_hostile_index_downloads_nothing(monkeypatch, snapshot: Path):
    write_index(snapshot, {"w": "*.safetensors"})
    fake = _patch(monkeypatch, snapshot, [*_SETTINGS, INDEX_NAME])
    with pytest.raises(CheckpointError, match="not a plain file name"):
        hub.resolve("org/name")
    assert len(fake.asked) == 2


def _http(kind: type[errors.HfHubHTTPError], message: str = "no") -> Exception:
    response = SimpleNamespace(headers={}, request=None, status_code=400)
    return kind(message, response=response)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (_http(errors.GatedRepoError), ("gated", "accept its licence", "org/name", "HF_TOKEN")),
        (_http(errors.RepositoryNotFoundError), ("no model org/name", "spelling")),
        (_http(errors.RevisionNotFoundError), ("no revision v9", "branch, tag or commit")),
        (errors.LocalEntryNotFoundError("x"), ("hub cannot be reached", "check the network")),
        (_http(errors.RemoteEntryNotFoundError), ("org/name has no config.json",)),
        (_http(errors.HfHubHTTPError, "502 Bad Gateway\nmore"), ("502 Bad Gateway", "run again")),
        (OSError(errno.ENOSPC, "No space left on device"), ("No space left", "free space")),
        (PermissionError(errno.EACCES, "Permission denied"), ("Permission denied", "writable")),
        (RuntimeError("data transfer failed"), ("could not be downloaded", "transfer failed")),
        (ValueError(), ("could not be downloaded", "ValueError: no message")),
    ],
)
def test_every_failure_becomes_one_error(error: Exception, words: tuple[str, ...], monkeypatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError) as caught:
        hub.resolve("org/name", revision="v9")
    assert "there is no directory of this name either" in str(caught.value)
    assert caught.value.do
    for word in words:
        assert word in str(caught.value)


def test_the_list_of_files_is_that_of_the_embedded_model():
    weight_map = json.loads((TINY_MIXTRAL / INDEX_NAME).read_bytes())["weight_map"]
    assert sorted(set(weight_map.values())) == _SHARDS
