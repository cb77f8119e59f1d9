"""Names, questions and commands said aloud: what is recorded is what the rows say, by voices of one split alone."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import soundfile
from PIL import Image, ImageDraw

from data_prep import referential_scenes
from data_prep.directed_config import SPLITS
from data_prep.referential_scenes import Materials
from data_prep.spoken_stamps import Counts, Utterance, _voice, _voices, make_plan, record, stamp_names
from data_prep.stamp_scenes import CutOut
from data_prep.voices import Voice
from mmchat.conversation import Record, Region
from mmchat.sources import read_source
from mmchat.sources.files import Files
from mmchat.tasks import TASKS
from mmchat.tasks.question import Protocol

NAMES = ["A moon wrasse", "An okapi"]
COUNTS = Counts(names=3, captions=2, asked=2, commanded=2, each=2)
VOICES = {split: _voices(split, ["espeak"]) for split in SPLITS}


def cut_out(label: str, colour: tuple[int, int, int]) -> CutOut:
    picture = Image.new("RGBA", (60, 50))
    ImageDraw.Draw(picture).ellipse((5, 5, 54, 44), fill=(*colour, 255))
    return CutOut(label, "an" if label[0] in "aeiou" else "a", picture, f"test {label}")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    colours = {"apple": (255, 0, 0), "drum": (0, 0, 0), "key": (0, 255, 0), "saw": (0, 0, 255)}
    things = tuple(cut_out(*one) for one in colours.items())
    grey = Image.new("RGB", (300, 300), (128, 128, 128))
    materials = Materials(things, (grey,), (*colours, "axe", "bell"))
    out = tmp_path_factory.mktemp("scenes")
    for split in ("train", "test"):
        referential_scenes.compose(materials, out, split, 30, 0)
    return out


@pytest.fixture(scope="module")
def made(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("spoken")
    record(make_plan(scenes, NAMES, "train", COUNTS, 0), out, "train", VOICES, 0)
    return out


def test_transcripts_are_those_of_the_recordings(made: Path, scenes: Path) -> None:
    plan = make_plan(scenes, NAMES, "train", COUNTS, 0)
    records = [one for one in read_source("librispeech", Files(made), "train") if isinstance(one, Record)]
    assert sorted(one.facts["text"] for one in records) == sorted(one.text for one in plan.utterances)
    speakers = dict(line.split(" ", 1) for line in (made / "train/speakers.txt").read_text().splitlines())
    for one in records:
        samples, rate = soundfile.read(io.BytesIO(one.media[0].read()))
        assert rate == 16_000 and samples.ndim == 1 and 0.3 < len(samples) / rate <= 3.0
        assert speakers[one.facts["speaker"]] in {voice.name for voice in VOICES["train"]}


def test_a_command_is_answered_with_the_box_of_what_it_names(made: Path, scenes: Path) -> None:
    plan = make_plan(scenes, NAMES, "train", COUNTS, 0)
    rows = {row["image"]: row for row in _rows(scenes, "train")}
    words = {number: one.text for one, number in plan.utterances.items()}
    for row in plan.commanded:
        targets = rows[row["media"][0]["path"]]["targets"]
        for item, turn in zip(row["media"][1:], row["turns"][1::2], strict=True):
            (part,) = turn["parts"]
            assert words[item["path"]] == item["text"]
            assert any(
                expression in item["text"] and target["boxes"] == [part["region"]["box"]]
                for target in targets
                for expression in target["expressions"]
            )
    found = list(read_source("chat", Files(made, [scenes]), "train"))
    assert len(found) == 2
    for one in found:
        assert isinstance(one, Record) and one.media[0].modality == "image"
        assert {item.modality for item in one.media[1:]} == {"audio"} and all(item.read() for item in one.media)
        (question,) = TASKS["instruct"].questions(one, Protocol())
        assert not question.problem and isinstance(question.reference[0], Region)


def test_spoken_questions_have_the_answers_of_their_pictures(made: Path, scenes: Path) -> None:
    rows = {row["image"]: row for row in _rows(scenes, "train")}
    plan = make_plan(scenes, NAMES, "train", COUNTS, 0)
    found = list(read_source("spoken_question", Files(made, [scenes]), "train"))
    for one, row in zip(found, plan.asked, strict=True):
        assert isinstance(one, Record)
        answers = {asked["question"]: asked["answers"] for asked in rows[row["image"]]["questions"]}
        for facts in [one.facts, *one.facts["more"]]:
            assert facts["answers"] == answers[facts["question"]["text"]]
            assert one.media[facts["question"]["media"]].modality == "audio"
        assert len(TASKS["vqa"].questions(one, Protocol())) == 2


def _rows(scenes: Path, split: str) -> list[dict]:
    from data_prep.spoken_stamps import _scenes

    return _scenes(scenes, "train" if split == "train" else "test")


def test_splits_share_neither_voices_nor_pictures(scenes: Path) -> None:
    names = [{(voice.engine, voice.base) for voice in VOICES[split]} for split in SPLITS]
    assert not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]
    one = Counts(names=2, captions=1, asked=1, commanded=1, each=1)
    shown = []
    for split in SPLITS:
        plan = make_plan(scenes, NAMES, split, one, 0)
        shown.append({row["image"] for row in plan.asked} | {row["media"][0]["path"] for row in plan.commanded})
    assert not shown[0] & shown[1] and not shown[0] & shown[2] and not shown[1] & shown[2]
    with pytest.raises(ValueError, match="make more scenes"):
        make_plan(scenes, NAMES, "val", Counts(names=1, captions=1, asked=9, commanded=1, each=1), 0)


def test_who_speaks_says_nothing_about_what_is_said() -> None:
    said = ["A drum.", "An apple.", "Is there a drum?", "Where is the apple?"]
    heard: dict[str, set[Voice]] = {}
    for text in said:
        heard[text] = {_voice(VOICES["train"], Utterance(text, take, 0), "train", 0) for take in range(60)}
    assert all(voices == set(VOICES["train"]) for voices in heard.values())


def test_what_is_made_is_kept(made: Path, scenes: Path) -> None:
    before = (made / "train/source.json").stat().st_mtime_ns
    record(make_plan(scenes, NAMES, "train", COUNTS, 0), made, "train", VOICES, 0)
    assert (made / "train/source.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="words_crc32"):
        record(make_plan(scenes, ["A gnu"], "train", COUNTS, 0), made, "train", VOICES, 0)


def test_names_of_stamps(tmp_path: Path) -> None:
    for name, text in (("a.txt", "A moon wrasse.\nfr.utf8=..."), ("b.txt", "An okapi"), ("c.txt", "Three pigs.")):
        (tmp_path / name).write_text(text)
    assert stamp_names(tmp_path) == NAMES
