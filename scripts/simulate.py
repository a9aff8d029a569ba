"""Replays recorded routing through the expert cache: what would which policy give?

Without a model and without a device. Prints hit rates by slots and rule of eviction, and how well
experts can be predicted; with --link_bytes_per_s what decoding would take on such a link instead.
Text or one JSON object goes to stdout. generate.py records traces with --record_routing.

Examples:
  python scripts/simulate.py --trace=trace.npz --slots=2,4,6 --rules=lru,likely,belady
  python scripts/simulate.py --trace=trace.npz --plot=hit-rates.svg --output=json
  python scripts/simulate.py --trace=trace.npz --slots=4 --rules=lru,likely --expert_bytes=66e6 \\
      --link_bytes_per_s=11e9 --layer_s=0.5e-3 --predictors=none,markov,oracle --lookahead=1
  python scripts/simulate.py --trace=trace.npz --slots=2,4 --rules=lru,lfu --expert_bytes=66e6 \\
      --link_bytes_per_s=11e9 --layer_s=1e-3 --misses=load,split,host --host_s=4e-3
"""

import itertools
import sys

import _common
from absl import flags

_TRACE = flags.DEFINE_string("trace", None, "The recorded routing, an npz file.", required=True)
_TRAIN = flags.DEFINE_string(
    "train",
    None,
    "Trace to learn popularity from. Default: every other sequence, where the rest is replayed.",
)
_SLOTS = flags.DEFINE_string("slots", None, "Slots in each layer. Default: up to seven numbers.")
_RULES = flags.DEFINE_string(
    "rules",
    None,
    "Of lru, lfu, likely, random, popular, fixed, belady, pool. Default: all; on a link two.",
)
_PREDICTORS = flags.DEFINE_string(
    "predictors", None, "Of none, oracle, noisy, recorded, popularity, markov. Default: none."
)
_RECALL = flags.DEFINE_string(
    "recall", None, "Shares of needed experts that noisy predictions name, one per layer ahead."
)
_LOOKAHEAD = flags.DEFINE_integer("lookahead", 1, "Layers to predict ahead.", lower_bound=1)
_FETCH = flags.DEFINE_integer(
    "fetch", None, "Experts to predict for a layer. Default: those of a token.", lower_bound=1
)
_STAGING = flags.DEFINE_integer(
    "num_staging",
    None,
    "Places besides slots. Default: for the experts of a token, with predictions for twice as many "
    "and the predictions.",
    lower_bound=0,
)
_LINK = flags.DEFINE_float("link_bytes_per_s", None, "Speed of the link; measures time.")
_LATENCY_S = flags.DEFINE_float("latency_s", 0.0, "Of each copy.", lower_bound=0.0)
_EXPERT_BYTES = flags.DEFINE_float("expert_bytes", None, "Of an expert.", lower_bound=1.0)
_LAYER_S = flags.DEFINE_float("layer_s", 0.0, "To compute a layer.", lower_bound=0.0)
_MISSES = flags.DEFINE_string(
    "misses", None, "How missing experts are served: of load, split, host. Default: load."
)
_HOST_S = flags.DEFINE_float("host_s", None, "To compute an expert on the host.", lower_bound=0.0)
_DEVICE_S = flags.DEFINE_float(
    "device_s", 0.0, "Of a layer's time, to compute an expert on the device.", lower_bound=0.0
)
_SEED = flags.DEFINE_integer("seed", 0, "Of what is random.", lower_bound=0)
_PLOT = flags.DEFINE_string("plot", None, "File for a picture of the hit rates, SVG.")
_OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "What stdout carries.")


def main() -> None:
    from _simulate import plot, replays, report
    from tqdm import tqdm

    from jmoe.planning.predictors import PREDICTORS

    link = replays.choose_link(
        _LINK.value, _EXPERT_BYTES.value, latency_s=_LATENCY_S.value, layer_s=_LAYER_S.value
    )
    ways, times = replays.choose_ways(
        _MISSES.value,
        host_s=_HOST_S.value,
        device_s=_DEVICE_S.value,
        layer_s=_LAYER_S.value,
        has_link=bool(link),
    )
    traces = replays.Traces(_TRACE.value, _TRAIN.value)
    slots = replays.choose_slots(_SLOTS.value, traces.whole.num_experts)
    default = [rule for rule in replays.RULES if rule != "popular" or traces.train is not None]
    default = ["lru", "likely"] if link else default
    rules = replays.choose_names(_RULES.value, list(replays.RULES), default)
    predicted = replays.choose_names(_PREDICTORS.value, PREDICTORS, ["none"])
    recall = replays.choose_recall(_RECALL.value, predicted)
    if _PLOT.value is not None:
        plot.check(_PLOT.value, predicted, ways)
    if traces.train is None:
        _common.note("nothing to learn from: the trace has one sequence (see --train)")
    arguments = {"lookahead": _LOOKAHEAD.value, "fetch": _FETCH.value, **link, **times, **recall}
    results = []
    settings = list(itertools.product(slots, rules, predicted, ways))
    for num_slots, rule, predictor, way in tqdm(
        settings, desc="replaying", disable=not sys.stderr.isatty()
    ):
        staging = _STAGING.value
        if staging is None and predictor == "none":
            staging = traces.whole.top_k  # more of it would be further slots
        results.append(
            replays.replay(
                traces,
                num_slots,
                rule,
                predictor,
                way,
                _SEED.value,
                num_staging=staging,
                **arguments,
            )
        )
    fetch = _FETCH.value or min(4, traces.whole.num_experts)
    rates = replays.prediction_floor(traces, _LOOKAHEAD.value, fetch)
    if _PLOT.value is not None:
        plot.write(_PLOT.value, results, f"share of needed experts that are there: {traces.name}")
    if _OUTPUT.value == "json":
        _common.print_json(
            {
                "trace": traces.to_json(),
                "settings": arguments | {"seed": _SEED.value},
                "replays": [result.to_json() for result in results],
                "recall": rates,
            }
        )
        return
    by_rule = report.hit_rates if not link and predicted == ["none"] else report.each
    by_rule = report.each_way if times else by_rule
    tables = [by_rule(results), *([report.recall(rates)] if rates else [])]
    print("\n\n".join([traces.describe(), *tables]))


if __name__ == "__main__":
    _common.run(main)
