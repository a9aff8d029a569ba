"""Says how many bytes a model takes, by component, and how a device's memory would be spent on it.

From its configuration alone: reads no weights and needs no device. With --device_memory_gib or
--policy comes the plan by which generate.py would run it on an accelerator: where every byte
goes, and why. With --hardware, too, how fast it would decode one sequence on such a machine, as
simulated. --quant=all compares the presets. Text or one JSON object goes to stdout.

Examples:
  python scripts/plan.py --model=mixtral-8x7b --quant=attn4-experts4 --device_memory_gib=16
  python scripts/plan.py --model=mixtral-8x7b --quant=all --device_memory_gib=12
  python scripts/plan.py --device_memory_gib=0.02 --policy=offload --save_policy=policy.json
  python scripts/plan.py --model=mixtral-8x7b --quant=int4 --device_memory_gib=16 \\
      --hardware=rtx4090-ddr5 --trace=trace.npz
  python scripts/plan.py --model=mixtral-8x22b --quant=attention=4g64,experts=3g32 --batch=4
  python scripts/plan.py --model=path/to/model --context=32768 --output=json | jq .components
"""

import _common
from absl import flags

_MODEL = flags.DEFINE_string(
    "model",
    None,
    "Known model (mixtral-8x7b, mixtral-8x22b), directory, converted store, config.json, or hub "
    "id, of which only config.json is downloaded. Default: the embedded model.",
)
_QUANT = flags.DEFINE_string(
    "quant",
    None,
    "Formats of the weights: a preset, component=format pairs, or all: every preset, one line "
    "each. Default: those of a store, else all in --dtype.",
)
_DEVICE_MEMORY_GIB = flags.DEFINE_float(
    "device_memory_gib", None, "Device memory to use, in GiB.", lower_bound=0.0
)
_POLICY = flags.DEFINE_string(
    "policy",
    None,
    "auto (resident if all fits, else offload), resident, offload, host, or a policy file, of "
    "which everything that it leaves out is chosen. Default: auto.",
)
_SAVE_POLICY = flags.DEFINE_string(
    "save_policy", None, "Write the policy that the plan comes to into this file, for --policy."
)
_HARDWARE = flags.DEFINE_string(
    "hardware",
    None,
    "Machine to predict the speed of: a preset (scripts/hardware.py --hardware=list), or a file of "
    "scripts/hardware.py --output=json.",
)
_TRACE = flags.DEFINE_string(
    "trace",
    None,
    "Recorded routing (generate.py --record_routing) to predict by. Default: random routing.",
)
_CONTEXT = flags.DEFINE_integer(
    "context", 4096, "Positions of a sequence, prompt and new tokens; at most the model's context."
)
_BATCH = flags.DEFINE_integer("batch", 1, "Sequences at once.", lower_bound=1)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "bfloat16",
    ["bfloat16", "float32"],
    "Of arithmetic, KV cache, and weights that are not quantized.",
)
_NUM_LAYERS = flags.DEFINE_integer(
    "num_layers", None, "Instead of the model's own number.", lower_bound=1
)
_OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "What stdout carries.")


def main() -> None:
    from _plan.report import Setting, comparison
    from _plan.speed import find_machine

    from jmoe.errors import ConfigError, RequestError
    from jmoe.loading import EMBEDDED_MODEL
    from jmoe.planning.model_shape import read_model_shape
    from jmoe.planning.policy import read_request
    from jmoe.quant.spec import PRESETS, parse_spec
    from jmoe.store.manifest import check_quant

    config, manifest = read_model_shape(
        _MODEL.value or EMBEDDED_MODEL, num_layers=_NUM_LAYERS.value
    )
    num_positions = _CONTEXT.value
    if not flags.FLAGS["context"].present:
        num_positions = min(num_positions, config.max_position_embeddings)
    policy = None if _POLICY.value is None else read_request(_POLICY.value)
    if _SAVE_POLICY.value is not None and policy is None:
        policy = "auto"
    machine = find_machine(
        _HARDWARE.value,
        _TRACE.value,
        config,
        has_plan=policy is not None or _DEVICE_MEMORY_GIB.value is not None,
        batch_size=_BATCH.value,
        num_quants=2 if _QUANT.value == "all" else 1,
    )
    setting = Setting(
        model=_MODEL.value or "tiny-mixtral (embedded)",
        config=config,
        dtype=_DTYPE.value,
        batch_size=_BATCH.value,
        num_positions=num_positions,
        device_memory_gib=_DEVICE_MEMORY_GIB.value,
        policy=policy,
        machine=machine,
    )
    reports = []
    if _QUANT.value == "all":
        if _SAVE_POLICY.value is not None:
            raise RequestError("--save_policy is for one quantization", got="--quant=all")
        for name, quant in PRESETS.items():
            try:
                reports.append(setting.report(name, quant))
            except ConfigError as error:
                _common.note(f"{name} is not possible: {error.what} ({error.got})")
    else:
        quant = None if _QUANT.value is None else parse_spec(_QUANT.value)
        if manifest is not None:
            check_quant(manifest, _QUANT.value)
            quant = manifest.quant
        reports.append(setting.report(str(quant or "unquantized"), quant))
    if _SAVE_POLICY.value is not None:
        reports[0].save_policy(_SAVE_POLICY.value)

    if _OUTPUT.value == "json":
        value = setting.to_json()
        values = [report.to_json() for report in reports]
        _common.print_json(value | ({"plans": values} if _QUANT.value == "all" else values[0]))
    elif _QUANT.value == "all":
        print(f"{setting}\n\n{comparison(reports)}")
    else:
        print(f"{setting}; {reports[0].quant_name}\n\n{reports[0]}")


if __name__ == "__main__":
    _common.run(main)
