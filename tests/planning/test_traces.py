"""RoutingTrace: what it holds, recording, and files that are none."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.errors import CheckpointError, RequestError
from jmoe.planning.traces import RoutingTrace, TraceRecorder

LAYERS, EXPERTS, TOP_K = 3, 6, 2


def some_ids(num_tokens: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    order = generator.permuted(
        np.broadcast_to(np.arange(EXPERTS), (num_tokens, LAYERS, EXPERTS)), axis=-1
    )
    return order[..., :TOP_K].astype(np.uint8)


def small_trace(*, with_predictions: bool = False, **changes) -> RoutingTrace:
    """Three sequences of 4, 0 and 3 tokens, with prompts of 5, 2 and 0."""
    arrays = {
        "decode_expert_ids": some_ids(7, 0),
        "decode_offsets": np.array([0, 4, 4, 7]),
        "prompt_expert_ids": some_ids(7, 1),
        "prompt_offsets": np.array([0, 5, 7, 7]),
        "num_experts": EXPERTS,
        "predictions": np.full((7, LAYERS, 2, 3), -1, np.int16) if with_predictions else None,
    }
    return RoutingTrace(**(arrays | changes))


def equal(a: RoutingTrace, b: RoutingTrace) -> bool:
    names = ("decode_expert_ids", "decode_offsets", "prompt_expert_ids", "prompt_offsets")
    same = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)
    if a.predictions is None or b.predictions is None:
        same &= a.predictions is b.predictions
    else:
        same &= np.array_equal(a.predictions, b.predictions)
    return same and a.num_experts == b.num_experts


def test_a_trace_knows_its_numbers():
    trace = small_trace()
    sizes = (trace.num_tokens, trace.num_layers, trace.top_k, trace.num_sequences)
    assert sizes == (7, LAYERS, TOP_K, 3)
    for prompts in (False, True):
        counts = trace.popularity(prompts=prompts)
        ids = trace.prompt_expert_ids if prompts else trace.decode_expert_ids
        assert counts.shape == (LAYERS, EXPERTS)
        assert counts[1].tolist() == [int((ids[:, 1] == e).sum()) for e in range(EXPERTS)]


@pytest.mark.parametrize("predictions", [False, True])
def test_files_give_back_what_was_saved(tmp_path: Path, predictions: bool):
    trace, path = small_trace(with_predictions=predictions), tmp_path / "trace.npz"
    trace.save(path)
    first = path.read_bytes()
    loaded = RoutingTrace.load(path)
    assert equal(loaded, trace) and loaded.decode_expert_ids.dtype == np.uint8
    loaded.save(path)  # over the old one
    assert path.read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == ["trace.npz"]


def test_sequences_can_be_selected():
    trace = small_trace(with_predictions=True)
    part = trace.select([2, 0])
    ids = trace.decode_expert_ids
    assert np.array_equal(part.decode_expert_ids, np.concatenate([ids[4:], ids[:4]]))
    assert part.decode_offsets.tolist() == [0, 3, 7]
    assert part.prompt_offsets.tolist() == [0, 0, 5]
    assert equal(trace.select(range(3)), trace)
    assert trace.select([]).num_sequences == 0


def test_the_number_of_experts_can_be_left_out(tmp_path: Path):
    trace, path = small_trace(), tmp_path / "trace.npz"
    np.savez(path, decode_expert_ids=trace.decode_expert_ids, decode_offsets=trace.decode_offsets)
    loaded = RoutingTrace.load(path)
    assert loaded.num_experts == int(trace.decode_expert_ids.max()) + 1
    assert loaded.prompt_expert_ids.shape == (0, LAYERS, TOP_K)
    assert RoutingTrace.load(path, num_experts=64).num_experts == 64


def test_recording_by_sequences():
    trace = small_trace()
    recorder = TraceRecorder(LAYERS, EXPERTS, TOP_K)
    for _ in range(3):
        recorder.begin()
    recorder.add_prompt(trace.prompt_expert_ids[:3], 0)
    recorder.add_prompt(trace.prompt_expert_ids[5:], 1)
    recorder.add_prompt(trace.prompt_expert_ids[3:5], 0)
    for i in range(3):  # two sequences at once
        recorder.add_decode(trace.decode_expert_ids[i], sequence=0)
        recorder.add_decode(trace.decode_expert_ids[4 + i])
    recorder.add_decode(trace.decode_expert_ids[3], sequence=0)
    assert recorder.num_tokens == 14
    assert equal(recorder.trace(), trace)


def test_predictions_are_kept_by_the_layer_they_are_for():
    recorder = TraceRecorder(LAYERS, EXPERTS, TOP_K)
    recorder.begin()
    ids = some_ids(2, 0)
    # Layer l predicts 10 * l + d for distance d, of which it has two.
    predicted = np.array([[[10 * layer + d] for d in (1, 2)] for layer in range(LAYERS)])
    recorder.add_decode(ids[0], predicted % EXPERTS)
    recorder.add_decode(ids[1])
    predictions = recorder.trace().predictions
    assert predictions is not None and predictions.shape == (2, LAYERS, 2, 1)
    assert predictions[0, :, :, 0].tolist() == [[-1, -1], [1, -1], [11 % EXPERTS, 2]]
    assert (predictions[1] == -1).all()


def test_nothing_recorded_is_a_trace():
    assert TraceRecorder(LAYERS, 300, TOP_K).trace().num_tokens == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decode_expert_ids": some_ids(7, 0).astype(np.int64)}, "unsigned"),
        ({"decode_expert_ids": some_ids(7, 0)[0]}, "unsigned"),
        ({"prompt_expert_ids": some_ids(7, 0)[:, :2]}, "3 layers and 2 experts"),
        ({"num_experts": 4}, "below 4"),
        ({"num_experts": 0}, "num_experts"),
        ({"decode_expert_ids": np.zeros((7, LAYERS, TOP_K), np.uint8)}, "an expert twice"),
        ({"decode_offsets": np.array([0, 4, 4, 8])}, "0 to 8"),
        ({"decode_offsets": np.array([0, 5, 4, 7])}, "falling"),
        ({"decode_offsets": np.array([0.0, 7.0])}, "float64"),
        ({"prompt_offsets": np.array([0, 7])}, "prompt_offsets: 2"),
        ({"predictions": np.zeros((7, LAYERS, 1, 1))}, "float64"),
        ({"predictions": np.full((7, LAYERS, 1, 1), EXPERTS, np.int16)}, "-1 to 5"),
        ({"predictions": np.full((7, LAYERS, 1, 1), -2, np.int16)}, "-1 to 5"),
        ({"predictions": np.zeros((6, LAYERS, 1, 1), np.int16)}, "int16 [6"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes: dict, words: str):
    with pytest.raises(RequestError) as raised:
        small_trace(**changes)
    assert words in str(raised.value)


def damaged(path: Path, kind: str) -> None:
    small_trace().save(path)
    contents = path.read_bytes()
    match kind:
        case "absent":
            path.unlink()
        case "directory":
            path.unlink()
            path.mkdir()
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("version https://git-lfs.github.com/spec/v1\n")
        case "cut":
            path.write_bytes(contents[:-100])
        case "changed":
            path.write_bytes(contents[:200] + b"\0" * 20 + contents[220:])
        case "another zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("decode_expert_ids.npy", "no array")
        case "other arrays":
            np.savez(path, ids=np.arange(3))
        case "objects":
            objects = np.array([{}], object)
            np.savez(path, decode_expert_ids=objects, decode_offsets=objects)
        case "ids beyond":
            arrays = dict(np.load(io.BytesIO(contents)))
            np.savez(path, **(arrays | {"num_experts": np.array(3)}))  # type: ignore[arg-type]
        case "several numbers":
            arrays = dict(np.load(io.BytesIO(contents)))
            np.savez(path, **(arrays | {"num_experts": np.arange(3)}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("absent", "No such file"),
        ("directory", "Is a directory"),
        ("empty", "begins with b''"),
        ("text", "begins with b'vers'"),
        ("cut", "no routing trace, or it is damaged"),
        ("changed", "no routing trace, or it is damaged"),
        ("another zip", "no routing trace, or it is damaged"),
        ("other arrays", "got: ids"),
        ("objects", "allow_pickle=False"),
        ("ids beyond", "below 3"),
        ("several numbers", "one integer"),
    ],
)
def test_a_file_that_is_none_is_one_error(tmp_path: Path, kind: str, words: str):
    path = tmp_path / "trace.npz"
    damaged(path, kind)
    with pytest.raises(CheckpointError) as raised:
        RoutingTrace.load(path)
    assert words in str(raised.value) and str(path) in str(raised.value)
    assert raised.value.do


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_no_damage_raises_anything_else(tmp_path_factory: pytest.TempPathFactory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    small_trace(with_predictions=True).save(path)
    contents = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(contents) - 1))
        contents[position] = data.draw(st.integers(0, 255))
    path.write_bytes(contents[: data.draw(st.integers(0, len(contents)))])
    try:
        RoutingTrace.load(path)
    except CheckpointError as error:
        assert error.do


def test_a_file_that_cannot_be_written_is_one_error(tmp_path: Path):
    for path in (tmp_path, tmp_path / "absent" / "trace.npz"):
        with pytest.raises(RequestError, match="cannot be written"):
            small_trace().save(path)
    assert list(tmp_path.iterdir()) == []
