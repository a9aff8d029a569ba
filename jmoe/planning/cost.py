"""What it costs to serve a layer's missing experts, and which of them to move and which to compute.

A missing expert is copied to the device, or computed on the host from the copy that is there. Both
go on at the same time, so what counts is when the later of the two ends. This extends the rule of
Fiddler (https://arxiv.org/abs/2402.07033, section 3.2), which compares the two for every expert by
itself and takes one after the other. Pure: engines and the simulator ask the same functions.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

from jmoe.planning.hardware import HardwareSpec
from jmoe.quant.layout import ExpertLayout

# Of the time of a layer: what is not slower by more than this copies more experts, since those that
# were copied may be used again.
TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCosts:
    """Seconds that one expert takes.

    Attributes:
      copy_s: to be copied to the device, when the link is free.
      host: to be computed on the host, by its number of tokens.
      device: to be computed on the device, likewise.
      fetch_s: what a copy takes of the time of an engine's loop, which computes nothing meanwhile.
      copying_s: what it takes of that of the processor that computes layers; not for experts that
        are waited for.
      hand_over_s: to hand a layer's tokens to the host and to get its results back.
      shares_cores: whether device and host compute on the same processor: one after the other then.
    """

    copy_s: float
    host: Callable[[float], float]
    device: Callable[[float], float]
    fetch_s: float = 0.0
    copying_s: float = 0.0
    hand_over_s: float = 0.0
    shares_cores: bool = False

    @classmethod
    def of(
        cls,
        hardware: HardwareSpec,
        layout: ExpertLayout,
        *,
        activation_bits: int,
        dtype: str,
        host_bytes_per_s: float | None = None,
    ) -> Self:
        """Costs on a machine.

        Args:
          hardware: the machine.
          layout: of an expert.
          activation_bits: of host kernels; 0 without.
          dtype: of activations.
          host_bytes_per_s: at which the host is held to reading experts, if it is: it counts as
            another processor then.

        Raises:
          ConfigError: nothing is known of experts on this machine.
        """
        times = hardware.estimate_experts(layout, activation_bits=activation_bits, dtype=dtype)
        held_s = layout.num_bytes / host_bytes_per_s if host_bytes_per_s is not None else 0.0
        is_cpu = hardware.platform == "cpu"
        copy_s = hardware.to_device(layout.num_bytes)
        return cls(
            copy_s=copy_s,
            fetch_s=hardware.fetch_s,
            # Read and written by the processor, however slow the link pretends to be.
            copying_s=min(copy_s, 2 * layout.num_bytes / hardware.host_bytes_per_s) * is_cpu,
            host=lambda tokens: max(held_s, times.host(tokens)),
            device=times.device,
            hand_over_s=hardware.hand_over_s,
            shares_cores=is_cpu and host_bytes_per_s is None,
        )


class Absent(NamedTuple):
    """An expert that a layer needs and that is not on the device.

    Attributes:
      expert: its number.
      tokens: that chose it.
      arrives_s: seconds until it is there, if its copy has begun; else None.
    """

    expert: int
    tokens: int
    arrives_s: float | None = None


class Split(NamedTuple):
    """How a layer's absent experts are served.

    Attributes:
      host: experts that the host computes.
      device: those that are copied, or waited for, in this order.
      seconds: until all have been computed, as predicted.
    """

    host: tuple[int, ...]
    device: tuple[int, ...]
    seconds: float


def split(
    absent: Sequence[Absent],
    costs: ExpertCosts,
    *,
    backlog_s: float = 0.0,
    present_s: float = 0.0,
) -> Split:
    """Serves absent experts so that the last of them is done as early as possible.

    Of experts whose copies have not begun those with the most tokens are copied: a copy takes as
    long for any number of them. Of copies under way those that arrive first are waited for; the
    others go on, but this time the host computes.

    Args:
      absent: distinct experts; of equal ones the earlier are copied first.
      costs: of each.
      backlog_s: until the link is free of the copies that have begun.
      present_s: what the device computes with experts that it has.

    Returns:
      Of choices that differ by less than TOLERANCE that which copies the most.
    """
    begun = sorted(
        (a for a in absent if a.arrives_s is not None), key=lambda a: (a.arrives_s, -a.tokens)
    )
    waiting = sorted((a for a in absent if a.arrives_s is None), key=lambda a: -a.tokens)
    host_s = {a.expert: costs.host(a.tokens) for a in absent}
    device_s = {a.expert: costs.device(a.tokens) for a in absent}
    of_begun, of_waiting = (_Prefixes(group, host_s, device_s) for group in (begun, waiting))
    choices = []
    for num_begun, num_waiting in itertools.product(range(len(begun) + 1), range(len(waiting) + 1)):
        arrival_s = backlog_s + num_waiting * costs.copy_s if num_waiting else 0.0
        last_device_s = of_waiting.last_device_s[num_waiting]
        if num_begun:
            begun_s = begun[num_begun - 1].arrives_s or 0.0
            if begun_s >= arrival_s:
                arrival_s, last_device_s = begun_s, of_begun.last_device_s[num_begun]
        host = of_begun.host_s[num_begun] + of_waiting.host_s[num_waiting]
        if num_begun < len(begun) or num_waiting < len(waiting):
            host += costs.hand_over_s
        device = present_s + of_begun.device_s[num_begun] + of_waiting.device_s[num_waiting]
        computed_s = host + device if costs.shares_cores else max(host, device)
        seconds = max(arrival_s + last_device_s, computed_s)
        choices.append((seconds, num_begun, num_waiting))
    best_s = min(choices)[0]
    seconds, num_begun, num_waiting = max(
        (c for c in choices if c[0] <= best_s * (1 + TOLERANCE)), key=lambda c: (c[1] + c[2], -c[0])
    )
    host = (*begun[num_begun:], *waiting[num_waiting:])
    device = (*begun[:num_begun], *waiting[:num_waiting])
    return Split(tuple(a.expert for a in host), tuple(a.expert for a in device), seconds)


class _Prefixes:
    """Seconds if the first n of a group go to the device and the others to the host, by n."""

    def __init__(
        self,
        group: Sequence[Absent],
        host_s: dict[int, float],
        device_s: dict[int, float],
    ):
        experts = [a.expert for a in group]
        self.device_s = list(itertools.accumulate((device_s[e] for e in experts), initial=0.0))
        backwards = itertools.accumulate((host_s[e] for e in reversed(experts)), initial=0.0)
        self.host_s = list(backwards)[::-1]
        self.last_device_s = [0.0, *(device_s[e] for e in experts)]
