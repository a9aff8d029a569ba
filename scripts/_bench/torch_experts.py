"""The experts of a layer in torch, bfloat16: one product after another, as PyTorch has them."""

import os
from typing import Any

import numpy as np

from jmoe.config import ModelConfig
from jmoe.errors import RequestError
from jmoe.planning.machine import num_threads

_NUM_WEIGHTS = 2  # experts with memory of their own: beyond any cache


class TorchExperts:
    """Random experts, of the shape that jmoe is measured with.

    Raises RequestError if torch is not installed.
    """

    def __init__(self, config: ModelConfig):
        # As in peer.py: threads that spin would take the cores from whoever is next.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        try:
            import torch
        except ImportError as error:
            raise RequestError(
                "--peer=torch needs a package that is not installed",
                got=error,
                do="pip install torch",
            ) from None
        torch.set_num_threads(num_threads())
        self.name = f"torch {torch.__version__}"
        self._config = config
        self._torch = torch
        hidden, width = config.hidden_size, config.intermediate_size
        shapes = (width, hidden), (width, hidden), (hidden, width)
        pool = torch.randn(2**20 - 1) * hidden**-0.5
        self._weights = [
            [
                pool.to(torch.bfloat16)
                .repeat(-(-rows * columns // len(pool)))[: rows * columns]
                .reshape(rows, columns)
                .contiguous()
                for rows, columns in shapes
            ]
            for _ in range(_NUM_WEIGHTS)
        ]

    def call(self, num_tokens: int) -> Any:
        """A call that takes so many tokens, normally distributed, through random experts."""
        torch, router = self._torch, self._config.router
        x_TD = torch.randn(num_tokens, self._config.hidden_size).to(torch.bfloat16)
        rng = np.random.default_rng(0)
        order = np.tile(np.arange(router.num_experts), (num_tokens, 1))
        ids_TK = torch.from_numpy(rng.permuted(order, axis=1)[:, : router.top_k])

        def call(turn: int) -> Any:
            with torch.inference_mode():
                return self._forward(x_TD, (ids_TK + turn) % router.num_experts)

        return call

    def _forward(self, x_TD: Any, ids_TK: Any) -> Any:
        linear, silu = self._torch.nn.functional.linear, self._torch.nn.functional.silu
        y_TD = self._torch.zeros_like(x_TD)
        for place, e in enumerate(ids_TK.unique().tolist()):
            w1, w3, w2 = self._weights[place % len(self._weights)]
            tokens = (ids_TK == e).any(dim=1).nonzero()[:, 0]
            x = x_TD[tokens]
            out = linear(silu(linear(x, w1)) * linear(x, w3), w2)
            y_TD.index_add_(0, tokens, out, alpha=1 / ids_TK.shape[1])
        return y_TD
