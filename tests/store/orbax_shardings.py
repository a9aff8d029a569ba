"""Saves sharded over four devices, restores otherwise sharded: a process for test_orbax.

    python -m tests.store.orbax_shardings DIRECTORY

It needs four devices; run it with XLA_FLAGS=--xla_force_host_platform_device_count=4.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jmoe.models.decoder import abstract_parameters
from jmoe.models.families import config_from_json
from jmoe.models.random_weights import random_parameters
from jmoe.store.orbax import OrbaxSource, restore_parameters, save_checkpoint
from tests.models.configs import mixtral_json


def check(directory: Path) -> None:
    config = config_from_json(mixtral_json(), "a test")
    shapes = abstract_parameters(config, "bfloat16")
    parameters = dict(zip(shapes, random_parameters(config, "bfloat16"), strict=True))
    line = Mesh(np.array(jax.devices()), ("x",))
    square = Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))

    def experts_over_devices(path, array):
        first = "x" if len(array.shape) == 3 else None
        return NamedSharding(line, PartitionSpec(first))

    def rows_and_columns(path, array):
        last_two = ("x", "y") if len(array.shape) > 1 else ()
        return NamedSharding(square, PartitionSpec(*(None,) * (len(array.shape) - 2), *last_two))

    def same_bits(arrays):
        for path, array in parameters.items():
            assert arrays[path].dtype == array.dtype
            assert np.asarray(arrays[path]).tobytes() == np.asarray(array).tobytes(), path

    choices = {"by expert": experts_over_devices, "by matrix": rows_and_columns}
    for name, choose in choices.items():
        sharded = {
            path: jax.device_put(array, choose(path, array)) for path, array in parameters.items()
        }
        save_checkpoint(directory / name, mixtral_json(), sharded)
        for other in choices.values():
            restored = restore_parameters(directory / name, sharding=other)
            same_bits(restored)
            for path, array in restored.items():
                assert array.sharding == other(path, array), path
            assert len(restored["layers.0.experts.w1"].sharding.device_set) == 4
        same_bits(restore_parameters(directory / name))
        source = OrbaxSource(directory / name)
        for expert in range(config.router.num_experts):
            got = source.read("layers.1.experts.w2", expert)
            wanted = np.asarray(parameters["layers.1.experts.w2"][expert])
            assert got.tobytes() == wanted.tobytes()

    everywhere = NamedSharding(line, PartitionSpec())
    restored = restore_parameters(directory / "by expert", "float32", everywhere)
    for path, array in restored.items():
        assert array.dtype == "float32" and array.is_fully_replicated
        np.testing.assert_array_equal(array, np.asarray(parameters[path], np.float32))


if __name__ == "__main__":
    check(Path(sys.argv[1]))
