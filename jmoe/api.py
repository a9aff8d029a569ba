"""The public surface: load a model, generate text."""

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jmoe.config import ModelConfig
from jmoe.engines.batch import BatchRun
from jmoe.engines.memory import check_fits
from jmoe.engines.resident import ResidentEngine
from jmoe.errors import ConfigError, RequestError
from jmoe.generation.options import GenerationOptions, make_options
from jmoe.generation.sequence import FinishReason, GrowingSequence
from jmoe.metrics import GenerationStats, Stopwatch
from jmoe.models import families
from jmoe.planning.memory import available_host_bytes
from jmoe.store import hub
from jmoe.store.checkpoint import Checkpoint
from jmoe.store.generation_config import GenerationDefaults
from jmoe.store.json_files import read_config_json
from jmoe.store.parameters import check_tensors, read_parameters
from jmoe.store.tokenizer import Tokenizer

EMBEDDED_MODEL = Path(__file__).parent / "data" / "tiny-mixtral"

Message = Mapping[str, str]  # {"role": "user", "content": "..."}
Prompt = str | Sequence[int] | Sequence[Message]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """What became of one prompt.

    Attributes:
      prompt: as it was given: text, messages, or token ids.
      prompt_token_ids: what the model saw.
      token_ids: the new tokens, including a stop token that ended the text.
      text: the new text, without stop strings and special tokens.
      finish_reason: "eos" (a stop token), "stop" (a stop string) or "length".
      stats: of the whole call, over all its prompts.
    """

    prompt: Prompt
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    stats: GenerationStats


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """New text of one prompt, as it is made.

    Attributes:
      index: which prompt of the call.
      text: text that is certain by now; it continues the chunk before.
      token_ids: new tokens since the chunk before; their text may come with a later chunk.
      finish_reason: set in the last chunk of a prompt.
      stats: set in the last chunk of the call.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stats: GenerationStats | None


class LLM:
    """A model that is ready to generate. Made by ``load``.

    Attributes:
      name: the directory or hub id that it was loaded by.
      directory: where its files are.
      config: its shape.
      tokenizer: text to tokens and back.
      engine: what runs it.
      load_s: seconds that loading took.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        tokenizer: Tokenizer,
        defaults: GenerationDefaults,
        engine: ResidentEngine,
        load_s: float,
    ):
        self.name = name
        self.directory = directory
        self.tokenizer = tokenizer
        self.engine = engine
        self.load_s = load_s
        self._defaults = defaults

    @property
    def config(self) -> ModelConfig:
        return self.engine.config

    @property
    def num_parameters(self) -> int:
        return sum(parameter.size for parameter in self.engine.parameters)

    def generate(self, prompt: Prompt | Sequence[Prompt], **options: Any) -> Any:
        """Generates text for one prompt, or for several as one batch.

        Args:
          prompt: text, used as it is; messages (dicts of "role" and "content"), rendered
            with the model's chat template; token ids; or a sequence of such prompts.
          **options: fields of GenerationOptions. What is not given comes from the model's
            generation_config.json, and is greedy without one.

        Returns:
          A GenerationResult; a list of them for a sequence of prompts.

        Raises:
          RequestError: an unusable prompt or option.
          CapacityError: the KV cache does not fit into memory.
        """
        prompts, is_batch = _as_batch(prompt)
        prompt_ids = [self.tokenize(p) for p in prompts]
        texts = ["" for _ in prompts]
        token_ids: list[list[int]] = [[] for _ in prompts]
        reasons: list[Any] = [None for _ in prompts]
        stats: Any = None
        for chunk in self._stream(prompt_ids, self.options(**options)):
            texts[chunk.index] += chunk.text
            token_ids[chunk.index] += chunk.token_ids
            reasons[chunk.index] = chunk.finish_reason
            stats = chunk.stats
        results = [
            GenerationResult(
                prompt=prompts[i],
                prompt_token_ids=tuple(prompt_ids[i]),
                token_ids=tuple(token_ids[i]),
                text=texts[i],
                finish_reason=reasons[i],
                stats=stats,
            )
            for i in range(len(prompts))
        ]
        return results if is_batch else results[0]

    def stream(self, prompt: Prompt | Sequence[Prompt], **options: Any) -> Iterator[Chunk]:
        """Like ``generate``, but yields text as it is made.

        The pieces of a prompt add up to the text that ``generate`` returns. Everything is
        checked, and the prompts are prefilled, before this returns.
        """
        prompts, _ = _as_batch(prompt)
        return self._stream([self.tokenize(p) for p in prompts], self.options(**options))

    def chat(self, messages: Sequence[Message], **options: Any) -> GenerationResult:
        """The model's answer to a conversation: {"role": ..., "content": ...} dicts."""
        return self.generate(list(messages), **options)

    def options(self, **requested: Any) -> GenerationOptions:
        """A request's options, completed with the model's own defaults (RequestError)."""
        return make_options(self._defaults.options, requested, self._defaults.stop_token_ids)

    def tokenize(self, prompt: Prompt) -> list[int]:
        """The token ids that the model sees for a prompt (RequestError)."""
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("the prompt is empty", do="give it some text")
            return self.tokenizer.encode(prompt)
        if all(isinstance(token_id, int | np.integer) for token_id in prompt):
            return [int(token_id) for token_id in prompt]  # type: ignore[arg-type]
        return self.tokenizer.apply_chat_template(list(prompt))  # type: ignore[arg-type]

    def _stream(self, prompt_ids: list[list[int]], options: GenerationOptions) -> Iterator[Chunk]:
        run = self.engine.start(prompt_ids, options)
        sequences = [
            GrowingSequence(self.tokenizer, ids, options, limit)
            for ids, limit in zip(prompt_ids, run.max_new_tokens, strict=True)
        ]
        return _chunks(run, sequences)


def _chunks(run: BatchRun, sequences: list[GrowingSequence]) -> Iterator[Chunk]:
    growing = dict(enumerate(sequences))
    for token_ids_B in run:
        for i, sequence in list(growing.items()):
            token_id = int(token_ids_B[i])
            text = sequence.push(token_id)
            if sequence.finish_reason is not None:
                del growing[i]
                run.finish(i)
            yield Chunk(
                index=i,
                text=text,
                token_ids=(token_id,),
                finish_reason=sequence.finish_reason,
                stats=None if growing else run.stats(),
            )


def _as_batch(prompt: Any) -> tuple[list[Any], bool]:
    """Tells one prompt from a sequence of prompts."""
    if isinstance(prompt, str):
        return [prompt], False
    if not isinstance(prompt, Sequence):
        raise RequestError(
            "a prompt must be text, messages or token ids", got=type(prompt).__name__
        )
    if not prompt:
        raise RequestError("the prompt is empty", do="give it some text")
    if isinstance(prompt[0], Mapping | int | np.integer):
        return [prompt], False
    return list(prompt), True


def load(
    model: str | Path | None = None,
    *,
    dtype: str = "auto",
    device: jax.Device | None = None,
    revision: str | None = None,
    progress: bool = False,
) -> LLM:
    """Loads a model.

    Args:
      model: a directory in Hugging Face format, or a hub id ("org/name"), which is found in
        the local hub cache or downloaded. None is the small model inside the package.
      dtype: of weights and arithmetic: "float32", "bfloat16", or "auto", which is
        bfloat16 on an accelerator; on the CPU backend float32 if that fits into free
        memory, else bfloat16.
      device: where to run; JAX's default device if None.
      revision: branch, tag or commit of a hub id.
      progress: show a bar on stderr while weights are read, if that is a terminal.

    Raises:
      ConfigError: the model's configuration is unreadable or not supported.
      CheckpointError: files are missing, damaged, or do not belong to this configuration.
      CapacityError: the weights do not fit into memory.
    """
    stopwatch = Stopwatch()
    with stopwatch:
        directory = EMBEDDED_MODEL if model is None else hub.resolve(model, revision=revision)
        config_json = read_config_json(directory)
        config = families.config_from_json(config_json, directory)
        checkpoint = Checkpoint.open(directory)
        check_tensors(checkpoint, config)
        tokenizer = Tokenizer.load(directory, vocab_size=config.vocab_size)
        defaults = GenerationDefaults.load(directory, config_json)
        device = device or _default_device()
        dtype_name = _choose_dtype(dtype, config, device)
        num_bytes = parameter_bytes(config, dtype_name)
        check_fits(
            num_bytes,
            device,
            what=f"the model in {dtype_name}",
            do="use a smaller dtype, or a machine with more memory",
        )
        show = progress and sys.stderr.isatty()
        with tqdm(
            total=num_bytes, unit="B", unit_scale=True, delay=1, desc="loading", disable=not show
        ) as bar:
            parameters = read_parameters(checkpoint, config, dtype_name, bar.update)
            engine = ResidentEngine(config, parameters, dtype_name, device)
    name = "tiny-mixtral (embedded)" if model is None else str(model)
    return LLM(name, directory, tokenizer, defaults, engine, stopwatch.seconds)


def _default_device() -> jax.Device:
    try:
        return jax.local_devices()[0]
    except (RuntimeError, AssertionError) as error:  # a backend that JAX_PLATFORMS asks for
        raise ConfigError(
            "JAX cannot start on any device",
            where=f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}",
            got=str(error) or type(error).__name__,
            do="unset JAX_PLATFORMS, or install the extra for your accelerator, jmoe[cuda12]",
        ) from None


def parameter_bytes(config: ModelConfig, dtype: str) -> int:
    """Size of a model's weights."""
    shapes = [source.shape for source in families.parameter_sources(config).values()]
    return sum(int(np.prod(shape)) for shape in shapes) * jnp.dtype(dtype).itemsize


def _choose_dtype(dtype: str, config: ModelConfig, device: jax.Device) -> str:
    if dtype in ("float32", "bfloat16"):
        return dtype
    if dtype != "auto":
        raise ConfigError("unknown dtype", got=repr(dtype), expected="auto, float32 or bfloat16")
    if device.platform != "cpu":
        return "bfloat16"
    fits = parameter_bytes(config, "float32") < 0.8 * available_host_bytes()
    return "float32" if fits else "bfloat16"
