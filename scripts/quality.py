"""Measures what each quantization costs in quality, and writes the page of it.

Quantizes the embedded model in every mix of Eliseev and Mazur, with HQQ and in part by rounding to
nearest, and scores its held-out text: perplexity, divergence and agreement with the unquantized
model. Takes about 20 minutes on two cores; what --results holds already is not measured again.
Writes quantization-quality.md and .svg; the last line of stdout names them.

Examples:
  python scripts/quality.py
  python scripts/quality.py --max_windows=4 --output=. --results=few.jsonl
"""

import sys
from pathlib import Path

import _common
from absl import flags

_OUTPUT = flags.DEFINE_string("output", "docs/measurements", "Directory of the page.")
_RESULTS = flags.DEFINE_string(
    "results", "quantization-quality.jsonl", "File of figures: read, and added to."
)
_MAX_WINDOWS = flags.DEFINE_integer(
    "max_windows", None, "Score only so many, from the beginning of the text.", lower_bound=2
)


def main() -> None:
    from _bench import machine
    from _quality import measure, page

    from jmoe.errors import RequestError
    from jmoe.loading import EMBEDDED_MODEL
    from jmoe.planning.model_shape import read_model_shape

    directory = Path(_OUTPUT.value)
    if not directory.is_dir():
        raise RequestError("there is no such directory to write to", where=directory)
    commit = machine.describe_commit()
    facts = machine.describe_machine()
    results = measure.measure(
        Path(_RESULTS.value),
        _MAX_WINDOWS.value,
        f"{commit['commit']}{' and changes' if commit['dirty'] else ''}",
        sys.stderr.isatty(),
    )
    config = read_model_shape(EMBEDDED_MODEL).config
    mixtral = read_model_shape("mixtral-8x7b").config
    where = {
        "CPU": f"{facts['cpu']}, {facts['num_cores']} cores",
        "Python": facts["versions"]["python"],
        "jax": facts["versions"]["jax"],
        "date": machine.now()[:10],
    }
    command = " ".join(["python scripts/quality.py", *sys.argv[1:]])
    text = page.page(results, config, mixtral, where, command)
    (directory / page.PLOT_NAME).write_text(page.picture(results, config))
    path = directory / "quantization-quality.md"
    path.write_text(text)
    print(path)


if __name__ == "__main__":
    _common.run(main)
