"""Line charts as one SVG that needs nothing else; colours are fixed and lie on white, so it looks the same anywhere."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

COLOURS = ("#0b6e62", "#c2255c", "#1864ab", "#a65308", "#6741d9", "#4b5563", "#2b8a3e", "#862e9c", "#b8860b")
DASHES = ("", "7 3", "2 3")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LINE = 520, 300, 62, 34, 54, 18  # pixels

Line = Sequence[tuple[float, float]]


def chart(
    title: str, lines: Mapping[str, Line], x_label: str, x_ticks: Sequence[tuple[float, str]], is_log: bool = False
) -> str:
    """Error rates, 0 to 1, as points joined by lines, with a legend below.

    Args:
        lines: by name, points (x, rate) with rising x.
        x_ticks: places and words along the x axis; the outer ones are its ends.
        is_log: x by its logarithm.
    """

    def along(x: float) -> float:
        low, high, at = (math.log(v) if is_log else v for v in (x_ticks[0][0], x_ticks[-1][0], x))
        return LEFT + WIDTH * (0.5 if high == low else (at - low) / (high - low))

    top = max(0.1, math.ceil(10 * max((rate for line in lines.values() for _, rate in line), default=0.1)) / 10)

    def up(rate: float) -> float:
        return TOP + HEIGHT * (1 - rate / top)

    drawn = []
    for tenth in range(round(10 * top) + 1):
        y = up(tenth / 10)
        drawn.append(f'<path d="M{LEFT} {y:.1f}h{WIDTH}" stroke="#e3e6e8"/>')
        drawn.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#5d646c">{10 * tenth} %</text>')
    for x, words in x_ticks:
        place = f'x="{along(x):.1f}" y="{TOP + HEIGHT + 18}"'
        drawn.append(f'<text {place} text-anchor="middle" fill="#5d646c">{html.escape(words)}</text>')
    for i, (name, line) in enumerate(lines.items()):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        style = f'stroke="{colour}" stroke-width="1.8"' + (f' stroke-dasharray="{dash}"' if dash else "")
        places = [(along(x), up(rate)) for x, rate in line]
        drawn.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}" fill="none" {style}/>')
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        y = TOP + HEIGHT + BOTTOM + LINE * i
        drawn.append(f'<path d="M{LEFT} {y - 4}h24" {style}/>')
        drawn.append(f'<text x="{LEFT + 32}" y="{y}" fill="#1c1e21">{html.escape(name)}</text>')
    width, height = LEFT + WIDTH + 24, TOP + HEIGHT + BOTTOM + LINE * len(lines)
    below = f'x="{LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 36}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{html.escape(title)}" font-family="system-ui, sans-serif" font-size="12">\n'
        f'<rect width="{width}" height="{height}" fill="#fff"/>\n'
        f'<text x="{LEFT}" y="20" fill="#1c1e21" font-weight="600">{html.escape(title)}</text>\n'
        + "\n".join(drawn)
        + f'\n<text {below} text-anchor="middle" fill="#1c1e21">{html.escape(x_label)}</text>\n</svg>\n'
    )
