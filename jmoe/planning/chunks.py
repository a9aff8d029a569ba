"""In which pieces a prompt goes through the model: bounded memory, few compiled programs."""

from jmoe.config import ModelConfig

# Longest and shortest piece of a prompt that goes through the model at once.
MAX_CHUNK = 512
MIN_CHUNK = 16
# Attention scores of a chunk, the largest temporary of a program, stay below this.
MAX_SCORE_BYTES = 2**29


def longest_chunk(config: ModelConfig, batch_size: int, num_positions: int) -> int:
    """Largest power of two whose attention scores over so many positions stay in bounds."""
    score_bytes = 4 * batch_size * config.num_attention_heads * num_positions
    fitting = max(1, MAX_SCORE_BYTES // score_bytes)
    return max(MIN_CHUNK, min(MAX_CHUNK, 1 << (fitting.bit_length() - 1)))


def prompt_chunks(num_tokens: int, longest: int = MAX_CHUNK) -> list[int]:
    """Lengths of the chunks of a prompt, padding included: the longest, then a power of two.

    Buckets bound the number of compiled programs; the last chunk is less than half padding.
    """
    full, rest = divmod(num_tokens, longest)
    last = [max(MIN_CHUNK, 1 << (rest - 1).bit_length())] if rest else []
    return [longest] * full + last
