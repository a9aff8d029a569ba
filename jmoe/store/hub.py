"""From what the user calls a model to a directory on this disk, through the hub if need be.

A path never touches the network. A name such as ``mistralai/Mixtral-8x7B-v0.1`` is looked up in
huggingface_hub's cache and downloaded into it; its settings (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE)
apply. Only the files that jmoe reads are asked for: repositories hold further copies of the same
weights, as large again.
"""

import errno
import os
import re
from pathlib import Path

from jmoe.errors import CheckpointError
from jmoe.store.checkpoint import INDEX_NAME, SINGLE_NAME, read_weight_map, require_directory
from jmoe.store.safetensors_file import first_few, printable

_SMALL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
)
# The rules of huggingface_hub.utils.validate_repo_id, whose import takes a second.
_REPO_ID = re.compile(r"(\b[\w\-.]{1,96}\b/)?\b[\w\-.]{1,96}\b", re.ASCII)


def resolve(
    path_or_id: str | os.PathLike[str], *, revision: str | None = None, config_only: bool = False
) -> Path:
    """Finds the directory of a model, and downloads the model if it has none.

    Args:
      path_or_id: a directory, or the id of a model on the hub. Whatever exists on this disk or
        looks like a path is a path, and so is every object that is not a string.
      revision: branch, tag or commit of a model on the hub; main by default.
      config_only: of a model on the hub ask for config.json alone.

    Returns:
      An existing directory. Its contents are not validated here.

    Raises:
      CheckpointError: no such directory, no such model, no access to it, no network and not in
        the cache, no space on the disk; or a revision of a directory.
    """
    name = os.fspath(path_or_id)
    if not isinstance(path_or_id, str) or _is_path(name):
        path = _expand(name)
        require_directory(path)
        if revision is not None:
            raise CheckpointError(
                "a revision can be chosen only for a model on the hub",
                where=path,
                got=f"revision {printable(revision)}",
                do="leave the revision out",
            )
        return path
    if not _REPO_ID.fullmatch(name) or "--" in name or ".." in name or name.endswith(".git"):
        raise CheckpointError(
            f"{printable(name)!r} is neither a directory nor a possible name on the hub",
            do="name a model directory, or a model on the hub like mistralai/Mixtral-8x7B-v0.1",
        )
    try:
        return _download(name, revision or "main", config_only)
    except CheckpointError:
        raise
    # Its errors include those of whichever HTTP client the installed version uses.
    except Exception as error:
        raise _explain(name, revision, error) from error


def _is_path(name: str) -> bool:
    return (
        os.path.exists(name)
        or name.startswith(("/", ".", "~"))
        or name.endswith("/")
        or "\\" in name
        or name.count("/") > 1
    )


def _expand(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~somebody who has no home directory
        return Path(name)


def _download(repo_id: str, revision: str, config_only: bool) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    directory = Path(hf_hub_download(repo_id, "config.json", revision=revision)).parent
    if config_only:
        return directory
    # From here on the commit, so that all files are of one version; a cached one needs no network.
    commit = directory.name
    try:
        hf_hub_download(repo_id, INDEX_NAME, revision=commit)
        weights = [INDEX_NAME, *sorted(set(read_weight_map(directory).values()))]
    except EntryNotFoundError:  # on the hub, or offline in the cache
        weights = [SINGLE_NAME]
    # Exact names: these are patterns, and *.safetensors would match the further copies.
    snapshot_download(repo_id, revision=commit, allow_patterns=[*_SMALL_FILES, *weights])
    absent = [file for file in weights if not (directory / file).exists()]
    if absent:
        raise CheckpointError(
            f"{repo_id} is not wholly in the cache and could not be completed: "
            f"{first_few(absent)} missing",
            where=directory,
            do="use a model with safetensors weights; if it has them, run again with network "
            "access and without HF_HUB_OFFLINE",
        )
    return directory


def _explain(repo_id: str, revision: str | None, error: Exception) -> CheckpointError:
    from huggingface_hub import constants, errors

    page = f"https://huggingface.co/{repo_id}"
    what = f"{repo_id} could not be downloaded"
    do = "check the network connection and run again; finished files are kept"
    match error:
        case errors.GatedRepoError():
            what = f"{repo_id} is a gated model, and you have no access to it"
            do = f"accept its licence on {page}, then set HF_TOKEN or run: hf auth login"
        case errors.RepositoryNotFoundError():
            what = f"there is no model {repo_id} on the hub, or it is private"
            do = "check the spelling; for a private model set HF_TOKEN or run: hf auth login"
        case errors.RevisionNotFoundError():
            what = f"{repo_id} has no revision {printable(revision or 'main')}"
            do = f"choose a branch, tag or commit listed on {page}/tree/main"
        case errors.LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            what = f"{repo_id} is not (wholly) in the cache, and HF_HUB_OFFLINE is set"
            do = "unset HF_HUB_OFFLINE, or download it on a machine with network access"
        case errors.LocalEntryNotFoundError():
            what = f"{repo_id} is not (wholly) in the cache, and the hub cannot be reached"
        case errors.EntryNotFoundError():
            what = f"{repo_id} has no config.json"
            do = "choose a repository in Hugging Face format"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            do = f"free space in {constants.HF_HUB_CACHE}, or set HF_HOME to a larger disk"
        case OSError(errno=errno.EACCES | errno.EPERM | errno.EROFS):
            do = f"make {constants.HF_HUB_CACHE} writable, or set HF_HOME to another directory"
    cause = error.__cause__ or error  # where there is one, it is the error of the network
    message = next(iter(str(cause).strip().splitlines()), "no message")
    return CheckpointError(
        f"{what}; there is no directory of this name either",
        got=f"{type(cause).__name__}: {message}",
        do=do,
    )
