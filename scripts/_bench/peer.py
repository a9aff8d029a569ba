"""transformers on the same weights, driven by a bare loop.

The loop does less than ``generate`` does: one forward per step, the cache handed on, the most
probable token taken. What it is compared with does the same. OMP_WAIT_POLICY is PASSIVE unless
the environment says otherwise.
"""

import importlib.metadata
import os
from typing import Any

import numpy as np

from _bench.settings import Subject
from _bench.transformers_loop import restore_frequencies, run_model
from jmoe.engines.memory import check_fits
from jmoe.errors import RequestError
from jmoe.models import families
from jmoe.models.decoder import abstract_parameters
from jmoe.planning.machine import num_threads


class TransformersPeer:
    """A transformers model that shares the engine's weights, except for gate and up.

    Attributes:
      name: with version and the implementation of experts that transformers chose.
      model: the torch module.

    Raises:
      RequestError: transformers or torch are not installed, or the engine is not on a CPU.
      CapacityError: the copies of gate and up do not fit into memory.
    """

    def __init__(self, subject: Subject):
        engine = subject.engine
        if engine.device.platform != "cpu":
            raise RequestError(
                "--peer=transformers compares on the CPU", do="set JAX_PLATFORMS=cpu"
            )
        if engine.quant is not None:
            raise RequestError(
                "--peer=transformers compares weights as they are", do="leave out --quant"
            )
        # Waiting threads sleep instead of spinning: while another process runs on the same cores,
        # spinning makes torch up to a hundred times slower. Read when torch is loaded.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        try:
            import torch
            import transformers
        except ImportError as error:
            raise RequestError(
                "--peer=transformers needs packages that are not installed",
                got=error,
                do="pip install transformers torch",
            ) from None
        check_fits(
            sum(_expert_weight(engine, name).nbytes for name in _copied(engine)),
            engine.device,
            what="the peer's own copy of the experts' gate and up projections",
            do="lower --num_layers, use --dtype=bfloat16, or leave out --peer",
        )
        torch.set_num_threads(num_threads())
        raw = {k: v for k, v in subject.config_json.items() if k != "model_type"}
        config = transformers.AutoConfig.for_model(engine.config.model_type, **raw)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, engine.dtype)
            )
        model.load_state_dict(_state_dict(engine), strict=True, assign=True)
        restore_frequencies(model)
        self.model = model.eval()
        version = importlib.metadata.version("transformers")
        self.name = f"transformers {version} (experts: {model.config._experts_implementation})"

    def logits(self, prompts: np.ndarray) -> np.ndarray:
        """Scores of the token after each prompt, float32 [B, V]."""
        import torch

        with torch.inference_mode():
            output = self.model(input_ids=torch.from_numpy(prompts), logits_to_keep=1)
        return output.logits[:, -1].float().numpy()

    def run(self, prompts: np.ndarray, new_tokens: int) -> tuple[float, float]:
        """Seconds until the first token, and of new_tokens steps after it.

        Args:
          prompts: token ids int64 [B, L].
          new_tokens: decode steps.
        """
        import torch

        return run_model(self.model, torch.from_numpy(prompts), new_tokens)


def _state_dict(engine: Any) -> dict[str, Any]:
    """The engine's arrays by the names of the torch module, without a copy where it can be.

    transformers keeps the experts of a layer as two stacks: gate above up, and down.
    """
    import torch

    names = families.parameter_sources(engine.config)
    state = {}
    for path, source in names.items():
        tensor = torch.from_dlpack(_expert_weight(engine, path))
        if not source.stacked:
            name = source.tensors[0].replace(".block_sparse_moe.", ".mlp.")
            state[name] = tensor
            continue
        layer = f"model.layers.{path.split('.')[1]}.mlp.experts"
        if path.endswith(".w2"):
            state[f"{layer}.down_proj"] = tensor
        elif path.endswith(".w1"):
            up = torch.from_dlpack(_expert_weight(engine, path.removesuffix("w1") + "w3"))
            state[f"{layer}.gate_up_proj"] = torch.cat([tensor, up], dim=1)
    if engine.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def _copied(engine: Any) -> list[str]:
    return [path for path in abstract_parameters(engine.config) if path.endswith((".w1", ".w3"))]


def _expert_weight(engine: Any, path: str) -> Any:
    return engine.parameters[list(abstract_parameters(engine.config)).index(path)]
