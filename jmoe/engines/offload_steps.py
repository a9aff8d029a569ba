"""A batch in the offload engine: prompts layer by layer, then decode steps in one of two ways."""

import dataclasses
import time
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.engines import layer_programs
from jmoe.engines.blank_experts import BlankExperts
from jmoe.engines.compiled_decoder import CompiledDecoder
from jmoe.engines.contest import Contest, EngineName, Way, engine_of
from jmoe.engines.forecast import Choices, forecasts_s, last_steps, replay_s
from jmoe.engines.prediction import Predictor, Recall
from jmoe.engines.programs import DecodeState, temporary_bytes
from jmoe.engines.prompt_stream import PromptStream
from jmoe.engines.steps import BatchShape, Decoder, Ending, Sampling
from jmoe.engines.thread_decoder import ThreadDecoder
from jmoe.errors import RequestError
from jmoe.metrics import ResidencyStats, Traffic
from jmoe.models import kv_cache
from jmoe.models.kv_cache import KVCache
from jmoe.planning.memory import device_memory
from jmoe.planning.traces import TraceRecorder
from jmoe.residency.host_experts import HostCounters

if TYPE_CHECKING:
    from jmoe.engines.offload import OffloadEngine


class OffloadSteps:
    """See ``steps.Steps``."""

    def __init__(
        self,
        model: "OffloadEngine",
        shape: BatchShape,
        recorder: TraceRecorder | None = None,
        predictor: Predictor | None = None,
        contest: Contest | None = None,
    ):
        """Args:
        model: whose experts nobody else uses until ``close``.
        shape: of the batch.
        recorder: told which experts were chosen.
        predictor: of experts; None takes what the routers say.
        contest: between both engines, that goes on in this batch.
        """
        self._model = model
        self._shape = shape
        self._recorder = recorder
        self._contest = contest
        self._predictor = predictor
        self._decoders: dict[EngineName, Decoder] = {}
        engines = {engine_of(way) for way in (model.decodes_by, *(contest.ways if contest else ()))}
        if "thread" in engines:
            self._decoders["thread"] = self._by_thread()
        if "compiled" in engines:
            self._decoders["compiled"] = self._by_program()
        self.runs_ahead = contest is None and self._decoder.runs_ahead
        self._recall = Recall(model.lookahead, model.num_predicted)
        self._prefill = self._decode = Traffic.none()
        self._since = model.places.counts()
        self._host_since = HostCounters()
        if model.hybrid is not None:
            self._host_since = model.hybrid.host.counters.snapshot()
        # Numbers of the batch's sequences in the record.
        self._recorded = [recorder.begin() for _ in range(shape.batch_size)] if recorder else []
        self._forecasts_s: dict[Way, float] = {}  # of a token
        # After the prompts: their tokens in the last chunk, and what is on the device.
        self._in_last: list[int] = []
        self._held: dict[int, list[int]] | None = None
        self._tried: list[Choices] = []  # what the tokens of the contest chose
        self._ended = False
        self._workspace_bytes = 0  # until the programs are compiled
        self._residency: ResidencyStats | None = None
        # While the caller keeps it, it is on the device.
        self._state: weakref.ref[DecodeState] | None = None

    def _by_thread(self) -> Decoder:
        return ThreadDecoder(self._model, self._shape, self._predictor)

    def _by_program(self) -> Decoder:
        num_tokens = self._model.plan.policy.tokens_per_call
        return CompiledDecoder(self._model, self._shape, num_tokens)

    @property
    def _decoder(self) -> Decoder:
        return self._decoders[engine_of(self._model.decodes_by)]

    def prepare(
        self, lengths_B: jax.Array, active_B: jax.Array, sampling: Sampling, ending: Ending
    ) -> None:
        model, shape = self._model, self._shape
        self._sampling = sampling
        cache = kv_cache.init_cache(
            model.config, shape.num_prompts, shape.capacity, model.dtype, model.device
        )
        self._caches = list(cache.layers)
        self._stream = PromptStream(model, shape.num_prompts, self._caches, model.hybrid)
        before = model.programs.num_compiled
        model.last_programs.clear()
        self._compile_prompts(lengths_B)
        arguments = (self._compile_cache(cache), active_B, sampling, ending)
        if "thread" in self._decoders:  # whose programs do not depend on the number of slots
            self._decoders["thread"].compile(*arguments)
        self._fit()
        for _ in range(2):  # for the slots that there are now, and once more if that leaves fewer
            if "compiled" in self._decoders and model.places.static is not None:
                self._decoders["compiled"].compile(*arguments)
            if self._find_workspace_bytes() <= self._workspace_bytes:
                break
            self._fit()
        if model.places.static is None and "compiled" in self._decoders:
            # What the programs leave is too little for one: it goes by the thread engine.
            if self._contest is not None:
                self._contest.drop("compiled")
            if "thread" not in self._decoders:
                self._decoders["thread"] = self._by_thread()
                self._decoders["thread"].compile(*arguments)
            del self._decoders["compiled"]
        untimed = model.host_side is not None and shape.batch_size not in model.step_s
        if model.programs.num_compiled > before or (untimed and "thread" in self._decoders):
            self._warm_up(active_B)

    def _fit(self) -> None:
        """Fits slots into what the programs leave of the budget."""
        self._workspace_bytes = self._find_workspace_bytes()
        self._model.fit(self._shape, self._workspace_bytes)

    def _compile_cache(self, cache: KVCache) -> KVCache:
        """Compiles what makes the KV cache of decode steps from that of prompts, if they differ.

        Returns:
          That of decode steps, or its shape.
        """
        return cache

    def _compile_prompts(self, lengths_B: jax.Array) -> None:
        model, shape = self._model, self._shape
        batch_size, hidden = shape.num_prompts, model.config.hidden_size
        hidden_BD = model.abstract((batch_size, hidden), model.dtype)
        top_k = model.config.router.top_k
        self._hidden = {}
        for size in set(shape.chunks):
            self._stream.compile(size)
            y_AD = model.abstract((batch_size * size * top_k + 1, hidden), "float32")
            self._hidden[size] = model.program(
                layer_programs.prompt_hidden,
                model.abstract_routed(batch_size, size),
                y_AD,
                model.ends,
                lengths_B,
                hidden_BD,
                layer=0,
            )
        self._compile_first(hidden_BD, lengths_B)

    def _compile_first(self, hidden_BD: jax.ShapeDtypeStruct, lengths_B: jax.Array) -> None:
        model, shape = self._model, self._shape
        self._first_tokens = model.program(
            layer_programs.first_tokens,
            model.ends,
            hidden_BD,
            lengths_B,
            model.abstract_seen(shape.batch_size, shape.kind),
            *self._sampling,
            layer=0,
            kind=shape.kind,
        )

    def _first(
        self, hidden_BD: jax.Array, lengths_B: jax.Array, seen_BV: jax.Array | None
    ) -> tuple[DecodeState, jax.Array]:
        """Behind the prompts: the state that decode steps begin with, and the first tokens."""
        token_ids_B, seen_BV = self._first_tokens(
            self._model.ends, hidden_BD, lengths_B, seen_BV, *self._sampling
        )
        cache, self._caches = KVCache(tuple(self._caches)), []
        return DecodeState(cache, lengths_B, token_ids_B, seen_BV), token_ids_B

    def _warm_up(self, active_B: jax.Array) -> None:
        """Runs the programs once, with experts of zeros: backends finish a program then.

        What that leaves in the KV cache is overwritten before it is read.
        """
        model, batch_size = self._model, self._shape.num_prompts
        blanks = BlankExperts(model)
        lengths_B = model.put(np.ones(batch_size, np.int32))
        hidden_BD = self._empty_hidden()
        for size in set(self._shape.chunks):
            tokens_BL = model.put(np.zeros((batch_size, size), np.int32))
            start_B = model.put(np.zeros(batch_size, np.int32))
            valid_BL = model.put(np.ones((batch_size, size), bool))
            routed, y_AD = self._stream.run(
                blanks, self._caches, tokens_BL, start_B, valid_BL, every_bucket=True
            )
            hidden_BD = self._hidden[size](routed, y_AD, model.ends, lengths_B, hidden_BD)
        seen_BV = None
        if self._shape.kind.penalized:
            seen_BV = model.put(np.zeros((batch_size, model.config.vocab_size), bool))
        state, _ = self._first(hidden_BD, lengths_B, seen_BV)
        self._warm_up_steps(state, active_B)
        self._stream.forget()

    def _warm_up_steps(self, state: DecodeState, active_B: jax.Array) -> None:
        state = self._decoder.warm_up(state, active_B)  # of a contest the other one comes later
        self._caches = list(state.cache.layers)

    def prefill(
        self, padded_BL: np.ndarray, lengths_B: jax.Array, seen_BV: jax.Array | None
    ) -> tuple[DecodeState, jax.Array]:
        self._check_open()
        model = self._model
        model.places.begin()
        self._count()
        lengths = np.asarray(lengths_B)
        hidden_BD, caches, start = self._empty_hidden(), self._caches, 0
        for size in self._shape.chunks:
            valid_BL = start + np.arange(size) < lengths[:, None]
            routed, y_AD = self._stream.run(
                model.places.supply,
                caches,
                model.put(padded_BL[:, start : start + size]),
                model.put(np.full(len(lengths), start, np.int32)),
                model.put(valid_BL),
            )
            last_B = model.put((lengths - 1 - start).astype(np.int32))
            hidden_BD = self._hidden[size](routed, y_AD, model.ends, last_B, hidden_BD)
            self._record_prompt(valid_BL)
            start += size
        state, token_ids_B = self._first(hidden_BD, lengths_B, seen_BV)
        token_ids_B.block_until_ready()
        self._prefill = self._count()
        self._prepare_forecast(lengths)
        self._state = weakref.ref(state)
        return state, token_ids_B

    def _prepare_forecast(self, lengths: np.ndarray) -> None:
        """Keeps what forecasts are made from, after prompts of these lengths."""
        if self._model.host_side is None:
            return
        *before, last = self._shape.chunks
        self._in_last = np.clip(lengths - sum(before), 0, last).tolist()
        self._held = self._model.places.held()

    def _forecast_s(self, ways: Iterable[Way]) -> dict[Way, float]:
        """Seconds of a decode step in these ways, as far as they can be predicted."""
        missing: list[Way] = [way for way in ways if way not in self._forecasts_s]
        if self._held is not None and missing:
            model, shape, choices = self._model, self._shape, self._stream.choices
            steps = last_steps(choices, self._in_last, shape.num_prompts, num_beams=shape.num_beams)
            self._forecasts_s |= forecasts_s(model, shape.batch_size, missing, steps, self._held)
        return self._forecasts_s

    def _record_prompt(self, valid_BL: np.ndarray) -> None:
        if self._recorder is not None:
            chosen_TLK = self._stream.chosen_LTK.swapaxes(0, 1)
            chosen_BLLK = chosen_TLK.reshape(*valid_BL.shape, *chosen_TLK.shape[1:])
            for sequence, chosen, valid_L in zip(
                self._recorded[:: self._shape.num_beams], chosen_BLLK, valid_BL, strict=True
            ):
                self._recorder.add_prompt(chosen[valid_L], sequence)

    def step(
        self, state: DecodeState, active_B: jax.Array
    ) -> tuple[DecodeState, jax.Array | np.ndarray]:
        self._check_open()
        contest = self._contest
        if contest is not None and not contest.turns and not contest.is_over:
            contest.predict(self._forecast_s(contest.ways))
        self._change_engine()
        start = time.perf_counter()
        state, token_ids_B, choices_LNTW = self._decoder.step(state, active_B)
        self._state = weakref.ref(state)
        if contest is not None and not contest.is_over:
            jax.block_until_ready(token_ids_B)
            self._note_time(contest, time.perf_counter() - start, choices_LNTW)
        if choices_LNTW is not None:
            self._note_choices(choices_LNTW)
        return state, token_ids_B

    def _note_time(self, contest: Contest, seconds: float, choices_LNTW: np.ndarray | None) -> None:
        """Enters a token's time into the contest, which that may end."""
        if choices_LNTW is not None:
            self._tried.append(list(choices_LNTW))
        contest.note(seconds)
        if not contest.is_over:
            return
        held, tried = self._held, self._tried  # fewer than turns if it began in another batch
        if held is not None and len(tried) == len(contest.turns) and contest.is_close:
            model, size = self._model, self._shape.batch_size
            as_made = replay_s(model, size, contest.turns, tried, held)
            by_way: dict[Way, list[float]] = {
                way: replay_s(model, size, way, tried, held) for way in contest.ways
            }
            if as_made:
                contest.even_out(as_made, by_way)
                contest.reconsider()
        if contest.is_over:
            self._tried = []

    def _change_engine(self) -> None:
        """Lets the other engine go on if it is its turn, and this one has nothing in hand."""
        model, contest = self._model, self._contest
        if contest is None or contest.running == model.decodes_by or self._decoder.num_waiting:
            return
        self._decode += self._count()
        model.decode_by(contest.running)
        self._count()  # without what was moved for this

    def _note_choices(self, choices_LNTW: np.ndarray) -> None:
        chosen_LTK = choices_LNTW[:, 0, :, : self._model.config.router.top_k]
        predicted_LNTW = choices_LNTW[:, 1:]
        if predicted_LNTW.shape[1]:
            self._recall.add(chosen_LTK, predicted_LNTW)
        if self._recorder is not None:
            for t, sequence in enumerate(self._recorded):
                if chosen_LTK[0, t, 0] >= 0:
                    self._recorder.add_decode(chosen_LTK[:, t], predicted_LNTW[:, :, t], sequence)

    def residency(self) -> ResidencyStats:
        return self._residency or self._stats()

    def _count(self) -> Traffic:
        """What happened since this was asked last."""
        since, self._since = self._since, self._model.places.counts()
        traffic = self._since - since
        if (hybrid := self._model.hybrid) is None:
            return traffic
        since, self._host_since = self._host_since, hybrid.host.counters.snapshot()
        host = self._host_since - since
        return dataclasses.replace(
            traffic, host_experts=host.experts, host_bytes=host.bytes, host_busy_s=host.busy_s
        )

    def _stats(self) -> ResidencyStats:
        model = self._model
        self._decode += self._count()
        policy = model.plan.policy
        return ResidencyStats(
            engine=engine_of(model.decodes_by),
            way=model.decodes_by,
            engine_reason=model.engine_reason(self._shape.batch_size),
            prefill=self._prefill,
            decode=self._decode,
            decode_by_layer=model.places.counts_by_layer(),
            predicted_step_s=self._forecast_s([model.decodes_by]).get(model.decodes_by),
            resident_step_s=model.step_s.get(self._shape.batch_size),
            recall=self._recall.rates(),
            num_slots=policy.num_slots,
            num_staging=policy.num_staging,
            peak_places=model.places.peak_places,
            expert_bytes=model.layout.num_bytes,
            peak_device_bytes=self._peak_bytes(),
        )

    def _peak_bytes(self) -> int:
        """What the device reports; else what is held, and the programs' own temporaries."""
        model, shape = self._model, self._shape
        reported = device_memory(model.device).peak_bytes
        if reported is not None:
            return reported
        experts_bytes = model.places.peak_places * model.layout.num_bytes
        kv_bytes = kv_cache.cache_bytes(model.config, shape.batch_size, shape.capacity, model.dtype)
        return model.parameter_bytes + experts_bytes + kv_bytes + self._workspace_bytes

    def _find_workspace_bytes(self) -> int:
        """Temporaries of the largest program, and what is handed from one to the next."""
        model, shape = self._model, self._shape
        tokens = max(shape.num_prompts * max(shape.chunks), shape.batch_size)
        hidden, item_bytes = model.config.hidden_size, jnp.dtype(model.dtype).itemsize
        outputs = (tokens * model.config.router.top_k + 1) * hidden * 4
        states = 2 * 2 * tokens * hidden * item_bytes
        return max(map(temporary_bytes, model.last_programs)) + outputs + states

    def end(self) -> None:
        self._ended, self._caches = True, []

    def close(self) -> None:
        if not self._ended:  # else the experts may be another batch's by now
            self.end()
            self._model.places.settle()
            self._residency = self._stats()

    def free(self) -> None:
        """Frees the KV cache of a batch that has ended, although its caller still has it.

        Before another one begins: from here on the counters are that one's.
        """
        self._residency = self.residency()
        state = self._state and self._state()
        for array in jax.tree.leaves(state and state.cache):
            if not array.is_deleted():
                array.delete()

    def _check_open(self) -> None:
        if self._ended:
            raise RequestError(
                "this generation has ended",
                got="another one was started with the same model, or it was closed",
                expected="one at a time, with the policy offload",
                do="finish one before the next, give all prompts at once, or load the model with "
                "the policy resident",
            )

    def _empty_hidden(self) -> jax.Array:
        model = self._model
        shape = (self._shape.num_prompts, model.config.hidden_size)
        return model.put(np.zeros(shape, jnp.dtype(model.dtype)))
