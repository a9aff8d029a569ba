"""Host kernels: what a CPU computes faster in C++ than through XLA.

Every operation has a fallback that XLA compiles, so nothing depends on the kernels being there.
They are built while jmoe is installed (hatch_build.py); ``status`` says whether they are there, and
why not.
"""

from jmoe.native.library import Status, require, status

__all__ = ["Status", "require", "status"]
