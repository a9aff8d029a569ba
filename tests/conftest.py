"""Set-up of the whole suite: annotated shapes are checked, and nothing reaches the network."""

import atexit
import gc
import os
import shutil
import signal
import tempfile

import jax
import pytest
from jaxtyping import install_import_hook

import tests.shape_checks  # noqa: F401  (named below)

os.environ["HF_HUB_OFFLINE"] = "1"

# A shell starts what it runs in the background with Ctrl-C ignored: so would all scripts that tests
# start from there be.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Most of the suite's time is compilation, often of the same programs: in many processes, too.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.mkdtemp(prefix="jmoe-programs-")
    atexit.register(shutil.rmtree, _programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    jax.config.update("jax_compilation_cache_dir", _programs)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

# What a test measures is not for later runs.
_measured = tempfile.mkdtemp(prefix="jmoe-cache-")
atexit.register(shutil.rmtree, _measured, ignore_errors=True)
os.environ["JMOE_CACHE_DIR"] = _measured

# Before jmoe is imported anywhere: functions of arrays check the shapes they are given.
install_import_hook(
    [
        "jmoe.quant",
        "jmoe.models",
        "jmoe.generation.sampling",
        "jmoe.generation.candidates",
        "jmoe.engines.programs",
        "jmoe.engines.beam_programs",
    ],
    "tests.shape_checks.check",
)


@pytest.fixture(scope="module", autouse=True)
def drop_programs():
    """Programs of a module's models are of no use to the next one, and add up to gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()
