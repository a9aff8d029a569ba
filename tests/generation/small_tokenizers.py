"""Small tokenizers of the two kinds that language models use, with every trap of the large ones."""

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from jmoe.store.tokenizer import Tokenizer

SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}

# Tokens of several bytes that begin, end or cut a character: of "€", of an emoji, of "é".
_BYTE_TOKENS = (b" a", b"he", b"llo", b"hello", b"\n\n", b"\xe2\x82", b"\xf0\x9f", b"\x98\x80")
_BYTE_TOKENS += (b"x\xc3", b"\xa9y", b"\xac\xc3", "é".encode())

_WORDS = ("a", "b", "l", "o", "▁", "▁▁", "▁a", "▁the", "he", "llo", "é", "€", "\ufffd", "<", "0x")


def byte_level_backend() -> Backend:
    """Byte-level BPE (GPT-2, Qwen, DeepSeek): all bytes, and tokens that cut characters."""
    characters = _characters_of_bytes()
    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS.values())}
    for data in [bytes([byte]) for byte in range(256)] + list(_BYTE_TOKENS):
        vocab["".join(characters[byte] for byte in data)] = len(vocab)
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _with_bos(backend)


def sentencepiece_backend() -> Backend:
    """SentencePiece-style BPE with byte fallback (Mixtral): a missing character is bytes."""
    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS.values())}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for word in _WORDS:
        vocab[word] = len(vocab)
    backend = Backend(
        models.BPE(
            vocab=vocab,
            merges=[("▁", "a"), ("▁", "▁")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _with_bos(backend)


def wrapped(backend: Backend) -> Tokenizer:
    """The tokenizer of jmoe around one of these."""
    return Tokenizer(backend, special_tokens=SPECIAL_TOKENS)


def _with_bos(backend: Backend) -> Backend:
    backend.add_special_tokens(list(SPECIAL_TOKENS.values()))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return backend


def _characters_of_bytes() -> list[str]:
    """By byte, the character that byte-level BPE writes for it."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    others = iter(sorted(character for character in alphabet if ord(character) >= 256))
    return [chr(byte) if chr(byte) in alphabet else next(others) for byte in range(256)]
