"""What a call to generate gives back."""

import dataclasses
from collections.abc import Mapping, Sequence

from jmoe.generation.sequence import FinishReason
from jmoe.metrics import GenerationStats

Message = Mapping[str, str]  # {"role": "user", "content": "..."}
Prompt = str | Sequence[int] | Sequence[Message]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedSequence:
    """One continuation of a prompt.

    Attributes:
      token_ids: the new tokens, including a stop token that ended the text.
      text: the new text, without stop strings and special tokens.
      finish_reason: "eos" (a stop token), "stop" (a stop string) or "length".
      score: with beams, the sum of its tokens' log-probabilities by its length **
        length_penalty; else None.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    score: float | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """What became of one prompt.

    Attributes:
      prompt: as it was given: text, messages, or token ids.
      prompt_token_ids: what the model saw.
      sequences: its continuations, best first: as many as num_return_sequences, else one. What
        the result itself says is of the first one.
      stats: of the whole call, over all its prompts.
    """

    prompt: Prompt
    prompt_token_ids: tuple[int, ...]
    sequences: tuple[GeneratedSequence, ...]
    stats: GenerationStats

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.sequences[0].token_ids

    @property
    def text(self) -> str:
        return self.sequences[0].text

    @property
    def finish_reason(self) -> FinishReason:
        return self.sequences[0].finish_reason

    @property
    def score(self) -> float | None:
        return self.sequences[0].score


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """New text of one prompt, as it is made. With beams the best text, in one chunk at the end.

    Attributes:
      index: which prompt of the call.
      text: text that is certain by now; it continues the chunk before.
      token_ids: new tokens since the chunk before; their text may come with a later chunk.
      finish_reason: set in the last chunk of a prompt.
      stats: set in the last chunk of the call.
      sequences: with beams, all that are returned, best first; else empty.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stats: GenerationStats | None
    sequences: tuple[GeneratedSequence, ...] = ()
