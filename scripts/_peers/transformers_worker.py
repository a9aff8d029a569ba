"""transformers in bfloat16 on random weights, driven by the loop of bench.py's peer."""

import os
from typing import Any

from _bench.transformers_loop import restore_frequencies, run_model

from _peers.worker import Run, serve

_POOL = 2**22 - 1


class Transformers:
    """A model of random weights.

    Args:
      settings: "config" (config.json) and "threads".
    """

    def __init__(self, settings: dict[str, Any]):
        # Waiting threads sleep: those that spin take the cores from the next program.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import torch
        import transformers

        torch.set_num_threads(settings["threads"])
        raw = dict(settings["config"])
        config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.to_empty(device="cpu")
        restore_frequencies(model)
        pool = torch.randn(_POOL).to(torch.bfloat16)
        for name, parameter in model.named_parameters():
            _fill(parameter.data, pool, 1.0 if "embed_tokens" in name else None)
        self._model = model.eval()
        self._torch = torch
        experts = model.config._experts_implementation
        self.facts = {
            "name": f"transformers {transformers.__version__}, torch {torch.__version__} "
            f"(experts: {experts})",
            "weights": "bfloat16",
            "bytes_per_token": _bytes_per_token(model, raw),
            "threads": settings["threads"],
        }

    def run(self, prompt: list[int], new_tokens: int) -> Run:
        return Run(*run_model(self._model, self._torch.tensor([prompt]), new_tokens))

    def extra(self) -> dict[str, Any]:
        return {}


def _fill(parameter: Any, pool: Any, std: float | None) -> None:
    """A run of normal numbers, over and over: to make up as many takes minutes."""
    if parameter.ndim == 1:  # of a norm
        parameter.fill_(1)
        return
    values = pool * (parameter.shape[-1] ** -0.5 if std is None else std)
    flat = parameter.view(-1)
    for start in range(0, len(flat), len(values)):
        part = flat[start : start + len(values)]
        part.copy_(values[: len(part)])


def _bytes_per_token(model: Any, raw: dict[str, Any]) -> float:
    share = raw["num_experts_per_tok"] / raw["num_local_experts"]
    return sum(
        parameter.nbytes * (share if ".experts." in name else 1)
        for name, parameter in model.named_parameters()
        if "embed_tokens" not in name
    )


if __name__ == "__main__":
    serve(Transformers)
