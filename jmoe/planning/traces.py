"""RoutingTrace: which experts the tokens of real runs used."""

import dataclasses
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import numpy as np

from jmoe.config import ModelConfig
from jmoe.errors import CheckpointError, RequestError
from jmoe.store.safetensors_writer import write_file

MAX_EXPERTS = 1 << 15  # predictions are int16

_ZIP = b"PK\x03\x04"
_REQUIRED = ("decode_expert_ids", "decode_offsets")
_DO = "name a file that --record_routing wrote, or record it again"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutingTrace:
    """Experts by token, layer and rank, of one sequence after another.

    Letters: T decode tokens, P prompt tokens, L layers, K experts of a token, n sequences, N
    distances, W predictions.

    Attributes:
      decode_expert_ids: unsigned [T, L, K], best first; distinct for each token and layer.
      decode_offsets: int64 [n + 1]; sequence i has rows offsets[i] to offsets[i + 1].
      prompt_expert_ids: unsigned [P, L, K], likewise.
      prompt_offsets: int64 [n + 1]; a sequence may have no rows.
      num_experts: per layer; None is as many as the ids show.
      predictions: None, or int16 [T, L, N, W]: what was predicted for a layer, best first, by the
        one d + 1 layers before it at index d; -1 for none.

    Raises RequestError if the arrays do not fit together.
    """

    decode_expert_ids: np.ndarray
    decode_offsets: np.ndarray
    prompt_expert_ids: np.ndarray
    prompt_offsets: np.ndarray
    num_experts: int = None  # type: ignore[assignment]  (chosen below)
    predictions: np.ndarray | None = None

    def __post_init__(self):
        decode, prompt = self.decode_expert_ids, self.prompt_expert_ids
        for name, ids in (("decode_expert_ids", decode), ("prompt_expert_ids", prompt)):
            fits = ids.ndim == 3 and ids.dtype.kind == "u" and ids.shape[1] * ids.shape[2] > 0
            _require(fits, name, _form(ids), "unsigned [tokens, layers, experts per token]")
        _require(
            decode.shape[1:] == prompt.shape[1:],
            "prompt_expert_ids",
            _form(prompt),
            f"{decode.shape[1]} layers and {decode.shape[2]} experts, as for decode_expert_ids",
        )
        most = max((int(ids.max()) for ids in (decode, prompt) if ids.size), default=0)
        if self.num_experts is None:
            object.__setattr__(self, "num_experts", max(most + 1, decode.shape[2]))
        num_experts = self.num_experts
        _require(0 < num_experts <= MAX_EXPERTS, "num_experts", num_experts, f"to {MAX_EXPERTS}")
        _require(most < num_experts, "expert ids", most, f"below {num_experts}")
        for name, ids in (("decode_expert_ids", decode), ("prompt_expert_ids", prompt)):
            ordered = np.sort(ids, axis=-1)
            twice = bool((ordered[..., 1:] == ordered[..., :-1]).any())
            _require(not twice, name, "an expert twice in a token", "distinct experts")
        lengths = (
            ("decode_offsets", self.decode_offsets, len(decode)),
            ("prompt_offsets", self.prompt_offsets, len(prompt)),
        )
        for name, offsets, length in lengths:
            fits = offsets.ndim == 1 and offsets.dtype.kind in "iu" and len(offsets) > 0
            _require(fits, name, _form(offsets), "integers [sequences + 1]")
            rises = bool((offsets[1:] >= offsets[:-1]).all())
            fits = rises and offsets[0] == 0 and offsets[-1] == length
            got = f"{offsets[0]} to {offsets[-1]}" if rises else "falling ones"
            _require(fits, name, got, f"rising from 0 to {length}, the number of tokens")
        num = len(self.decode_offsets)
        _require(len(self.prompt_offsets) == num, "prompt_offsets", len(self.prompt_offsets), num)
        if (predictions := self.predictions) is not None:
            fits = predictions.dtype == np.int16 and predictions.ndim == 4
            fits = fits and predictions.shape[:2] == decode.shape[:2]
            _require(fits, "predictions", _form(predictions), "int16 [tokens, layers, N, W]")
            low, high = int(predictions.min(initial=-1)), int(predictions.max(initial=-1))
            fits = low == -1 and high < num_experts
            _require(fits, "predictions", f"{low} to {high}", f"-1 to {num_experts - 1}")

    @property
    def num_tokens(self) -> int:
        """Decode tokens."""
        return len(self.decode_expert_ids)

    @property
    def num_layers(self) -> int:
        return self.decode_expert_ids.shape[1]

    @property
    def top_k(self) -> int:
        return self.decode_expert_ids.shape[2]

    @property
    def num_sequences(self) -> int:
        return len(self.decode_offsets) - 1

    def popularity(self, *, prompts: bool = False) -> np.ndarray:
        """How many tokens used each expert, of decoding or of prompts: int64 [L, E]."""
        ids = self.prompt_expert_ids if prompts else self.decode_expert_ids
        flat = ids + np.arange(self.num_layers)[:, None] * self.num_experts
        counts = np.bincount(flat.reshape(-1), minlength=self.num_layers * self.num_experts)
        return counts.reshape(self.num_layers, self.num_experts)

    def select(self, sequences: Iterable[int]) -> "RoutingTrace":
        """The trace of some sequences, in this order."""
        chosen = list(sequences)
        decode_rows, decode_offsets = _rows(self.decode_offsets, chosen)
        prompt_rows, prompt_offsets = _rows(self.prompt_offsets, chosen)
        return dataclasses.replace(
            self,
            decode_expert_ids=self.decode_expert_ids[decode_rows],
            decode_offsets=decode_offsets,
            prompt_expert_ids=self.prompt_expert_ids[prompt_rows],
            prompt_offsets=prompt_offsets,
            predictions=None if self.predictions is None else self.predictions[decode_rows],
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an npz file, or replaces it; at every moment it is complete (RequestError)."""
        path = Path(path)
        arrays = {
            field.name: np.asarray(value)
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        contents = io.BytesIO()
        np.savez_compressed(contents, **arrays)  # type: ignore[arg-type]
        try:
            write_file(path.parent, path.name, contents.getvalue())
        except OSError as error:
            raise RequestError(
                "the trace cannot be written",
                where=path,
                got=error.strerror,
                do="choose another file",
            ) from None

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, num_experts: int | None = None) -> Self:
        """Reads an npz file.

        Args:
          path: of ``save``; of the arrays only decode_expert_ids and decode_offsets must be there.
          num_experts: for a file that does not say it.

        Raises:
          CheckpointError: the file is missing, damaged, or something else.
        """
        path = Path(path)
        arrays = _read_arrays(path)
        for name in _REQUIRED:
            if name not in arrays:
                got = ", ".join(arrays) or "no arrays"
                raise _not_a_trace(path, got=got, expected=f"an array {name}")
        ids, offsets = (arrays[name] for name in _REQUIRED)
        known = arrays.get("num_experts")
        if known is not None and (known.shape or known.dtype.kind not in "iu"):
            raise _not_a_trace(path, got=f"num_experts: {_form(known)}", expected="one integer")
        try:
            return cls(
                decode_expert_ids=ids,
                decode_offsets=offsets,
                prompt_expert_ids=arrays.get("prompt_expert_ids", ids[:0]),
                prompt_offsets=arrays.get("prompt_offsets", np.zeros_like(offsets)),
                num_experts=num_experts if known is None else int(known),  # type: ignore[arg-type]
                predictions=arrays.get("predictions"),
            )
        except RequestError as error:
            raise _not_a_trace(path, got=error.got, expected=error.expected) from None


def read_trace_of(path: str | os.PathLike[str], config: ModelConfig) -> RoutingTrace:
    """Reads what was recorded of a model.

    Raises:
      CheckpointError: the file is missing, damaged, or something else.
      RequestError: it is of a model of another shape.
    """
    router = config.router
    trace = RoutingTrace.load(path, num_experts=router.num_experts)
    got = trace.num_layers, trace.num_experts, trace.top_k
    shape = config.num_hidden_layers, router.num_experts, router.top_k
    if got != shape:
        raise RequestError(
            "the recorded routing is of another model",
            where=path,
            got="{} layers of {} experts, top {}".format(*got),
            expected="{} layers of {} experts, top {}".format(*shape),
        )
    return trace


class TraceRecorder:
    """Collects what tokens use while a model runs; ``trace`` makes a RoutingTrace of it.

    Each entry is made in one instruction: so it is there or not, also after Ctrl-C.
    """

    def __init__(self, num_layers: int, num_experts: int, top_k: int):
        dtype = np.uint8 if num_experts <= 256 else np.uint16
        self._none = np.zeros((0, num_layers, top_k), dtype)
        self._num_experts = num_experts
        # By sequence: ids of pieces of its prompt; ids and predictions of its decode steps.
        self._sequences: list[
            tuple[list[np.ndarray], list[tuple[np.ndarray, np.ndarray | None]]]
        ] = []

    @property
    def num_tokens(self) -> int:
        """Of prompts and decode steps."""
        return sum(sum(map(len, pieces)) + len(steps) for pieces, steps in self._sequences)

    def begin(self) -> int:
        """Starts another sequence; returns its index."""
        self._sequences.append(([], []))
        return len(self._sequences) - 1

    def add_prompt(self, ids: np.ndarray, sequence: int = -1) -> None:
        """Enters a piece of a prompt: ids [tokens, L, K], of the sequence begun last or another."""
        self._sequences[sequence][0].append(np.array(ids, self._none.dtype))

    def add_decode(
        self, ids: np.ndarray, predicted: np.ndarray | None = None, sequence: int = -1
    ) -> None:
        """Enters one token of a decode step.

        Args:
          ids: [L, K].
          predicted: int [L, N, W], what each layer predicted for the N layers after it; -1 for
            none. What it predicts for layers beyond the last one is not looked at.
          sequence: index.
        """
        by_target = None if predicted is None else _by_target(np.asarray(predicted, np.int16))
        self._sequences[sequence][1].append((np.array(ids, self._none.dtype), by_target))

    def trace(self) -> RoutingTrace:
        """What was entered so far."""
        num_layers = self._none.shape[1]
        prompts = [np.concatenate([self._none, *pieces]) for pieces, _ in self._sequences]
        steps = [
            np.stack([ids for ids, _ in rows]) if rows else self._none
            for _, rows in self._sequences
        ]
        predicted = [row for _, rows in self._sequences for _, row in rows]
        shapes = [row.shape for row in predicted if row is not None]
        predictions = None
        if shapes:
            widest = (num_layers, max(s[1] for s in shapes), max(s[2] for s in shapes))
            predictions = np.full((len(predicted), *widest), -1, np.int16)
            for into, row in zip(predictions, predicted, strict=True):
                if row is not None:
                    into[:, : row.shape[1], : row.shape[2]] = row
        return RoutingTrace(
            decode_expert_ids=np.concatenate([self._none, *steps]),
            decode_offsets=np.cumsum([0, *map(len, steps)]),
            prompt_expert_ids=np.concatenate([self._none, *prompts]),
            prompt_offsets=np.cumsum([0, *map(len, prompts)]),
            num_experts=self._num_experts,
            predictions=predictions,
        )


def _by_target(made_LNW: np.ndarray) -> np.ndarray:
    """Predictions by the layer that they are for, from those by the layer that made them."""
    predicted_LNW = np.full_like(made_LNW, -1)
    for d in range(min(made_LNW.shape[1], len(made_LNW) - 1)):
        predicted_LNW[d + 1 :, d] = made_LNW[: len(made_LNW) - d - 1, d]
    return predicted_LNW


def _rows(offsets: np.ndarray, sequences: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of these sequences, and their new offsets."""
    rows = [np.arange(offsets[i], offsets[i + 1]) for i in sequences]
    return np.concatenate([np.arange(0), *rows]), np.cumsum([0, *map(len, rows)])


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as file:
            start = file.read(len(_ZIP))
            if start != _ZIP:
                raise _not_a_trace(path, got=f"a file that begins with {start}", expected="npz")
            file.seek(0)
            archive = np.load(file, allow_pickle=False)
            return {name: archive[name] for name in archive.files}
    except OSError as error:
        if error.strerror is None:  # zipfile's and numpy's own
            raise _not_a_trace(path, got=error, expected="npz") from None
        raise CheckpointError(
            "the trace cannot be read", where=path, got=error.strerror, do=_DO
        ) from None
    except CheckpointError:
        raise
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds for damaged files
        got = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _not_a_trace(path, got=got, expected="npz") from None


def _require(fits: bool, name: str, got: object, expected: object) -> None:
    if not fits:
        raise RequestError("this is no routing trace", got=f"{name}: {got}", expected=expected)


def _not_a_trace(path: Path, *, got: object, expected: object) -> CheckpointError:
    return CheckpointError(
        "this is no routing trace, or it is damaged", where=path, got=got, expected=expected, do=_DO
    )


def _form(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
