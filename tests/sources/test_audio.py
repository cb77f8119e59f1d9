"""LibriSpeech, Speech Commands, SLURP, AudioCaps and Clotho."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mmchat.conversation import Record
from mmchat.sources import read_source
from mmchat.sources.files import Files
from mmchat.tasks import TASKS
from mmchat.tasks.question import Answer, Protocol
from tests.sources.fixtures_audio import FIXTURES
from tests.sources.made import records_of


def test_librispeech(tmp_path: Path) -> None:
    good, bad = records_of(FIXTURES["librispeech"](tmp_path), "librispeech")
    assert good[0].facts == {"text": "THE TONE'S NUMBER ZERO", "speaker": "174", "chapter": "50561"}
    assert [record.key for record in good][:2] == ["174-50561-0000", "174-50561-0001"]
    assert bad == {"missing media": 1}  # the cut recording shows when its header is read
    asked = TASKS["transcribe"].conversation(good[0], random.Random(0))
    assert asked.turns[1].parts == ("the tone's number zero",)


def test_librispeech_names_the_subset(tmp_path: Path) -> None:
    FIXTURES["librispeech"](tmp_path)
    with pytest.raises(ValueError, match="--split names the subset"):
        list(read_source("librispeech", Files(tmp_path), "train"))


def test_speech_commands_splits_are_disjoint_in_speakers(tmp_path: Path) -> None:
    fixture = FIXTURES["speech_commands"](tmp_path)
    speakers = {}
    for split in ("train", "val", "test"):
        files = Files(fixture.source, work=tmp_path / "work")
        found = list(read_source("speech_commands", files, split))
        speakers[split] = {one.facts["speaker"] for one in found if isinstance(one, Record)}
        assert all(one.facts["text"] in ("yes", "no", "go") for one in found if isinstance(one, Record))
    assert speakers == {"train": {"0a7c2a8d", "1b4c9b89"}, "val": {"ffa1b2c3"}, "test": {"004ae714"}}
    with pytest.raises(ValueError, match="has the splits train, validation and testing, not dev"):
        list(read_source("speech_commands", Files(fixture.source, work=tmp_path / "work"), "dev"))


def test_a_compressed_tar_needs_room_for_its_copy(tmp_path: Path) -> None:
    fixture = FIXTURES["speech_commands"](tmp_path)
    with pytest.raises(ValueError, match="decompress it first"):
        Files(fixture.source).find("*")


@pytest.mark.parametrize(("microphone", "count"), [("any", 3), ("headset", 1), ("distant", 2)])
def test_slurp(tmp_path: Path, microphone: str, count: int) -> None:
    FIXTURES["slurp"](tmp_path)
    files = Files(tmp_path, [tmp_path / "slurp_real.tar.gz"], tmp_path / "work")
    found = list(read_source("slurp", files, "dev", {"microphone": microphone}))
    good = [one for one in found if isinstance(one, Record)]
    assert len(good) == count
    assert good[0].facts["intent"] == "audio_volume_up" and good[0].key.startswith("13804/audio-1501754435")
    with pytest.raises(ValueError, match="no option mic;"):
        read_source("slurp", files, "dev", {"mic": "any"})


def test_audiocaps_joins_the_captions_of_a_clip(tmp_path: Path) -> None:
    good, bad = records_of(FIXTURES["audiocaps"](tmp_path), "audiocaps")
    assert good[0].facts["captions"] == ['Rustling, then "quacking"', "Ducks quack"]
    assert [record.key for record in good] == ["97151", "103541", "103548"]
    assert bad == {"missing media": 1, "unreadable row": 1}


def test_clotho(tmp_path: Path) -> None:
    good, bad = records_of(FIXTURES["clotho"](tmp_path), "clotho")
    assert good[0].facts["captions"] == ["One 0", "Two", "Three", "Four, and more", "Five"]
    assert good[2].facts["file_name"] == "Tür.wav" and bad == {"unreadable row": 1}


def test_the_word_error_rate_counts_words_of_all_records() -> None:
    records = [Record("a", {"text": "ONE TWO THREE"}), Record("b", {"text": "It's four."})]
    questions = [question for record in records for question in TASKS["transcribe"].questions(record, Protocol())]
    answers = [Answer("one too three!"), Answer("it\u2019s four")]
    scores = TASKS["transcribe"].score(answers, questions, Protocol())
    wanted = {"word_error_rate": 1 / 5, "character_error_rate": 1 / 22, "exact_match": 0.5}
    assert scores == pytest.approx(wanted)


def test_a_quote_that_is_never_closed_is_counted(tmp_path: Path) -> None:
    fixture = FIXTURES["audiocaps"](tmp_path)
    before, _ = records_of(fixture, "audiocaps")
    with open(tmp_path / f"{fixture.split}.csv", "a") as file:
        file.write('9,x,0,"' + "long " * 40_000 + "\n")
    found = list(read_source("audiocaps", Files(tmp_path), fixture.split))
    assert [one for one in found if isinstance(one, Record)] == before
    assert any("field larger than field limit" in str(one) for one in found)


def test_a_table_in_latin1_is_named(tmp_path: Path) -> None:
    FIXTURES["clotho"](tmp_path)
    table = tmp_path / "clotho_captions_evaluation.csv"
    table.write_bytes(table.read_text("utf-8").encode("latin-1"))
    with pytest.raises(ValueError, match=r"clotho_captions_evaluation.csv in .* is not in UTF-8"):
        list(read_source("clotho", Files(tmp_path), "test"))
