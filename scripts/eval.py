"""Measures how well a model predicts a text: perplexity, and what quantization changed.

The text is scored in windows, each on its own. With a reference also the Kullback-Leibler
divergence from it, in nats, and how often both find the same token the most probable. A model
quantized with --quant is compared with itself unquantized, unless --reference says otherwise.
Standard errors are over windows. Results go to stdout.

Examples:
  python scripts/eval.py --quant=attn4-experts4
  python scripts/eval.py --quant=attn4-experts2 --method=rtn --max_windows=20 --output=json
  python scripts/eval.py --model=path/to/store --reference=path/to/model --text=wiki.test.raw
"""

import sys

import _common
import _model_flags
from absl import flags

_REFERENCE = flags.DEFINE_string(
    "reference",
    None,
    "Model to compare with, or none. Default: with --quant the same model unquantized, unless it "
    "is a converted store or has random weights; else none.",
)
_TEXT = flags.DEFINE_string(
    "text", None, "Text file in UTF-8. Default: with the embedded model, its held-out text."
)
_WINDOW = flags.DEFINE_integer("window", 256, "Predictions of a window.", lower_bound=1)
_MAX_WINDOWS = flags.DEFINE_integer(
    "max_windows", None, "Score only so many, from the beginning of the text.", lower_bound=1
)
_OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "What stdout carries.")
_VERBOSE = flags.DEFINE_bool("verbose", False, "Tell more on stderr.")


def main() -> None:
    from _eval import inputs, report
    from tqdm import tqdm

    from jmoe.engines.evaluation import cut_windows, evaluate
    from jmoe.errors import RequestError
    from jmoe.metrics import Stopwatch

    model = _model_flags.MODEL.value
    text = inputs.read_text(_TEXT.value, model)
    chosen = inputs.choose_reference(_REFERENCE.value, model, _model_flags.arguments())
    llm = _model_flags.load()
    if _WINDOW.value > llm.config.max_position_embeddings:
        raise RequestError(
            "windows are longer than the model's context",
            got=f"--window={_WINDOW.value}",
            expected=f"at most {llm.config.max_position_embeddings}",
        )
    windows = cut_windows(
        llm.tokenizer.encode(text),
        _WINDOW.value,
        bos_token_id=llm.tokenizer.bos_token_id,
        max_windows=_MAX_WINDOWS.value,
    )
    reference = None
    if chosen is not None:
        name, why = chosen
        reference = inputs.load_reference(name, llm, text)
        _common.note(f"compared with {_common.describe(reference)}: {why}")
    if _VERBOSE.value:
        _common.note(f"{len(windows)} windows of {_WINDOW.value} predictions; {llm.quant}")
    stopwatch = Stopwatch()
    quiet = not sys.stderr.isatty()
    with stopwatch, tqdm(desc="scoring", total=len(windows), unit="window", disable=quiet) as bar:
        result = evaluate(
            llm.engine.logits, windows, reference and reference.engine.logits, bar.update
        )
    speed = result.num_predictions / stopwatch.seconds
    _common.note(f"scored in {stopwatch.seconds:.1f} s, {speed:,.0f} predictions/s")
    if _OUTPUT.value == "text":
        print(report.result_text(result, llm))
        return
    _common.print_json(
        {
            "model": _common.model_json(llm),
            "quant": None if llm.quant is None else str(llm.quant),
            "reference": None if reference is None else _common.model_json(reference),
            "text": _TEXT.value or str(inputs.EMBEDDED_TEXT.name),
            "window": _WINDOW.value,
            **report.result_json(result, llm),
            "evaluation_s": stopwatch.seconds,
        }
    )


if __name__ == "__main__":
    _common.run(main)
