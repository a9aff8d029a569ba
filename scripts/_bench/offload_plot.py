"""The paper's four rows, on its machines and here, as SVG: speed as a multiple of naive."""

from collections.abc import Mapping, Sequence

from _bench.svg import picture, text

ROWS = ("naive", "without LRU and pre-loading", "without pre-loading", "full")

# Tokens per second in the order of ROWS: https://arxiv.org/abs/2312.17238, table 2. Naive on the
# 3060 with 3 bits is printed there as 1.791, more than without pre-loading; left out here.
PAPER: Mapping[str, Sequence[float]] = {
    "A100, 2 bits": (1.392, 2.265, 2.918, 3.061),
    "3080M, 2 bits": (1.059, 1.758, 2.227, 2.655),
    "3060, 2 bits": (0.919, 1.547, 2.051, 2.278),
    "T4, 2 bits": (0.661, 1.168, 1.567, 2.092),
    "A100, 3 bits": (1.246, 2.055, 2.683, 2.845),
    "3080M, 3 bits": (0.914, 1.595, 2.024, 2.475),
    "T4, 3 bits": (0.580, 1.061, 1.365, 1.603),
}

_COLOURS = ("#9b9b9b", "#d9730d", "#448361", "#0b6e99")
_LEFT, _TOP, _HEIGHT, _BOTTOM = 44, 64, 340, 56
_GROUP, _BAR = 96, 19


def draw(title: str, ours: Mapping[str, Mapping[str, float]]) -> str:
    """The picture.

    Args:
      title: of our machines.
      ours: tokens per second by group and row.
    """
    groups = {
        **{name: tuple(speeds) for name, speeds in PAPER.items()},
        **{name: tuple(speeds[row] for row in ROWS) for name, speeds in ours.items()},
    }
    highest = max(max(speeds) / speeds[0] for speeds in groups.values())
    step = next(step for step in (0.5, 1, 2, 5, 10, 20, 50) if highest / step <= 8)
    top = (int(highest / step) + 1) * step
    bottom, width = _HEIGHT - _BOTTOM, _LEFT + _GROUP * len(groups) + 24

    def y(ratio: float) -> float:
        return round(bottom - ratio / top * (bottom - _TOP), 1)

    parts = []
    for i in range(round(top / step) + 1):
        parts.append(f'<path d="M{_LEFT} {y(i * step)}H{width - 12}" stroke="#e3e3e3"/>')
        parts.append(text(_LEFT - 6, y(i * step) + 4, f"{i * step:g}", "end"))
    for i, (name, speeds) in enumerate(groups.items()):
        is_ours = i >= len(PAPER)
        left = _LEFT + 8 + i * _GROUP + (12 if is_ours else 0)
        for j, (row, speed) in enumerate(zip(ROWS, speeds, strict=True)):
            ratio, x = speed / speeds[0], left + j * (_BAR + 1)
            parts.append(
                f'<rect x="{x}" y="{y(ratio)}" width="{_BAR}" height="{bottom - y(ratio):g}" '
                f'fill="{_COLOURS[j]}"><title>{name}, {row}: {speed:.3g} tokens/s</title></rect>'
            )
            parts.append(text(x + _BAR / 2, y(ratio) - 4, f"{ratio:.1f}", size=9))
        middle = left + 2 * (_BAR + 1)
        parts.append(text(middle, bottom + 16, name))
        parts.append(text(middle, bottom + 30, f"naive: {speeds[0]:.3g} tok/s", size=9))
    border = _LEFT + 10 + len(PAPER) * _GROUP
    parts.append(f'<path d="M{border} {_TOP - 20}V{bottom + 34}" stroke="#666"/>')
    parts.append(text(border - 8, _TOP - 8, "Mixtral-8x7B, Eliseev and Mazur, table 2", "end"))
    parts.append(text(border + 8, _TOP - 8, "here", "start"))
    parts.append(text(width / 2, _HEIGHT - 8, f"here: {title}"))
    parts.append(text(_LEFT, 18, "Speed of decoding, as a multiple of naive", "start", bold=True))
    for j, (row, colour) in enumerate(zip(ROWS, _COLOURS, strict=True)):
        x = _LEFT + 4 + 210 * j
        parts.append(f'<rect x="{x}" y="28" width="10" height="10" fill="{colour}"/>')
        parts.append(text(x + 15, 37, row, "start"))
    return picture(width, _HEIGHT, parts)
