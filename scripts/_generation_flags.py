"""The flags that say how tokens are chosen and where a text ends."""

from typing import Any

from absl import flags

MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "Longest continuation, in tokens.")
TEMPERATURE = flags.DEFINE_float(
    "temperature", None, "0 is greedy. Default: the model's generation_config.json, or greedy."
)
TOP_K = flags.DEFINE_integer("top_k", None, "Sample among the k most probable tokens; 0 is all.")
TOP_P = flags.DEFINE_float("top_p", None, "Sample among the fewest tokens that reach p.")
MIN_P = flags.DEFINE_float(
    "min_p", None, "Sample among tokens at least this share as probable as the best."
)
REPETITION_PENALTY = flags.DEFINE_float(
    "repetition_penalty", None, "Above 1: makes tokens seen already less likely."
)
SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same text.")
STOP = flags.DEFINE_multi_string("stop", [], "End the text before this string; repeatable.")
NUM_BEAMS = flags.DEFINE_integer(
    "num_beams",
    None,
    "Sequences to follow at once, for the one that is most probable as a whole: beam search, "
    "instead of sampling. The text comes at the end. See docs/beams.md.",
)
NUM_RETURN_SEQUENCES = flags.DEFINE_integer(
    "num_return_sequences", None, "With --num_beams: how many of the best to print."
)
LENGTH_PENALTY = flags.DEFINE_float(
    "length_penalty",
    None,
    "With --num_beams: a sequence's log-probability is divided by its length to this power; above "
    "0 favours long ones, below short ones. Default: 1.",
)
EARLY_STOPPING = flags.DEFINE_enum(
    "early_stopping",
    None,
    ["true", "false", "never"],
    "With --num_beams: end when as many sequences as beams have ended (true), when better ones are "
    "not likely (false, the default), or when there cannot be any (never).",
)


def options() -> dict[str, Any]:
    """What the flags say, as options of ``LLM.generate``; None is not said."""
    early_stopping: Any = EARLY_STOPPING.value
    return {
        "max_new_tokens": MAX_NEW_TOKENS.value,
        "temperature": TEMPERATURE.value,
        "top_k": TOP_K.value,
        "top_p": TOP_P.value,
        "min_p": MIN_P.value,
        "repetition_penalty": REPETITION_PENALTY.value,
        "seed": SEED.value,
        "stop": STOP.value,
        "num_beams": NUM_BEAMS.value,
        "num_return_sequences": NUM_RETURN_SEQUENCES.value,
        "length_penalty": LENGTH_PENALTY.value,
        "early_stopping": {"true": True, "false": False}.get(early_stopping, early_stopping),
    }
