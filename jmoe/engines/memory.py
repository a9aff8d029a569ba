"""Device memory that is not there: refusing work before it starts, and explaining failures."""

from collections.abc import Callable
from types import TracebackType

import jax

from jmoe.config import ModelConfig
from jmoe.errors import CapacityError
from jmoe.planning import memory
from jmoe.planning.budget import Offloading, smallest_gib
from jmoe.planning.need import MemoryNeed
from jmoe.planning.plan import Plan, make_plan
from jmoe.planning.policy import Policy
from jmoe.quant.spec import QuantSpec

# How much smaller the next smaller plan is.
SMALLER = 0.9


def check_fits(num_bytes: int, device: jax.Device, *, what: str, do: str) -> None:
    """Raises CapacityError if a device has fewer free bytes than are needed.

    The CPU backend's memory is the host's. A device that does not report its memory passes.
    """
    if device.platform == "cpu":
        available = memory.available_host_bytes()
    else:
        limit, in_use, _ = memory.device_memory(device)
        if limit is None:
            return
        available = limit - (in_use or 0)
    if num_bytes > available:
        raise CapacityError(
            f"{what} does not fit into the memory of {device}",
            got=f"{available / 2**30:.2f} GiB available",
            expected=f"{num_bytes / 2**30:.2f} GiB",
            do=do,
        )


class ExplainShortage:
    """Turns the backend's error of a full device into CapacityError. May be entered again.

    Other errors pass as they are.
    """

    def __init__(
        self,
        doing: str,
        device: jax.Device,
        do: Callable[[], str],
        *,
        copies_experts: bool = False,
    ):
        """Args:
        doing: what fails then: "the device ran out of memory while ...".
        device: whose memory it is.
        do: makes the remedy.
        copies_experts: a CapacityError in here comes from the link, and is explained likewise.
        """
        self._doing = doing
        self._device = device
        self._do = do
        self._copies_experts = copies_experts

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            return
        got: object = None
        if isinstance(error, CapacityError) and self._copies_experts:
            got = f"{error.what}: {error.got}"
        elif isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            got = str(error).strip().splitlines()[0][:300]
        elif isinstance(error, MemoryError):
            got = str(error) or "no memory on the host"
        if got is not None:
            what = f"the device ran out of memory while {self._doing}"
            raise CapacityError(what, where=self._device, got=got, do=self._do()) from error


def smaller_plan(
    config: ModelConfig,
    dtype: str,
    quant: QuantSpec | None,
    *,
    batch_size: int,
    num_positions: int,
    used_bytes: int,
    policy: Policy,
) -> Plan | None:
    """A plan for the same batch that takes a tenth less, or the least that works.

    Args:
      config: the model.
      dtype: of activations and KV cache.
      quant: formats of the weights.
      batch_size: sequences.
      num_positions: of each.
      used_bytes: what the plan that failed takes.
      policy: of that plan: its eviction rule, look-ahead, and what becomes of misses are kept.

    Returns:
      None if there is no smaller one.
    """
    policy = Policy(
        mode="offload",
        misses=policy.misses,
        eviction=policy.eviction,
        lookahead=policy.lookahead,
        fetch=policy.fetch,
    )
    need = MemoryNeed.of(config, dtype, quant, batch_size=batch_size, num_positions=num_positions)
    offloading = Offloading(
        config=config,
        dtype=dtype,
        batch_size=batch_size,
        num_positions=num_positions,
        need=need,
        policy=policy,
    )
    budget_bytes = max(int(SMALLER * used_bytes), offloading.smallest_bytes)
    if budget_bytes >= used_bytes:
        return None
    return make_plan(
        config,
        dtype,
        quant,
        batch_size=batch_size,
        num_positions=num_positions,
        requested=policy,
        budget_bytes=budget_bytes,
    )


def remedy(config: ModelConfig, smaller: Plan | None) -> str:
    """What to do if the device is too full, with the next smaller plan if there is one."""
    if smaller is None:
        return (
            "free memory that other programs hold; or use fewer bits, a shorter context, fewer "
            "sequences at once, or the CPU alone (policy host): there is no smaller plan"
        )
    assert smaller.budget_bytes is not None
    num_experts = config.num_hidden_layers * config.router.num_experts
    return (
        "load the model with policy=offload and device_memory_gib="
        f"{smallest_gib(smaller.budget_bytes)}, which leaves slots for "
        f"{smaller.policy.num_slots} of {num_experts} experts; or free memory that other programs "
        "hold"
    )
