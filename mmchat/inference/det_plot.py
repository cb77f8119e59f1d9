"""DET curves as one SVG that needs nothing else: false accepts against false rejects on axes of normal deviates.

The axes are those of Martin et al., 'The DET curve in assessment of detection task performance' (Eurospeech 1997): the
curve of a scorer whose two kinds of score are normal, with one spread, is a straight line. Colours are fixed and lie on
white, so that the file looks the same in a page, a document and a viewer; no style sheet is in it, which a page's
content security policy would not let act.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import NormalDist

from mmchat.metrics.detection import det_points, eer

TICKS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995)
LOW, HIGH = 0.0005, 0.9995  # rates beyond lie on the edge: a rate of 0 is infinitely far away
FIRST, LAST = map(NormalDist().inv_cdf, (LOW, HIGH))
COLOURS = ("#0b6e62", "#c2255c", "#1864ab", "#a65308", "#6741d9", "#4b5563", "#2b8a3e", "#862e9c")
DASHES = ("", "7 3", "2 3")  # another one each time that the colours are used up
SIDE, LEFT, TOP, BOTTOM = 420, 62, 14, 54  # pixels: of the square, and of what lies around it
LINE = 18  # height of a name in the legend
STEP = 0.7  # pixels: shorter steps of a curve, which no eye sees, are joined

Scores = tuple[Sequence[float], Sequence[float]]


def det_svg(curves: Mapping[str, Scores]) -> str:
    """The picture of each name's (scores of targets, scores of non-targets); a dot is where a curve's rates are equal.

    Raises ValueError where a list is empty or a score is NaN, or there is no curve.
    """
    if not curves:
        raise ValueError("found no curve to draw; wanted scores of targets and of non-targets under at least one name")
    rates = {name: eer(*scores) for name, scores in curves.items()}
    width, height = LEFT + SIDE + 20, TOP + SIDE + BOTTOM + LINE * len(curves)
    label = "DET curves: " + "; ".join(f"{name}, equal error rate {_percent(rate)}" for name, rate in rates.items())
    drawn = [_curve(i, *pair) for i, pair in enumerate(zip(curves.values(), rates.values(), strict=True))]
    legend = [_legend(i, name, rate) for i, (name, rate) in enumerate(rates.items())]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{html.escape(label)}" font-family="system-ui, sans-serif" font-size="11">\n'
        f'<rect width="{width}" height="{height}" fill="#fff"/>\n{_axes()}\n' + "\n".join([*drawn, *legend, "</svg>\n"])
    )


def _place(rate: float) -> float:
    """0 to 1 along an axis."""
    return (NormalDist().inv_cdf(min(max(rate, LOW), HIGH)) - FIRST) / (LAST - FIRST)


def _x(far: float) -> float:
    return LEFT + SIDE * _place(far)


def _y(frr: float) -> float:
    return TOP + SIDE * (1 - _place(frr))


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"


def _axes() -> str:
    parts = []
    for rate in TICKS:
        x, y, name = _x(rate), _y(rate), f"{100 * rate:g}"
        parts += [
            f'<path d="M{x:.1f} {TOP}V{TOP + SIDE}M{LEFT} {y:.1f}H{LEFT + SIDE}" stroke="#e3e6e8"/>',
            f'<text x="{x:.1f}" y="{TOP + SIDE + 15}" text-anchor="middle" fill="#5d646c">{name}</text>',
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#5d646c">{name}</text>',
        ]
    middle, end = TOP + SIDE / 2, TOP + SIDE
    return "\n".join([
        *parts,
        f'<path d="M{LEFT} {end}L{LEFT + SIDE} {TOP}" stroke="#b9bfc5" stroke-dasharray="3 4"/>',
        f'<rect x="{LEFT}" y="{TOP}" width="{SIDE}" height="{SIDE}" fill="none" stroke="#8d949b"/>',
        f'<text x="{LEFT + SIDE / 2}" y="{end + 34}" text-anchor="middle" fill="#1c1e21">false accepts, %</text>',
        f'<text x="16" y="{middle}" transform="rotate(-90 16 {middle})" text-anchor="middle" fill="#1c1e21">'
        "false rejects, %</text>",
    ])  # fmt: skip


def _curve(i: int, scores: Scores, rate: float) -> str:
    """The lines between operating points. What is straight in rates is bent on these axes, so a long one has parts."""
    places = [(_x(0), _y(1))]
    for (far, frr), (next_far, next_frr) in pairwise(det_points(*scores)):
        num = max(1, round(50 * max(next_far - far, frr - next_frr)))
        for step in range(1, num + 1):
            x, y = _x(far + (next_far - far) * step / num), _y(frr + (next_frr - frr) * step / num)
            if x - places[-1][0] + y - places[-1][1] >= STEP:
                places.append((x, y))
    places.append((_x(1), _y(0)))
    colour, dash = _style(i)
    line = " ".join(f"{x:.1f} {y:.1f}" for x, y in places)
    return (
        f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>'
        f'<circle cx="{_x(rate):.1f}" cy="{_y(rate):.1f}" r="3.5" fill="{colour}"/>'
    )


def _legend(i: int, name: str, rate: float) -> str:
    colour, dash = _style(i)
    y = TOP + SIDE + BOTTOM + LINE * i
    return (
        f'<path d="M{LEFT} {y - 4}h24" stroke="{colour}" stroke-width="1.8"{dash}/>'
        f'<text x="{LEFT + 32}" y="{y}" fill="#1c1e21">{html.escape(name)}: equal error rate {_percent(rate)}</text>'
    )


def _style(i: int) -> tuple[str, str]:
    dash = DASHES[i // len(COLOURS) % len(DASHES)]
    return COLOURS[i % len(COLOURS)], f' stroke-dasharray="{dash}"' if dash else ""
