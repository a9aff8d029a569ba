"""Which component of a model is stored in which format: presets by name, and free mixes."""

import dataclasses

from jmoe.errors import ConfigError
from jmoe.quant.formats import BF16, F32, Format, QuantFormat, parse_format


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec:
    """The format of every component. Routers and norms are never quantized.

    Attributes:
      attention: the projections of queries, keys, values and output.
      experts: gate (w1) and up (w3) projections of every expert.
      experts_down: down projection (w2) of every expert; None is as ``experts``.
      embeddings: token embeddings, which are the head too if that is tied.
      head: output head.

    An expert is one run of bytes: its matrices are all quantized, or all of one float type
    (ConfigError).

    Text form, read by ``parse_spec``: a preset, or ``component=format`` pairs with commas:
    ``attention=4g64,experts=3g32,experts_down=4g64``. What is not named is bf16.
    """

    attention: Format = BF16
    experts: Format = BF16
    experts_down: Format | None = None
    embeddings: Format = BF16
    head: Format = BF16

    def __post_init__(self):
        formats = self.experts_formats
        if len(set(formats)) > 1 and not all(isinstance(f, QuantFormat) for f in formats):
            raise ConfigError(
                "an expert's matrices are all quantized, or all of one float type",
                got=f"experts={formats[0]}, experts_down={formats[2]}",
            )

    @property
    def experts_formats(self) -> tuple[Format, Format, Format]:
        """Formats of w1, w3 and w2."""
        down = self.experts if self.experts_down is None else self.experts_down
        return self.experts, self.experts, down

    @property
    def formats(self) -> tuple[Format, ...]:
        """All that occur, once each."""
        others = self.attention, self.embeddings, self.head
        return tuple(dict.fromkeys((*others, *self.experts_formats)))

    @property
    def is_quantized(self) -> bool:
        """Whether anything is in few bits."""
        return any(isinstance(fmt, QuantFormat) for fmt in self.formats)

    def to_json(self) -> dict[str, str]:
        """Every component's format in text form."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: str(value) for name, value in values.items() if value is not None}

    def __str__(self) -> str:
        for name, preset in PRESETS.items():
            if preset == self:
                return name
        return ",".join(f"{name}={value}" for name, value in self.to_json().items())


def _affine(bits: int, group_size: int) -> QuantFormat:
    return QuantFormat(bits=bits, group_size=group_size)  # type: ignore[arg-type]


def _presets() -> dict[str, QuantSpec]:
    int8 = QuantFormat(bits=8, group_size=64, symmetric=True, nested=False)
    presets = {
        "bf16": QuantSpec(),
        "f32": QuantSpec(attention=F32, experts=F32, embeddings=F32, head=F32),
        "int8": QuantSpec(attention=int8, experts=int8, head=int8),
        "int4": QuantSpec(attention=_affine(4, 64), experts=_affine(4, 64), head=int8),
    }
    # Paper A, https://arxiv.org/abs/2312.17238, Table 1: attention by experts. 2 bits go with
    # groups of 16. The paper's 3-bit codes take 3.5 bits each with their padding, and ours 3;
    # the difference goes into smaller groups and a down projection of 4 bits.
    attention = {"16": BF16, "4": _affine(4, 64), "3": _affine(3, 64), "2": _affine(2, 16)}
    experts = {
        "16": (BF16, None),
        "4": (_affine(4, 64), None),
        "3": (_affine(3, 32), _affine(4, 64)),
        "2": (_affine(2, 16), None),
    }
    for a, attention_format in attention.items():
        for e, (experts_format, down_format) in experts.items():
            if a != "16" or e != "16":
                presets[f"attn{a}-experts{e}"] = QuantSpec(
                    attention=attention_format, experts=experts_format, experts_down=down_format
                )
    return presets


PRESETS = _presets()


def parse_spec(text: str) -> QuantSpec:
    """Reads a preset's name or a list of ``component=format`` (ConfigError)."""
    if text in PRESETS:
        return PRESETS[text]
    components = [field.name for field in dataclasses.fields(QuantSpec)]
    formats: dict[str, Format] = {}
    for item in text.split(","):
        name, equals, value = item.strip().partition("=")
        if not equals or name not in components or name in formats:
            raise ConfigError(
                "unknown quantization",
                got=repr(text),
                expected=f"one of {', '.join(PRESETS)}; or component=format pairs such as "
                f"attention=4g64,experts=3g32, with the components {', '.join(components)}",
            )
        formats[name] = parse_format(value)
    return QuantSpec(**formats)
