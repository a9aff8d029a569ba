"""Tokens per second over the speed of the link, for each way of serving misses, as SVG."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from _bench.svg import picture, text

_COLOURS = {"load": "#d9730d", "host": "#9b9b9b", "split": "#0b6e99", "bound": "#448361"}
_LABELS = {
    "load": "offload: copied",
    "host": "computed on the host",
    "split": "hybrid: both at once",
    "bound": "bound",
}
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _GAP = 400, 340, 52, 64, 56, 24


def draw(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The picture, a panel for each number of slots.

    Args:
      title: what was measured.
      rows: of the part decode.
    """
    slots = list(dict.fromkeys(row["slots_per_layer"] for row in rows))
    width = len(slots) * (_WIDTH + _GAP)
    parts = [text(_LEFT, 18, "Decode speed over the speed of the link", "start", bold=True)]
    for i, (way, label) in enumerate(_LABELS.items()):
        x = _LEFT + 150 * i
        parts.append(f'<path d="M{x} 33h16" stroke="{_COLOURS[way]}" stroke-width="2"/>')
        parts.append(text(x + 21, 37, label, "start"))
    for i, number in enumerate(slots):
        panel = [row for row in rows if row["slots_per_layer"] == number]
        parts += _panel(i * (_WIDTH + _GAP), f"{number} slots per layer", panel)
    parts.append(text(width / 2, _HEIGHT - 6, title))
    return picture(width, _HEIGHT, parts)


def _panel(offset: float, name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    links = sorted({row["link_bytes_per_s"] for row in rows})
    low, high = math.log(links[0]), math.log(links[-1])
    highest = max(
        max(row["tok_per_s"]["max"], row["bound_tok_per_s"])
        for row in rows
        if row["way"] in _COLOURS
    )
    step = next(s for s in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if highest / s <= 8)
    top = (int(highest / step) + 1) * step
    bottom = _HEIGHT - _BOTTOM

    def x(link: float) -> float:
        share = (math.log(link) - low) / (high - low) if high > low else 0.5
        return round(offset + _LEFT + 16 + share * (_WIDTH - _LEFT - 32), 1)

    def y(speed: float) -> float:
        return round(bottom - min(speed, top) / top * (bottom - _TOP), 1)

    parts = [text(offset + _LEFT + (_WIDTH - _LEFT) / 2, _TOP - 8, name)]
    for i in range(round(top / step) + 1):
        parts.append(f'<path d="M{offset + _LEFT} {y(i * step)}H{offset + _WIDTH}" stroke="#eee"/>')
        parts.append(text(offset + _LEFT - 6, y(i * step) + 4, f"{i * step:g}", "end"))
    for link in links:
        parts.append(text(x(link), bottom + 16, f"{link / 1e9:g} GB/s"))
    by_way: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda row: row["link_bytes_per_s"]):
        by_way.setdefault(row["way"], []).append(
            (row["link_bytes_per_s"], row["tok_per_s"]["median"])
        )
        if row["way"] == "split":
            by_way.setdefault("bound", []).append((row["link_bytes_per_s"], row["bound_tok_per_s"]))
    for way, points in by_way.items():
        if way not in _COLOURS:
            continue
        path = " ".join(f"{'ML'[i > 0]}{x(a)} {y(b)}" for i, (a, b) in enumerate(points))
        dashes = ' stroke-dasharray="4 3"' if way == "bound" else ""
        parts.append(
            f'<path d="{path}" fill="none" stroke="{_COLOURS[way]}" stroke-width="2"{dashes}/>'
        )
        for link, speed in points:
            parts.append(
                f'<circle cx="{x(link)}" cy="{y(speed)}" r="3" fill="{_COLOURS[way]}"><title>'
                f"{_LABELS[way]}, {link / 1e9:g} GB/s: {speed:.3g} tokens/s</title></circle>"
            )
    return parts
