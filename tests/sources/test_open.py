"""Stamps, their speech and scenes; Fish Fillets, clips, PocketSphinx's recordings and ChatterBot's corpus."""

from __future__ import annotations

import io
import random
import wave
from pathlib import Path

import pytest

from mmchat.conversation import Record, Region
from mmchat.errors import SampleError
from mmchat.sources import read_source
from mmchat.sources.files import Files
from mmchat.tasks import TASKS
from tests.sources.fixtures_open import FIXTURES
from tests.sources.made import records_of


def read(name: str, source: Path, split: str = "train", **options: str) -> list[Record]:
    return [one for one in read_source(name, Files(source), split, options) if isinstance(one, Record)]


@pytest.mark.parametrize("name", FIXTURES)
def test_what_is_written_and_skipped(tmp_path: Path, name: str) -> None:
    fixture = FIXTURES[name](tmp_path)
    good, bad = records_of(fixture, name)
    assert len(good) == len({record.key for record in good}) == fixture.num_samples
    assert bad == fixture.skipped


def test_stamps_keep_all_languages(tmp_path: Path) -> None:
    FIXTURES["stamps"](tmp_path)
    found = {record.key: record.facts for record in read("stamps", tmp_path)}
    assert found["food/fruit/blue_dot"] == {
        "captions": ["A blue dot."],
        "language": "en",
        "category": "food/fruit",
        "translations": {"en": "A blue dot.", "fr": "Un point bleu.", "zh_CN": "蓝点"},  # Lithuanian is left empty
    }
    assert found["symbols/money/yen_v2"]["translations"]["ca@valencia"] == "1 ien."


def test_stamps_in_another_language(tmp_path: Path) -> None:
    FIXTURES["stamps"](tmp_path)
    found = list(read_source("stamps", Files(tmp_path), "train", {"language": "fr"}))
    good = [record for record in found if isinstance(record, Record)]
    assert [record.facts["captions"] for record in good] == [
        ["Un point vert dessiné."],
        ["Un point vert."],
        ["Un point bleu."],
    ]
    reasons = [error.reason for error in found if isinstance(error, SampleError)]
    assert reasons == ["picture is SVG", "no caption in this language", "no caption in this language"]


def test_stamps_of_one_name_are_in_one_split(tmp_path: Path) -> None:
    FIXTURES["stamps"](tmp_path)
    assert [record.key for record in read("stamps", tmp_path, "test")] == ["plants/square"]
    assert [record.key for record in read("stamps", tmp_path, "test", language="fr")] == ["plants/square"]
    with pytest.raises(ValueError, match="there are the splits train and test, not val"):
        read("stamps", tmp_path, "val")


def test_stamp_speech_has_the_text_of_its_language(tmp_path: Path) -> None:
    FIXTURES["stamp_speech"](tmp_path)
    spoken = {record.key: record.facts for record in read("stamp_speech", tmp_path)}
    assert spoken["animals/birds/green_dot/el"]["text"] == "Κουκκίδα."
    # These speakers leave the article out.
    assert spoken["animals/birds/green_dot/pt_BR"]["text"] == "Ponto."
    assert spoken["animals/birds/green_dot/en"] == {
        "text": "Green dot.",
        "language": "en",
        "translations": {"en": "A green dot."},
    }
    french = read("stamp_speech", tmp_path, language="fr")
    assert [record.facts["text"] for record in french] == ["Un point vert.", "Un point bleu."]


def test_a_scene_is_to_find_and_to_spot(tmp_path: Path) -> None:
    FIXTURES["scenes"](tmp_path)
    found = read("scenes", tmp_path)
    assert found[1].facts["expressions"] == ["dot"] and found[1].facts["boxes"] == [[1, 1, 9, 9]]
    assert [one["expressions"] for one in found[1].facts["more"]] == [["red dot"], ["ring"]]
    answer = TASKS["spot"].conversation(found[1], random.Random(0)).turns[1].parts
    regions = [part.box for part in answer if isinstance(part, Region)]
    assert [part for part in answer if isinstance(part, str)] == ["A red dot ", ", a dot ", ", a ring ", "."]
    assert regions == [(12, 3, 20, 21), (1, 1, 9, 9), (30, 2, 40, 9)]
    asked = TASKS["rec"].conversation(found[2], random.Random(0))
    assert [part.box for part in asked.turns[1].parts if isinstance(part, Region)] == [(1, 1, 9, 9), (20, 1, 29, 9)]


def test_fillets(tmp_path: Path) -> None:
    good, _ = records_of(FIXTURES["fillets"](tmp_path), "fillets")
    facts = {record.key: record.facts for record in good}
    assert facts["cs/reef/reef-v-2"] == {
        "text": 'Podívej se do "TEMP".',
        "speaker": "big",
        "language": "cs",
        "level": "reef",
        "translations": {"en": "Look at C:\\TEMP."},
    }
    assert facts["cs/share/borejokes/nuda-1"]["level"] == "share/borejokes"


def test_fillets_holds_out_levels(tmp_path: Path) -> None:
    """viking1 and viking2 are parts of one story, which the hash of "viking" puts in the test split."""
    for level in ("reef", "viking1", "viking2"):
        (tmp_path / "script" / level).mkdir(parents=True)
        (tmp_path / "sound" / level / "nl").mkdir(parents=True)
        line = f'dialogId("{level}-1", "font_big", "Yes.")\ndialogStr("Ja.")\n'
        (tmp_path / "script" / level / "dialogs_nl.lua").write_text(line)
        (tmp_path / "sound" / level / "nl" / f"{level}-1.ogg").write_bytes(b"")
    assert [record.facts["level"] for record in read("fillets", tmp_path, language="nl")] == ["reef"]
    assert len(read("fillets", tmp_path, "test", language="nl")) == 2


def test_fillets_refuses_what_nobody_speaks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="speech in cs and nl, not in en"):
        read("fillets", tmp_path, language="en")
    with pytest.raises(ValueError, match=r"has no script/LEVEL/dialogs_cs.lua"):
        read("fillets", tmp_path)


def test_clips_with_sound(tmp_path: Path) -> None:
    FIXTURES["clips"](tmp_path)
    media = {record.key: record.media for record in read("clips", tmp_path / "data", sound="yes")}
    assert [item.modality for item in media["bigbuckbunny"]] == ["video", "audio"]
    assert [item.modality for item in media["bikes"]] == ["video"]
    with pytest.raises(ValueError, match="sound is yes or no, not on"):
        read("clips", tmp_path / "data", sound="on")


def test_raw_samples_get_a_header(tmp_path: Path) -> None:
    FIXTURES["pocketsphinx"](tmp_path)
    raw = next(record for record in read("pocketsphinx", tmp_path) if record.key == "goforward")
    assert raw.facts == {"text": "go forward ten meters", "language": "en"}
    with wave.open(io.BytesIO(raw.media[0].read())) as opened:
        assert (opened.getframerate(), opened.getnchannels(), opened.getsampwidth()) == (16000, 1, 2)
        assert opened.readframes(opened.getnframes()) == (tmp_path / "goforward.raw").read_bytes()


def test_a_line_that_is_no_transcript_is_counted(tmp_path: Path) -> None:
    FIXTURES["pocketsphinx"](tmp_path)
    with open(tmp_path / "cards/cards.transcription", "a") as file:
        file.write("\nten of clubs (003)\n")
    errors = [one for one in read_source("pocketsphinx", Files(tmp_path), "test") if isinstance(one, SampleError)]
    assert [error.reason for error in errors] == ["unreadable row", "missing media"]
    assert "cards.transcription line 4: wanted <s> TEXT </s> (ID)" in errors[0].detail


def test_chatterbot_takes_turns(tmp_path: Path) -> None:
    FIXTURES["chatterbot"](tmp_path)
    found = {record.key: record.facts for record in read("chatterbot", tmp_path)}
    assert found["english/conversations/00001"] == {
        "turns": [
            {"role": "user", "parts": [{"text": "What is round?"}]},
            {"role": "assistant", "parts": [{"text": "A small dot."}]},
            {"role": "user", "parts": [{"text": "Thank you."}]},
        ],
        "categories": ["conversations"],
        "language": "english",
    }
    # Both answers to a question are in one split, and in no other.
    assert [record.key for record in read("chatterbot", tmp_path, "test")] == ["english/conversations/00003"]
    assert [record.key for record in read("chatterbot", tmp_path, language="french")] == ["french/conversations/00000"]


def test_chatterbot_names_its_languages_and_counts_broken_files(tmp_path: Path) -> None:
    FIXTURES["chatterbot"](tmp_path)
    with pytest.raises(ValueError, match=r"no klingon/\*.yml; its languages are english, french"):
        read("chatterbot", tmp_path, language="klingon")
    (tmp_path / "french/ai.yml").write_text("categories: [")
    (tmp_path / "french/food.yml").write_text("just text")
    (tmp_path / "french/facts.yml").write_text("conversations:\n- - Oui ou non ?\n  - yes\n- - 1\n  - deux\n")
    errors = list(read_source("chatterbot", Files(tmp_path), "train", {"language": "french"}))
    reasons = [error.reason for error in errors if isinstance(error, SampleError)]
    assert reasons == ["unreadable file", "unreadable row", "unreadable row", "unreadable file"]
