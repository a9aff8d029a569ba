"""Which peers there are, what they need, and whether that is there."""

import dataclasses
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from _peers import q4_0
from _peers.process import PeerProcess, worker_command
from jmoe.errors import RequestError
from jmoe.models import families
from jmoe.planning import memory, sizes
from jmoe.quant.spec import parse_spec
from jmoe.store.known_models import read_shape

OURS = "jmoe"
OTHERS = ("llama.cpp", "transformers")

_PROCESS_BYTES = 3 * 2**28  # a Python with libraries, and working memory
_SPARE_DISK_BYTES = 2**28
_MIN_VOCABULARY = 512


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is compared: the flags of compare_peers.py.

    Raises RequestError if they contradict each other.
    """

    model: str
    loading: dict[str, Any]  # of jmoe.load
    prompt_tokens: int
    new_tokens: int
    threads: int
    peers: tuple[str, ...]
    llama_cpp_python: str | None
    cache_dir: str

    def __post_init__(self):
        if unknown := sorted(set(self.peers) - set(OTHERS)):
            raise RequestError(
                "--peers names what is not known", got=unknown[0], expected=" or ".join(OTHERS)
            )
        if not self.loading["random_weights"]:
            raise RequestError("peers are compared on random weights", got="--norandom_weights")
        raw = self.config_json()
        limit = families.config_from_json(raw, self.model).max_position_embeddings
        if raw.get("model_type") != "mixtral" or raw["vocab_size"] < _MIN_VOCABULARY:
            raise RequestError(
                "peers are compared on Mixtral's architecture",
                where=self.model,
                got=f"{raw.get('model_type')} with {raw.get('vocab_size')} tokens",
                expected=f"mixtral with at least {_MIN_VOCABULARY}",
            )
        if self.num_positions > limit:
            raise RequestError(
                "prompt and new tokens are longer than the model's context",
                got=f"{self.num_positions} tokens",
                expected=f"at most {limit}",
                do="lower --prompt_tokens or --new_tokens",
            )

    @property
    def num_positions(self) -> int:
        return self.prompt_tokens + self.new_tokens + 1

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def config_json(self) -> dict[str, Any]:
        return read_shape(self.model, self.loading["num_layers"])


class Candidate(NamedTuple):
    """A peer that can run here.

    Attributes:
      name: of the peer.
      command: starts its worker.
      settings: what that loads.
      num_bytes: of memory that it needs, about.
    """

    name: str
    command: list[str]
    settings: dict[str, Any]
    num_bytes: int

    def start(self) -> PeerProcess:
        return PeerProcess(self.name, self.command, self.settings)


def find(comparison: Comparison) -> tuple[list[Candidate], dict[str, str]]:
    """Those that can run, jmoe first; and of the others why not.

    Raises:
      JmoeError: jmoe cannot, or the Python that was named for llama.cpp has none.
    """
    found, skipped = [_jmoe(comparison)], {}
    available = memory.available_host_bytes()
    finders = {"llama.cpp": _llama_cpp, "transformers": _transformers}
    for name in comparison.peers:
        candidate = finders[name](comparison)
        if isinstance(candidate, Candidate) and candidate.num_bytes > available:
            candidate = (
                f"needs about {candidate.num_bytes / 2**30:.1f} GiB of memory, "
                f"of which {available / 2**30:.1f} are available"
            )
        if isinstance(candidate, Candidate):
            found.append(candidate)
        else:
            skipped[name] = candidate
    return found, skipped


def fit_together(candidates: list[Candidate]) -> bool:
    """Whether all can be loaded at once."""
    return sum(candidate.num_bytes for candidate in candidates) < memory.available_host_bytes()


def _jmoe(comparison: Comparison) -> Candidate:
    loading: dict[str, Any] = comparison.loading | {"threads": comparison.threads}
    config = families.config_from_json(comparison.config_json(), comparison.model)
    quant = None if loading["quant"] is None else parse_spec(loading["quant"])
    # What is not quantized is little, and in float32 at the most.
    dtype = "bfloat16" if quant is None and loading["dtype"] != "float32" else "float32"
    num_bytes = sizes.total(sizes.weight_sizes(config, dtype, quant)).num_bytes
    settings = {
        "model": comparison.model,
        "loading": loading,
        "threads": comparison.threads,
    }
    return Candidate(OURS, worker_command("jmoe_worker"), settings, num_bytes + 2 * _PROCESS_BYTES)


def _transformers(comparison: Comparison) -> Candidate | str:
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        return f"{' and '.join(missing)} not installed here"
    raw = comparison.config_json()
    config = families.config_from_json(raw, comparison.model)
    num_bytes = sizes.total(sizes.weight_sizes(config, "bfloat16")).num_bytes
    settings = {"config": raw, "threads": comparison.threads}
    command = worker_command("transformers_worker")
    return Candidate("transformers", command, settings, num_bytes + _PROCESS_BYTES)


def _llama_cpp(comparison: Comparison) -> Candidate | str:
    python = comparison.llama_cpp_python or sys.executable
    problem = _import_problem(python)
    if problem is not None and comparison.llama_cpp_python is not None:
        raise RequestError(
            "--llama_cpp_python is no Python with llama-cpp-python and gguf",
            where=python,
            got=problem,
            do="pip install llama-cpp-python gguf",
        )
    if problem is not None:
        return "not installed here; --llama_cpp_python names a Python that has it"
    raw = comparison.config_json()
    file = _gguf_file(raw, Path(comparison.cache_dir), Path(comparison.model).stem)
    if isinstance(file, str):
        return file
    settings = {
        "config": raw,
        "file": str(file),
        "threads": comparison.threads,
        "num_positions": -(-comparison.num_positions // 256) * 256,
    }
    num_bytes = q4_0.total_bytes(raw) + _PROCESS_BYTES
    command = worker_command("llama_cpp_worker", python)
    return Candidate("llama.cpp", command, settings, num_bytes)


def _import_problem(python: str) -> str | None:
    """Why a Python cannot import what the worker of llama.cpp needs; None if it can."""
    if python == sys.executable:
        missing = [name for name in ("llama_cpp", "gguf") if not importlib.util.find_spec(name)]
        return f"no module {missing[0]}" if missing else None
    try:
        result = subprocess.run(
            [python, "-c", "import gguf, llama_cpp"], capture_output=True, text=True, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return result.stderr.strip().splitlines()[-1] if result.returncode else None


def _gguf_file(raw: dict[str, Any], directory: Path, name: str) -> Path | str:
    """Where the file of a shape is or will be; or why it cannot be there."""
    digest = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()[:12]
    file = directory / f"{name}-{raw['num_hidden_layers']}-layers-q4_0-{digest}.gguf"
    if file.exists():
        return file
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"--cache_dir={directory} cannot be made: {error.strerror}"
    free = shutil.disk_usage(directory).free
    needed = q4_0.total_bytes(raw) + _SPARE_DISK_BYTES
    if free < needed:
        return (
            f"no room for its file in --cache_dir={directory}: {needed / 2**30:.1f} GiB needed, "
            f"{free / 2**30:.1f} free"
        )
    return file
