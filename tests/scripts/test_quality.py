"""quality.py: the page and the picture that it makes of its figures."""

import itertools
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from tests.scripts.processes import assert_one_error, run_script

PURE_3_BITS = "attention=4g64,experts=3g64"
MIXES = [
    "bf16" if bits == ("16", "16") else "attn{}-experts{}".format(*bits)
    for bits in itertools.product(("16", "4", "3", "2"), repeat=2)
]


def write_results(file: Path, max_windows: int | None = 2) -> None:
    """Figures of every quantization, so that nothing is left to measure."""
    rows = [
        {
            "quant": quant,
            "method": method,
            "commit": "0123abc",
            "max_windows": max_windows,
            "num_predictions": 512,
            "perplexity": 15 + i / 8,
            "perplexity_error": 0.5,
            "reference_perplexity": 15.0,
            "ratio": 1 + i / 120,
            "ratio_error": 0.01,
            "kl_mean": i / 100,
            "top1_agreement": 1 - i / 200,
        }
        for method in ("hqq", "rtn")
        for i, quant in enumerate([*MIXES, PURE_3_BITS, "int4", "int8"])
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_page_and_picture(tmp_path: Path):
    write_results(tmp_path / "results.jsonl")
    flags = f"--output={tmp_path}", f"--results={tmp_path / 'results.jsonl'}", "--max_windows=2"
    result = run_script("quality.py", *flags)
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout.decode() == f"{tmp_path / 'quantization-quality.md'}\n"
    page = (tmp_path / "quantization-quality.md").read_text()
    assert "| commit | 0123abc |" in page
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    (row,) = [row for row in rows if "attn4-experts3" in row[0] and len(row) == 11]
    # Size and bits of the embedded model; perplexity; ours and the paper's size of Mixtral-8x7B.
    assert row[1:4] == ["11.10", "5.50", "15.750"]
    assert row[7:] == ["20.99", "21.37", "4.05", "+12.8% |"]
    assert sum(len(row) == 11 for row in rows) == 2 + 16
    svg = ElementTree.parse(tmp_path / "quantization-quality.svg")
    titles = [title.text for title in svg.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 2 * 16
    assert "attention 4, experts 3 bits: 21.37 GiB, perplexity 4.050" in titles


def test_figures_of_another_text_are_refused(tmp_path: Path):
    write_results(tmp_path / "results.jsonl", max_windows=5)
    flags = f"--output={tmp_path}", f"--results={tmp_path / 'results.jsonl'}"
    result = run_script("quality.py", *flags, "--max_windows=2")
    assert_one_error(result, "another number of windows", "name another file with --results")
    (tmp_path / "results.jsonl").write_text("{}\n")
    assert_one_error(run_script("quality.py", *flags), "not one of quality.py's")
    assert_one_error(run_script("quality.py", "--output=/absent"), "no such directory")
