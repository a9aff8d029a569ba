"""Set-up of the whole suite: annotated shapes are checked, and nothing reaches the network."""

import os

from jaxtyping import install_import_hook

import tests.shape_checks  # noqa: F401  (named below)

os.environ["HF_HUB_OFFLINE"] = "1"

# Before jmoe is imported anywhere: functions of arrays check the shapes they are given.
install_import_hook(
    ["jmoe.quant", "jmoe.models", "jmoe.generation.sampling", "jmoe.engines.programs"],
    "tests.shape_checks.check",
)
