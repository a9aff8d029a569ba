"""The public surface: load a model, generate text."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from jmoe.config import ModelConfig
from jmoe.engines.batch import BatchRun
from jmoe.engines.beam_run import BeamRun
from jmoe.engines.offload import OffloadEngine
from jmoe.errors import RequestError
from jmoe.generation.beams import Hypothesis
from jmoe.generation.options import GenerationOptions, make_options
from jmoe.generation.results import (
    Chunk,
    GeneratedSequence,
    GenerationResult,
    Message,
    Prompt,
)
from jmoe.generation.sequence import GrowingSequence
from jmoe.loading import EMBEDDED_MODEL as EMBEDDED_MODEL
from jmoe.loading import Engine, LoadOptions, find_model
from jmoe.metrics import Stopwatch
from jmoe.models.decoder import abstract_parameters
from jmoe.planning import sizes
from jmoe.planning.plan import Plan
from jmoe.planning.policy import EngineChoice, MissesChoice, Policy
from jmoe.planning.traces import RoutingTrace
from jmoe.quant.solver import Method
from jmoe.quant.spec import QuantSpec
from jmoe.residency.timeline import Timeline
from jmoe.store import orbax
from jmoe.store.generation_config import GenerationDefaults
from jmoe.store.source import find_side_files
from jmoe.store.tokenizer import Tokenizer


class LLM:
    """A model that is ready to generate. Made by ``load``.

    It may hold a thread and memory of a device: ``close`` gives them back, as does ``with``.

    Attributes:
      name: the directory or hub id that it was loaded by.
      directory: where its files are.
      config: its shape.
      tokenizer: text to tokens and back.
      engine: what runs it.
      config_json: its config.json.
      plan: where it runs, and where the bytes go, as it was planned when it was loaded.
      notes: what was decided while loading, and why; a sentence each.
      load_s: seconds that loading took.
    """

    def __init__(
        self,
        *,
        name: str,
        directory: Path,
        tokenizer: Tokenizer,
        defaults: GenerationDefaults,
        engine: Engine,
        plan: Plan,
        notes: tuple[str, ...],
        config_json: Mapping[str, Any],
        load_s: float,
    ):
        self.name = name
        self.directory = directory
        self.config_json = config_json
        self.engine = engine
        self.plan = plan
        self.notes = notes
        self.tokenizer = tokenizer
        self.load_s = load_s
        self._defaults = defaults

    @property
    def config(self) -> ModelConfig:
        return self.engine.config

    @property
    def quant(self) -> QuantSpec | None:
        """Formats of the quantized weights; None if all are plain."""
        return self.engine.quant

    @property
    def num_parameters(self) -> int:
        return sizes.total(sizes.weight_sizes(self.config)).num_weights

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
        chunks: list[list[Chunk]] = [[] for _ in prompts]
        stats: Any = None
        for chunk in self._stream(prompt_ids, self.options(**options)):
            chunks[chunk.index].append(chunk)
            stats = chunk.stats
        results = [
            GenerationResult(
                prompt=prompts[i],
                prompt_token_ids=tuple(prompt_ids[i]),
                sequences=_sequences(chunks[i]),
                stats=stats,
            )
            for i in range(len(prompts))
        ]
        return results if is_batch else results[0]

    def stream(self, prompt: Prompt | Sequence[Prompt], **options: Any) -> Iterator[Chunk]:
        """Like ``generate``, but yields text as it is made; with beams, when it is known.

        The pieces of a prompt add up to the text that ``generate`` returns. Everything is
        checked, and the prompts are prefilled, before this returns.
        """
        prompts, _ = _as_batch(prompt)
        return self._stream([self.tokenize(p) for p in prompts], self.options(**options))

    def chat(self, messages: Sequence[Message], **options: Any) -> GenerationResult:
        """The model's answer to a conversation: {"role": ..., "content": ...} dicts."""
        return self.generate(list(messages), **options)

    def save_checkpoint(self, directory: str | Path) -> None:
        """Saves the parameters as an Orbax checkpoint, which ``load`` and convert.py read.

        ``jmoe.store.orbax.restore_parameters`` gives them back with any sharding.

        Args:
          directory: to make; absent or complete, whatever happens.

        Raises:
          RequestError: the weights are quantized, or the directory exists.
          CapacityError: they do not fit on the disk.
        """
        if isinstance(self.engine, OffloadEngine):
            raise RequestError(
                "only a model that is on its device as a whole is saved",
                got="the policy offload",
                do="load it with the policy resident",
            )
        if self.quant is not None:
            raise RequestError(
                "only plain weights are saved with Orbax",
                got=f"weights in {self.quant}",
                do="load the model without quant; scripts/convert.py stores quantized ones",
            )
        names = abstract_parameters(self.config)
        parameters = dict(zip(names, self.engine.parameters, strict=True))
        side_files = find_side_files(self.directory)
        orbax.save_checkpoint(directory, self.config_json, parameters, side_files)

    def routing(self) -> RoutingTrace:
        """Which experts all tokens so far used (RequestError: loaded without record_routing)."""
        if not isinstance(self.engine, OffloadEngine) or self.engine.recorder is None:
            raise RequestError(
                "the routing was not recorded", do="load the model with record_routing=True"
            )
        return self.engine.recorder.trace()

    def close(self) -> None:
        """Ends what runs in the background, and gives experts' memory back; may be called again."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

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
        if options.num_beams > 1:
            beams = self.engine.start_beams(prompt_ids, options)
            return _beam_chunks(beams, self.tokenizer, prompt_ids, options)
        run = self.engine.start(prompt_ids, options)
        sequences = [
            GrowingSequence(self.tokenizer, ids, options, limit)
            for ids, limit in zip(prompt_ids, run.max_new_tokens, strict=True)
        ]
        return _chunks(run, sequences)


def _chunks(run: BatchRun, sequences: list[GrowingSequence]) -> Iterator[Chunk]:
    growing = dict(enumerate(sequences))
    with contextlib.closing(iter(run)) as steps:  # also if the caller leaves before the end
        yield from _grow(run, steps, growing)


def _grow(
    run: BatchRun, steps: Iterator[np.ndarray], growing: dict[int, GrowingSequence]
) -> Iterator[Chunk]:
    for token_ids_B in steps:
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


def _beam_chunks(
    run: BeamRun,
    tokenizer: Tokenizer,
    prompt_ids: list[list[int]],
    options: GenerationOptions,
) -> Iterator[Chunk]:
    num_left = len(prompt_ids)
    with contextlib.closing(iter(run)) as steps:  # also if the caller leaves before the end
        for i, hypotheses in steps:
            num_left -= 1
            sequences = tuple(
                _sequence(hypothesis, tokenizer, prompt_ids[i], options)
                for hypothesis in hypotheses
            )
            best = sequences[0]
            yield Chunk(
                index=i,
                text=best.text,
                token_ids=best.token_ids,
                finish_reason=best.finish_reason,
                stats=None if num_left else run.stats(),
                sequences=sequences,
            )


def _sequence(
    hypothesis: Hypothesis,
    tokenizer: Tokenizer,
    prompt_ids: list[int],
    options: GenerationOptions,
) -> GeneratedSequence:
    token_ids = hypothesis.token_ids
    growing = GrowingSequence(tokenizer, prompt_ids, options, len(token_ids))
    text = "".join(map(growing.push, token_ids))
    assert growing.finish_reason == hypothesis.finish_reason
    return GeneratedSequence(
        token_ids=token_ids,
        text=text,
        finish_reason=hypothesis.finish_reason,
        score=hypothesis.score,
    )


def _sequences(chunks: Sequence[Chunk]) -> tuple[GeneratedSequence, ...]:
    """What all chunks of a prompt make together."""
    last = chunks[-1]
    assert last.finish_reason is not None
    whole = GeneratedSequence(
        token_ids=tuple(token_id for chunk in chunks for token_id in chunk.token_ids),
        text="".join(chunk.text for chunk in chunks),
        finish_reason=last.finish_reason,
    )
    return last.sequences or (whole,)


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
    quant: str | None = None,
    method: Method = "hqq",
    host_memory: str = "auto",
    read_ahead: bool = True,
    lock_memory_gib: float | None = None,
    popularity: str | Path | None = None,
    random_weights: bool = False,
    num_layers: int | None = None,
    seed: int = 0,
    host_kernels: bool = True,
    activation_bits: int | None = None,
    threads: int = 0,
    policy: str | Policy = "auto",
    engine: EngineChoice | None = None,
    tokens_per_call: int | None = None,
    misses: MissesChoice | None = None,
    device_memory_gib: float | None = None,
    context: int | None = None,
    record_routing: bool = False,
    timeline: Timeline | None = None,
    link_gb_per_s: float | None = None,
    link_latency_us: float = 0.0,
    host_gb_per_s: float | None = None,
    hardware: str | None = None,
    recalibrate: bool = False,
    device: jax.Device | None = None,
    revision: str | None = None,
    progress: bool = False,
) -> LLM:
    """Loads a model.

    Args:
      model: a directory in Hugging Face format, or a hub id ("org/name"), which is found in
        the local hub cache or downloaded; a store made by scripts/convert.py; or an Orbax
        checkpoint (``save_checkpoint``). None is the small model inside the package.
      dtype: of arithmetic and of weights that are not quantized: "float32", "bfloat16", or
        "auto", which is bfloat16 on an accelerator; on the CPU backend float32 if that fits
        into free memory, else bfloat16.
      quant: formats of the weights: a preset such as "attn4-experts4", or components with
        their formats (``quant.spec.parse_spec``). None leaves them as they are. A converted
        store has its formats; another one than that is refused.
      method: how to quantize: "hqq", or "rtn" (round to nearest), which is faster.
      host_memory: of a converted store: "mmap" maps its files, "ram" reads them into
        memory of its own, "auto" is ram if there is room.
      read_ahead: of experts in mapped files: read those that are predicted before they are needed.
      lock_memory_gib: of experts in mapped files: so much of them is kept in memory, of those that
        are used most. None is a share of what is free if they do not all fit, else nothing.
      popularity: file of recorded routing (``LLM.routing``) that says which ones those are to begin
        with; without it that is learnt from use. By the policy offload these experts also get the
        slots on the device that are free, before anything is generated.
      random_weights: fill the shape of a known model ("mixtral-8x7b") or of a config.json
        with random weights instead, with the embedded model's tokenizer.
      num_layers: with random weights: instead of the shape's own number.
      seed: of random weights.
      host_kernels: on the CPU backend compute with the kernels of ``jmoe.native``, if they were
        built; False computes through XLA.
      activation_bits: of activations that meet weights in few bits in those kernels: 24 is as
        exact as float32; 8, the default, is the fastest.
      threads: of those kernels; 0 takes all that XLA has.
      policy: "resident": all weights on the device; "offload": experts in host memory, and as many
        as there is room for on the device; "host": everything on the CPU; "auto": resident if
        that fits, else offload, by the engine and with the misses that turn out to be the fastest.
        Or a Policy, or the name of a file with one.
      engine: with the policy offload, what takes decode steps: "thread", the host layer by layer,
        with a thread that copies experts, which is the default; "compiled", one program that finds
        and fetches experts itself; "auto", the faster of both on the first tokens.
      tokens_per_call: that the engine compiled makes at once; 1 is the default.
      misses: with the policy offload, what becomes of experts that are needed and not on the
        device: "load" copies them, which is the default; "host" computes them on the host; "split"
        does both at once, so that both end together; "auto" tries which is the fastest.
      device_memory_gib: device memory to use, for weights, KV cache, workspace and experts. None
        has no end on the CPU backend, and is most of what is free on an accelerator.
      context: positions to plan for, prompt and new tokens; 1,024 if the model has so many. A
        batch that needs more or less has a plan of its own.
      record_routing: keep which experts all tokens use, for ``LLM.routing``.
      timeline: where to enter copies, waits and layers; with the policy offload.
      link_gb_per_s: holds copies to the device to this speed, in 10^9 bytes per second: for
        experiments on a machine without an accelerator.
      link_latency_us: what each copy takes besides then, in microseconds.
      host_gb_per_s: likewise holds the host to reading experts at this speed when it computes.
      hardware: what this machine can do, if missing experts may be computed on the host: a file of
        scripts/hardware.py, or a preset. None is what was measured before, or measures it now, in
        a few seconds.
      recalibrate: measure it in any case.
      device: where to run; JAX's default device if None.
      revision: branch, tag or commit of a hub id.
      progress: show a bar on stderr while weights are read, if that is a terminal.

    Raises:
      ConfigError: the model's configuration is unreadable or not supported.
      CheckpointError: files are missing, damaged, or do not belong to this configuration.
      CapacityError: the weights do not fit into memory.
      RequestError: arguments contradict each other.
    """
    options = LoadOptions(
        dtype=dtype,
        quant=quant,
        method=method,
        host_memory=host_memory,
        read_ahead=read_ahead,
        lock_memory_gib=lock_memory_gib,
        popularity=popularity,
        random_weights=random_weights,
        num_layers=num_layers,
        seed=seed,
        host_kernels=host_kernels,
        activation_bits=activation_bits,
        threads=threads,
        revision=revision,
        progress=progress,
        policy=policy,
        engine=engine,
        tokens_per_call=tokens_per_call,
        misses=misses,
        device_memory_gib=device_memory_gib,
        context=context,
        record_routing=record_routing,
        timeline=timeline,
        link_gb_per_s=link_gb_per_s,
        link_latency_us=link_latency_us,
        host_gb_per_s=host_gb_per_s,
        hardware=hardware,
        recalibrate=recalibrate,
    )
    stopwatch = Stopwatch()
    with stopwatch:
        found = find_model(model, options, device)
        tokenizer = Tokenizer.load(found.directory, vocab_size=found.config.vocab_size)
        defaults = GenerationDefaults.load(found.directory, found.config_json)
        made, notes = found.build()
    return LLM(
        name=found.name,
        directory=found.directory,
        tokenizer=tokenizer,
        defaults=defaults,
        engine=made,
        plan=found.plan,
        notes=notes,
        config_json=found.config_json,
        load_s=stopwatch.seconds,
    )
