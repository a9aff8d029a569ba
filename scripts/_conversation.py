"""Text as it is made, on stdout, for prompts and for chats."""

import sys
from collections.abc import Sequence
from typing import Any

import _common

import jmoe


def print_text(llm: jmoe.LLM, prompts: list[Any], options: dict[str, Any]) -> str:
    """Prints the answers in the order of the prompts, as they are made.

    All prompts run at once. The first one that has not ended is shown live; what the others
    make meanwhile follows when it is their turn. Of several sequences of a prompt each has a
    heading. Returns everything but the headings of prompts.
    """
    waiting: dict[int, list[str]] = {i: [] for i in range(len(prompts))}
    ended: set[int] = set()
    shown, answer = -1, ""
    with _common.status("compiling and reading the prompt ..."):
        chunks = llm.stream(prompts, **options)
    for chunk in chunks:
        several = len(chunk.sequences) > 1
        waiting[chunk.index].append(_numbered(chunk.sequences) if several else chunk.text)
        if chunk.finish_reason is not None:
            ended.add(chunk.index)
        while waiting:
            current = min(waiting)
            if len(prompts) > 1 and current != shown:
                print(f"=== {current + 1}/{len(prompts)} ===")
            shown = current
            text = "".join(waiting[current])
            waiting[current].clear()
            answer += text
            print(text, end="", flush=True)
            if current not in ended:
                break
            del waiting[current]
            print(flush=True)
        if chunk.stats is not None:
            for line in _common.describe_stats(chunk.stats):
                _common.note(line)
    return answer


def _numbered(sequences: Sequence[jmoe.GeneratedSequence]) -> str:
    return "\n".join(
        f"--- {i}/{len(sequences)}, score {sequence.score:.4f} ---\n{sequence.text}"
        for i, sequence in enumerate(sequences, start=1)
    )


def chat(llm: jmoe.LLM, system: str | None, options: dict[str, Any]) -> None:
    """Talks with the user, one line of standard input per turn, until /exit or its end.

    Raises:
      RequestError: the model has no chat template, the conversation outgrew its context, or
        several answers are asked for.
    """
    import readline  # noqa: F401  (line editing for input())

    if not llm.tokenizer.has_chat_template:
        raise jmoe.RequestError(
            "the model has no chat template", where=llm.directory, do="use --prompt with --raw"
        )
    if llm.options(**options).num_return_sequences > 1:
        raise jmoe.RequestError(
            "a chat goes on from one answer", do="leave out --num_return_sequences"
        )
    start = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    _common.note("/reset starts over; /exit or Ctrl-D ends.")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip() == "/exit":
            return
        if line.strip() == "/reset":
            messages = list(start)
        elif line.strip():
            messages.append({"role": "user", "content": line})
            answer = print_text(llm, [messages], options)
            messages.append({"role": "assistant", "content": answer})
