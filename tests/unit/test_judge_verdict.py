"""Judge protocols, and what counts as a verdict."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mmchat.config import ConfigError
from mmchat.inference.judge import load_judge_protocol
from mmchat.inference.judge_verdict import Verdict, parse_verdict
from tests import tiny

PROTOCOLS = sorted((tiny.ROOT / "configs/judges").glob("*.yaml"))


@pytest.mark.parametrize("path", PROTOCOLS, ids=lambda path: path.stem)
def test_protocols_load_and_show_a_verdict_that_they_accept(path: Path) -> None:
    protocol = load_judge_protocol(path)
    assert yaml.safe_load(path.read_text()) == protocol.model_dump(mode="json")
    example = protocol.instructions.rstrip().rsplit("Its form: ", 1)[1]
    assert parse_verdict(example, protocol.verdict).is_strict
    assert protocol.shows == ("pair" if path.stem == "consistency" else "answer")
    assert not any(f"{n}." in protocol.instructions.replace("1. verdict", "").replace("2. score", "") for n in range(5))


def test_there_is_a_protocol_for_each_aspect() -> None:
    names = ["consistency", "context", "correctness", "detail", "qa", "temporal"]
    assert [path.stem for path in PROTOCOLS] == names
    assert len({load_judge_protocol(path).sha256 for path in PROTOCOLS}) == 6


def test_a_protocol_may_not_set_the_model(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("shows: answer\nverdict: score\ninstructions: x\nrequest: {model: y}\n")
    with pytest.raises(ConfigError, match="must not name model"):
        load_judge_protocol(tmp_path / "wrong.yaml")


# ---- verdicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"verdict": "yes", "score": 5}', Verdict(5, True, True)),
        (' {"score": 0, "verdict": "no"}\n', Verdict(0, False, True)),
        ('{"verdict": "no", "score": 3, "why": "{}"}', Verdict(3, False, False)),
        ('```json\n{"verdict": " NO ", "score": 4.0}\n```', Verdict(4, False, False)),
        ('<think>{"score": 1} or {"score": 2}?</think>{"verdict": "yes", "score": "4"}', Verdict(4, True, False)),
        ('A set {1, 2} of words, then {"verdict": "yes", "score": 4}.', Verdict(4, True, False)),
    ],
)
def test_verdicts_that_are_read(text: str, wanted: Verdict) -> None:
    assert parse_verdict(text, "yes_no") == wanted


@pytest.mark.parametrize(
    "text",
    [
        "", "5", "yes", "[]", "null", '"yes"', "{}",
        '{"verdict": "yes"}', '{"score": 5}',
        '{"verdict": "yes", "score": 4.8}', '{"verdict": "yes", "score": 6}', '{"verdict": "yes", "score": -1}',
        '{"verdict": "yes", "score": true}', '{"verdict": "yes", "score": null}', '{"verdict": "yes", "score": "4.5"}',
        '{"verdict": "yes", "score": NaN}', '{"verdict": "yes", "score": 1e999}', '{"verdict": "yes", "score": "٤"}',
        '{"verdict": "yes", "score": [4]}', '{"verdict": "maybe", "score": 4}', '{"verdict": true, "score": 4}',
        '{"verdict": "yes", "score": 1, "score": 5}', '{"verdict": "yes", "score": 5} {"verdict": "no", "score": 0}',
        "{'verdict': 'yes', 'score': 4}", '{"verdict": "yes", "score": 4',
        "[" * 100_000, '{"a":' * 100_000, "{" * 20_000,
    ],
)  # fmt: skip
def test_verdicts_that_are_not_read(text: str) -> None:
    with pytest.raises(ValueError):
        parse_verdict(text, "yes_no")
