"""Set-up of the whole suite: shape annotations are checked, scripts see no network."""

import os

from jaxtyping import install_import_hook

# Before jmoe is imported anywhere: every annotated function checks its arrays' shapes.
install_import_hook("jmoe", "beartype.beartype")

os.environ["HF_HUB_OFFLINE"] = "1"
