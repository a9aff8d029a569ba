"""One model in engines that serve missing experts in several ways, on links of several speeds."""

import dataclasses
from typing import NamedTuple

import numpy as np

from _bench.offload_subject import OffloadSubject
from _bench.settings import Settings
from jmoe.engines.contest import MAX_WAYS, NUM_COUNTING, NUM_SETTLING
from jmoe.engines.offload import HostSide, OffloadEngine
from jmoe.engines.probes import Subject
from jmoe.generation.options import GenerationOptions
from jmoe.loading.hardware import find_hardware
from jmoe.metrics import Traffic
from jmoe.native import library
from jmoe.planning.budget import EVICTION, LOOKAHEAD
from jmoe.planning.cost import ExpertCosts

# As --misses.
WAYS = ("load", "host", "split", "auto")
NUM_STAGING = 8
# That auto may spend on trying ways, before it goes on with one.
AUTO_TOKENS = (MAX_WAYS + 2) * (NUM_SETTLING + NUM_COUNTING)
_PROMPT_TOKENS = 32


class HybridRun(NamedTuple):
    """One generation.

    Attributes:
      tokens: of decode steps.
      decode_s: of these.
      prefill_s: to the first token.
      predicted_tok_per_s: of decode steps, before the first one.
      way: of decode steps, at the end.
      reason: for it, if several were tried.
      traffic: of decode steps.
      prefill_traffic: of the prompt.
    """

    tokens: int
    decode_s: float
    prefill_s: float
    predicted_tok_per_s: float | None
    way: str
    reason: str | None
    traffic: Traffic
    prefill_traffic: Traffic

    @property
    def tok_per_s(self) -> float:
        return self.tokens / self.decode_s if self.decode_s else 0.0


class HybridSubject:
    """A model, and what this machine can do with its experts.

    Attributes:
      offload: the model, with all experts on the device: its time is that of computing alone.
      hardware: this machine.
      title: for plots.
    """

    def __init__(self, settings: Settings):
        loading = settings.loading
        speed = loading["host_gb_per_s"]
        self._host_bytes_per_s = None if speed is None else speed * 1e9
        self.offload = OffloadSubject(settings)
        base = self.offload.base
        has_kernels = loading["host_kernels"] and library.status().available
        self._subject = Subject(
            device=base.device,
            config=base.config,
            dtype=base.dtype,
            quant=base.quant,
            host=base.host if base.device.platform == "cpu" and has_kernels else None,
        )
        self.hardware = find_hardware(
            self._subject, named=loading["hardware"], recalibrate=loading["recalibrate"]
        ).spec
        self._new_tokens = settings.new_tokens
        self._copies = settings.copies
        host = "the host's own speed" if speed is None else f"a host held to {speed:g} GB/s"
        self.title = f"{self.offload.name}, {base.quant}, {host}"

    def engine(self, way: str, link_bytes_per_s: float, slots: int) -> OffloadEngine:
        """An engine of its own, on the programs and weights of all."""
        base = self.offload.base
        layers = base.num_layers
        return self.offload.engine(
            slots,
            NUM_STAGING,
            min(LOOKAHEAD[way], layers - 1),
            link_bytes_per_s,
            host_experts=self._host_side(link_bytes_per_s),
            misses=way,
            eviction=EVICTION[way],
            prefill_chunk=512,
        )

    def _host_side(self, link_bytes_per_s: float) -> HostSide:
        costs = ExpertCosts.of(
            self.hardware,
            self._subject.layout,
            activation_bits=self._subject.activation_bits,
            dtype=self._subject.dtype,
            host_bytes_per_s=self._host_bytes_per_s,
        )
        copy_s = max(costs.copy_s, self.offload.link_s(1, link_bytes_per_s))
        copying_s = costs.copying_s if self._copies else 0.0
        costs = dataclasses.replace(costs, copy_s=copy_s, copying_s=copying_s)
        loop_s = self.hardware.round_trip_s + self.hardware.dispatch_s
        return HostSide(self._subject.host, costs, loop_s, self._host_bytes_per_s)

    def close_engine(self, engine: OffloadEngine) -> None:
        """Not by its own close, which would close the store of all."""
        engine.places.close()
        if engine.hybrid is not None:
            engine.hybrid.host.close()

    def bound_tok_per_s(self, run: HybridRun, link_bytes_per_s: float) -> float:
        """No way is faster with these misses: link and host serve them together, and the device
        computes meanwhile.

        Args:
          run: of the way host, which copies nothing while it decodes.
          link_bytes_per_s: of the link.
        """
        costs = self._host_side(link_bytes_per_s).costs
        misses = run.traffic.host_experts / run.tokens
        together_s = 1 / (1 / costs.copy_s + 1 / costs.host(1))
        base = self.offload.base
        computing_s = base.num_layers * base.config.router.top_k * costs.device(1)
        return 1 / max(misses * together_s, computing_s)

    def run(
        self,
        engine: OffloadEngine,
        new_tokens: int | None = None,
        prompt_tokens: int = _PROMPT_TOKENS,
    ) -> HybridRun:
        """A generation, sampled, that finds no expert on the device but those its prompt used."""
        tokens = self._new_tokens if new_tokens is None else new_tokens
        if engine.plan.policy.misses == "auto":
            tokens += AUTO_TOKENS
        self._make_cold(engine)
        options = GenerationOptions(max_new_tokens=tokens + 1, temperature=1.0, seed=7)
        batch = engine.start([self._prompt(engine, prompt_tokens)], options)
        for made, _ in enumerate(batch, 1):
            if made > tokens:
                batch.finish(0)
        stats = batch.stats()
        residency = stats.residency
        assert residency is not None
        predicted_s = residency.predicted_step_s
        return HybridRun(
            tokens=max(1, stats.decode_tokens),
            decode_s=stats.decode_s,
            prefill_s=stats.prefill_s,
            predicted_tok_per_s=1 / predicted_s if predicted_s else None,
            way=residency.way,
            reason=residency.engine_reason,
            traffic=residency.decode,
            prefill_traffic=residency.prefill,
        )

    def run_beams(self, engine: OffloadEngine, width: int) -> float:
        """Tokens per second of a beam search, all beams counted, the prompt's time too."""
        if width == 1:
            return self.run_serially(engine, 1)
        self._make_cold(engine)
        tokens = self._new_tokens + 1
        options = GenerationOptions(max_new_tokens=tokens, num_beams=width)
        search = engine.start_beams([self._prompt(engine, _PROMPT_TOKENS)], options)
        for _ in search:
            pass
        stats = search.stats()
        return width * tokens / (stats.prefill_s + stats.decode_s)

    def run_serially(self, engine: OffloadEngine, width: int) -> float:
        """The same of as many sequences one after the other, as Fiddler's code takes them."""
        runs = [self.run(engine) for _ in range(width)]
        tokens = sum(run.tokens + 1 for run in runs)
        return tokens / sum(run.prefill_s + run.decode_s for run in runs)

    def _prompt(self, engine: OffloadEngine, num_tokens: int) -> list[int]:
        rng = np.random.default_rng(0)
        return rng.integers(1, engine.config.vocab_size, num_tokens).tolist()

    def _make_cold(self, engine: OffloadEngine) -> None:
        policy = engine.plan.policy
        assert policy.slots is not None
        engine.experts.resize((0,) * engine.num_layers, 0)
        engine.experts.resize(policy.slots, policy.num_staging)

    def close(self) -> None:
        self.offload.close()
