"""benchmarks/media.py: each row's scores are its task's, and thresholds are those that its help names."""

from __future__ import annotations

import sys

import pytest

from benchmarks import media
from mmchat.inference.evaluate import load_protocol


def scores(first: float, shuffled: float, right: float, other: float) -> dict[str, dict[str, float]]:
    found = {row.name: {"num_questions": 10, **dict.fromkeys(row.scores, 0.5)} for row in media.ROWS}
    found["clips"][media.FIRST] = first
    found["clips, frames in any order"][media.FIRST] = shuffled
    for name in ("spoken commands", "spoken questions"):
        found[name]["exact_match"] = right
        found[f"{name}, another recording"]["exact_match"] = other
    return found


def test_every_threshold_can_be_missed() -> None:
    assert media._missed(scores(0.70, 0.52, 0.45, 0.25)) == []
    missed = media._missed(scores(0.69, 0.61, 0.45, 0.36))
    assert [one.split(" 0.")[0] for one in missed] == [
        "what came first",
        "what came first, frames in any order",
        "spoken commands",
        "spoken questions",
    ]
    assert len(media._missed(scores(0.70, 0.39, 0.45, 0.30))) == 2
    without_video = {name: of_row for name, of_row in scores(0, 1, 0, 0).items() if "clips" not in name}
    assert len(media._missed(without_video)) == 2


def test_the_table_has_a_line_for_every_row() -> None:
    lines = media._table(scores(0.7, 0.5, 0.5, 0.1), media.ROWS).splitlines()
    assert len(lines) == 2 + len(media.ROWS)
    assert lines[2] == (
        "| clips | 10 | 50.0 % accuracy | 70.0 % accuracy_temporal, 50.0 % accuracy_motion, 50.0 % accuracy_yes_no, "
        "50.0 % accuracy_object |"
    )
    for row in media.ROWS:
        assert row.protocol is None or load_protocol(media.PROTOCOLS / row.protocol, [])


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["media.py", "no/such/checkpoint"])
    assert media.main() == 1
    assert "no/such/checkpoint" in capsys.readouterr().err
