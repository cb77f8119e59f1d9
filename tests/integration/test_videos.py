"""Videos from public files to scores: missing ones are counted, sound is heard beside them, tubes are asked for."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from data_prep import make_shards
from mmchat.config import SourceConfig
from mmchat.conversation import Conversation, Record, StoredBytes
from mmchat.data.lanes import SampleId
from mmchat.data.mixture import Mixture
from mmchat.data.pack import load_media
from mmchat.inference.evaluate import evaluate
from mmchat.inference.load import load
from mmchat.tasks import TASKS
from mmchat.tasks.question import Protocol
from tests import models, tiny
from tests.evaluations import SHORT, lines, say
from tests.sources.fixtures_videos import TUBE, tracks, video_instruct_with_sound


def _shards(folder: Path, task: str, *options: str, split: str = "train") -> str:
    out = str(folder / "shards")
    assert make_shards.main([task, str(folder / "source"), out, "--split", split, "--workers", "1", *options]) == 0
    return out


def _records(task: str, shards: str) -> list[Record]:
    mixture = Mixture([SourceConfig(name="only", task=task, shards=shards)])
    return [mixture.record(SampleId("only", 0, i)) for i in range(mixture.sources[0].num_samples)]


def test_questions_about_missing_and_broken_videos_stay_in_the_denominator(tiny_folder, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "v_here.mp4").write_bytes(tiny.clip("left"))
    rows = [("here", 0), ("here", 3), ("gone", 0)]
    asked = [{"video_name": name, "question": "what", "question_id": f"{name}_{i}"} for i, (name, _) in enumerate(rows)]
    answers = [
        {"answer": "left", "type": kind, "question_id": one["question_id"]}
        for one, (_, kind) in zip(asked, rows, strict=True)
    ]
    (source / "test_q.json").write_text(json.dumps(asked))
    (source / "test_a.json").write_text(json.dumps(answers))
    shards, out = _shards(tmp_path, "video_qa", split="test"), tmp_path / "out"
    loaded = load("configs/tiny.yaml")
    metrics = evaluate(loaded, "video_qa", shards, out, SHORT)
    assert metrics["num_questions"] == 3 and metrics["not_answered"] == {
        "missing video": {"count": 1, "keys": ["gone_2"]}
    }
    say(out, {"here_0": "Left.", "gone_2": "left", "here_1": "right"})
    assert evaluate(loaded, "video_qa", shards, out, SHORT)["scores"] == {
        "accuracy": pytest.approx(1 / 3), "token_f1": pytest.approx(1 / 3), "accuracy_motion": 0.5,
        "accuracy_yes_no": 0.0, "accuracy_free": 0.0,
    }  # fmt: skip


def test_the_sound_of_a_video_is_read_from_the_same_file(tiny_folder, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    made = video_instruct_with_sound(tmp_path / "source")
    shards = _shards(tmp_path, "instruct", *made.options)
    with tarfile.open(next(Path(shards).glob("*.tar"))) as tar:
        names = tar.getnames()
    assert names == ["00000000.0.mp4", "00000000.json", "00000001.0.mp4", "00000001.json"]  # each clip once
    sounding, silent = _records("instruct", shards)
    video, audio = sounding.media
    assert isinstance(video.data, StoredBytes) and isinstance(audio.data, StoredBytes)
    assert (video.modality, audio.modality) == ("video", "audio") and video.data.offset == audio.data.offset
    assert audio.header is not None and audio.header.sample_rate_hz == 16_000 and audio.header.width is None
    assert video.header is not None and video.header.width == 64
    # A clip without a sound track has an absent sound.
    assert silent.media[0].data is not None and silent.media[1].data is None

    _, template = models.build(models.config())
    sample = template.render(TASKS["instruct"].conversation(sounding, Protocol().rng("")))
    assert [item.modality for item in sample.media] == ["video", "audio"] and sample.gates[0].tolist() == [0, 1, 1]
    frames, mel = load_media(sample, template)
    assert frames.shape[0] == 4 and mel.shape[0] == 1
    preprocess, tone = template.preprocesses["audio"], tiny.tone(440.0, 1.0)
    wanted = preprocess(tone, preprocess.plan(preprocess.header(tone)))
    assert mel[0, :, 10:80].mean(-1).argmax() == wanted[0, :, 10:80].mean(-1).argmax()
    alone = template.render(TASKS["instruct"].conversation(silent, Protocol().rng("")))
    assert [item.modality for item in alone.media] == ["video"]


def test_tubes_are_asked_for_and_scored(tiny_folder, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    made = tracks(tmp_path / "source")
    shards, out = _shards(tmp_path, "track", *made.options), tmp_path / "out"
    loaded = load("configs/tiny.yaml")
    evaluate(loaded, "track", shards, out, SHORT)
    keys = [line["key"] for line in lines(out)]
    assert len(keys) == 3 and [len(line["reference_regions"]) for line in lines(out)] == [1, 0, 1]
    # What the template writes for the right answer is read back as it: nearly all of the tube, and the interval.
    right = TASKS["track"].conversation(_records("track", shards)[0], Protocol().rng("")).turns
    text = loaded.template.tokenizer.decode(loaded.template.render(Conversation(right)).token_ids)
    said = text.partition("assistant\n")[2].partition("<|im_end|>")[0]
    assert said.startswith("{0.0s[") and said.count("[") == len(TUBE)
    found = loaded.template.read_regions(said, Conversation(right[:1]))
    answer = [{"media": 0, "tube": [list(box) for box in region.tube or ()]} for region in found.regions]
    first, *others = lines(out)
    changed = [first | {"answer": said, "regions": answer, "num_failed": 0}, *others]
    (out / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    say(out, {keys[1]: "@0.5s-1.0s"})
    scores = evaluate(loaded, "track", shards, out, SHORT)["scores"]
    assert 0.9 / 2 < scores["mean_viou"] <= scores["mean_tiou"] <= 1 / 2 and scores["viou_0.5"] == 1 / 2
    assert scores["mean_interval_iou"] == 1 and scores["parse_failures"] == pytest.approx(1 / 3)
