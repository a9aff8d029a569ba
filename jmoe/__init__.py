"""jmoe: Mixture-of-Experts language models in JAX, where the accelerator is too small for them."""

from jmoe.api import LLM, Chunk, GeneratedSequence, GenerationResult, load
from jmoe.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    JmoeError,
    RequestError,
    TransferError,
)
from jmoe.generation.options import GenerationOptions, check_options
from jmoe.metrics import GenerationStats
from jmoe.planning import Plan, Policy, RoutingTrace
from jmoe.residency.timeline import Timeline

__version__ = "0.1.0.dev0"

__all__ = [
    "LLM",
    "CapacityError",
    "CheckpointError",
    "Chunk",
    "ConfigError",
    "GeneratedSequence",
    "GenerationOptions",
    "GenerationResult",
    "GenerationStats",
    "JmoeError",
    "Plan",
    "Policy",
    "RequestError",
    "RoutingTrace",
    "Timeline",
    "TransferError",
    "check_options",
    "load",
]
