"""Hit rate by slots, as SVG: one line per rule."""

from collections.abc import Sequence
from pathlib import Path

from _simulate.replays import Replay
from jmoe.errors import RequestError
from jmoe.store.safetensors_writer import write_file

_COLOURS = {
    "belady": "#9065b0",
    "likely": "#d9730d",
    "lfu": "#448361",
    "lru": "#0b6e99",
    "random": "#64b5d0",
    "pool": "#8d6e63",
    "popular": "#c14c8a",
    "fixed": "#9b9a97",
}
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 400, 52, 500, 40, 352


def check(file: str, predictors: Sequence[str], ways: Sequence[str]) -> None:
    """Raises RequestError, before minutes of work, if the picture cannot be drawn or written."""
    for what, values in (("predictor", predictors), ("way of serving misses", ways)):
        if len(values) > 1:
            raise RequestError(
                f"a picture shows one {what}", got=", ".join(values), do="leave --plot out"
            )
    path = Path(file)
    if path.is_dir() or not path.parent.is_dir():
        raise _no_place(path, "a directory" if path.is_dir() else "no such directory")


def write(file: str, replays: Sequence[Replay], title: str) -> None:
    """Draws into a file (RequestError)."""
    path = Path(file)
    try:
        write_file(path.parent, path.name, draw(replays, title).encode())
    except OSError as error:
        raise _no_place(path, error.strerror) from None


def _no_place(path: Path, got: str | None) -> RequestError:
    return RequestError(
        "the picture cannot be written", where=path, got=got, do="choose another --plot"
    )


def draw(replays: Sequence[Replay], title: str) -> str:
    """The picture. Labels stand at the right, each at the height of its line's end if it can."""
    slots = sorted({replay.slots for replay in replays})
    lines = {rule: [r for r in replays if r.rule == rule] for rule in _COLOURS}
    lines = {rule: line for rule, line in lines.items() if line}

    def x(number: int) -> float:
        span = slots[-1] - slots[0] or 1
        return round(_LEFT + 12 + (number - slots[0]) / span * (_RIGHT - _LEFT - 24), 1)

    def y(rate: float) -> float:
        return round(_BOTTOM - rate * (_BOTTOM - _TOP), 1)

    parts = [_text(_LEFT, 20, title, "start", bold=True)]
    for i in range(11):
        parts.append(f'<path d="M{_LEFT} {y(i / 10)}H{_RIGHT}" stroke="#e3e3e3"/>')
        parts.append(_text(_LEFT - 6, y(i / 10) + 4, f"{i / 10:g}", "end"))
    for number in slots:
        parts.append(f'<path d="M{x(number)} {_BOTTOM}v4" stroke="#666"/>')
        parts.append(_text(x(number), _BOTTOM + 18, str(number), "middle"))
    parts.append(_text((_LEFT + _RIGHT) / 2, _BOTTOM + 36, "slots in each layer", "middle"))
    parts.append(f'<path d="M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}" fill="none" stroke="#666"/>')
    for rule, line in lines.items():
        points = [(x(replay.slots), y(replay.result.hit_rate)) for replay in line]
        path = " ".join(f"{a},{b}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{_COLOURS[rule]}"/>')
        for replay, (a, b) in zip(line, points, strict=True):
            parts.append(
                f'<circle cx="{a}" cy="{b}" r="3" fill="{_COLOURS[rule]}"><title>{rule}, '
                f"{replay.slots} slots: {replay.result.hit_rate:.4f}</title></circle>"
            )
    # Lines meet at both ends: so the legend is in the order of the middle.
    middle = slots[len(slots) // 2]
    order = {rule: _rate_at(line, middle) for rule, line in lines.items()}
    for i, rule in enumerate(sorted(order, key=lambda rule: -order[rule])):
        legend_y = _TOP + 60 + 22 * i
        parts.append(
            f'<path d="M{_RIGHT + 16} {legend_y}h18" stroke="{_COLOURS[rule]}" stroke-width="2"/>'
        )
        label = f"{rule} {order[rule]:.3f}"
        parts.append(_text(_RIGHT + 40, legend_y + 4, label, "start", _COLOURS[rule]))
    parts.append(_text(_RIGHT + 16, _TOP + 40, f"at {middle} slots:", "start"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" font-size="11">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def _rate_at(line: Sequence[Replay], slots: int) -> float:
    return next(replay.result.hit_rate for replay in line if replay.slots == slots)


def _text(
    x: float, y: float, text: str, anchor: str, colour: str = "#333", *, bold: bool = False
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}"{weight}>{text}</text>'
