"""infer.py evaluate on recordings: directed speech with its DET picture, captions and transcripts, spoken questions."""

from __future__ import annotations

import json
import random
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

import infer
from mmchat.conversation import MediaRef, Record
from mmchat.inference.controls import Controls
from mmchat.inference.evaluate import evaluate, load_protocol
from mmchat.inference.load import Loaded
from mmchat.metrics.detection import eer, far_at_frr
from tests import tiny
from tests.evaluations import SHORT, awake, lines, metrics_of, shards


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> Loaded:
    return awake()


def tone(hz: float, duration_s: float = 0.4) -> MediaRef:
    return MediaRef("audio", tiny.tone(hz, duration_s))


def speech(i: int, directed: bool) -> Record:
    facts = {"text": f"dim light {i}", "directed": directed, "kind": "command" if directed else "dialogue"}
    return Record(f"{i:03d}", facts, (tone(200 + 37 * i),))


@pytest.fixture(scope="module")
def spoken_to(tmp_path_factory: pytest.TempPathFactory) -> str:
    return shards(tmp_path_factory.mktemp("directed"), [speech(i, i % 3 == 0) for i in range(12)])


# ---- directed speech ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["directed", "directed_audio", "directed_text"])
def test_error_rates_are_those_of_the_likelihoods(loaded: Loaded, spoken_to: str, tmp_path: Path, task: str) -> None:
    protocol = load_protocol(tiny.ROOT / "configs/protocols/directed.yaml")
    metrics = evaluate(loaded, task, spoken_to, tmp_path, protocol, batch_size=5)
    scores = {line["key"]: line["likelihoods"][0] - line["likelihoods"][1] for line in lines(tmp_path)}
    kinds = [[scores[f"{i:03d}"] for i in range(12) if (i % 3 == 0) == directed] for directed in (True, False)]
    assert len(set(scores.values())) == 12  # the recording or the words are heard
    assert metrics["scores"]["eer"] == eer(*kinds) and metrics["scores"]["far_at_frr_10"] == far_at_frr(*kinds)
    assert (metrics["scores"]["num_command"], metrics["scores"]["num_dialogue"]) == (4, 8)
    prompt = lines(tmp_path)[0]["prompt"]
    assert ("<audio>" in prompt, "dim light 0" in prompt) == (task != "directed_text", task != "directed_audio")
    picture, page = (tmp_path / "det.svg").read_text(), (tmp_path / "index.html").read_text()
    ET.fromstring(picture)
    assert picture in page
    assert page.count('<audio controls preload="metadata" src="data:audio/wav') == 12 * (task != "directed_text")


def test_each_part_has_a_curve_where_recordings_are_missing(loaded: Loaded, spoken_to: str, tmp_path: Path) -> None:
    controls = Controls(missing={"audio": 0.5})
    metrics = evaluate(loaded, "directed_audio", spoken_to, tmp_path, SHORT, controls)
    parts = metrics["scores_by_presence"]
    assert set(parts) == {"missing", "present"} and parts["missing"]["scores"]["eer"] == 0.5  # nothing was heard
    names = [text for text in ET.fromstring((tmp_path / "det.svg").read_text()).itertext() if "equal error" in text]
    assert [name.partition(":")[0] for name in names] == ["all", "media missing", "media present"]
    files = {name: (tmp_path / name).read_bytes() for name in ("det.svg", "index.html", "predictions.jsonl")}
    evaluate(loaded, "directed_audio", spoken_to, tmp_path, SHORT, controls)
    assert files == {name: (tmp_path / name).read_bytes() for name in files}


def test_a_broken_recording_counts_and_one_side_has_no_rates(loaded: Loaded, tmp_path: Path) -> None:
    broken = Record("broken", speech(0, True).facts, (MediaRef("audio", tiny.tone(200, 0.4)[:20]),))
    where = shards(tmp_path / "shards", [speech(0, True), broken, Record("bare", {"text": "x"})], header_of=None)
    metrics = evaluate(loaded, "directed", where, tmp_path / "out", SHORT)
    assert metrics["num_questions"] == 3 and sum(one["count"] for one in metrics["not_answered"].values()) == 2
    assert metrics["scores"]["accuracy"] in (0.0, 1 / 3) and metrics["scores"]["num_command"] == 2
    assert metrics["scores"]["eer"] >= 0.5  # one of two commands, and a record of no known side
    alone = shards(tmp_path / "alone", [speech(0, True), speech(1, True)])
    one_side = evaluate(loaded, "directed", alone, tmp_path / "other", SHORT)
    assert one_side["scores"]["eer"] is None and one_side["not_finite"]["scores.eer"] == "nan"
    assert not (tmp_path / "other/det.svg").exists()


def test_the_command(spoken_to: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = f"infer.py evaluate configs/tiny.yaml --task directed_text --shards {spoken_to} --out {tmp_path}"
    monkeypatch.setattr("sys.argv", [*arguments.split(), "--protocol", "configs/protocols/directed.yaml"])
    assert infer.main() == 0
    printed = capsys.readouterr().out
    assert "eer" in printed and "far_at_frr_10_dialogue" in printed and (tmp_path / "det.svg").exists()


# ---- other tasks about sound ----------------------------------------------------------------------------------------


def test_captions_and_transcripts_of_recordings(loaded: Loaded, tmp_path: Path) -> None:
    records = [Record(f"{i}", {"captions": ["a low tone", "it hums"]}, (tone(200 + i),)) for i in range(3)]
    where = shards(tmp_path / "captions", records)
    protocol = load_protocol(tiny.ROOT / "configs/protocols/audio_caption.yaml", ["max_new_tokens=4"])
    metrics = evaluate(loaded, "caption", where, tmp_path / "out", protocol)
    assert lines(tmp_path / "out")[0]["prompt"] == "<audio>What can be heard here?"
    assert set(metrics["scores"]) == {"exact_match", "token_f1", "cider", "bleu_4", "rouge_l"}
    assert metrics["num_answered"] == 3 and "bleu_signature" in metrics

    where = shards(tmp_path / "words", [Record("a", {"text": "HELLO THERE"}, (tone(300),))])
    protocol = load_protocol(tiny.ROOT / "configs/protocols/transcribe.yaml", ["max_new_tokens=4"])
    metrics = evaluate(loaded, "transcribe", where, tmp_path / "said", protocol)
    assert set(metrics["scores"]) == {"word_error_rate", "character_error_rate", "exact_match"}


def test_spoken_questions_about_a_picture_and_replies(loaded: Loaded, tmp_path: Path) -> None:
    picture = MediaRef("image", tiny.picture("red", random.Random(0)))
    asked = {"question": {"media": 2}, "answers": ["red"], "more": [{"question": {"media": 1}, "answers": ["a disc"]}]}
    where = shards(tmp_path / "vqa", [Record("a", asked, (picture, tone(300), tone(900)))])
    metrics = evaluate(loaded, "vqa", where, tmp_path / "out", SHORT)
    assert metrics["num_answered"] == 2 and not metrics["not_answered"]
    prompts = [line["prompt"] for line in lines(tmp_path / "out")]
    assert prompts == ["<image><audio>Answer in a word or a short phrase."] * 2

    turns = [
        {"role": "user", "parts": [{"media": 0}, {"media": 1}]},
        {"role": "assistant", "parts": [{"text": "Red."}]},
    ]
    where = shards(tmp_path / "instruct", [Record("a", {"turns": turns}, (picture, tone(300)))])
    assert evaluate(loaded, "instruct", where, tmp_path / "turns", SHORT)["num_answered"] == 1

    talk = [
        {"media": 0, "text": "hello", "attributes": {"mood": "glad"}},
        {"text": "Hi.", "attributes": {"mood": "calm"}},
    ]
    where = shards(tmp_path / "spoken", [Record("a", {"turns": talk}, (tone(300),))])
    protocol = load_protocol(tiny.ROOT / "configs/protocols/spoken.yaml", ["max_new_tokens=4"])
    metrics = evaluate(loaded, "spoken_audio", where, tmp_path / "replies", protocol)
    assert metrics_of(tmp_path / "replies")["scores"]["heard_mood_accuracy"] == 0.0
    (line,) = lines(tmp_path / "replies")
    assert "<audio>" in line["prompt"] and "hello" not in line["prompt"]
    assert line["reference"] == "heard mood: glad\nreply mood: calm\nHi." and "bleu_4" in metrics["scores"]
    assert json.loads((tmp_path / "replies/run.json").read_text())["task"] == "spoken_audio"
