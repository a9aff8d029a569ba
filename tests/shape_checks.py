"""The checker that jaxtyping applies to annotated functions while the suite runs."""

from collections.abc import Callable

from beartype import beartype


def check(function: Callable) -> Callable:
    """Checks arguments and results, but not constructors.

    A pytree class is also built by JAX itself, with abstract values in its fields.
    """
    return function if function.__name__ == "__init__" else beartype(function)
