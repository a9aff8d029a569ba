"""From what the user names to an engine with weights."""

from jmoe.loading.building import Engine, Setup, parameter_bytes
from jmoe.loading.find import EMBEDDED_MODEL, FoundModel, default_device, find_model
from jmoe.loading.options import DTYPES, LoadOptions

__all__ = [
    "DTYPES",
    "EMBEDDED_MODEL",
    "Engine",
    "FoundModel",
    "LoadOptions",
    "Setup",
    "default_device",
    "find_model",
    "parameter_bytes",
]
