"""The result of an evaluation, as text or JSON."""

import dataclasses
from typing import Any

import jmoe
from jmoe.engines.evaluation import Evaluation
from jmoe.planning import sizes


def weights_json(llm: "jmoe.LLM") -> dict[str, Any]:
    """What the weights take here, and what the same formats take with the rest in bfloat16."""
    stored = sizes.total(sizes.weight_sizes(llm.config, "bfloat16", llm.quant))
    return {
        "weight_bytes": llm.engine.parameter_bytes,
        "stored_bytes": stored.num_bytes,
        "bits_per_weight": stored.bits_per_weight,
    }


def result_json(result: Evaluation, llm: "jmoe.LLM") -> dict[str, Any]:
    value = dataclasses.asdict(result)
    comparison = value.pop("comparison")
    return value | (comparison or {}) | weights_json(llm)


def result_text(result: Evaluation, llm: "jmoe.LLM") -> str:
    """A line per measure."""
    lines = {
        "perplexity": f"{_with_error(result.perplexity, result.perplexity_error)}, "
        f"{result.num_predictions:,} predictions in {result.num_windows:,} windows"
    }
    if comparison := result.comparison:
        ratio = _with_error(comparison.perplexity_ratio, comparison.perplexity_ratio_error, 5)
        lines |= {
            "of the reference": f"{comparison.reference_perplexity:.4f}; ratio {ratio}",
            "KL divergence": f"mean {comparison.kl_mean:.3g}, median {comparison.kl_median:.3g}, "
            f"99 % {comparison.kl_p99:.3g}",
            "top-1 agreement": f"{comparison.top1_agreement:.2%}",
        }
    weights = weights_json(llm)
    lines["weights"] = (
        f"{weights['stored_bytes'] / 2**20:,.2f} MiB, "
        f"{weights['bits_per_weight']:.2f} bits per weight"
    )
    return "\n".join(f"{label:18}{value}" for label, value in lines.items())


def _with_error(value: float, error: float | None, digits: int = 4) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
