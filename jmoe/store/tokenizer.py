"""Text to token ids and back, as a model directory's tokenizer.json defines it.

Encoding is the `tokenizers` library's, one text at a time: its batch calls start threads,
and then warn whenever the process forks. Decoding is by bytes: each token is the bytes it
stands for, and a text is what those bytes mean in UTF-8. That gives the library's text
wherever the bytes are valid, and lets generation/detokenize.py stream the same text.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import tokenizers

from jmoe.errors import CheckpointError, RequestError
from jmoe.store.chat_template import ChatTemplate
from jmoe.store.json_files import read_json_object

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

# What transformers gives to chat templates by these names.
SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes every byte as a visible character; this is the way back (GPT-2's)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(0x100 + index): byte for index, byte in enumerate(hidden)
    }


_BYTE_OF_CHARACTER = _byte_of_character()
_BYTE_OF_FALLBACK = {f"<0x{byte:02X}>": byte for byte in range(0x100)}


class Tokenizer:
    """A model's tokenizer with its special tokens and its chat template.

    Attributes:
      bos_token_id: what a text begins with; None where the model names none.
      eos_token_id: what the tokenizer's files say ends a text; None where they name none.
        (generation_config.json may name more.)
      special_ids: all ids that stand for no text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: ChatTemplate | None = None,
    ):
        """Wraps a tokenizer of the library, which is changed; most callers want `load`.

        Args:
          backend: the library's tokenizer.
          special_tokens: by name (``bos_token``) the tokens that count as special besides
            those that `backend` marks so.
          chat_template: how conversations become text.
        """
        ids = {name: backend.token_to_id(t) for name, t in (special_tokens or {}).items()}
        # A tokenizer.json keeps the settings of its last training run: 512 tokens, then cut.
        backend.no_truncation()
        backend.no_padding()
        backend.add_special_tokens(
            [
                tokenizers.AddedToken(token, special=True, normalized=False)
                for name, token in (special_tokens or {}).items()
                if ids[name] is not None
            ]
        )
        self._backend = backend
        self._chat_template = chat_template
        self.bos_token_id = ids.get("bos_token")
        self.eos_token_id = ids.get("eos_token")
        self.special_ids = frozenset(
            token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        )
        # SentencePiece drops the space before the first word of a text. Behind some other
        # word every token shows what it is in the middle of a text.
        self._anchor_ids: list[int] = backend.encode("a", add_special_tokens=False).ids
        self._anchor_text: str = backend.decode(self._anchor_ids, skip_special_tokens=False)
        self._bytes: dict[tuple[int, bool], bytes] = {}

    @classmethod
    def load(cls, directory: Path, *, vocab_size: int | None = None) -> "Tokenizer":
        """Loads the tokenizer of a model directory.

        Args:
          directory: holds tokenizer.json and, optionally, tokenizer_config.json and
            chat_template.jinja.
          vocab_size: rows of the model's embedding. More rows than tokens is fine (padding).

        Raises:
          CheckpointError: a file is missing or damaged, or there are more tokens than rows.
        """
        backend = _read_backend(directory)
        config = {}
        if (directory / TOKENIZER_CONFIG_FILE).exists():
            config = read_json_object(directory / TOKENIZER_CONFIG_FILE)
        special_tokens = _read_special_tokens(config, directory)
        for name in ("bos_token", "eos_token"):
            if name in special_tokens and backend.token_to_id(special_tokens[name]) is None:
                raise CheckpointError(
                    f"{name} of {TOKENIZER_CONFIG_FILE} is not in {TOKENIZER_FILE}",
                    where=directory,
                    got=repr(special_tokens[name]),
                    do="download both files again, from the same revision",
                )
        largest_id = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if vocab_size is not None and largest_id >= vocab_size:
            raise CheckpointError(
                f"{TOKENIZER_FILE} has more tokens than the model has embeddings",
                where=directory,
                got=f"token id {largest_id}",
                expected=f"ids below vocab_size = {vocab_size}",
                do="take the tokenizer and the weights from the same model",
            )
        return cls(
            backend,
            special_tokens=special_tokens,
            chat_template=ChatTemplate.find(directory, config, special_tokens),
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` works."""
        return self._chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Encodes a text.

        Args:
          text: any text. Special tokens written out in it count as such, as in transformers.
          add_special_tokens: whether tokenizer.json's post-processor runs, which puts BOS in
            front for most models. It alone decides: ``add_bos_token`` in
            tokenizer_config.json changes nothing, as in transformers v5.

        Raises:
          RequestError: the text holds a lone surrogate.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as e:
            raise RequestError(
                "the text holds half a character (a lone surrogate)",
                got=f"U+{ord(text[e.start]):04X} at position {e.start}",
                do="read the input as UTF-8",
            ) from None
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Decodes ids: the library's text, except for invalid UTF-8 from byte tokens.

        There the library gives one U+FFFD for each byte token of the whole run, valid
        neighbours too, so that a later token changes earlier text. Here, as in byte-level
        tokenizers, only the invalid part is replaced.
        """
        shown = [
            i
            for i in ids
            if self.token_bytes(i) and not (skip_special_tokens and i in self.special_ids)
        ]
        data = b"".join(self.token_bytes(i, first=n == 0) for n, i in enumerate(shown))
        return data.decode("utf-8", errors="replace")

    def has_text(self, token_id: int) -> bool:
        """Whether an id is part of a text: neither a special token nor a row of padding."""
        return token_id not in self.special_ids and self.token_bytes(token_id) != b""

    def token_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        """The UTF-8 bytes that a token adds to a text; b"" for an id without a token.

        Args:
          token_id: any id >= 0; a special token gives its name.
          first: whether no other token comes before it: SentencePiece-style decoders drop
            one space there.
        """
        key = (token_id, first)
        if key not in self._bytes:
            self._bytes[key] = self._find_bytes(token_id, first)
        return self._bytes[key]

    def _find_bytes(self, token_id: int, first: bool) -> bytes:
        ids = [token_id] if first else [*self._anchor_ids, token_id]
        text = self._backend.decode(ids, skip_special_tokens=False)
        if not first:
            text = text.removeprefix(self._anchor_text)
        if "\ufffd" not in text:
            return text.encode("utf-8")
        # Part of a character: only the token's name says which bytes.
        token = self._backend.id_to_token(token_id)
        assert token is not None, token_id
        if token in _BYTE_OF_FALLBACK:
            return bytes([_BYTE_OF_FALLBACK[token]])
        if all(character in _BYTE_OF_CHARACTER for character in token):
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        return text.encode("utf-8")  # a token that is, or contains, U+FFFD itself

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Encodes a conversation; the template writes BOS and the like itself.

        Raises:
          RequestError: the model has no template, a message is malformed, or the template
            refuses the conversation.
        """
        if self._chat_template is None:
            raise RequestError(
                "this model has no chat template", do="give the prompt as text, not as messages"
            )
        text = self._chat_template.render(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(text, add_special_tokens=False)


def _read_backend(directory: Path) -> tokenizers.Tokenizer:
    try:
        data = (directory / TOKENIZER_FILE).read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"{TOKENIZER_FILE} is missing",
            where=directory,
            do="download it; a model with tokenizer.model only needs conversion by transformers",
        ) from None
    except OSError as e:
        raise CheckpointError(
            f"{TOKENIZER_FILE} cannot be read", where=directory, got=e.strerror
        ) from None
    try:
        backend = tokenizers.Tokenizer.from_buffer(data)
        # A post-processor that names a token which does not exist fails only when it runs.
        backend.encode("a")
    except BaseException as e:
        # The library raises plain Exceptions, and PanicException, which is none and has no
        # importable name, where a damaged file is still JSON.
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"{TOKENIZER_FILE} is not a tokenizer",
            where=directory,
            got=e,
            do="git lfs pull, or download the file again",
        ) from None
    return backend


def _read_special_tokens(config: Mapping, directory: Path) -> dict[str, str]:
    """Special tokens by name: strings, or in older files objects with their content."""
    tokens = {}
    for name in SPECIAL_TOKEN_NAMES:
        token = config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            tokens[name] = token
        elif config.get(name) is not None:
            raise CheckpointError(
                f"{name} is neither text nor an object with content",
                where=directory / TOKENIZER_CONFIG_FILE,
                got=config[name],
            )
    return tokens
