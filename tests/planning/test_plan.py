"""Plans: no byte beyond the budget, none left that an expert could use, and honest refusals."""

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.config import ModelConfig
from jmoe.errors import CapacityError, RequestError
from jmoe.planning import sizes
from jmoe.planning.chunks import MAX_CHUNK, MIN_CHUNK
from jmoe.planning.need import MemoryNeed
from jmoe.planning.plan import Plan, make_plan
from jmoe.planning.policy import ENGINES, NUM_PROMPT_PLACES, Policy
from jmoe.quant.spec import PRESETS
from jmoe.residency.array_cache import make_pools
from jmoe.residency.experts import MAX_IN_FLIGHT
from tests.models.configs import small_config
from tests.planning.test_sizes import known_config, quantizable_config

GIB = 2**30
MIB = 2**20
MIXTRAL = known_config("mixtral-8x7b")
INT4 = PRESETS["attn4-experts4"]
SHAPE: dict[str, Any] = {"batch_size": 1, "num_positions": 4096}
MODEL: dict[str, Any] = {"config": MIXTRAL, "dtype": "bfloat16", "quant": INT4}


def mixtral_plan(gib: float | None = None, **arguments: Any) -> Plan:
    budget_bytes = None if gib is None else int(gib * GIB)
    return make_plan(MIXTRAL, "bfloat16", INT4, budget_bytes=budget_bytes, **SHAPE | arguments)


def item_bytes(plan: Plan) -> dict[str, int]:
    return {item.name: item.num_bytes for item in plan.items}


def smallest_budget(error: CapacityError) -> int:
    """What a user gets who types the number of GiB that the text names."""
    found = re.search(r"allow ([\d.]+) GiB or more", str(error))
    assert found is not None, str(error)
    return int(float(found[1]) * GIB)


# A model of any shape, and what it is to run.
MODELS = st.fixed_dictionaries(
    {
        "hidden_size": st.integers(1, 16).map(lambda groups: 64 * groups),
        "intermediate_size": st.integers(1, 32).map(lambda groups: 64 * groups),
        "num_hidden_layers": st.integers(1, 12),
        "num_local_experts": st.integers(1, 16),
        "num_experts_per_tok": st.integers(1, 16),
        "tie_word_embeddings": st.booleans(),
        "vocab_size": st.sampled_from([64, 32000]),
        "dtype": st.sampled_from(["float32", "bfloat16"]),
        "quant": st.sampled_from([None, PRESETS["bf16"], PRESETS["int8"], INT4]),
        "batch_size": st.integers(1, 4),
        "num_positions": st.integers(1, 32768),
    }
)

# A policy that leaves the slots open, and more or less of the rest; staging beyond the least.
OPEN_POLICIES = st.fixed_dictionaries(
    {
        "lookahead": st.integers(0, 3),
        "fetch": st.integers(0, 16),
        "num_staging": st.sampled_from([0, 0, 3]),
        "prefill_chunk": st.sampled_from([0, 0, MIN_CHUNK, MAX_CHUNK]),
        "engine": st.sampled_from(ENGINES),
    }
)


def model_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of make_plan and of MemoryNeed.of."""
    settings = dict(settings)
    names = ("dtype", "quant", "batch_size", "num_positions")
    arguments = {name: settings.pop(name) for name in names}
    settings["num_experts_per_tok"] %= settings["num_local_experts"]
    settings["num_experts_per_tok"] += 1
    return {"config": small_config(**settings, max_position_embeddings=32768), **arguments}


def policy_of(config: ModelConfig, settings: dict[str, Any]) -> Policy:
    fetch = min(settings["fetch"], config.router.num_experts)
    more = settings["num_staging"]
    num_staging = more and config.router.top_k + MAX_IN_FLIGHT + more
    return Policy(mode="offload", **settings | {"fetch": fetch, "num_staging": num_staging})


def need_of(arguments: dict[str, Any]) -> MemoryNeed:
    names = ("config", "dtype", "quant", "batch_size", "num_positions")
    return MemoryNeed.of(**{name: arguments[name] for name in names})


@settings(deadline=None)
@given(MODELS, OPEN_POLICIES, st.floats(0, 2))
def test_a_budget_is_kept_and_used(
    shape: dict[str, Any], open_policy: dict[str, Any], share: float
):
    model = model_of(shape)
    policy = policy_of(model["config"], open_policy)
    need = need_of(model)
    budget = int(share * need.total_bytes)
    try:
        plan = make_plan(**model, requested=policy, budget_bytes=budget)
    except CapacityError as error:
        assert smallest_budget(error) > budget
        return
    assert plan.budget_bytes == budget
    assert sum(item.num_bytes for item in plan.items) == plan.device_bytes <= budget
    spare = budget - plan.device_bytes
    assert plan.spare_bytes == spare
    slots = plan.policy.slots
    assert isinstance(slots, tuple)
    if plan.policy.num_slots < need.all_experts:
        assert spare < need.blob_bytes
    assert len(slots) == need.num_layers
    assert 0 <= min(slots) <= max(slots) <= need.num_experts
    assert max(slots) - min(slots) <= 1 and sorted(slots, reverse=True) == list(slots)
    top_k = model["config"].router.top_k
    num_staging = plan.policy.num_staging
    if policy.engine == "compiled":
        # Slots of all layers together hold a token's experts; staging is for prompts.
        assert make_pools(slots, num_staging - NUM_PROMPT_PLACES, top_k) is not None
    else:
        assert num_staging >= top_k + MAX_IN_FLIGHT
    plan.policy.check_model(model["config"])
    # What a plan comes to is a policy that comes to the same plan.
    again = make_plan(**model, requested=plan.policy, budget_bytes=budget)
    assert (again.policy, again.items) == (plan.policy, plan.items)


@settings(deadline=None)
@given(MODELS, st.one_of(st.none(), OPEN_POLICIES))
def test_the_smallest_budget_that_is_named_works_and_less_does_not(
    shape: dict[str, Any], open_policy: dict[str, Any] | None
):
    model = model_of(shape)
    requested: Any = "offload"
    if open_policy is not None:
        requested = policy_of(model["config"], open_policy)
    with pytest.raises(CapacityError) as raised:
        make_plan(**model, requested=requested, budget_bytes=0)
    smallest = smallest_budget(raised.value)
    plan = make_plan(**model, requested=requested, budget_bytes=smallest)
    assert 0 <= smallest - plan.device_bytes < MIB
    with pytest.raises(CapacityError):
        make_plan(**model, requested=requested, budget_bytes=max(0, smallest - MIB))


@settings(deadline=None)
@given(MODELS, st.floats(0, 2))
def test_auto_is_resident_where_that_fits_and_else_offload(shape: dict[str, Any], share: float):
    model = model_of(shape)
    need = need_of(model)
    budget = int(share * need.total_bytes)
    try:
        plan = make_plan(**model, budget_bytes=budget)
    except CapacityError as error:
        assert budget < smallest_budget(error)
        return
    fits = need.total_bytes <= budget
    assert plan.policy.mode == ("resident" if fits else "offload")
    if fits:
        assert plan.device_bytes == need.total_bytes
        assert plan.host_bytes == 0
    else:
        assert plan.host_bytes == need.all_experts * need.blob_bytes


def test_every_item_by_hand():
    plan = mixtral_plan(16)
    weights = sizes.weight_sizes(MIXTRAL, "bfloat16", INT4)
    blob = sizes.blob_bytes(MIXTRAL, "bfloat16", INT4)
    chunk = plan.policy.prefill_chunk
    workspace = sizes.offload_workspace(MIXTRAL, "bfloat16", **SHAPE, chunk=chunk)
    expected = {name: size.num_bytes for name, size in weights.items() if name != "experts"}
    expected |= {
        "KV cache": sizes.cache_bytes(MIXTRAL, "bfloat16", **SHAPE),
        "workspace": workspace.num_bytes,
        "slots": plan.policy.num_slots * blob,
        "staging": 4 * blob,
    }
    assert item_bytes(plan) == expected
    assert plan.policy == Policy(
        mode="offload",
        slots=plan.policy.slots,
        num_staging=4,
        eviction="lru",
        lookahead=1,
        fetch=2,
        prefill_chunk=512,
    )
    assert 16 * GIB - plan.device_bytes < blob
    assert plan.host_bytes == 256 * blob


def test_a_chunk_takes_no_more_than_a_quarter_of_what_it_shares_with_slots():
    chunks = set()
    for gib in (2.5, 2.75, 3, 3.5, 4):
        plan = mixtral_plan(gib, requested="offload")
        items = item_bytes(plan)
        left = items["workspace"] + items["slots"] + (plan.spare_bytes or 0)
        assert items["workspace"] <= left / 4 or plan.policy.prefill_chunk == MIN_CHUNK
        if (chunk := plan.policy.prefill_chunk) < MAX_CHUNK:
            longer = sizes.offload_workspace(MIXTRAL, "bfloat16", **SHAPE, chunk=2 * chunk)
            assert longer.num_bytes > left / 4
        chunks.add(chunk)
    assert len(chunks) > 2


def test_prefetches_have_room_before_slots_do():
    smallest = Policy(mode="offload", lookahead=3)
    with pytest.raises(CapacityError) as raised:
        mixtral_plan(0, requested=smallest)
    floor, blob = smallest_budget(raised.value), sizes.blob_bytes(MIXTRAL, "bfloat16", INT4)
    staging = [
        make_plan(
            MIXTRAL, "bfloat16", INT4, **SHAPE, requested=smallest, budget_bytes=floor + extra
        ).policy
        for extra in (0, blob, 3 * blob, 4 * blob, 5 * blob)
    ]
    assert [policy.num_staging for policy in staging] == [4, 5, 7, 8, 8]
    assert [policy.num_slots for policy in staging] == [0, 0, 0, 0, 1]


def test_prefetches_reach_no_further_than_the_last_layer():
    plan = make_plan(
        quantizable_config(),
        "float32",
        None,
        batch_size=1,
        num_positions=64,
        requested=Policy(mode="offload", lookahead=3),
    )
    assert plan.policy.lookahead == 1
    assert plan.policy.num_staging == 4


def test_without_a_budget_every_expert_has_a_slot():
    plan = mixtral_plan(requested="offload")
    assert plan.policy.slots == (8,) * 32
    assert (plan.budget_bytes, plan.spare_bytes) == (None, None)
    assert mixtral_plan().policy == Policy(mode="resident")
    assert mixtral_plan(platform="cpu", free_bytes=GIB).policy == Policy(mode="resident")


def test_an_accelerator_without_budget_has_nine_tenths_of_what_is_free():
    plan = mixtral_plan(free_bytes=20 * GIB)
    assert plan.policy.mode == "offload"
    assert plan.budget_bytes == 18 * GIB
    assert "90% of the 20.00 GiB" in plan.reasons[0]
    assert mixtral_plan(free_bytes=40 * GIB).policy.mode == "resident"
    # Who asks for it gets it: what is free is checked as it is allocated.
    assert mixtral_plan(requested="resident", free_bytes=20 * GIB).budget_bytes is None


def test_a_budget_is_no_more_than_what_is_free():
    plan = mixtral_plan(80, free_bytes=20 * GIB)
    assert plan.budget_bytes == 20 * GIB
    assert plan.device_bytes <= 20 * GIB
    assert "less than 80.00 GiB" in plan.reasons[0]


def test_a_policy_is_followed():
    policy = Policy(
        mode="offload",
        slots=100,
        num_staging=9,
        eviction="lfu",
        lookahead=2,
        fetch=3,
        prefill_chunk=32,
    )
    for gib in (None, 16):
        plan = mixtral_plan(gib, requested=policy)
        assert plan.policy == policy
        blob = sizes.blob_bytes(MIXTRAL, "bfloat16", INT4)
        assert (item_bytes(plan)["slots"], item_bytes(plan)["staging"]) == (100 * blob, 9 * blob)
    by_layer = Policy(mode="offload", slots=tuple(range(8)) * 4)
    assert mixtral_plan(16, requested=by_layer).policy.slots == by_layer.slots
    assert mixtral_plan(requested=Policy(mode="resident")).policy.mode == "resident"


def test_a_policy_that_takes_more_than_the_budget_is_refused():
    policy = Policy(mode="offload", slots=200)
    with pytest.raises(CapacityError, match="the policy does not fit") as raised:
        mixtral_plan(16, requested=policy)
    assert "fewer slots" in str(raised.value)
    smallest = smallest_budget(raised.value)
    assert smallest > 200 * sizes.blob_bytes(MIXTRAL, "bfloat16", INT4)
    plan = make_plan(MIXTRAL, "bfloat16", INT4, **SHAPE, requested=policy, budget_bytes=smallest)
    assert plan.policy.slots == 200


def test_a_refusal_has_the_arithmetic_and_remedies():
    with pytest.raises(CapacityError) as raised:
        make_plan(MIXTRAL, "float32", None, batch_size=2, num_positions=4096, budget_bytes=GIB)
    text = str(raised.value)
    assert "not even with its experts in host memory" in text
    for item in ("attention", "embeddings", "head", "routers", "norms", "KV cache", "workspace"):
        assert re.search(rf"[\d.]+ [GMK]iB  {item}\n", text)
    assert re.search(r"2\.62 GiB  staging\n", text)  # 4 experts of 672 MiB
    assert "got: 1.00 GiB" in text
    for remedy in ("fewer bits", "than 4,096 positions", "sequences than 2", "bfloat16", "host"):
        assert remedy in text


def test_resident_is_all_or_nothing():
    with pytest.raises(CapacityError, match="as a whole") as raised:
        mixtral_plan(16, requested="resident")
    smallest = smallest_budget(raised.value)
    plan = make_plan(
        MIXTRAL, "bfloat16", INT4, **SHAPE, requested="resident", budget_bytes=smallest
    )
    assert plan.device_bytes == need_of({**MODEL, **SHAPE}).total_bytes
    assert plan.reasons == ("all 256 experts fit: resident",)


def test_host_has_no_device_memory():
    plan = mixtral_plan(requested="host", free_bytes=GIB)
    assert (plan.items, plan.device_bytes) == ((), 0)
    assert plan.host_bytes == need_of({**MODEL, **SHAPE}).total_bytes
    with pytest.raises(RequestError, match="leave the budget out"):
        mixtral_plan(1, requested="host")


def test_bad_requests_are_refused():
    with pytest.raises(RequestError, match="unknown policy"):
        mixtral_plan(requested="ofload")
    with pytest.raises(RequestError, match="another shape"):
        mixtral_plan(requested=Policy(mode="offload", slots=(8,) * 12))
    with pytest.raises(RequestError, match="context"):
        mixtral_plan(num_positions=10**6)


def test_a_plan_in_words_and_as_json():
    plan = mixtral_plan(16)
    lines = str(plan).splitlines()
    assert lines[0].split() == ["policy", "offload", "device", "memory"]
    names = [re.split(r"  +", line)[0] for line in lines[1:] if line[0] != "-"]
    rest = ["together", "spare", "budget", "host memory"]
    assert names == [*(item.name for item in plan.items), *rest]
    assert [line for line in lines if line.startswith("- ")] == [f"- {r}" for r in plan.reasons]
    assert max(map(len, lines)) < 160
    value = plan.to_json()
    assert sum(item["num_bytes"] for item in value["items"]) == value["device_bytes"]
    assert value["device_bytes"] + value["spare_bytes"] == value["budget_bytes"] == 16 * GIB
    assert Policy.from_json(value["policy"]) == plan.policy


def test_reasons_say_what_fits():
    assert mixtral_plan(32).reasons == ("all 256 experts fit: resident",)
    reasons = mixtral_plan(16).reasons
    assert reasons[0].startswith("resident would take")
    assert re.match(r"22.45 GiB of experts, .* left for them: slots for \d+ of 256", reasons[1])
    assert "prompts in chunks of 512 tokens" in reasons[2]
