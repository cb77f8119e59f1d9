"""The DET picture: axes of normal deviates, curves where they belong, one file that needs nothing else."""

from __future__ import annotations

import random
import xml.etree.ElementTree as ET
from statistics import NormalDist

import numpy as np
import pytest

from mmchat.inference.det_plot import LEFT, SIDE, TOP, det_svg

SVG = "{http://www.w3.org/2000/svg}"


def polyline(root: ET.Element, i: int = 0) -> np.ndarray:
    """[points, 2] of the i-th curve in pixels."""
    text = root.findall(f"{SVG}polyline")[i].attrib["points"].split()
    return np.array([float(number) for number in text]).reshape(-1, 2)


def test_two_normal_kinds_of_score_make_a_straight_line() -> None:
    """Of one spread: along the curve a step in one deviate is the same step back in the other."""
    quantiles = [NormalDist().inv_cdf((i + 0.5) / 4000) for i in range(4000)]
    root = ET.fromstring(det_svg({"a": ([q + 1.5 for q in quantiles], quantiles)}))
    points = polyline(root)
    inner = points[(points[:, 0] > LEFT + 60) & (points[:, 1] < TOP + SIDE - 60)]
    assert len(inner) > 50
    assert np.ptp(inner[:, 1] - inner[:, 0]) < 3  # y grows downwards
    # A distance of 1.5 between the means: rates are equal at a deviate of -0.75.
    dot = root.find(f"{SVG}circle")
    assert dot is not None
    x, y = float(dot.attrib["cx"]) - LEFT, TOP + SIDE - float(dot.attrib["cy"])
    edge = NormalDist().inv_cdf(0.0005)
    assert x == pytest.approx(y, abs=0.2) and x == pytest.approx(SIDE * (-0.75 - edge) / (-2 * edge), abs=1)


def test_curves_run_from_corner_to_corner_and_never_back() -> None:
    rng = random.Random(0)
    for grain in (1, 2, 100):
        curves = {
            name: (
                [round(rng.gauss(shift, 1) * grain) / grain for _ in range(50)],
                [rng.gauss(0, 1) for _ in range(50)],
            )
            for name, shift in (("a", 0.0), ("b", 2.0))
        }
        root = ET.fromstring(det_svg(curves))
        for i in range(2):
            points = polyline(root, i)
            assert points[0].tolist() == [LEFT, TOP] and points[-1].tolist() == [LEFT + SIDE, TOP + SIDE]
            assert (np.diff(points, axis=0) >= 0).all()


def test_a_perfect_and_an_infinite_score_stay_in_the_square() -> None:
    root = ET.fromstring(det_svg({"perfect": ([1, 2], [0, -1]), "none": ([float("-inf")], [float("inf")])}))
    for i in range(2):
        points = polyline(root, i)
        assert points.min(axis=0).tolist() == [LEFT, TOP] and points.max(axis=0).tolist() == [LEFT + SIDE, TOP + SIDE]
    assert [text.text for text in root.findall(f"{SVG}text")][-2:] == [
        "perfect: equal error rate 0.0 %",
        "none: equal error rate 100.0 %",
    ]


def test_names_are_text_and_nothing_is_loaded() -> None:
    name = '<script>x</script> "&'
    text = det_svg({name: ([1], [0]), **{f"{i}": ([1], [0]) for i in range(20)}})
    root = ET.fromstring(text)
    assert f"{name}: equal error rate" in "".join(root.itertext()) and name in root.attrib["aria-label"]
    assert "<script" not in text and "href" not in text and "<style" not in text and 'style="' not in text
    styles = [(line.attrib["stroke"], line.attrib.get("stroke-dasharray")) for line in root.findall(f"{SVG}polyline")]
    assert len(set(styles)) == len(styles) == 21
    assert float(root.findall(f"{SVG}text")[-1].attrib["y"]) < float(root.attrib["height"])


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="no curve"):
        det_svg({})
    with pytest.raises(ValueError, match="0 scores of targets"):
        det_svg({"a": ([], [1])})
