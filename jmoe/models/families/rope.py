"""Rotary settings in their two spellings: before transformers 5 and since."""

from jmoe.errors import ConfigError
from jmoe.models.families.fields import ConfigFields


def read_rope(fields: ConfigFields, *, default_theta: float) -> float:
    """Reads the base of the rotary embedding.

    Old: ``rope_theta`` with ``rope_scaling`` (null, or an object with ``type`` or
    ``rope_type``). New: ``rope_parameters`` with ``rope_theta`` and ``rope_type``.

    Raises:
      ConfigError: the two contradict each other, or ask for a scaling that is not supported.
    """
    old_theta = fields.number("rope_theta", None)
    scaling = fields.sub_object("rope_scaling")
    new = fields.sub_object("rope_parameters")
    for group in (scaling, new):
        if group is not None:
            group.choice("rope_type", ("default",), "default")
            group.choice("type", ("default",), "default")
    new_theta = new.number("rope_theta", None) if new is not None else None
    for group in (scaling, new):
        if group is not None:
            group.refuse_unread()
    if old_theta is not None and new_theta is not None and old_theta != new_theta:
        raise ConfigError(
            "config.json: rope_theta and rope_parameters.rope_theta contradict each other",
            where=fields.where,
            got=f"{old_theta:g} and {new_theta:g}",
        )
    return new_theta or old_theta or default_theta
