"""How prompts are cut: little padding, and attention scores within bounds."""

from jmoe.planning import chunks
from tests.models.configs import small_config


def test_chunks_cover_a_prompt_with_little_padding():
    assert chunks.prompt_chunks(1) == [16]
    assert chunks.prompt_chunks(300) == [512]
    assert chunks.prompt_chunks(512) == [512]
    assert chunks.prompt_chunks(513) == [512, 16]
    assert chunks.prompt_chunks(1300) == [512, 512, 512]
    assert chunks.prompt_chunks(300, 128) == [128, 128, 64]


def test_chunks_shrink_where_attention_scores_would_take_too_much():
    mixtral = small_config(num_attention_heads=32, hidden_size=128)
    assert chunks.longest_chunk(mixtral, 1, 1024) == 512
    assert chunks.longest_chunk(mixtral, 1, 32768) == 128
    assert chunks.longest_chunk(mixtral, 64, 4096) == chunks.MIN_CHUNK
    # 128 * 32768 * 32 heads * 4 bytes
    assert chunks.MAX_SCORE_BYTES == 128 * 32768 * 32 * 4
