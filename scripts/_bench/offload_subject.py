"""One model in several offload engines that share its weights and programs."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

import jmoe
from _bench.ceiling import Ceiling
from _bench.report import Report
from _bench.settings import Settings
from jmoe.engines.contest import EngineName
from jmoe.engines.offload import HostSide, OffloadEngine
from jmoe.engines.prediction import OraclePredictor
from jmoe.engines.resident import ResidentEngine
from jmoe.errors import RequestError
from jmoe.generation.options import GenerationOptions
from jmoe.loading import Engine
from jmoe.metrics import Traffic
from jmoe.models.decoder import abstract_parameters
from jmoe.planning.policy import Policy
from jmoe.planning.traces import TraceRecorder
from jmoe.residency.link import DeviceLink, Link, ThrottledLink

PROMPT = "def read_lines(path):\n"  # the embedded model knows Python's library
PROMPT_TOKENS = 8  # of random weights
PREFILL_CHUNK = 16  # prompts are short here


class Run(NamedTuple):
    """One generation.

    Attributes:
      decode_s: of its decode steps.
      token_ids: the new tokens.
      traffic: of decode steps; None of the engine that moves nothing.
    """

    decode_s: float
    token_ids: list[int]
    traffic: Traffic | None


class HeldLink(DeviceLink):
    """Hands out the host's own memory: takes no time, no core and no memory bandwidth.

    As a DMA engine would, if a ThrottledLink says how long. On the CPU backend only.
    """

    def _copy(self, blob: np.ndarray) -> np.ndarray:
        return blob


class OffloadSubject:
    """A model, and the greedy text that every engine must make of its prompt.

    Attributes:
      name: of the model.
      notes: of jmoe.load.
      base: all experts resident, nothing predicted: its time is that of computing alone.
      chosen_SLK: experts of every decode step of that text.
      token_ids: the text.
    """

    def __init__(self, settings: Settings, engine: EngineName = "thread"):
        """Args:
        settings: that leave to suites what they choose.
        engine: of base.
        """
        check_flags(settings)
        loading = dict(settings.loading)
        loading["policy"] = Policy(
            mode="offload", lookahead=0, prefill_chunk=PREFILL_CHUNK, engine=engine
        )
        for flag in ("link_gb_per_s", "link_latency_us", "host_gb_per_s"):
            loading.pop(flag)
        llm = jmoe.load(settings.model, **loading, progress=True)
        assert isinstance(llm.engine, OffloadEngine)
        self.base = llm.engine
        self.name, self.notes = llm.name, llm.notes
        self.new_tokens = settings.new_tokens
        self._latency_s = settings.loading["link_latency_us"] * 1e-6
        self._copies = settings.copies
        self._prompt = list(range(1, 1 + PROMPT_TOKENS))
        if not settings.loading["random_weights"]:
            self._prompt = llm.tokenize(PROMPT)
        config = self.base.config
        recorder = TraceRecorder(
            config.num_hidden_layers, config.router.num_experts, config.router.top_k
        )
        self.base.recorder = recorder
        self.token_ids = self.run(self.base).token_ids
        self.base.recorder = None
        self.chosen_SLK = recorder.trace().decode_expert_ids

    @property
    def num_layers(self) -> int:
        return self.base.num_layers

    @property
    def blob_bytes(self) -> int:
        return self.base.layout.num_bytes

    def to_json(self) -> dict[str, Any]:
        base = self.base
        return {
            "name": self.name,
            "dtype": base.dtype,
            "quant": None if base.quant is None else str(base.quant),
            "host_kernels": base.host and dataclasses.asdict(base.host),
            "notes": list(self.notes),
            "num_hidden_layers": self.num_layers,
            "num_experts": base.config.router.num_experts,
            "expert_bytes": self.blob_bytes,
            "new_tokens": self.new_tokens,
        }

    def describe(self, report: Report) -> dict[str, Any]:
        """Reports what this machine could reach at most; returns that and what is measured."""
        base = self.base
        ceiling = Ceiling(base.device, base.dtype).to_json()
        formats = base.dtype if base.quant is None else f"{base.quant} in {base.dtype}"
        notes = "; ".join(self.notes)
        report.ceiling(f"{self.name} in {formats} on {base.device}; {notes}", ceiling)
        return {"subject": self.to_json(), "ceiling": ceiling}

    def link_s(self, copies: int, bytes_per_s: float) -> float:
        """Seconds for which a link of this speed is occupied by so many copies."""
        return copies * (self._latency_s + self.blob_bytes / bytes_per_s)

    def engine(
        self,
        slots: int,
        num_staging: int,
        lookahead: int,
        bytes_per_s: float | None,
        *,
        host_experts: HostSide | None = None,
        **policy_fields: Any,
    ) -> OffloadEngine:
        """An engine with so many slots per layer; None is the device's own link.

        What is not said is as base has it.
        """
        base = self.base
        policy = dataclasses.replace(
            base.plan.policy,
            slots=(slots,) * self.num_layers,
            num_staging=num_staging,
            lookahead=lookahead,
            **policy_fields,
        )
        engine = OffloadEngine(
            base.config,
            _parameters(base),
            base.dtype,
            base.device,
            base.quant,
            base.host,
            plan=dataclasses.replace(base.plan, policy=policy),
            link=self.link(bytes_per_s),
            store=base.store,
            host_experts=host_experts,
        )
        engine.programs = base.programs
        return engine

    def link(self, bytes_per_s: float | None) -> Link:
        kind = DeviceLink if self._copies else HeldLink
        link = kind(self.base.device, self.base.layout.dtype)
        if bytes_per_s is None:
            return link
        return ThrottledLink(link, bytes_per_s, self._latency_s)

    def resident(self) -> ResidentEngine:
        """The engine whose decode step is one executable; on a CPU it shares the experts."""
        base = self.base
        return ResidentEngine(
            base.config, _parameters(base), base.dtype, base.device, base.quant, base.host
        )

    def run_cold(self, engine: OffloadEngine, num_tokens: int | None = None) -> Run:
        """A generation that finds no expert on the device but those that its prompt used."""
        policy = engine.plan.policy
        assert policy.slots is not None
        try:
            engine.experts.resize(policy.slots, policy.num_staging)
            if isinstance(engine.predictor, OraclePredictor):
                engine.predictor.restart()
            return self.run(engine, num_tokens)
        finally:
            engine.experts.resize((0,) * self.num_layers, 0)

    def run(self, engine: Engine, num_tokens: int | None = None) -> Run:
        """A generation of decode steps after the first token.

        Two loops over layers must make the same text.
        """
        num_tokens = num_tokens or self.new_tokens
        options = GenerationOptions(max_new_tokens=num_tokens + 1)
        batch = engine.start([self._prompt], options)
        token_ids = [int(ids_B[0]) for ids_B in batch]
        stats = batch.stats()
        assert stats.decode_tokens == num_tokens
        expected = getattr(self, "token_ids", token_ids)[: len(token_ids)]
        # The one-executable steps add in another order, and may choose otherwise at a near tie.
        loops = (
            isinstance(engine, OffloadEngine)
            and engine.decodes_by == self.base.decodes_by == "thread"
        )
        assert token_ids == expected or not loops, "another text"
        residency = stats.residency
        return Run(stats.decode_s, token_ids, residency and residency.decode)

    def close(self) -> None:
        self.base.close()


def _parameters(base: OffloadEngine) -> Iterator[np.ndarray | jax.Array]:
    ends, layers = iter(base.ends), [iter(layer) for layer in base.layers]
    blobs = itertools.count()
    for name in abstract_parameters(base.config, base.dtype, base.quant):
        if name.endswith(".blobs"):
            yield base.store.layer(next(blobs)).view(base.layout.dtype)
        else:
            yield next(layers[int(name.split(".")[1])] if name.startswith("layers.") else ends)


def check_flags(settings: Settings) -> None:
    """Raises RequestError for flags about what a suite chooses itself."""
    links = "leave it out; --suite=offload --links names speeds of the link"
    chosen = {
        "policy": ("auto", "leave it out"),
        "engine": (None, "leave it out; --suite=engines compares engines"),
        "tokens_per_call": (None, "leave it out; --suite=engines compares engines"),
        "misses": (None, "leave it out; --suite=hybrid compares what becomes of them"),
        "device_memory_gib": (None, "leave it out"),
        "link_gb_per_s": (None, links),
    }
    for flag, (default, do) in chosen.items():
        if (given := settings.loading[flag]) != default:
            raise RequestError(f"the suite chooses --{flag} itself", got=given, do=do)
    if not settings.new_tokens:
        raise RequestError("the suite measures decoding", do="give --new_tokens above 0")
