"""What is soaked: an offload model that a soak can disturb, and the texts that it should give."""

import dataclasses
import gc
import random
import threading
from typing import Any, NamedTuple

import jax

import jmoe
from jmoe.engines.offload import OffloadEngine
from jmoe.loading import LoadOptions, find_model
from jmoe.planning.budget import format_bytes
from jmoe.residency.cache import SlotCache
from jmoe.residency.eviction import make_eviction
from jmoe.residency.experts import DeviceExperts
from jmoe.residency.fetch_thread import THREAD_NAME
from jmoe.residency.link import DeviceLink

from .links import RandomLink

EVICTIONS = ("lru", "lfu", "likely", "random")


class Held(NamedTuple):
    """Arrays in memory.

    Attributes:
      other_bytes: of all arrays that are no experts.
      num_experts: experts of offload models.
      num_places: that they have.
      num_models: that are loaded.
    """

    other_bytes: int
    num_experts: int
    num_places: int
    num_models: int


class Subject:
    """An offload model behind a link that fails at will, and the resident one.

    Attributes:
      llm: the offload model.
      link: of its experts.
      num_budgets: budgets so far.
    """

    def __init__(self, model: str | None, quant: str | None, engine: str, seed: int):
        self._loading: dict[str, Any] = {"policy": "offload", "quant": quant, "engine": engine}
        self._model = model
        self.reference = jmoe.load(model, policy="resident", quant=quant)
        self._setup = find_model(model, LoadOptions(**self._loading)).setup
        self.llm = jmoe.load(model, **self._loading)
        self._clean: jmoe.LLM | None = None
        self.num_budgets = 0
        self._threads = set(threading.enumerate())
        self.link = self._disturb(random.Random(seed))

    @property
    def engine(self) -> OffloadEngine:
        engine = self.llm.engine
        assert isinstance(engine, OffloadEngine)
        return engine

    def _disturb(self, rng: random.Random) -> RandomLink:
        """Puts a link that fails between the store and the cache."""
        engine = self.engine
        link = RandomLink(DeviceLink(engine.device, engine.layout.dtype), rng.randrange(2**32))
        plain, store, config = engine.experts.cache, engine.store, engine.config
        engine.experts.close()
        cache = SlotCache(
            plain.slots,
            num_layers=config.num_hidden_layers,
            num_experts=config.router.num_experts,
            num_staging=plain.num_staging,
            eviction=make_eviction(rng.choice(EVICTIONS)),
            min_free=config.router.top_k,
        )
        engine.places.replace_experts(
            DeviceExperts(link, lambda key: store.layer(key.layer)[key.expert], cache)
        )
        return link

    def set_budget(self, share: float) -> str:
        """Gives all batches from now on a share of what all experts would take."""
        self.num_budgets += 1
        plan = self._setup.plan
        budget_bytes = int(share * plan.device_bytes)
        setup = self._setup._replace(plan=dataclasses.replace(plan, budget_bytes=budget_bytes))
        self.engine.plan_with(setup.replan)
        return format_bytes(budget_bytes)

    def expected(self, prompts: list[list[int]], options: dict[str, Any]) -> list[tuple[int, ...]]:
        """What the resident model continues these prompts with."""
        return [result.token_ids for result in self.reference.generate(prompts, **options)]

    def second_opinion(
        self, prompts: list[list[int]], options: dict[str, Any]
    ) -> list[tuple[int, ...]]:
        """What an offload model makes of them that nobody disturbs: bit by bit the same.

        The resident model's logits differ in their last bits, which may tip a choice.
        """
        if self._clean is None:
            self._clean = jmoe.load(self._model, **self._loading)
        return [result.token_ids for result in self._clean.generate(prompts, **options)]

    def held(self) -> "Held":
        """What is in memory now, of all models."""
        gc.collect()
        layout = self.engine.layout
        offload = [self.engine]
        if self._clean is not None:
            assert isinstance(self._clean.engine, OffloadEngine)
            offload.append(self._clean.engine)
        in_host_memory = {id(blobs) for engine in offload for blobs in engine.host_blobs}
        other_bytes, num_experts = 0, 0
        for array in jax.live_arrays():
            holds_experts = array.shape[-1:] == (layout.num_items,) and array.dtype == layout.dtype
            if holds_experts and id(array) not in in_host_memory:
                num_experts += array.size // layout.num_items
            else:
                other_bytes += array.nbytes
        num_places = sum(engine.places.num_places for engine in offload)
        return Held(other_bytes, num_experts, num_places, 1 + len(offload))

    def close(self) -> list[str]:
        """Closes everything; returns the names of threads that stay and should not."""
        for llm in (self.llm, self._clean, self.llm):
            if llm is not None:
                llm.close()
        left = set(threading.enumerate()) - self._threads
        return [thread.name for thread in left if thread.name == THREAD_NAME or not thread.daemon]
