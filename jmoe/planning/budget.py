"""How a budget of device memory is spent when experts are offloaded: pure arithmetic.

First what must be there: weights that are no experts, the KV cache, the workspace, and staging.
All that is left becomes slots for experts, but for a longer chunk of prompts: each chunk moves
all experts that it uses once, so that prompts are faster in long ones.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jmoe.config import ModelConfig
from jmoe.errors import CapacityError
from jmoe.models import kv_cache
from jmoe.planning import sizes
from jmoe.planning.chunks import MAX_CHUNK, MIN_CHUNK, longest_chunk
from jmoe.planning.need import MemoryNeed
from jmoe.planning.policy import NUM_PROMPT_PLACES, Policy, least_staging
from jmoe.residency.experts import MAX_IN_FLIGHT

# Of what is left for workspace and slots, the workspace of a longer chunk may take this part.
WORKSPACE_SHARE = 1 / 4
# Layers for which experts are predicted, by what becomes of missing ones. The host computes while
# an expert is copied: what comes too late for the next layer may come in time for a later one.
LOOKAHEAD = {"load": 1, "split": 3, "host": 0, "auto": 3}
# Copies that nobody waits for replace what is used least often, not what was used least recently:
# docs/hybrid.md.
EVICTION = {"load": "lru", "split": "lfu", "host": "lfu", "auto": "lfu"}


class Item(NamedTuple):
    """One use of device memory."""

    name: str
    num_bytes: int
    note: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spending:
    """A policy that leaves nothing out, what it takes, and why, a sentence each."""

    policy: Policy
    items: tuple[Item, ...]
    reasons: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Offloading:
    """What offloading the experts of a model takes.

    Attributes:
      config: the model.
      dtype: of what is not quantized.
      batch_size: sequences at once.
      num_positions: of each, prompt and new tokens.
      need: the model's, of so many.
      policy: what is asked for; checked to be for a model of this shape.
      workspace_bytes: what its chunk takes, if that is known; else it is estimated.
    """

    config: ModelConfig
    dtype: str
    batch_size: int
    num_positions: int
    need: MemoryNeed
    policy: Policy
    workspace_bytes: int | None = None

    def spend(self, budget_bytes: int | None) -> Spending:
        """Chooses what the policy leaves open so that all of a budget is used; None has no end.

        Raises:
          CapacityError: the budget is smaller than ``smallest_bytes``.
        """
        smallest = self.smallest_bytes
        if budget_bytes is not None and budget_bytes < smallest:
            whole = "not even with its experts in host memory"
            raise CapacityError(
                f"the model does not fit into this device memory, {whole}"
                if self._asked_slots is None
                else "the policy does not fit into this device memory",
                got=format_bytes(budget_bytes),
                expected=shortfall(smallest, self._items(self._smallest)),
                do=f"allow {smallest_gib(smallest)} GiB or more; or use {self._remedies()}",
            )
        if budget_bytes is None:
            chunk = longest_chunk(self.config, self.batch_size, self.num_positions)
            policy = self._policy(
                slots=(self.need.num_experts,) * self.need.num_layers,
                num_staging=self._wanted_staging,
                prefill_chunk=chunk,
            )
            reasons = ["no budget: a slot for every expert"] if self._asked_slots is None else []
            return Spending(policy=policy, items=self._items(policy), reasons=tuple(reasons))
        return self._spend(budget_bytes)

    @property
    def smallest_bytes(self) -> int:
        """The smallest budget that works."""
        return sum(item.num_bytes for item in self._items(self._smallest))

    def _spend(self, budget_bytes: int) -> Spending:
        need, blob_bytes, asked_slots = self.need, self.need.blob_bytes, self._asked_slots
        room = budget_bytes - need.base_bytes - (asked_slots or 0) * blob_bytes
        # Staging beyond the least is for prefetches, which are worth more than slots.
        affordable = (room - self._workspace_bytes(self._smallest.prefill_chunk)) // blob_bytes
        wanted = min(self._wanted_staging, affordable)
        least = self._least_staging - (self._token_slots if asked_slots is None else 0)
        num_staging = self.policy.num_staging or max(least, wanted)
        left = room - num_staging * blob_bytes
        limit = left
        if asked_slots is None:
            limit = min(int(left * WORKSPACE_SHARE), left - self._token_slots * blob_bytes)
        chunk = self._longest_chunk(limit)
        workspace_bytes = self._workspace_bytes(self.policy.prefill_chunk or chunk)
        num_slots = min(need.all_experts, (left - workspace_bytes) // blob_bytes)
        policy = self._policy(
            slots=_spread(num_slots, need.num_layers),
            num_staging=num_staging,
            prefill_chunk=chunk,
        )
        all_bytes, here = need.all_experts * blob_bytes, format_bytes(left - workspace_bytes)
        reasons = []
        if asked_slots is None:
            reasons.append(
                f"{format_bytes(all_bytes)} of experts, {here} left for them: "
                f"{_describe_slots(policy.slots, need)}"
            )
        if not self.policy.prefill_chunk:
            reasons.append(self._explain_chunk(chunk, limit, left))
        return Spending(policy=policy, items=self._items(policy), reasons=tuple(reasons))

    def _policy(self, **chosen) -> Policy:
        """The policy with these choices where it leaves them open."""
        policy = self.policy
        return dataclasses.replace(
            policy,
            slots=chosen["slots"] if policy.slots is None else policy.slots,
            num_staging=policy.num_staging or chosen["num_staging"],
            eviction=policy.eviction or EVICTION[policy.misses],
            lookahead=self._lookahead,
            fetch=self._fetch,
            prefill_chunk=policy.prefill_chunk or chosen["prefill_chunk"],
        )

    @property
    def _smallest(self) -> Policy:
        """The policy with the choices that take the least memory."""
        return self._policy(
            slots=(0,) * self.need.num_layers,
            num_staging=self._least_staging,
            prefill_chunk=MIN_CHUNK,
        )

    @property
    def _least_staging(self) -> int:
        """Places with which the slots that are asked for work, or layers without slots."""
        if self.policy.engine == "compiled":
            return NUM_PROMPT_PLACES + max(0, self._token_slots - (self._asked_slots or 0))
        return least_staging(self.config)

    @property
    def _token_slots(self) -> int:
        """Slots that there must be for a token's experts."""
        return self.config.router.top_k if self.policy.engine == "compiled" else 0

    @property
    def _asked_slots(self) -> int | None:
        return None if self.policy.slots is None else self.policy.num_slots

    @property
    def _lookahead(self) -> int:
        lookahead = self.policy.lookahead
        if lookahead is None:
            lookahead = LOOKAHEAD[self.policy.misses]
        return min(lookahead, self.need.num_layers - 1)

    @property
    def _fetch(self) -> int:
        return self.policy.fetch or self.config.router.top_k

    @property
    def _wanted_staging(self) -> int:
        """Room for all that is prefetched for a token, and at least for what it must have."""
        top_k = self.config.router.top_k
        if self.policy.engine == "compiled":
            return NUM_PROMPT_PLACES if self._asked_slots is None else self._least_staging
        wanted = max(top_k, self._fetch * self._lookahead) + MAX_IN_FLIGHT
        return wanted if self.policy.engine == "thread" else max(wanted, top_k + NUM_PROMPT_PLACES)

    def _workspace_bytes(self, chunk: int) -> int:
        if self.workspace_bytes is not None:
            return self.workspace_bytes
        return sizes.offload_workspace(
            self.config,
            self.dtype,
            batch_size=self.batch_size,
            num_positions=self.num_positions,
            chunk=chunk,
        ).num_bytes

    def _longest_chunk(self, limit_bytes: int) -> int:
        """Longest chunk whose workspace keeps a limit, or the shortest there is."""
        chunk = MAX_CHUNK
        while chunk > MIN_CHUNK and self._workspace_bytes(chunk) > limit_bytes:
            chunk //= 2
        return chunk

    def _explain_chunk(self, chunk: int, limit_bytes: int, left_bytes: int) -> str:
        taken = format_bytes(self._workspace_bytes(chunk))
        text = f"prompts in chunks of {chunk} tokens: their workspace takes {taken}"
        if self._asked_slots is not None:
            return f"{text} of the {format_bytes(left_bytes)} left for it"
        within = self._workspace_bytes(chunk) <= limit_bytes
        share = f"{'at most' if within else 'more than'} a quarter"
        why = f"{text}, {share} of the {format_bytes(left_bytes)} left for it and slots"
        return why if within else f"{why}, but there are no shorter ones"

    def _items(self, policy: Policy) -> tuple[Item, ...]:
        num_slots, each = policy.num_slots, format_bytes(self.need.blob_bytes)
        workspace_bytes = self._workspace_bytes(policy.prefill_chunk)
        how = "estimated" if self.workspace_bytes is None else "as compiled"
        return (
            *weight_items(self.need, but="experts"),
            cache_item(self.need, self.batch_size, self.num_positions),
            Item("workspace", workspace_bytes, f"{how}, chunks of {policy.prefill_chunk}"),
            Item(
                "slots",
                num_slots * self.need.blob_bytes,
                f"{num_slots} of {self.need.all_experts} experts, {each} each",
            ),
            Item(
                "staging",
                policy.num_staging * self.need.blob_bytes,
                f"{policy.num_staging} experts on their way, or without a slot",
            ),
        )

    def _remedies(self) -> str:
        remedies = ["fewer bits", f"a shorter context than {self.num_positions:,} positions"]
        if self.batch_size > 1:
            remedies.append(f"fewer sequences than {self.batch_size} at once")
        if self.dtype == "float32":
            remedies.append("bfloat16")
        if self._asked_slots:
            remedies.append("fewer slots")
        return f"{', '.join(remedies)}, or the CPU alone (policy host)"


def weight_items(need: MemoryNeed, *, but: str = "") -> tuple[Item, ...]:
    """The weights by component, without those that are not there."""
    return tuple(
        Item(name, size.num_bytes, f"{size.bits_per_weight:.2f} bits per weight")
        for name, size in need.weights.items()
        if size.num_bytes and name != but
    )


def cache_item(need: MemoryNeed, batch_size: int, num_positions: int) -> Item:
    sequences = "" if batch_size == 1 else f"{batch_size} x "
    capacity = kv_cache.bucket_capacity(num_positions)
    return Item("KV cache", need.cache_bytes, f"room for {sequences}{capacity:,} positions")


def shortfall(num_bytes: int, items: Iterable[Item]) -> str:
    """How much is needed at least, and for what, line by line."""
    lines = [
        f"    {format_bytes(item.num_bytes):>12}  {item.name}" for item in items if item.num_bytes
    ]
    return "\n".join([f"at least {format_bytes(num_bytes)}", *lines])


def smallest_gib(num_bytes: int) -> str:
    """GiB with four digits after the point, rounded up: so much is enough."""
    return f"{math.ceil(num_bytes * 10**4 / 2**30) / 10**4:.4f}"


def format_bytes(num_bytes: int) -> str:
    """In GiB, or in a smaller unit where that says more."""
    if num_bytes == 0:
        return "0"
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if abs(num_bytes) >= scale:
            return f"{num_bytes / scale:,.2f} {unit}"
    return f"{num_bytes / 2**10:,.2f} KiB"


def _spread(num_slots: int, num_layers: int) -> tuple[int, ...]:
    """Evenly, what is left over one by one from the first layer on."""
    each, more = divmod(num_slots, num_layers)
    return tuple(each + (layer < more) for layer in range(num_layers))


def _describe_slots(slots: Sequence[int] | int | None, need: MemoryNeed) -> str:
    assert isinstance(slots, tuple)
    if slots[-1] == need.num_experts:
        return f"all {need.all_experts} have a slot"
    each = f"{slots[-1]} or {slots[0]}" if slots[0] != slots[-1] else slots[0]
    return f"slots for {sum(slots)} of {need.all_experts}, {each} a layer"
