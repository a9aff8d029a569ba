"""Streaming gives the one-shot text, for any tokens, as early as can be."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jmoe
from jmoe.generation.detokenize import Detokenizer
from jmoe.store.tokenizer import Tokenizer
from tests.generation.small_tokenizers import (
    byte_level_backend,
    sentencepiece_backend,
    wrapped,
)

BYTE_LEVEL = byte_level_backend()
SENTENCEPIECE = sentencepiece_backend()
TOKENIZERS = {"byte_level": wrapped(BYTE_LEVEL), "sentencepiece": wrapped(SENTENCEPIECE)}
TINY = Path(jmoe.__file__).parent / "data" / "tiny-mixtral"

# Embeddings may have more rows than there are tokens: ids up to 280 are generated too.
ids_lists = st.lists(st.integers(0, 280), max_size=12)
# How a text may end for bytes that Python's decoder still waits on.
UNFINISHED = ("", "\ufffd", "\ufffd\ufffd")
kinds = pytest.mark.parametrize("kind", TOKENIZERS)


def stream(tokenizer: Tokenizer, prompt_ids: list[int], ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt_ids)
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


def byte_ids(text: str) -> list[int]:
    """One token per byte: both small tokenizers have those behind the three special tokens."""
    return [3 + byte for byte in text.encode()]


def assert_continues(full: str, prompt: str, streamed: str) -> None:
    """Checks that `full` is `prompt`, less an unfinished character, followed by `streamed`."""
    assert full.endswith(streamed)
    assert prompt in [full.removesuffix(streamed) + end for end in UNFINISHED]


@given(ids_lists, ids_lists)
def test_pieces_of_byte_level_tokens_continue_the_library_text(prompt_ids, ids):
    streamed = "".join(stream(TOKENIZERS["byte_level"], prompt_ids, ids))
    assert_continues(BYTE_LEVEL.decode(prompt_ids + ids), BYTE_LEVEL.decode(prompt_ids), streamed)


def sentencepiece_reference(ids: list[int]) -> str:
    """What the ids mean, by names alone: only the invalid part of a run of bytes is replaced."""
    data = b""
    for i in ids:
        name = SENTENCEPIECE.id_to_token(i)
        if name is None:
            continue
        if byte := re.fullmatch("<0x(..)>", name):
            data += bytes.fromhex(byte[1])
        elif name not in ("<unk>", "<s>", "</s>"):
            data += name.replace("▁", " ").encode()
    return data.decode("utf-8", errors="replace").removeprefix(" ")


@given(ids_lists, ids_lists)
def test_pieces_of_sentencepiece_tokens_continue_the_text(prompt_ids, ids):
    streamed = "".join(stream(TOKENIZERS["sentencepiece"], prompt_ids, ids))
    prompt = sentencepiece_reference(prompt_ids)
    full = sentencepiece_reference(prompt_ids + ids)
    assert_continues(full, prompt, streamed)
    assert full == TOKENIZERS["sentencepiece"].decode(prompt_ids + ids)


@given(st.text(max_size=8), st.text(max_size=8))
def test_bytes_of_any_text_stream_to_the_library_text(prompt, text):
    # Text that is not in the vocabulary: runs of byte tokens, all valid.
    prompt_ids = SENTENCEPIECE.encode(prompt).ids
    ids = SENTENCEPIECE.encode(text, add_special_tokens=False).ids
    streamed = "".join(stream(TOKENIZERS["sentencepiece"], prompt_ids, ids))
    library = SENTENCEPIECE.decode(prompt_ids + ids)
    assert SENTENCEPIECE.decode(prompt_ids) + streamed == library


@kinds
@given(ids=ids_lists)
def test_all_but_one_unfinished_character_is_emitted_at_once(kind, ids):
    tokenizer = TOKENIZERS[kind]
    detokenizer = Detokenizer(tokenizer)
    streamed = ""
    for n, token_id in enumerate(ids, start=1):
        streamed += detokenizer.push(token_id)
        assert tokenizer.decode(ids[:n]) in [streamed + end for end in UNFINISHED]


@kinds
def test_ascii_is_never_held_back(kind):
    tokenizer = TOKENIZERS[kind]
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("a"))
    for byte in range(0x80):
        token_id = tokenizer.encode(chr(byte))[-1]
        assert detokenizer.push(token_id).endswith(chr(byte))


@kinds
def test_a_character_cut_into_tokens_comes_out_whole(kind):
    tokenizer = TOKENIZERS[kind]
    ids = byte_ids("😀")
    assert stream(tokenizer, tokenizer.encode("a"), ids) == ["", "", "", "😀", ""]
    assert stream(tokenizer, tokenizer.encode("a"), ids[:3]) == ["", "", "", "\ufffd"]


def test_endless_invalid_bytes_flow():
    # The library's own stream holds such bytes back for ever, and decodes them all each time.
    tokenizer = TOKENIZERS["sentencepiece"]
    pieces = stream(tokenizer, [], [3 + 0xFF] * 20_000)
    assert pieces == ["\ufffd"] * 20_000 + [""]


def test_the_first_word_keeps_its_space_behind_a_prompt_only():
    tokenizer = TOKENIZERS["sentencepiece"]
    word = SENTENCEPIECE.token_to_id("▁the")
    assert word is not None
    assert stream(tokenizer, tokenizer.encode("a"), [word])[0] == " the"
    assert stream(tokenizer, [1], [word])[0] == "the"  # BOS alone is no text
    assert stream(tokenizer, [1], [2, word])[1] == "the"


@kinds
def test_special_tokens_have_no_text_even_within_a_character(kind):
    first, *rest = byte_ids("€")
    assert stream(TOKENIZERS[kind], [], [first, 1, *rest, 2]) == ["", "", "", "€", "", ""]


def test_rows_of_padding_change_nothing():
    tokenizer = TOKENIZERS["sentencepiece"]
    word = SENTENCEPIECE.token_to_id("▁the")
    assert word is not None
    assert stream(tokenizer, [1, 280], [280, word]) == ["", "the", ""]
    assert tokenizer.decode([280, word]) == "the"
    first, *rest = byte_ids("€")
    assert stream(tokenizer, [first, 280, 280, 280], rest) == ["", "€", ""]


def test_a_prompt_may_end_within_a_character():
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("a€")
    assert "".join(stream(tokenizer, ids[:-1], ids[-1:])) == "€"


def test_generated_source_of_the_embedded_model_streams_whole():
    tokenizer = Tokenizer.load(TINY)
    text = "def f(x):\n    # naïve 😀\n    return x\n"
    ids = tokenizer.encode(text)
    for cut in range(1, len(ids)):
        streamed = "".join(stream(tokenizer, ids[:cut], ids[cut:]))
        assert_continues(text, tokenizer.decode(ids[:cut]), streamed)
