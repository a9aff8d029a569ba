"""Tokenizers of model directories: transformers' ids and text, and every damage named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jmoe
from jmoe.errors import CheckpointError, RequestError
from jmoe.store.tokenizer import Tokenizer
from tests.generation.small_tokenizers import (
    byte_level_backend,
    sentencepiece_backend,
    wrapped,
)

TINY = Path(jmoe.__file__).parent / "data" / "tiny-mixtral"
TINY_TOKENIZER = Tokenizer.load(TINY, vocab_size=4096)
TEXT = "def greet(name):\n    '''naïve 😀'''\n    return f'hé {name}</s>'\n"


@pytest.fixture
def directory(tmp_path):
    """A model directory with the SentencePiece-style tokenizer and the usual special tokens."""
    sentencepiece_backend().save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path, bos_token="<s>", eos_token={"content": "</s>", "lstrip": False})
    return tmp_path


def write_config(directory: Path, **config) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def change_tokenizer_json(directory: Path, change) -> None:
    path = directory / "tokenizer.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_agrees_with_transformers_on_the_embedded_model():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(TINY)
    for add in (False, True):
        ids = TINY_TOKENIZER.encode(TEXT, add_special_tokens=add)
        assert ids == theirs.encode(TEXT, add_special_tokens=add)
        for skip in (False, True):
            ours = TINY_TOKENIZER.decode(ids, skip_special_tokens=skip)
            assert ours == theirs.decode(ids, skip_special_tokens=skip)
    talk = [{"role": "system", "content": "Doc."}, {"role": "user", "content": "import os"}]
    ids = theirs.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
    assert TINY_TOKENIZER.apply_chat_template(talk) == ids
    assert TINY_TOKENIZER.bos_token_id == theirs.bos_token_id
    assert TINY_TOKENIZER.eos_token_id == theirs.eos_token_id
    assert TINY_TOKENIZER.special_ids == set(theirs.all_special_ids)


@pytest.mark.parametrize("build", [byte_level_backend, sentencepiece_backend])
def test_agrees_with_transformers_on_small_tokenizers(tmp_path, build):
    transformers = pytest.importorskip("transformers")
    build().save(str(tmp_path / "tokenizer.json"))
    # add_bos_token is there because it must not decide: the post-processor does.
    write_config(
        tmp_path,
        tokenizer_class="PreTrainedTokenizerFast",
        add_bos_token=False,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    for text in ("", " ", "hello the 😀", "  a\n\nb<s>  b", TEXT):
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


def test_a_text_comes_back():
    ids = TINY_TOKENIZER.encode(TEXT.replace("</s>", ""))
    assert ids[0] == TINY_TOKENIZER.bos_token_id
    assert TINY_TOKENIZER.decode(ids) == TEXT.replace("</s>", "")


@given(st.lists(st.integers(0, 4200), max_size=12), st.booleans())
def test_decodes_any_byte_level_ids_as_the_library_does(ids, skip):
    ours = TINY_TOKENIZER.decode(ids, skip_special_tokens=skip)
    assert ours == TINY_TOKENIZER._backend.decode(ids, skip_special_tokens=skip)


@given(st.text(max_size=10), st.booleans())
def test_decodes_any_sentencepiece_text_as_the_library_does(text, skip):
    backend = sentencepiece_backend()
    ids = wrapped(backend).encode(text)
    assert wrapped(backend).decode(ids, skip_special_tokens=skip) == backend.decode(
        ids, skip_special_tokens=skip
    )


def test_an_invalid_byte_leaves_its_valid_neighbours_alone():
    backend = sentencepiece_backend()
    ids = [3 + byte for byte in b"ab\xff\nc"]
    assert backend.decode(ids) == "\ufffd" * 5
    assert wrapped(backend).decode(ids) == "ab\ufffd\nc"


def test_an_id_without_a_token_has_no_text():
    assert TINY_TOKENIZER.token_bytes(4096) == b""
    assert TINY_TOKENIZER.decode([10**6]) == ""


@pytest.mark.parametrize("text", ["\ud800", "fine until \udcff"])
def test_half_a_character_cannot_be_encoded(text):
    with pytest.raises(RequestError, match=f"U\\+{ord(text[-1]):04X} at position {len(text) - 1}"):
        TINY_TOKENIZER.encode(text)


def test_encoding_leaves_no_warning_for_a_process_that_forks():
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from jmoe.store.tokenizer import Tokenizer\n"
        "tokenizer = Tokenizer.load(Path(sys.argv[1]))\n"
        "tokenizer.decode(tokenizer.encode('x = 1\\n' * 1000))\n"
        "if os.fork() == 0:\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "tokenizer.encode('y')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(TINY)],
        capture_output=True,
        text=True,
        cwd=Path(jmoe.__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert "huggingface/tokenizers" not in done.stderr


def test_finds_special_tokens_as_text_or_objects(directory):
    tokenizer = Tokenizer.load(directory)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.special_ids == {0, 1, 2}


def test_a_token_is_special_if_the_config_says_so(directory):
    # Then it is skipped in text, and one token when written out, as in transformers.
    write_config(directory, eos_token="▁the")
    tokenizer = Tokenizer.load(directory)
    eos = tokenizer.eos_token_id
    assert eos in tokenizer.special_ids
    assert tokenizer.decode([eos, 1, eos]) == ""


def test_no_tokenizer_config_means_no_named_tokens(directory):
    (directory / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.bos_token_id is None
    assert tokenizer.eos_token_id is None
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_forgets_truncation_and_padding(directory):
    backend = sentencepiece_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(directory / "tokenizer.json"))
    assert len(Tokenizer.load(directory).encode("a" * 10)) == 11


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path)


def test_a_directory_in_its_place_is_named(tmp_path):
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"\xff", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_a_damaged_tokenizer_is_named(directory, data):
    (directory / "tokenizer.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(directory)


@pytest.mark.parametrize("panic", ["post_processor", "merges"])
def test_a_tokenizer_that_makes_the_library_panic_is_named(directory, panic):
    def change(value):
        if panic == "post_processor":
            value["post_processor"]["special_tokens"] = {}
        else:
            value["model"]["continuing_subword_prefix"] = "longer than a token"

    change_tokenizer_json(directory, change)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(directory)


@pytest.mark.parametrize("config", ["{", "[]", "\ud800"])
def test_a_damaged_tokenizer_config_is_named(directory, config):
    path = directory / "tokenizer_config.json"
    path.write_bytes(config.encode(errors="surrogatepass"))
    with pytest.raises(CheckpointError, match="tokenizer_config"):
        Tokenizer.load(directory)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"eos_token": 2}, "eos_token is neither text"),
        ({"eos_token": {"text": "</s>"}}, "eos_token is neither text"),
        ({"eos_token": "<|end|>"}, "eos_token of tokenizer_config.json is not in tokenizer.json"),
        ({"chat_template": 1}, "chat_template must be text"),
        ({"chat_template": ["x"]}, "chat_template must list"),
        ({"chat_template": "{% if %}"}, "line 1"),
    ],
)
def test_a_malformed_setting_is_named(directory, config, text):
    write_config(directory, **config)
    with pytest.raises(CheckpointError, match=text):
        Tokenizer.load(directory)


def test_more_tokens_than_embeddings_is_another_models_tokenizer(directory):
    largest_id = sentencepiece_backend().get_vocab_size() - 1
    assert Tokenizer.load(directory, vocab_size=largest_id + 1)
    assert Tokenizer.load(directory, vocab_size=largest_id + 100)
    with pytest.raises(CheckpointError, match=f"token id {largest_id}"):
        Tokenizer.load(directory, vocab_size=largest_id)


def test_the_template_file_wins_over_the_config(directory):
    talk = [{"role": "user", "content": "b"}]
    named = [{"name": "rag", "template": "l"}, {"name": "default", "template": "a"}]
    for template, text in (("o", "o"), (named, "a"), (named[:1], None)):
        write_config(directory, bos_token="<s>", chat_template=template)
        tokenizer = Tokenizer.load(directory)
        assert tokenizer.has_chat_template == (text is not None)
        if text is not None:
            assert tokenizer.decode(tokenizer.apply_chat_template(talk)) == text
    (directory / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    ids = Tokenizer.load(directory).apply_chat_template(talk)
    assert ids[0] == 1 and ids.count(1) == 1
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read"):
        Tokenizer.load(directory)


def test_a_chat_with_the_embedded_model_is_one_growing_source():
    def text(*contents, system=None):
        talk = [{"role": "system", "content": system}] if system else []
        roles = ("user", "assistant")
        talk += [{"role": roles[n % 2], "content": c} for n, c in enumerate(contents)]
        ids = TINY_TOKENIZER.apply_chat_template(talk)
        return TINY_TOKENIZER.decode(ids, skip_special_tokens=False)

    one = [{"role": "user", "content": "def f("}]
    assert TINY_TOKENIZER.apply_chat_template(one) == TINY_TOKENIZER.encode("def f(")
    assert text("def f(x):\n", "    return x", "\ndef g(") == (
        "<s>def f(x):\n    return x\n\ndef g("
    )
    assert text("import os\n", system="Paths.") == '<s>"""Paths."""\nimport os\n'
