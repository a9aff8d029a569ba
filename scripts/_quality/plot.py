"""Size against perplexity, as SVG: one panel per model, one line per width of attention."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_COLOURS = {16: "#0b6e99", 4: "#d9730d", 3: "#448361", 2: "#9065b0"}
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 460, 320, 52, 40, 48


class Panel(NamedTuple):
    """Sizes and perplexities by bits of attention and experts."""

    title: str
    unit: str
    points: Mapping[tuple[int, int], tuple[float, float]]
    x_ticks: Sequence[float]


def draw(panels: Sequence[Panel]) -> str:
    """The whole picture."""
    width = _WIDTH * len(panels)
    body = "".join(
        f'<g transform="translate({i * _WIDTH},0)">{_draw_panel(panel)}</g>'
        for i, panel in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}" '
        f'width="{width}" height="{_HEIGHT}" font-family="sans-serif" font-size="11">'
        f'<rect width="100%" height="100%" fill="white"/>{body}</svg>\n'
    )


def _draw_panel(panel: Panel) -> str:
    sizes = [size for size, _ in panel.points.values()] + list(panel.x_ticks)
    worst = max(perplexity for _, perplexity in panel.points.values())
    best = min(perplexity for _, perplexity in panel.points.values())
    step = _round_step((worst - best) / 5)
    low, high = math.floor(best / step) * step, math.ceil(worst / step) * step
    right, bottom = _WIDTH - 20, _HEIGHT - _BOTTOM

    def x(size: float) -> float:
        share = math.log(size / min(sizes)) / math.log(max(sizes) / min(sizes))
        return round(_LEFT + 12 + share * (right - _LEFT - 24), 1)

    def y(perplexity: float) -> float:
        return round(bottom - (perplexity - low) / (high - low) * (bottom - _TOP), 1)

    parts = [_text(_LEFT, 20, panel.title, "start", bold=True)]
    for i in range(round((high - low) / step) + 1):
        value = low + i * step
        parts.append(f'<path d="M{_LEFT} {y(value)}H{right}" stroke="#e3e3e3"/>')
        parts.append(_text(_LEFT - 6, y(value) + 4, f"{value:g}", "end"))
    for value in panel.x_ticks:
        parts.append(f'<path d="M{x(value)} {bottom}v4" stroke="#666"/>')
        parts.append(_text(x(value), bottom + 16, f"{value:g}", "middle"))
    parts.append(_text((_LEFT + right) / 2, bottom + 34, f"size, {panel.unit} (log)", "middle"))
    parts.append(f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="#666"/>')
    for i, (attention, colour) in enumerate(_COLOURS.items()):
        line = {e: point for (a, e), point in panel.points.items() if a == attention}
        path = " ".join(f"{x(size)},{y(perplexity)}" for size, perplexity in line.values())
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" opacity="0.5"/>')
        for experts, (size, perplexity) in line.items():
            parts.append(
                f'<circle cx="{x(size)}" cy="{y(perplexity)}" r="4" fill="{colour}">'
                f"<title>attention {attention}, experts {experts} bits: {size:.2f} {panel.unit}, "
                f"perplexity {perplexity:.3f}</title></circle>"
            )
            parts.append(_text(x(size) + 6, y(perplexity) - 6, str(experts), "start", colour))
        legend_y = _TOP + 12 + 16 * i
        parts.append(f'<circle cx="{right - 180}" cy="{legend_y}" r="4" fill="{colour}"/>')
        label = f"attention in {attention} bits"
        parts.append(_text(right - 170, legend_y + 4, label, "start", colour))
    note = "numbers: bits of experts"
    parts.append(_text(right - 184, _TOP + 16 * len(_COLOURS) + 16, note, "start"))
    return "".join(parts)


def _text(
    x: float, y: float, text: str, anchor: str, colour: str = "#333", *, bold: bool = False
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}"{weight}>{text}</text>'


def _round_step(step: float) -> float:
    """The next larger of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step)
