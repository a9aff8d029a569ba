"""The page of results: tables in Markdown, and the picture."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from _quality import plot
from _quality.measure import BOTH_METHODS, WINDOW, Results
from _quality.paper import PAPER_RESULTS, preset_of
from jmoe.config import ModelConfig
from jmoe.planning import sizes
from jmoe.quant.spec import parse_spec

PLOT_NAME = "quantization-quality.svg"
GIB, MIB = 2**30, 2**20


def picture(results: Results, config: ModelConfig) -> str:
    """Ours beside the paper's, as SVG."""
    ours = {
        bits: (_size(config, preset_of(*bits))[0] / MIB, results[preset_of(*bits), "hqq"])
        for bits in PAPER_RESULTS
    }
    return plot.draw(
        [
            plot.Panel(
                "Perplexity of tiny-mixtral (embedded) on its held-out text",
                "MiB",
                {bits: (size, row["perplexity"]) for bits, (size, row) in ours.items()},
                (10, 15, 20, 25, 30),
            ),
            plot.Panel(
                "Perplexity of Mixtral-8x7B on WikiText2, from the paper",
                "GiB",
                PAPER_RESULTS,
                (20, 30, 40, 60, 80),
            ),
        ]
    )


def page(
    results: Results, config: ModelConfig, mixtral: ModelConfig, where: dict[str, str], command: str
) -> str:
    """The Markdown page."""
    reference = next(iter(results.values()))
    commits = dict.fromkeys(str(row["commit"]) for row in results.values())
    where = where | {"commit": ", ".join(commits), "command": f"`{command}`"}
    parts = [
        "# Quality of quantization",
        "The embedded model, quantized and scored on its held-out text "
        f"({reference['num_predictions']:,} predictions in windows of {WINDOW}), beside what "
        "Eliseev and Mazur found with Mixtral-8x7B (https://arxiv.org/abs/2312.17238, Table 1). "
        "Arithmetic is float32 everywhere. KL is the divergence from the unquantized model in "
        "nats per prediction, top-1 how often both find the same token the most probable; "
        "errors are standard errors over windows. Sizes are those of all weights, with scales, "
        "zero points and padding, and what is not quantized in bfloat16.",
        "## Where",
        _table(("", ""), where.items()),
        "## The paper's mixes",
        f"![Size against perplexity]({PLOT_NAME})",
        f"Unquantized, the perplexity is {reference['reference_perplexity']:.4f}.",
        _table(
            (
                "attention / experts",
                *("MiB", "bits per weight", "perplexity", "increase", "KL", "top-1"),
                *("Mixtral-8x7B here, GiB", "paper, GiB", "paper, WikiText2", "increase"),
            ),
            _grid_rows(results, config, mixtral),
        ),
        "## HQQ against rounding to nearest",
        "The same formats; only the zero points differ. `int8` is symmetric: there HQQ has "
        "nothing to choose. By which measure HQQ keeps a zero point was chosen with this text in "
        "view: [quantization-methods.md](quantization-methods.md) compares the two on another.",
        _table(
            (
                *("quantization", "bits per weight"),
                *("HQQ: perplexity", "increase", "KL", "top-1"),
                *("RTN: perplexity", "increase", "KL", "top-1"),
            ),
            _method_rows(results, config),
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _grid_rows(
    results: Results, config: ModelConfig, mixtral: ModelConfig
) -> Iterator[Sequence[str]]:
    unquantized = PAPER_RESULTS[16, 16].wikitext2_perplexity
    for bits, paper in PAPER_RESULTS.items():
        preset = preset_of(*bits)
        num_bytes, bits_per_weight = _size(config, preset)
        large_bytes, _ = _size(mixtral, preset)
        yield (
            f"{bits[0]} / {bits[1]} (`{preset}`)",
            f"{num_bytes / MIB:.2f}",
            f"{bits_per_weight:.2f}",
            *_quality(results[preset, "hqq"]),
            f"{large_bytes / GIB:.2f}",
            f"{paper.size_gib:.2f}",
            f"{paper.wikitext2_perplexity:.2f}",
            f"{paper.wikitext2_perplexity / unquantized - 1:+.1%}",
        )


def _method_rows(results: Results, config: ModelConfig) -> Iterator[Sequence[str]]:
    for quant in BOTH_METHODS:
        _, bits_per_weight = _size(config, quant)
        hqq, rtn = (_quality(results[quant, method]) for method in ("hqq", "rtn"))
        yield (f"`{quant}`", f"{bits_per_weight:.2f}", *hqq, *rtn)


def _quality(row: dict[str, Any]) -> tuple[str, str, str, str]:
    increase = f"{row['ratio'] - 1:+.2%} ± {row['ratio_error']:.2%}"
    return (
        f"{row['perplexity']:.3f}",
        increase,
        f"{row['kl_mean']:.4f}",
        f"{row['top1_agreement']:.1%}",
    )


def _size(config: ModelConfig, quant: str) -> tuple[int, float]:
    size = sizes.total(sizes.weight_sizes(config, "bfloat16", parse_spec(quant)))
    return size.num_bytes, size.bits_per_weight


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
