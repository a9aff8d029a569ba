"""Policy: how a model runs on its device, as a small JSON file that can be saved and edited.

What it leaves out, ``plan.make_plan`` chooses; the policy of a Plan leaves nothing out.
"""

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any, Literal, Self, get_args

from jmoe.config import ModelConfig
from jmoe.errors import ConfigError, RequestError
from jmoe.planning.chunks import MAX_CHUNK, MIN_CHUNK
from jmoe.residency.array_cache import RULES, make_pools
from jmoe.residency.eviction import EVICTIONS
from jmoe.residency.experts import MAX_IN_FLIGHT
from jmoe.residency.switching import NUM_COPY_PLACES, NUM_READ_PLACES
from jmoe.store.json_files import json_lines, read_json_object
from jmoe.store.safetensors_writer import write_file

Mode = Literal["resident", "offload", "host"]
MODES: tuple[Mode, ...] = get_args(Mode)

# What becomes of experts that are needed and not on the device.
Misses = Literal["load", "split", "host"]
MISSES: tuple[Misses, ...] = get_args(Misses)
MissesChoice = Literal["auto", "load", "split", "host"]

# How decode steps are taken.
EngineChoice = Literal["auto", "thread", "compiled"]
ENGINES: tuple[EngineChoice, ...] = get_args(EngineChoice)
MAX_TOKENS_PER_CALL = 256
# Of staging, for prompts of an engine whose decode steps are one program.
NUM_PROMPT_PLACES = NUM_COPY_PLACES + NUM_READ_PLACES

VERSION = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Where weights are, and how experts come to the device.

    Attributes:
      mode: "resident": everything on the device, a decode step is one program. "offload": experts
        in host memory, and as many as fit on the device. "host": everything on the CPU.
      slots: experts that stay on the device: in each layer, or over all layers in one pool; None
        is as many as fit, spread evenly.
      num_staging: places that all layers share, for experts that arrive early and for those that
        their layer has no slot for; 0 is chosen by the plan.
      eviction: which expert leaves a full pool, one of ``residency.eviction.EVICTIONS``; None is
        chosen by the plan.
      misses: what becomes of an expert that is needed and not there. "load": it is copied. "split":
        it is copied or computed on the host, so that both end together (``planning.cost``).
        "host": the host computes it, and nothing is copied but what prompts bring. "auto": what
        turns out to be the fastest.
      lookahead: for how many layers ahead experts are prefetched; 0 is none, None is chosen by the
        plan.
      fetch: experts to prefetch per token and layer; 0 is the model's top_k.
      prefill_chunk: longest piece of a prompt in tokens, a power of two; 0 is chosen by the plan.
      engine: what takes decode steps. "thread": the host, layer by layer, with a thread that
        copies. "compiled": one program, that finds and fetches experts itself, with eviction lru
        or lfu and no pool for all layers. "auto": the faster one.
      tokens_per_call: that the compiled engine makes before the host sees them.
      fetch_ahead: experts that the compiled engine fetches for the next layer, behind those that a
        layer needs; lookahead and fetch are the thread's.

    All but the mode is for "offload" only. Raises ConfigError for what no model could use.
    """

    mode: Mode
    slots: tuple[int, ...] | int | None = None
    num_staging: int = 0
    eviction: str | None = None
    misses: MissesChoice = "load"
    lookahead: int | None = None
    fetch: int = 0
    prefill_chunk: int = 0
    engine: EngineChoice = "thread"
    tokens_per_call: int = 1
    fetch_ahead: int = 0

    def __post_init__(self):
        _require(self.mode in MODES, "mode", self.mode, f"one of {', '.join(MODES)}")
        if isinstance(self.slots, tuple):
            fits = bool(self.slots) and all(map(_is_count, self.slots))
        else:
            fits = self.slots is None or _is_count(self.slots)
        expected = "a number of experts, one number for each layer, or null"
        _require(fits, "slots", _plain(self.slots), expected)
        for name in ("num_staging", "lookahead", "fetch", "prefill_chunk", "fetch_ahead"):
            value = getattr(self, name)
            if name == "lookahead" and value is None:
                continue
            _require(_is_count(value), name, value, "a whole number from 0")
        known = get_args(MissesChoice)
        _require(self.misses in known, "misses", self.misses, f"one of {', '.join(known)}")
        known = f"one of {', '.join(EVICTIONS)}"
        fits = self.eviction is None or self.eviction in EVICTIONS
        _require(fits, "eviction", self.eviction, known)
        chunk = self.prefill_chunk
        is_chunk = MIN_CHUNK <= chunk <= MAX_CHUNK and chunk.bit_count() == 1
        expected = f"0, or a power of two from {MIN_CHUNK} to {MAX_CHUNK}"
        _require(chunk == 0 or is_chunk, "prefill_chunk", chunk, expected)
        _require(self.engine in ENGINES, "engine", self.engine, f"one of {', '.join(ENGINES)}")
        tokens, expected = self.tokens_per_call, f"a whole number from 1 to {MAX_TOKENS_PER_CALL}"
        fits = type(tokens) is int and 1 <= tokens <= MAX_TOKENS_PER_CALL
        _require(fits, "tokens_per_call", tokens, expected)
        self._check_engine()
        if self.mode != "offload" and (given := self._given()):
            raise ConfigError(
                f"{given[0]} is for the mode offload",
                got=f"mode {self.mode}",
                do="leave it out, or change the mode",
            )

    def _check_engine(self) -> None:
        """Raises ConfigError for what the compiled engine cannot do, or nobody else."""
        if self.engine == "thread":
            for name in ("tokens_per_call", "fetch_ahead"):
                if name in self._given():
                    raise ConfigError(
                        f"{name} is for decode steps that are one program",
                        got="the engine thread",
                        do="leave it out, or choose the engine compiled or auto",
                    )
            return
        known = f"{' or '.join(RULES)} for the engine {self.engine}"
        fits = self.eviction is None or self.eviction in RULES
        _require(fits, "eviction", self.eviction, known)
        expected = "load, for the engine compiled, whose program computes all experts"
        fits = self.misses == "load" or self.engine == "auto"
        _require(fits, "misses", self.misses, expected)
        expected = f"slots by layer, not one pool, for the engine {self.engine}"
        _require(not isinstance(self.slots, int), "slots", self.slots, expected)

    @property
    def possible_misses(self) -> tuple[Misses, ...]:
        """What may become of missing experts, the first thing to try first."""
        return ("split", "host", "load") if self.misses == "auto" else (self.misses,)

    @property
    def num_slots(self) -> int:
        """Over all layers; not to be asked if that is open."""
        assert self.slots is not None
        return self.slots if isinstance(self.slots, int) else sum(self.slots)

    def check_model(self, config: ModelConfig) -> None:
        """Raises RequestError if the policy is not for a model of this shape."""
        num_layers, num_experts = config.num_hidden_layers, config.router.num_experts
        slots = self.slots
        if isinstance(slots, tuple):
            if len(slots) != num_layers:
                raise _other_model(f"slots for {len(slots)} layers", f"for {num_layers}")
            if max(slots) > num_experts:
                raise _other_model(f"{max(slots)} slots in a layer", f"at most {num_experts}")
        elif slots is not None and slots > num_layers * num_experts:
            raise _other_model(f"{slots} slots", f"at most {num_layers * num_experts}")
        for name in ("fetch", "fetch_ahead"):
            if (value := getattr(self, name)) > num_experts:
                raise _other_model(f"{name} {value}", f"at most {num_experts}")
        if self.num_staging:
            if self.engine == "compiled":
                self._check_slots(config)
                return
            least, pool = least_staging(config), min(slots) if isinstance(slots, tuple) else slots
            if self.num_staging < MAX_IN_FLIGHT or (pool or 0) + self.num_staging < least:
                raise RequestError(
                    "the policy has too few places for the experts of one token",
                    got=f"{self.num_staging} for staging, {pool or 0} slots in the smallest pool",
                    expected=f"{least} together, for {config.router.top_k} experts and "
                    f"{MAX_IN_FLIGHT} copies under way; at least {MAX_IN_FLIGHT} for staging",
                    do="give it more of them, or leave num_staging out",
                )

    def for_thread(self, config: ModelConfig) -> Self:
        """The same places for the engine thread, where no program can hold the experts.

        Some slots become staging, if that is needed for layers without slots.
        """
        assert isinstance(self.slots, tuple)
        slots = list(self.slots)
        missing = max(0, least_staging(config) - self.num_staging)
        for _ in range(missing):
            slots[slots.index(max(slots))] -= 1
        return dataclasses.replace(
            self,
            slots=tuple(slots),
            num_staging=self.num_staging + missing,
            engine="thread",
            tokens_per_call=1,
            fetch_ahead=0,
        )

    def _check_slots(self, config: ModelConfig) -> None:
        """Raises RequestError if one program has too few slots for the experts of a token."""
        top_k, slots = config.router.top_k, self.slots
        assert slots is None or isinstance(slots, tuple)
        num_shared = self.num_staging - NUM_PROMPT_PLACES
        if num_shared < 0 or make_pools(slots or (0,), num_shared, top_k) is None:
            num_slots = sum(slots or ())
            raise RequestError(
                "the policy has too few places for a program that holds the experts of a token",
                got=f"{num_slots} slots + {self.num_staging} for staging = "
                f"{num_slots + self.num_staging}",
                expected=f"{top_k} experts + {NUM_PROMPT_PLACES} for prompts = "
                f"{top_k + NUM_PROMPT_PLACES}; at least {NUM_PROMPT_PLACES} for staging",
                do="give it more of them, or leave num_staging out",
            )

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a policy file.

        Raises:
          ConfigError: there is none, it is not a policy, of another version, or has a field that
            is unknown or of a wrong type.
        """
        path = Path(path)
        try:
            return cls.from_json(read_json_object(path, ConfigError))
        except ConfigError as error:
            raise ConfigError(
                error.what,
                where=path,
                got=error.got,
                expected=error.expected,
                do="name a policy that --save_policy wrote, or correct it",
            ) from None

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The policy of ``to_json`` (ConfigError); fields that are left out have their defaults."""
        version = value.get("version")
        if type(version) is not int or version != VERSION:
            raise ConfigError(
                "the policy is of another version",
                got="none" if version is None else json.dumps(version),
                expected=f'"version": {VERSION}',
            )
        names = [field.name for field in dataclasses.fields(cls)]
        for name in value:
            if name not in ("version", *names):
                raise ConfigError(
                    "a policy has no such field", got=repr(name), expected=", ".join(names)
                )
        if "mode" not in value:
            raise ConfigError("the policy has no mode", expected=f"one of {', '.join(MODES)}")
        fields = {name: value[name] for name in names if name in value}
        if isinstance(slots := fields.get("slots"), list):
            fields["slots"] = tuple(slots)
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        """The contents of a policy file."""
        fields = dataclasses.fields(self) if self.mode == "offload" else ()
        values = {field.name: _plain(getattr(self, field.name)) for field in fields}
        return {"version": VERSION, "mode": self.mode, **values}

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes a policy file, or replaces it: a reader sees the old one or the new one.

        Raises:
          RequestError: the file system refuses.
        """
        path = Path(path)
        text = json_lines(self.to_json())
        try:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            write_file(path.parent, path.name, text.encode())
        except OSError as error:
            raise RequestError(
                "the policy cannot be written", where=path, got=error.strerror or error
            ) from None

    def _given(self) -> list[str]:
        """Fields that are not as they would be if they were left out."""
        fields = dataclasses.fields(self)[1:]
        return [field.name for field in fields if getattr(self, field.name) != field.default]


def read_request(text: str) -> Mode | Literal["auto"] | Policy:
    """What --policy says: "auto", a mode, or the policy in a file of another name.

    Raises:
      ConfigError: the file is not a policy.
      RequestError: there is no such file.
    """
    if text in ("auto", *MODES):
        return text  # type: ignore[return-value]
    if not os.path.exists(text):
        raise RequestError(
            "there is no such policy",
            got=repr(text),
            expected=f"auto, {', '.join(MODES)}, or a file that --save_policy wrote",
        )
    return Policy.read(text)


def least_staging(config: ModelConfig) -> int:
    """Places with which layers without slots work: for a token's experts and copies under way."""
    return config.router.top_k + MAX_IN_FLIGHT


def _other_model(got: str, expected: str) -> RequestError:
    return RequestError("the policy is for a model of another shape", got=got, expected=expected)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _require(is_right: bool, name: str, got: object, expected: str) -> None:
    if not is_right:
        raise ConfigError(
            f"the policy's {name} is not usable",
            got=json.dumps(got, default=repr),
            expected=expected,
        )
