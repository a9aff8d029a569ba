"""The offload engine with experts that come from a disk: the same tokens, whatever is in memory."""

import threading

import jax
import pytest

from jmoe.engines.offload import OffloadEngine
from jmoe.engines.programs import ProgramCache
from jmoe.planning.plan import make_plan
from jmoe.planning.policy import Policy
from jmoe.residency.link import DeviceLink
from jmoe.store.converted_model import ConvertedModel
from jmoe.store.expert_store import ExpertStore
from tests.engines.offload_engines import greedy
from tests.residency.faulty_link import await_true
from tests.store.small_stores import write_store

_PROMPTS = [[5, 9, 33, 2, 7, 61, 12, 40, 18]]
_NEW_TOKENS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ConvertedModel:
    directory = tmp_path_factory.mktemp("disk") / "store"
    write_store(directory, "f32", num_hidden_layers=3, num_local_experts=8)
    return ConvertedModel.open(directory)


@pytest.fixture(scope="module")
def programs() -> ProgramCache:
    return ProgramCache(jax.local_devices()[0])


def _engine(model: ConvertedModel, programs: ProgramCache, store: ExpertStore) -> OffloadEngine:
    plan = make_plan(
        model.config,
        "float32",
        model.quant,
        batch_size=1,
        num_positions=64,
        requested=Policy(mode="offload", slots=(1,) * 3, num_staging=6),
    )
    device = jax.local_devices()[0]
    engine = OffloadEngine(
        model.config,
        model.parameters(store, "float32"),
        "float32",
        device,
        model.quant,
        None,
        plan=plan,
        link=DeviceLink(device, model.layout.dtype),
        store=store,
    )
    engine.programs = programs
    return engine


@pytest.fixture(scope="module")
def expected(model: ConvertedModel, programs: ProgramCache) -> list[list[int]]:
    engine = _engine(model, programs, model.open_experts("ram"))
    texts, _ = greedy(engine, _PROMPTS, _NEW_TOKENS)
    engine.close()
    return texts


@pytest.mark.parametrize("read_ahead", [True, False])
def test_tokens_are_the_same_while_pages_come_and_go(read_ahead: bool, model, programs, expected):
    store = model.open_experts("mmap")
    disk = store.open_disk(1 << 20, read_ahead=read_ahead)
    assert disk is not None and disk.is_larger
    disk.lock_most_used(lambda: 1 << 22, max_bytes=4 * model.layout.num_bytes)
    engine = _engine(model, programs, store)
    stop = threading.Event()

    def drop_pages() -> None:
        while not stop.wait(0.002):
            disk.experts.drop()

    thread = threading.Thread(target=drop_pages)
    thread.start()
    try:
        texts, run = greedy(engine, _PROMPTS, _NEW_TOKENS)
    finally:
        stop.set()
        thread.join()
    assert texts == expected
    stats = run.stats()
    assert stats.residency is not None and stats.disk is not None
    # Every copy asked for its bytes once.
    for phase in ("prefill", "decode"):
        disk_traffic, traffic = getattr(stats.disk, phase), getattr(stats.residency, phase)
        assert disk_traffic.needed == traffic.copies > 0
        assert read_ahead or disk_traffic.read_ahead == 0
    assert stats.disk.expert_bytes == model.layout.num_bytes
    assert stats.to_json()["disk"]["decode"]["needed"] == stats.disk.decode.needed
    engine.close()


def test_counts_end_with_the_batch(model: ConvertedModel, programs: ProgramCache):
    store = model.open_experts("mmap")
    store.open_disk(1 << 20)
    engine = _engine(model, programs, store)
    _, run = greedy(engine, _PROMPTS, 4)
    before = run.stats().disk
    assert before is not None and before.prefill.needed > 0
    greedy(engine, _PROMPTS, 4)
    assert run.stats().disk == before
    engine.close()


def test_an_expert_on_the_disk_is_prefetched_when_its_bytes_have_come(
    model: ConvertedModel, programs: ProgramCache
):
    store = model.open_experts("mmap")
    disk = store.open_disk(1 << 20)
    assert disk is not None
    engine = _engine(model, programs, store)
    disk.experts.drop()
    experts = engine.experts
    before = experts.counts()
    experts.predict([(1, [3, 4])])
    await_true(lambda: (experts.counts() - before).copies == 2)
    assert disk.is_ready((1, 3))
    experts.need(1, [3, 4])
    traffic = experts.counts() - before
    assert (traffic.hits, traffic.demand_loads) == (2, 0)
    experts.take(1, [3, 4])
    experts.release()
    experts.settle()
    engine.close()


def test_files_that_do_not_fit_are_not_registered_with_a_driver(model: ConvertedModel):
    store = model.open_experts("mmap", available_bytes=1 << 20)

    class Gpu:
        platform = "gpu"
        client = None

    lock = store.lock_pages(Gpu())  # type: ignore[arg-type]
    assert lock.kind == "plain"
    assert "dma_map: not tried, the files are larger than the memory that is free" in lock.reason
