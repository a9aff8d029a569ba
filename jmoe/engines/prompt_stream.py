"""Prompts through a model whose experts come and go: a layer at a time, an expert at a time.

Many tokens use nearly every expert of a layer. So tokens are grouped by expert, and each expert is
applied to its tokens when it is on the device, while others are on their way. What is there already
is not moved; what the prompt used most stays for the decode steps after it.
"""

from collections.abc import Sequence

import jax
import numpy as np

from jmoe.engines import layer_programs
from jmoe.engines.expert_model import ExpertModel, PromptSupply
from jmoe.engines.layer_experts import Hybrid
from jmoe.engines.prediction import by_votes
from jmoe.models.kv_cache import LayerCache

MIN_ROWS = 16
# What an earlier chunk used counts half as much as the next one, for what stays on the device.
CHUNK_DECAY = 0.5


class PromptStream:
    """Takes chunks of prompts, of so many positions, through all layers.

    Attributes:
      chosen_LTK: experts chosen in the last chunk, int32, -1 for padding.
      choices: by layer of the last chunk what ``layer_programs.first_layer`` returns for the host.
    """

    def __init__(
        self,
        model: ExpertModel,
        batch_size: int,
        caches: Sequence[LayerCache],
        hybrid: Hybrid | None = None,
    ):
        """Args:
        model: to go through.
        batch_size: prompts.
        caches: by layer, for their shapes.
        hybrid: computes experts on the host; None if the device computes all.
        """
        self.chosen_LTK = np.zeros((0, 0, 0), np.int32)
        self.choices: list[np.ndarray] = []
        self._model = model
        self._hybrid = hybrid
        self._batch_size = batch_size
        self._caches = caches
        self._programs: dict[int, _ChunkPrograms] = {}
        num_experts = model.config.router.num_experts
        self._counts_LE = np.zeros((model.num_layers, num_experts))

    def compile(self, size: int) -> None:
        """Compiles the programs for chunks of so many positions."""
        if size not in self._programs:
            self._programs[size] = _ChunkPrograms(
                self._model, self._batch_size, size, self._caches, self._hybrid
            )

    def forget(self) -> None:
        """Forgets what was used so far."""
        self._counts_LE[...] = 0

    def run(
        self,
        experts: PromptSupply,
        caches: list[LayerCache],
        token_ids_BL: jax.Array,
        start_B: jax.Array,
        valid_BL: jax.Array,
        *,
        every_bucket: bool = False,
    ) -> tuple[layer_programs.Routed, jax.Array]:
        """Takes a chunk through all layers.

        Args:
          experts: where they come from.
          caches: by layer; donated, and replaced by the new ones.
          token_ids_BL: the tokens, of a size that was compiled.
          start_B: position of the first one.
          valid_BL: which are no padding.
          every_bucket: run the programs for all numbers of rows, too.

        Returns:
          The last layer's state, and the outputs of its experts by assignment.
        """
        model = self._model
        programs = self._programs[token_ids_BL.shape[1]]
        self._counts_LE *= CHUNK_DECAY
        y_AD = model.zeros(programs.y_AD)
        routed, caches[0], choices = programs.first(
            model.ends, model.layers[0], model.ahead(0), caches[0], token_ids_BL, start_B, valid_BL
        )
        if every_bucket:
            y_AD = programs.run_every_bucket(experts, routed, y_AD)
        chosen, all_choices = [], []
        for layer in range(model.num_layers):
            choices_NTW = np.asarray(choices)
            all_choices.append(choices_NTW)
            chosen.append(choices_NTW[0, :, : model.config.router.top_k])
            y_AD = self._apply_experts(
                experts, layer, choices_NTW, routed, y_AD, programs, is_rehearsal=every_bucket
            )
            if layer + 1 < model.num_layers:
                routed, caches[layer + 1], choices = programs.next[layer](
                    routed,
                    y_AD,
                    model.layers[layer + 1],
                    model.ahead(layer + 1),
                    caches[layer + 1],
                    start_B,
                    valid_BL,
                )
        self.chosen_LTK = np.stack(chosen)
        self.choices = all_choices
        return routed, y_AD

    def _apply_experts(
        self,
        experts: PromptSupply,
        layer: int,
        choices_NTW: np.ndarray,
        routed: layer_programs.Routed,
        y_AD: jax.Array,
        programs: "_ChunkPrograms",
        is_rehearsal: bool,
    ) -> jax.Array:
        model, hybrid = self._model, self._hybrid
        rows = rows_by_expert(choices_NTW[0, :, : model.config.router.top_k])
        counts_E = self._counts_LE[layer]
        for expert, rows_R in rows.items():
            counts_E[expert] += len(rows_R)
        wanted = sorted(np.flatnonzero(counts_E).tolist(), key=lambda e: -counts_E[e])
        y = y_AD

        def fence() -> None:
            y.block_until_ready()

        on_host, job, prefetches = [], None, True
        if hybrid is not None and not is_rehearsal:
            tokens = [len(rows_R) for rows_R in rows.values()]
            ways = hybrid.splitter.split(experts, layer, list(rows), tokens, is_prompt=True)
            on_host, prefetches = ways.host, bool(ways.coming)
        if on_host:
            assert hybrid is not None
            hybrid.compute.expect(layer, on_host)
            work_on_host = programs.prepare_host({e: rows[e] for e in on_host})
            job = hybrid.host.start(layer, routed.normed_TD, *work_on_host)
        # Least used first: what is kept is what came last, and so the most recent.
        order = sorted(rows.keys() - set(on_host), key=lambda e: counts_E[e])
        # Before the experts: copies to a GPU come one after another.
        work = {expert: programs.prepare(rows[expert]) for expert in order}
        ahead = []
        if layer + 1 < model.num_layers and len(choices_NTW) > 1:
            ahead = [(layer + 1, by_votes(choices_NTW[1]))]
        for expert, blob, all_started in experts.stream(layer, order, wanted, fence):
            if all_started and prefetches:
                experts.predict(ahead, fence)
            rows_R, apply = work[expert]
            y = apply(blob, rows_R, routed, y)
            del blob  # or it would outlive its place
        if job is not None:
            assert hybrid is not None
            experts.foresee(ahead)
            y = programs.enter(hybrid.host.wait(job), job.rows_R, y)
            if hybrid.splitter.slots_pay:
                experts.fill(layer, wanted)
        fence()
        return y


class _ChunkPrograms:
    """What is compiled for chunks of one size."""

    def __init__(
        self,
        model: ExpertModel,
        batch_size: int,
        size: int,
        caches: Sequence[LayerCache],
        hybrid: Hybrid | None,
    ):
        config = model.config
        self._put = model.put
        routed = model.abstract_routed(batch_size, size)
        start_B = model.abstract((batch_size,), "int32")
        valid_BL = model.abstract((batch_size, size), "bool")
        self._num_assignments = batch_size * size * config.router.top_k
        self.y_AD = model.abstract((self._num_assignments + 1, config.hidden_size), "float32")
        self.first = model.program(
            layer_programs.first_layer,
            model.ends,
            model.layers[0],
            model.ahead(0),
            caches[0],
            model.abstract((batch_size, size), "int32"),
            start_B,
            valid_BL,
            layer=0,
        )
        self.next = [
            model.program(
                layer_programs.next_prompt_layer,
                routed,
                self.y_AD,
                model.layers[layer],
                model.ahead(layer),
                caches[layer],
                start_B,
                valid_BL,
                layer=layer,
            )
            for layer in range(1, model.num_layers)
        ]
        self._enter = {}
        if hybrid is not None:
            for num_rows in row_buckets(self._num_assignments):
                hybrid.compute.compile(batch_size * size, num_rows)
                self._enter[num_rows] = model.program(
                    layer_programs.enter_rows,
                    model.abstract((num_rows, config.hidden_size), "float32"),
                    model.abstract((num_rows,), "int32"),
                    self.y_AD,
                    layer=0,
                )
        self._rows = {
            num_rows: model.program(
                layer_programs.expert_rows,
                model.abstract_blob(),
                model.abstract((num_rows,), "int32"),
                routed,
                self.y_AD,
                layer=0,
            )
            for num_rows in row_buckets(batch_size * size)
        }

    def prepare_host(self, rows: dict[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Assignments of the host's experts filled up to a bucket, and the expert of each."""
        num_rows = bucket_rows(sum(map(len, rows.values())))
        rows_R = np.full(num_rows, self._num_assignments, np.int32)
        ids_R = np.full(num_rows, -1, np.int32)
        first = 0
        for expert, some_R in rows.items():
            rows_R[first : first + len(some_R)] = some_R
            ids_R[first : first + len(some_R)] = expert
            first += len(some_R)
        return rows_R, ids_R

    def enter(self, out_RD: np.ndarray, rows_R: np.ndarray, y_AD: jax.Array) -> jax.Array:
        """Enters what the host computed."""
        return self._enter[len(rows_R)](self._put(out_RD), self._put(rows_R), y_AD)

    def prepare(self, rows_R: np.ndarray) -> tuple[jax.Array, jax.stages.Compiled]:
        """Assignments of an expert filled up to a bucket, on the device; the program for that."""
        num_rows = bucket_rows(len(rows_R))
        padded_R = np.full(num_rows, self._num_assignments, np.int32)
        padded_R[: len(rows_R)] = rows_R
        return self._put(padded_R), self._rows[num_rows]

    def run_every_bucket(
        self, experts: PromptSupply, routed: layer_programs.Routed, y_AD: jax.Array
    ) -> jax.Array:
        ((_, blob, _),) = experts.stream(0, [0], (), lambda: None)
        for num_rows, apply in self._rows.items():
            rows_R = self._put(np.full(num_rows, self._num_assignments, np.int32))
            y_AD = apply(blob, rows_R, routed, y_AD)
        for num_rows in self._enter:
            rows_R = np.full(num_rows, self._num_assignments, np.int32)
            y_AD = self.enter(np.zeros((num_rows, y_AD.shape[1]), np.float32), rows_R, y_AD)
        return y_AD


def rows_by_expert(chosen_TK: np.ndarray) -> dict[int, np.ndarray]:
    """Assignments t * K + k of every expert that is used, int32 ascending; -1 is no expert."""
    flat = chosen_TK.ravel()
    order = np.argsort(flat, kind="stable").astype(np.int32)
    experts, firsts = np.unique(flat[order], return_index=True)
    parts = np.split(order, firsts[1:])
    pairs = zip(experts.tolist(), parts, strict=True)
    return {expert: rows for expert, rows in pairs if expert >= 0}


def bucket_rows(num_rows: int) -> int:
    """Rows that a program for so many tokens of an expert has: a power of two."""
    return max(MIN_ROWS, 1 << (num_rows - 1).bit_length())


def row_buckets(num_tokens: int) -> list[int]:
    """All that a chunk of so many tokens may need."""
    largest = bucket_rows(num_tokens)
    return [1 << i for i in range(MIN_ROWS.bit_length() - 1, largest.bit_length())]
