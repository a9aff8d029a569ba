"""Pieces of SVG that the plots of several suites share."""

from collections.abc import Iterable


def picture(width: float, height: float, parts: Iterable[str]) -> str:
    """A whole file, on white."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" fill="#333">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def text(
    x: float, y: float, words: str, anchor: str = "middle", *, size: int = 11, bold: bool = False
) -> str:
    """Words at a place."""
    weight = ' font-weight="bold"' if bold else ""
    place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
    return f'<text {place} font-size="{size}"{weight}>{words}</text>'
