"""Our side of the comparison: an engine without a tokenizer, and looks inside it."""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.engines.prompts import pad_prompts
from jmoe.engines.resident import ResidentEngine
from jmoe.generation.options import GenerationOptions
from jmoe.models import families, kv_cache
from jmoe.models.decoder import rebuild
from jmoe.native.choice import HostKernels
from jmoe.planning.chunks import prompt_chunks
from jmoe.store.checkpoint import Checkpoint
from jmoe.store.json_files import read_config_json
from jmoe.store.parameters import check_tensors, read_parameters


def load_engine(directory: Path, dtype: str = "float32") -> ResidentEngine:
    """What ``jmoe.load`` does without host kernels, for a checkpoint without a tokenizer."""
    config = families.config_from_json(read_config_json(directory), directory)
    checkpoint = Checkpoint.open(directory)
    check_tensors(checkpoint, config)
    parameters = read_parameters(checkpoint, config, dtype)
    return ResidentEngine(config, parameters, dtype, jax.local_devices()[0])


def with_host_kernels(engine: ResidentEngine) -> ResidentEngine:
    """The same weights, computed by the host kernels where there are some."""
    host = HostKernels()
    return ResidentEngine(
        engine.config, engine.parameters, engine.dtype, engine.device, engine.quant, host
    )


def greedy(
    engine: ResidentEngine, prompts: Sequence[Sequence[int]], num_tokens: int
) -> list[list[int]]:
    """The most probable continuations of a batch, which nothing ends early."""
    options = GenerationOptions(max_new_tokens=num_tokens, stop_token_ids=())
    return np.stack(list(engine.start(prompts, options)), axis=1).tolist()


def batch_logits(
    engine: ResidentEngine, prompts: Sequence[Sequence[int]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Runs prompts of one chunk as one batch, as the engine does.

    Returns:
      For each prompt its logits, float32 [L, V], and its router margins [L].
    """
    (length,) = prompt_chunks(max(map(len, prompts)))
    capacity = kv_cache.bucket_capacity(length)
    cache = kv_cache.init_cache(engine.config, len(prompts), capacity, engine.dtype, engine.device)
    logits_BLV, margins_BL = _batch_logits(
        engine.parameters,
        cache,
        engine.put(pad_prompts(prompts, length)),
        engine.put(np.array([len(prompt) for prompt in prompts], np.int32)),
        **engine.static_arguments(len(prompts) * length),
    )
    return [
        (np.asarray(logits_BLV[i, : len(prompt)]), np.asarray(margins_BL[i, : len(prompt)]))
        for i, prompt in enumerate(prompts)
    ]


@functools.partial(jax.jit, static_argnames=("config", "dtype", "quant", "host", "form"))
def _batch_logits(parameters, cache, token_ids_BL, lengths_B, *, config, dtype, quant, host, form):
    batch_size, length = token_ids_BL.shape
    valid_BL = jnp.arange(length) < lengths_B[:, None]
    model = rebuild(config, dtype, parameters, quant, host)
    start_B = jnp.zeros(batch_size, jnp.int32)
    hidden_BLD, _, routings = model(token_ids_BL, start_B, valid_BL, cache, form)
    margins_NT = jnp.stack([router_margin(r.probs_TE, config.router.top_k) for r in routings])
    return model.logits(hidden_BLD), jnp.min(margins_NT, axis=0).reshape(batch_size, length)


def router_margin(probs_TE: jax.Array, top_k: int) -> jax.Array:
    """By how much the last expert chosen is more probable than the first one not chosen.

    Arithmetic that differs by less cannot change which experts are used.
    """
    best = jax.lax.top_k(probs_TE, top_k + 1)[0]
    return best[:, top_k - 1] - best[:, top_k]
