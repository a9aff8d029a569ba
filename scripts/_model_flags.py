"""The flags that say which model to load and how, the same in every script that runs one."""

import os
from typing import TYPE_CHECKING, Any

import _common
from absl import flags

if TYPE_CHECKING:
    import jmoe
    from jmoe.loading import FoundModel

MODEL = flags.DEFINE_string(
    "model",
    None,
    "Directory in Hugging Face format or its hub id, converted store, or Orbax checkpoint; with "
    "--random_weights a known shape such as mixtral-8x7b. Default: the embedded model.",
)
DTYPE = flags.DEFINE_enum(
    "dtype",
    "auto",
    ["auto", "float32", "bfloat16"],
    "Of arithmetic, and of weights that are not quantized. auto: bfloat16, but float32 on a CPU "
    "with room for it.",
)
QUANT = flags.DEFINE_string(
    "quant",
    None,
    "Formats of the weights: a preset (attn4-experts4, int8, ...; scripts/plan.py --quant=all "
    "lists them) or component=format pairs. Default: as they are stored.",
)
METHOD = flags.DEFINE_enum(
    "method", "hqq", ["hqq", "rtn"], "How to quantize; rtn (round to nearest) is faster."
)
HOST_MEMORY = flags.DEFINE_enum(
    "host_memory",
    "auto",
    ["auto", "mmap", "ram"],
    "Of a converted store: map its files, or read them into memory. auto: ram if there is room.",
)
READ_AHEAD = flags.DEFINE_bool(
    "read_ahead",
    True,
    "Of experts in mapped files: read those that are predicted before they are needed.",
)
LOCK_MEMORY_GIB = flags.DEFINE_float(
    "lock_memory_gib",
    None,
    "Of experts in mapped files: keep so much of the most used ones in memory. Default: a share of "
    "what is free if they do not all fit, else 0.",
)
POPULARITY = flags.DEFINE_string(
    "popularity",
    None,
    "File of --record_routing that says which experts are used most. They are locked first, and by "
    "the policy offload on the device to begin with. Default: that is learnt.",
)
RANDOM_WEIGHTS = flags.DEFINE_bool(
    "random_weights", False, "Fill the shape of --model with random weights."
)
NUM_LAYERS = flags.DEFINE_integer(
    "num_layers", None, "With --random_weights: instead of the shape's own.", lower_bound=1
)
HOST_KERNELS = flags.DEFINE_bool(
    "host_kernels",
    True,
    "On a CPU compute with jmoe's C++ kernels, if they were built; --nohost_kernels leaves "
    "everything to XLA.",
)
ACTIVATION_BITS = flags.DEFINE_enum(
    "activation_bits",
    None,
    ["8", "16", "24"],
    "Of activations that meet weights in few bits in those kernels: 24 is as exact as float32; 8, "
    "the default, is the fastest.",
)
THREADS = flags.DEFINE_integer(
    "threads", None, "That a CPU computes with, XLA's own too. Default: all.", lower_bound=1
)

POLICY = flags.DEFINE_string(
    "policy",
    "auto",
    "auto (resident if all fits into the device memory, else experts in host memory, and whatever "
    "way of using them is the fastest on the first tokens), resident, offload (as many experts as "
    "fit on the device, the others copied), host (all on the CPU), or a policy file.",
)
ENGINE = flags.DEFINE_enum(
    "engine",
    None,
    ["auto", "thread", "compiled"],
    "With the policy offload, what takes decode steps: thread (the default), the host layer by "
    "layer, with a thread that copies experts; compiled, one program that finds and fetches "
    "experts itself; auto, the faster of both on the first tokens. See docs/engines.md.",
)
TOKENS_PER_CALL = flags.DEFINE_integer(
    "tokens_per_call",
    None,
    "Tokens that the engine compiled makes before the host sees them. Default: 1.",
    lower_bound=1,
)
MISSES = flags.DEFINE_enum(
    "misses",
    None,
    ["auto", "load", "split", "host"],
    "With the policy offload, what becomes of experts that are needed and not on the device: load "
    "(the default) copies them; host computes them on the CPU; split does both at once, so that "
    "both end together; auto, what is the fastest on the first tokens. See docs/hybrid.md.",
)
DEVICE_MEMORY_GIB = flags.DEFINE_float(
    "device_memory_gib",
    None,
    "Device memory to use, in GiB, for weights, KV cache, workspace and experts. Default: most of "
    "what is free on an accelerator; without end on a CPU.",
)
CONTEXT = flags.DEFINE_integer(
    "context",
    None,
    "Positions to plan for, prompt and new tokens; a batch of another size is planned anew. "
    "Default: 1024, or the model's context.",
)
LINK_GB_PER_S = flags.DEFINE_float(
    "link_gb_per_s",
    None,
    "Holds copies of experts to this speed (10^9 bytes per second), for experiments.",
)
LINK_LATENCY_US = flags.DEFINE_float(
    "link_latency_us", 0.0, "With --link_gb_per_s: what each copy takes besides.", lower_bound=0.0
)
HOST_GB_PER_S = flags.DEFINE_float(
    "host_gb_per_s",
    None,
    "Holds the CPU to reading experts at this speed (10^9 bytes per second) when it computes what "
    "the device does not have, for experiments.",
)
HARDWARE = flags.DEFINE_string(
    "hardware",
    None,
    "What the machine can do, if the CPU may compute missing experts: a file of "
    "scripts/hardware.py, or a preset. Default: what was measured before, or is measured now.",
)
RECALIBRATE = flags.DEFINE_bool("recalibrate", False, "Measure the machine again.")


def limit_threads() -> None:
    """Keeps XLA to ``--threads``; must be called before JAX starts a backend."""
    if THREADS.value is not None:
        os.environ["PJRT_NPROC"] = str(THREADS.value)


def arguments() -> dict[str, Any]:
    """What the flags say to ``jmoe.load``, besides the model."""
    return {
        "dtype": DTYPE.value,
        "quant": QUANT.value,
        "method": METHOD.value,
        "host_memory": HOST_MEMORY.value,
        "read_ahead": READ_AHEAD.value,
        "lock_memory_gib": LOCK_MEMORY_GIB.value,
        "popularity": POPULARITY.value,
        "random_weights": RANDOM_WEIGHTS.value,
        "num_layers": NUM_LAYERS.value,
        "host_kernels": HOST_KERNELS.value,
        "activation_bits": ACTIVATION_BITS.value and int(ACTIVATION_BITS.value),
        "threads": THREADS.value or 0,
        "policy": POLICY.value,
        "engine": ENGINE.value,
        "tokens_per_call": TOKENS_PER_CALL.value,
        "misses": MISSES.value,
        "device_memory_gib": DEVICE_MEMORY_GIB.value,
        "context": CONTEXT.value,
        "link_gb_per_s": LINK_GB_PER_S.value,
        "link_latency_us": LINK_LATENCY_US.value,
        "host_gb_per_s": HOST_GB_PER_S.value,
        "hardware": HARDWARE.value,
        "recalibrate": RECALIBRATE.value,
    }


def find() -> "FoundModel":
    """Looks at the model that the flags name, which may be too large for this machine."""
    limit_threads()
    from jmoe.loading import LoadOptions, find_model

    return find_model(MODEL.value, LoadOptions(**arguments(), check_memory=False))


def load(**more: Any) -> "jmoe.LLM":
    """Loads the model that the flags name, and says on stderr what it is.

    Args:
      more: arguments of ``jmoe.load`` besides those of the flags.
    """
    limit_threads()
    import jmoe

    llm = jmoe.load(MODEL.value, **arguments(), **more, progress=True)
    _common.note(_common.describe(llm))
    for line in llm.notes:
        _common.note(line)
    return llm
