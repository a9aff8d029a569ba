"""llama.cpp on random weights in Q4_0, through llama-cpp-python.

The file is written when it is not there yet. Needs llama-cpp-python and gguf, and not jmoe.
"""

import ctypes
import os
import time
from typing import Any

import gguf
import llama_cpp
import numpy as np

from _peers import q4_0
from _peers.worker import Run, serve

_BATCH = 512  # llama.cpp's default for prompts
_FILE_TYPE_Q4_0 = 2
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # types of tokens
_CHUNK_BYTES = 2**26


class LlamaCpp:
    """A loaded file.

    Args:
      settings: "config" (config.json), "file" (to read, or to write first), "threads", and
        "num_positions" of the context.
    """

    def __init__(self, settings: dict[str, Any]):
        config, file, threads = settings["config"], settings["file"], settings["threads"]
        if not os.path.exists(file):
            partial = f"{file}.{os.getpid()}.partial"
            try:
                write_file(partial, config)
                os.replace(partial, file)
            finally:
                if os.path.exists(partial):
                    os.remove(partial)
        self._vocabulary = config["vocab_size"]
        self._llama = llama_cpp.Llama(
            file,
            n_ctx=settings["num_positions"],
            n_batch=_BATCH,
            n_ubatch=_BATCH,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=0,
            verbose=True,  # to stderr: which processor features it uses
        )
        self.facts = {
            "name": f"llama.cpp (llama-cpp-python {llama_cpp.__version__})",
            "weights": "Q4_0",
            "bytes_per_token": q4_0.bytes_per_token(config),
            "threads": threads,
            "system": llama_cpp.llama_print_system_info().decode().strip(),
        }

    def run(self, prompt: list[int], new_tokens: int) -> Run:
        self._llama.reset()
        started = time.perf_counter()
        self._llama.eval(prompt)
        token = self._best()
        first_token_at = time.perf_counter()
        for _ in range(new_tokens):
            self._llama.eval([token])
            token = self._best()
        return Run(first_token_at - started, time.perf_counter() - first_token_at)

    def extra(self) -> dict[str, Any]:
        return {}

    def _best(self) -> int:
        """The most probable token, which waits for the scores."""
        scores = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        array = np.ctypeslib.as_array(
            ctypes.cast(scores, ctypes.POINTER(ctypes.c_float)), (self._vocabulary,)
        )
        return int(array.argmax())


def write_file(path: str, config: dict[str, Any]) -> None:
    """Writes random weights of a Mixtral shape, tensor by tensor."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random weights")
    writer.add_file_type(_FILE_TYPE_Q4_0)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(q4_0.head_dim(config))
    writer.add_rope_freq_base(config.get("rope_theta", 1e6))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-5))
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    _add_vocabulary(writer, config["vocab_size"])
    tensors = list(q4_0.tensors(config))
    q4 = gguf.GGMLQuantizationType.Q4_0
    for tensor in tensors:
        shape, dtype, raw = tensor.shape, np.dtype(np.float32), None
        if tensor.quantized:
            row_bytes = shape[-1] // q4_0.BLOCK * q4_0.BLOCK_BYTES
            shape, dtype, raw = (*shape[:-1], row_bytes), np.dtype(np.uint8), q4
        writer.add_tensor_info(tensor.name, shape, dtype, tensor.num_bytes, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (_CHUNK_BYTES // q4_0.BLOCK_BYTES, q4_0.BLOCK_BYTES), np.uint8)
    for tensor in tensors:
        writer.write_tensor_data(_values(tensor, rng, blocks))
    writer.close()


def _values(tensor: q4_0.Tensor, rng: np.random.Generator, blocks: np.ndarray) -> np.ndarray:
    """Random weights that keep activations of order one."""
    std = 1.0 if tensor.name == "token_embd.weight" else tensor.shape[-1] ** -0.5
    if not tensor.quantized:
        if len(tensor.shape) == 1:  # of a norm
            return np.ones(tensor.shape, np.float32)
        return (rng.standard_normal(tensor.shape) * std).astype(np.float32)
    # Codes are uniform from -8 to 7: a deviation of 4.6. Blocks repeat, far apart.
    scale = np.frombuffer(np.float16(std / 4.6).tobytes(), np.uint8)
    data = np.empty(tensor.num_bytes, np.uint8)
    table = blocks.copy()
    table[:, :2] = scale
    run = table.reshape(-1)
    for start in range(0, len(data), len(run)):
        size = min(len(run), len(data) - start)
        data[start : start + size] = run[:size]
    return data.reshape(*tensor.shape[:-1], -1)


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """As many tokens as there are scores; no text is ever made of them."""
    special = {"<unk>": _UNKNOWN, "<s>": _CONTROL, "</s>": _CONTROL}
    tokens = special | {f"<0x{byte:02X}>": _BYTE for byte in range(256)}
    tokens |= {f"token{i}": _NORMAL for i in range(size - len(tokens))}
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(tokens))
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(list(tokens.values()))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


if __name__ == "__main__":
    serve(LlamaCpp)
