from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from data_prep.directed_check import check
from data_prep.directed_clips import ClipMaker
from data_prep.directed_config import CONFIG, SPLITS, DirectedConfig, load_directed
from data_prep.directed_page import page
from data_prep.directed_real import ANNOUNCEMENTS
from data_prep.directed_sentences import Line, Sentences, is_speakable, plain, split_sentences
from data_prep.directed_speech import make_split

COMMANDS = tuple(
    Line(text, "home-assistant-intents") for text in ("turn off the light", "stop the music", "lock the door")
)
DIALOGUE = tuple(Line(text, "chatterbot-corpus") for text in ("how are you", "i like green tea", "that is very kind"))
SENTENCES = Sentences(COMMANDS, DIALOGUE, ("anna", "ben"), ("{name} {command}",))


def changed(**parts: Any) -> DirectedConfig:
    """The configuration with some values of its sections replaced: acoustics={"noises": ...}."""
    values = yaml.safe_load(CONFIG.read_text())
    for name, part in parts.items():
        values[name] = values[name] | part if isinstance(part, dict) else part
    return DirectedConfig.model_validate(values)


def small(clips: int = 12) -> DirectedConfig:
    """A few clips by espeak-ng, which needs no file of its own, without babble."""
    return changed(
        clips=dict.fromkeys(SPLITS, clips),
        voices={"train": {"espeak.en-us+m1": [0.9, 1.0], "espeak.en+f2": [1.0]}},
        acoustics={"noises": {"quiet": 0.5, "fan": 0.5}},
    )


def test_the_configuration_says_what_is_wrong_with_it() -> None:
    config = load_directed()
    assert config.sha256 == load_directed().sha256 != small().sha256
    with pytest.raises(ValueError, match=r"add up to 1\.1; wanted 1"):
        changed(sentences={"literal": config.sentences.literal + 0.1})
    with pytest.raises(ValueError, match=r"flite\.slt is in several splits"):
        changed(voices={"train": {"flite.slt": [1.0]}})
    with pytest.raises(ValueError, match="noises are shares of quiet"):
        changed(acoustics={"noises": {"drill": 1.0}})


def test_plain_texts_show_no_class_by_their_spelling() -> None:
    assert plain("Set it to 50%, please!") == "set it to fifty percent please"
    assert plain("'Don\u2019t' -- he said...") == "don't he said"
    assert plain("21.5° in the living-room") == "twenty one point five degrees in the living room"
    assert is_speakable("turn on the tv", 20) and not is_speakable("hm hm", 20) and not is_speakable("turn", 20)
    assert all(text == plain(text) for text in ANNOUNCEMENTS.values())


def test_sentences_of_splits_share_neither_texts_nor_templates() -> None:
    from home_assistant_intents import get_intents

    config = changed(sentences={"commands": {"train": 120, "val": 20, "test": 40}})
    lines = [(f"talk/{number // 3}", Line(f"line {plain(str(number))} is said", "made")) for number in range(300)]
    found = split_sentences(config, get_intents("en"), [*lines, ("other", lines[0][1])])
    assert {split: len(one.commands) for split, one in found.items()} == {"train": 120, "val": 20, "test": 40}
    texts = [line.text for one in found.values() for line in (*one.commands, *one.dialogue)]
    assert len(texts) == len(set(texts)) and all(is_speakable(text, config.sentences.max_characters) for text in texts)
    groups: dict[str, set[str]] = {}
    for group, line in lines:
        groups.setdefault(group, set()).update(split for split in SPLITS if line in found[split].dialogue)
    assert {len(splits) for splits in groups.values()} == {1}
    again = split_sentences(config, get_intents("en"), lines)
    assert again["test"].commands == found["test"].commands
    addressed = found["test"].addressed("stop", np.random.default_rng(0))
    assert "stop" in addressed and any(name in addressed.split() for name in config.words.names["test"])


def test_the_plan_has_the_shares_of_the_configuration() -> None:
    config = changed(clips=dict.fromkeys(SPLITS, 1000))
    rules = config.sentences
    counts = Counter((said.manner, said.words) for said in ClipMaker(config, "train", SENTENCES, Path()).plan)
    assert counts["directed", "dialogue"] == round(500 * rules.chat)
    assert counts["directed", "command"] == 500 - round(500 * rules.chat)
    assert counts["to_person", "command"] == round(500 * rules.literal)
    assert counts["to_person", "addressed"] == round(500 * rules.addressed)
    assert counts["background", "command"] == pytest.approx(500 * rules.background * rules.background_commands, abs=1)
    assert sum(counts.values()) == 1000


def test_a_clip_follows_from_its_number_alone(tmp_path: Path) -> None:
    first, second = (ClipMaker(small(), "train", SENTENCES, tmp_path) for _ in range(2))
    made = {index: first.clip(index) for index in (3, 0, 5)}
    for index in (0, 3, 5):
        samples, facts = second.clip(index)
        assert np.array_equal(samples, made[index][0]) and facts == made[index][1]
        assert samples.dtype == np.int16 and 1.0 <= len(samples) / 16000 <= 4.0
        assert facts["seconds"] == pytest.approx(len(samples) / 16000, abs=1e-3)
        assert facts["directed"] == (facts["kind"] == "command") and facts["speaker"].startswith("espeak.")
        assert facts["room"].startswith("train-") and facts["text"] == plain(facts["text"])
        level = 10 * np.log10(np.mean(np.square(samples / 32768.0)))
        assert level < facts["level_dbfs"] + 3 and np.abs(samples).max() > 50


def test_a_stopped_run_continues_to_the_same_split(tmp_path: Path) -> None:
    whole = ClipMaker(small(6), "train", SENTENCES, tmp_path / "whole" / "train", chunk=2)
    summary = make_split(whole, 2)
    assert summary["clips"] == 6 and summary["directed"] == 3

    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    cut = ClipMaker(small(6), "train", SENTENCES, tmp_path / "cut" / "train", chunk=2)
    cut.chunk_file(2).unlink()
    (cut.folder / "audio/000003.flac").unlink()
    kept = (cut.folder / "audio/000000.flac").stat().st_mtime_ns
    assert make_split(cut, 1) == summary
    assert (cut.folder / "audio/000000.flac").stat().st_mtime_ns == kept
    samples, rate_hz = soundfile.read(cut.folder / "audio/000003.flac", dtype="int16")
    assert rate_hz == 16000 and np.array_equal(samples, whole.clip(3)[0])


def corpus(folder: Path, has_text_cue: bool, has_sound_cue: bool) -> Path:
    """Clips of noise whose level and whose words tell the class, or do not."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 120), ("val", 40), ("test", 60), ("real", 10)):
        (folder / split / "audio").mkdir(parents=True)
        rows = []
        for number in range(count):
            directed = bool(number % 2)
            says_command = directed if has_text_cue else bool(rng.random() < 0.5)
            text = " ".join(rng.choice(["stop", "open", "close"] if says_command else ["tea", "green", "nice"], 3))
            level = 0.1 if directed and has_sound_cue else 0.02
            name = f"audio/{number:06d}.flac"
            soundfile.write(folder / split / name, level * rng.standard_normal(16000).clip(-4, 4), 16000)
            kind, words = ("command", "command") if directed else ("to_person", "command")
            row = {"id": f"{split}-{number}", "audio": name, "text": text, "directed": directed, "kind": kind}
            rows.append(row | {"words": words, "speaker": "a", "source": "made", "licence": "none"})
        (folder / split / "directed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(("has_text_cue", "has_sound_cue"), [(True, False), (False, True)])
def test_the_check_finds_the_cue_that_is_there(tmp_path: Path, has_text_cue: bool, has_sound_cue: bool) -> None:
    found = check(corpus(tmp_path, has_text_cue, has_sound_cue))["test"]
    for cue, is_there in (("text", has_text_cue), ("sound", has_sound_cue), ("both", True)):
        assert found[cue] < 0.1 if is_there else 0.3 < found[cue] < 0.7, (cue, found)


def test_the_page_escapes_what_is_said_and_leaves_out_what_may_not_be_passed_on(tmp_path: Path) -> None:
    folder = corpus(tmp_path, True, True)
    rows = [json.loads(line) for line in (folder / "test/directed.jsonl").read_text().splitlines()]
    rows[1]["text"], rows[3]["source"], rows[3]["text"] = "<script>x</script>", "fillets-ng", "a line of the game"
    (folder / "test/directed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = {split: {"clips": 1, "directed": 1} for split in (*SPLITS, "real")}
    (folder / "manifest.json").write_text(json.dumps({"splits": splits}))
    made = page(folder, load_directed())
    assert "&lt;script&gt;x" in made and "<script>x" not in made and "a line of the game" not in made
    assert made.count("<audio") >= 10 and made.count("data:image/png") == made.count("<audio")
