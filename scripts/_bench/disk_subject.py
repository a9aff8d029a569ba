"""A store on a disk, and engines that read its experts from there in several ways."""

import contextlib
import dataclasses
import gc
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import jmoe
from _bench.settings import Settings
from _bench.wide_model import WideSource
from jmoe.engines.offload import OffloadEngine
from jmoe.engines.resident import ResidentEngine
from jmoe.errors import RequestError
from jmoe.generation.options import GenerationOptions
from jmoe.loading import Engine
from jmoe.metrics import GenerationStats
from jmoe.planning.memory import available_host_bytes
from jmoe.planning.policy import MAX_IN_FLIGHT, Policy
from jmoe.quant.spec import parse_spec
from jmoe.residency.link import DeviceLink
from jmoe.store import page_cache
from jmoe.store.convert import Conversion
from jmoe.store.converted_model import ConvertedModel
from jmoe.store.expert_store import ExpertStore
from jmoe.store.host_memory import map_file
from jmoe.store.mapped_experts import MappedExperts

PROMPT = "def read_lines(path):\n"
_PREFILL_CHUNK = 16
_QUANT = "bf16"
_MAX_DROPS, _DROP_AGAIN_S = 20, 0.02


class Way(NamedTuple):
    """How an engine gets experts from the disk.

    Attributes:
      name: to be shown.
      is_offload: copies them, layer by layer; else one program computes where they lie.
      has_tier: jmoe takes care of what is read; else the system alone.
      read_ahead: what is predicted.
      locks: the most used ones.
    """

    name: str
    is_offload: bool
    has_tier: bool = True
    read_ahead: bool = False
    locks: bool = False


class DiskRun(NamedTuple):
    """One generation that began with nothing in memory.

    Attributes:
      stats: its statistics.
      read_bytes: that disks gave while it decoded; None if the system does not say.
      token_ids: the new tokens.
    """

    stats: GenerationStats
    read_bytes: int | None
    token_ids: list[int]


@contextlib.contextmanager
def opened_store(settings: Settings) -> Iterator[Path]:
    """The store that is named, or one made of the embedded model, which goes afterwards."""
    if settings.model is not None:
        yield Path(settings.model)
        return
    with tempfile.TemporaryDirectory(prefix="jmoe-bench-") as directory:
        path = Path(directory) / "store"
        quant = parse_spec(settings.loading["quant"] or _QUANT)
        Conversion(WideSource(settings.expert_times), path, quant, method="rtn").run()
        yield path


class DiskSubject:
    """A model in a store.

    Attributes:
      name: of the model.
      model: the opened store.
    """

    def __init__(self, directory: Path, settings: Settings):
        _check_flags(settings)
        self.model = ConvertedModel.open(directory)
        self.new_tokens = settings.new_tokens
        self._files = self.model.expert_files
        top_k = self.model.config.router.top_k
        num_layers = self.model.config.num_hidden_layers
        loading = {
            name: settings.loading[name]
            for name in ("dtype", "host_kernels", "activation_bits", "threads", "context")
        }
        loading |= {"host_memory": "mmap", "read_ahead": False, "lock_memory_gib": 0.0}
        # Nothing stays on the device, which on a CPU has the memory that this is about.
        policy = Policy(
            mode="offload",
            slots=(0,) * num_layers,
            num_staging=2 * top_k + MAX_IN_FLIGHT,
            prefill_chunk=_PREFILL_CHUNK,
        )
        offload = jmoe.load(directory, policy=policy, **loading, progress=True)
        resident = jmoe.load(directory, policy="resident", **loading, progress=True)
        assert isinstance(offload.engine, OffloadEngine)
        assert isinstance(resident.engine, ResidentEngine)
        self.name = (
            offload.name if settings.model is not None else WideSource.title(settings.expert_times)
        )
        self._offload, self._resident = offload.engine, resident.engine
        # Which have read some to measure the disk.
        self._mappings = [
            engine.disk.experts for engine in (offload.engine, resident.engine) if engine.disk
        ]
        self._prompt = offload.tokenize(PROMPT)

    @property
    def paths(self) -> list[Path]:
        """Files of experts, by layer."""
        return [file.path for file in self._files]

    @property
    def num_experts(self) -> int:
        """Over all layers."""
        return self.model.config.num_hidden_layers * self.model.config.router.num_experts

    @property
    def expert_bytes(self) -> int:
        return self.model.layout.num_bytes

    def mapped(self) -> MappedExperts:
        """The experts, in a mapping of their own."""
        layers = [map_file(file).reshape(-1, self.expert_bytes) for file in self._files]
        self._mappings.append(MappedExperts(layers, self._files))
        return self._mappings[-1]

    def drop(self, *others: MappedExperts) -> None:
        """Takes all experts out of memory that are not locked, and not in a mapping of others."""
        gc.collect()  # mappings of engines that are gone
        mappings = (*self._mappings, *others)
        for _ in range(_MAX_DROPS):  # pages that are being read stay
            for mapping in mappings:
                mapping.drop()
            missing = sum(mappings[0].missing_bytes(mappings[0].blob(k)) for k in mappings[0].keys)
            if missing >= self.model.expert_bytes:
                break
            time.sleep(_DROP_AGAIN_S)

    def to_json(self) -> dict[str, Any]:
        engine = self._offload
        return {
            "name": self.name,
            "dtype": engine.dtype,
            "quant": str(engine.quant),
            "host_kernels": engine.host and dataclasses.asdict(engine.host),
            "num_experts": self.num_experts,
            "expert_bytes": self.expert_bytes,
            "experts_bytes": self.model.expert_bytes,
            "new_tokens": self.new_tokens,
        }

    def run(self, way: Way) -> DiskRun:
        """A generation with a new engine, from a cold start."""
        self.drop()
        with self.model.open_experts("mmap") as store:
            if way.has_tier:
                disk = store.open_disk(
                    available_host_bytes(), has_hints=way.is_offload, read_ahead=way.read_ahead
                )
                assert disk is not None
                if way.locks:
                    disk.lock_most_used(available_host_bytes, reserve_bytes=self._reserve_bytes)
            engine = self._engine(way, store)
            # Also what was read to measure the disk.
            self.drop(*([store.disk.experts] if store.disk else []))
            try:
                return self._generate(engine)
            finally:
                engine.close()

    @property
    def _reserve_bytes(self) -> int:
        """What an engine will take of host memory, which on a CPU is its device's."""
        engine = self._offload
        is_host = engine.device.platform == "cpu"
        return engine.plan.device_bytes - engine.parameter_bytes if is_host else 0

    def _engine(self, way: Way, store: ExpertStore) -> Engine:
        base = self._offload if way.is_offload else self._resident
        parameters = self.model.parameters(store, base.dtype)
        quant = self.model.quant
        arguments = (base.config, parameters, base.dtype, base.device, quant, base.host)
        if not way.is_offload:
            engine: Engine = ResidentEngine(*arguments)
            engine.disk = store.disk
        else:
            engine = OffloadEngine(
                *arguments,
                plan=self._offload.plan,
                link=DeviceLink(base.device, self.model.layout.dtype),
                store=store,
            )
        engine.programs = base.programs
        return engine

    def _generate(self, engine: Engine) -> DiskRun:
        options = GenerationOptions(max_new_tokens=self.new_tokens + 1, stop_token_ids=())
        batch = engine.start([self._prompt], options)
        before = page_cache.read_bytes_so_far()
        token_ids = [int(ids_B[0]) for ids_B in batch]
        after = page_cache.read_bytes_so_far()
        read_bytes = None if before is None or after is None else after - before
        stats = batch.stats()
        assert stats.decode_tokens == self.new_tokens
        return DiskRun(stats, read_bytes, token_ids)

    def close(self) -> None:
        self._offload.close()
        self._resident.close()


def random_blobs(experts: MappedExperts, number: int) -> list[np.ndarray]:
    """So many experts, in an order that no disk expects."""
    keys = list(experts.keys)
    order = np.random.default_rng().permutation(len(keys))[:number]
    return [experts.blob(keys[i]) for i in order]


def _check_flags(settings: Settings) -> None:
    """Raises RequestError for flags about what the suite chooses itself."""
    chosen = {
        "policy": "auto",
        "engine": None,
        "tokens_per_call": None,
        "device_memory_gib": None,
        "misses": None,
        "link_gb_per_s": None,
        "host_memory": "auto",
        "read_ahead": True,
        "lock_memory_gib": None,
        "popularity": None,
        "random_weights": False,
    }
    for flag, default in chosen.items():
        if (given := settings.loading[flag]) != default:
            raise RequestError(f"the suite chooses --{flag} itself", got=given, do="leave it out")
    if settings.plot is not None:
        raise RequestError("the suite draws nothing", got="--plot", do="leave it out")
    if not settings.new_tokens:
        raise RequestError("the suite measures decoding", do="give --new_tokens above 0")
