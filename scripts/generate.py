"""Generates text with a Mixture-of-Experts model.

Without flags the small model inside the package (17 M parameters, trained on the Python
standard library) continues a class. Text streams to stdout as it is made; everything
else goes to stderr.

Examples:
  python scripts/generate.py
  python scripts/generate.py --prompt='def binary_search(' --temperature=0
  python scripts/generate.py --model=mistralai/Mixtral-8x7B-Instruct-v0.1 --prompt='Hello!'
  python scripts/generate.py --model=path/to/model --chat --system='You are brief.'
  python scripts/generate.py --model=path/to/model --quant=attn4-experts4
  python scripts/generate.py --model=mixtral-8x7b --random_weights --num_layers=2 --quant=int4
  python scripts/generate.py --policy=offload --device_memory_gib=0.02
  python scripts/generate.py --model=path/to/store --device_memory_gib=8 --dry_run
  python scripts/generate.py --policy=offload --link_gb_per_s=0.5 --trace_timeline=timeline.json
  python scripts/generate.py --prompt='def mean(' --num_beams=4 --num_return_sequences=2
  cat question.txt | python scripts/generate.py --prompt=- --output=json
  python scripts/generate.py --prompt_file=prompts.jsonl --output=json
"""

import _common
import _generation_flags
import _model_flags
from absl import flags

_DEFAULT_PROMPT = 'class Reader:\n    """Reads records from a file."""'

_PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "Prompt; repeat it for a batch. - reads standard input."
)
_PROMPT_FILE = flags.DEFINE_string(
    "prompt_file", None, "Text file with one prompt, or .jsonl with one prompt per line."
)
_CHAT = flags.DEFINE_bool("chat", False, "Talk with the model: one line of stdin per turn.")
_SYSTEM = flags.DEFINE_string("system", None, "System message, for models with a chat template.")
_RAW = flags.DEFINE_bool("raw", False, "Use prompts as they are, without the chat template.")
_OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "What stdout carries.")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print the plan, where every byte goes, and end without reading weights."
)
_RECORD_ROUTING = flags.DEFINE_string(
    "record_routing",
    None,
    "File (.npz) to write which experts were used to, for simulate.py. A resident model runs layer "
    "by layer for it.",
)
_TRACE_TIMELINE = flags.DEFINE_string(
    "trace_timeline",
    None,
    "File (.json) to write a timeline of link, host and device to, for Perfetto or Chrome; with "
    "the policy offload.",
)
_VERBOSE = flags.DEFINE_bool("verbose", False, "Tell more on stderr.")


def main() -> None:
    import _prompts
    import _residency

    import jmoe

    if _RAW.value and (_CHAT.value or _SYSTEM.value is not None):
        raise jmoe.RequestError("--raw goes without the chat template, --chat and --system need it")
    options = _generation_flags.options()
    jmoe.check_options(**options)
    prompts = _prompts.read_prompts(_PROMPT.value, _PROMPT_FILE.value)
    if _CHAT.value and (prompts or _OUTPUT.value == "json"):
        raise jmoe.RequestError("--chat goes without --prompt, --prompt_file and --output=json")

    if _DRY_RUN.value:
        _residency.print_plan(_model_flags.find(), _OUTPUT.value)
        return
    with _residency.recording(_RECORD_ROUTING.value, _TRACE_TIMELINE.value) as loaded:
        _generate(loaded(), prompts, options)


def _generate(llm, prompts: list, options: dict) -> None:
    import _conversation
    import _prompts

    if _VERBOSE.value:
        _common.note(f"{llm.options(**options)}")
    if _CHAT.value:
        _conversation.chat(llm, _SYSTEM.value, options)
        return
    if not prompts:
        _common.note(f"prompt: {_DEFAULT_PROMPT}")
        prompts = [_DEFAULT_PROMPT]
    inputs = prompts
    if _SYSTEM.value is not None or (llm.tokenizer.has_chat_template and not _RAW.value):
        inputs = [_prompts.as_messages(prompt, _SYSTEM.value) for prompt in prompts]
    if _OUTPUT.value == "json":
        _common.print_json(_generate_json(llm, prompts, inputs, options))
    else:
        _conversation.print_text(llm, inputs, options)


def _generate_json(llm, prompts: list, inputs: list, options: dict) -> dict:
    with _common.status("generating ..."):
        results = llm.generate(inputs, **options)
    stats = results[0].stats
    for line in _common.describe_stats(stats):
        _common.note(line)
    return {
        "results": [
            {"prompt": prompt, **_result_json(result)}
            for prompt, result in zip(prompts, results, strict=True)
        ],
        "stats": {**stats.to_json(), "load_s": llm.load_s},
        "model": _common.model_json(llm),
    }


def _result_json(result) -> dict:
    """A result; with beams its score, too, and all sequences that are returned."""
    fields = ["token_ids", "text", "finish_reason"]
    more = {}
    if result.score is not None:
        fields.append("score")
        more["sequences"] = [
            {name: getattr(sequence, name) for name in fields} for sequence in result.sequences
        ]
    own = {name: getattr(result, name) for name in ("prompt_token_ids", *fields)}
    return own | more


if __name__ == "__main__":
    _common.run(main)
