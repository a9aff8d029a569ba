"""One sequence while it grows: its tokens, its text, and whether it has ended."""

from collections.abc import Sequence
from typing import Literal

from jmoe.generation.detokenize import Detokenizer
from jmoe.generation.options import GenerationOptions
from jmoe.generation.stopping import StopStrings
from jmoe.store.tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length"]


class GrowingSequence:
    """Turns token ids into text that is certain, and ends at the first reason to.

    Attributes:
      token_ids: new tokens so far, including the one that ended the sequence.
      finish_reason: None while it grows; "eos" after a stop token, "stop" after a stop
        string, "length" after as many tokens as it may have.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        options: GenerationOptions,
        max_new_tokens: int,
    ):
        self._detokenizer = Detokenizer(tokenizer, prompt_ids)
        self._stop_strings = StopStrings(options.stop)
        self._stop_token_ids = frozenset(options.stop_token_ids)
        self._max_new_tokens = max_new_tokens
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None

    def push(self, token_id: int) -> str:
        """Takes the next token; returns the text that it made certain, perhaps none."""
        assert self.finish_reason is None, "the sequence has ended"
        self.token_ids.append(token_id)
        if token_id in self._stop_token_ids:
            self.finish_reason = "eos"
            return self._finish("")
        piece = self._detokenizer.push(token_id)
        if len(self.token_ids) == self._max_new_tokens:
            self.finish_reason = "length"
            return self._finish(piece)
        text, stopped = self._stop_strings.push(piece)
        if stopped:
            self.finish_reason = "stop"
        return text

    def _finish(self, piece: str) -> str:
        text, stopped = self._stop_strings.push(piece + self._detokenizer.finish())
        if stopped:
            self.finish_reason = "stop"
            return text
        return text + self._stop_strings.finish()
