"""What docs/referential.md shows of questions, answers and marks is what the code writes and reads."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import pytest

from mmchat.conversation import MediaHeader, MediaRef, Part, Record, Region
from mmchat.modalities.image import square_geometry
from mmchat.regions import Geometry, RegionFormat
from mmchat.tasks import TASKS
from mmchat.tasks.question import Protocol
from tests import tiny

PAGE = (tiny.ROOT / "docs/referential.md").read_text()
SIZE = (640, 480)
GEOMETRY = square_geometry(*SIZE, 448, "pad")
BOX, POINT = Region(0, box=(64, 144, 224, 384)), Region(0, point=(144, 264))


def _blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.S)


def _rows(heading: str) -> list[list[str]]:
    """Cells of the table whose first line starts so."""
    table = PAGE[PAGE.index(f"| {heading} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table[2:]]


def _text(parts: Sequence[Part]) -> str:
    return "".join(
        part
        if isinstance(part, str)
        else f"<{part.modality}>"
        if isinstance(part, MediaRef)
        else RegionFormat().render(part, GEOMETRY)
        for part in parts
    )


def _said(task: str, facts: dict[str, object], protocol: Protocol) -> str:
    """The only question and its answer, as the page writes them."""
    record = Record("example", facts, (MediaRef("image", b"", MediaHeader(*SIZE)),))
    (question,) = TASKS[task].questions(record, protocol)
    (turn,) = question.conversation.turns
    return f"{task}: {_text(turn.parts)}\n  {_text(question.reference)}\n"


def test_examples_are_what_the_tasks_say():
    (facts,) = map(json.loads, _blocks("json"))
    said = "".join(
        _said(task, facts[name], Protocol())
        for name, tasks in {
            "target": ("rec", "reg"),
            "nothing": ("rec",),
            "caption": ("spot", "ground"),
            "candidates": ("point",),
            "about a place": ("vqa",),
            "reasons": ("vqa",),
        }.items()
        for task in tasks
    )
    first, drawn = _blocks("text")[:2]
    assert first == said
    possible = {_said("refer", facts["target"], Protocol(phrasing="drawn", seed=seed)) for seed in range(60)}
    shown = re.findall(r"refer: .*\n  .*\n", drawn)
    assert "".join(shown) == drawn and len(shown) == 4 and set(shown) <= possible


def test_dialects_are_what_is_written():
    rows = _rows("`region_dialect`")
    assert len(rows) == 7
    for dialect, frame, decimals, box, point, _ in rows:
        regions = RegionFormat(dialect, frame, int(decimals) if decimals else None)
        assert [regions.render(BOX, GEOMETRY), regions.render(POINT, GEOMETRY)] == [box, point]
    second = Region(1, box=(20, 40, 90, 120))
    assert f"`{RegionFormat().render(second, square_geometry(300, 200, 448, 'pad'), 2)}`" in PAGE


@pytest.mark.parametrize("row", _rows("an answer of the default dialect"), ids=lambda row: row[0])
def test_answers_are_read_so(row):
    text, pictures, num_regions, num_failed = row
    geometries: list[Geometry | None] = [GEOMETRY] * int(pictures)
    parsed = RegionFormat().parse(text, geometries)
    assert (len(parsed.regions), parsed.num_failed) == (int(num_regions), int(num_failed))
