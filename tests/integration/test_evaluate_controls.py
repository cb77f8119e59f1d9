"""Controls of an evaluation: what they change in the media, and that they change nothing else."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from data_prep.make_shards import media_header
from mmchat.config import ConfigError, SourceConfig, parse
from mmchat.conversation import MediaHeader, MediaRef, Record, StoredBytes
from mmchat.data.mixture import Mixture
from mmchat.data.pack import load_media
from mmchat.inference.controls import GREY, ControlledRecords, Controls, parse_missing
from mmchat.inference.evaluate import evaluate
from mmchat.inference.load import Loaded
from mmchat.modalities.image import upright
from mmchat.tasks import TASKS
from mmchat.tasks.question import Protocol
from tests.evaluations import SHARD, SHORT, awake, lines, shards


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> Loaded:
    return awake()


def controlled(loaded: Loaded, controls: Controls, shards: str = ".cache/tiny/shards") -> list[Record]:
    mixture = Mixture([SourceConfig(name="evaluate", task="instruct", shards=shards)])
    records = ControlledRecords(mixture, loaded.template, mixture.sources[0].num_samples, controls)
    return [records.record(i) for i in range(records.total)]


def test_swap_gives_every_record_the_pictures_of_another(loaded: Loaded) -> None:
    before, after = controlled(loaded, Controls()), controlled(loaded, Controls(swap=("image",)))
    places = {tuple(item.data for item in record.media): record.key for record in before if record.media}
    givers = []
    for record, swapped in zip(before, after, strict=True):
        if record.media and record.media[0].modality == "image":
            givers.append(places[tuple(item.data for item in swapped.media)])
            assert givers[-1] != record.key and len(record.media) == len(swapped.media)
        else:
            assert swapped == record
    assert len(set(givers)) == len(givers) == 24  # each is given once
    assert after == controlled(loaded, Controls(swap=("image",)))
    assert after != controlled(loaded, Controls(swap=("image",), seed=1))


COLOURS = {(320, 240): (200, 30, 30), (90, 160): (30, 200, 30), (64, 64): (30, 30, 200)}


def sized(key: str, size: tuple[int, int], turned: bool = False) -> Record:
    """A box in the middle of a plain picture whose colour says how large it was; `turned` is stored on its side."""
    width, height = size
    exif, out = Image.Exif(), io.BytesIO()
    if turned:
        exif[0x0112] = 6
    Image.new("RGB", (height, width) if turned else size, COLOURS[size]).save(out, "PNG", exif=exif.tobytes())
    box = [width // 4, height // 4, width * 3 // 4, height * 3 // 4]
    return Record(key, {"expressions": ["the disc"], "boxes": [box]}, (MediaRef("image", out.getvalue()),))


@pytest.mark.parametrize("header_of", [media_header, None])
def test_swapped_pictures_come_in_the_size_of_the_own_ones(loaded: Loaded, tmp_path: Path, header_of: Any) -> None:
    """So every place can be asked, and what is told by a size is told by the own one."""
    records = [sized(f"{i}", list(COLOURS)[i % 3], turned=i % 2 == 1) for i in range(24)]
    names = shards(tmp_path, records, header_of)
    mixture = Mixture([SourceConfig(name="evaluate", task="reg", shards=names)])
    found = ControlledRecords(mixture, loaded.template, 24, Controls(swap=("image",)))
    others = num_same_size = 0
    for i, own in enumerate(records):
        record = found.record(i)
        (item,), size = record.media, list(COLOURS)[i % 3]
        image = upright(item.read())
        assert image.size == size and record.facts == own.facts
        ((_, colour),) = image.getcolors()
        others += colour != COLOURS[size]
        num_same_size += colour == COLOURS[size]
        for task in ("reg", "rec"):
            (question,) = TASKS[task].questions(record, Protocol())
            assert not question.problem
            sample = loaded.template.render(question.conversation, "k", answer=True)
            load_media(sample, loaded.template)
        (region,) = loaded.template.read_regions("[0.250,0.250,0.750,0.750]", question.conversation).regions
        assert region.media == 0
    assert others > 8 and num_same_size > 0
    # The same picture, not encoded anew, where the size is that of the own one and is known.
    again = [found.record(i).media[0] for i in range(24)]
    assert any(type(item.data) is StoredBytes for item in again) == (header_of is not None)


def test_a_swapped_picture_that_cannot_be_decoded(loaded: Loaded, tmp_path: Path) -> None:
    good, bad = sized("good", (320, 240)), sized("bad", (64, 64))
    cut = MediaRef("image", bad.media[0].read()[:60], MediaHeader(64, 64))
    names = shards(tmp_path / "s", [good, Record("bad", bad.facts, (cut,))], header_of=None)
    metrics = evaluate(loaded, "rec", names, tmp_path / "out", SHORT, Controls(swap=("image",)))
    assert metrics["not_answered"] == {"undecodable image": {"count": 1, "keys": ["good"]}}


def test_blank_keeps_sizes_and_lengths(loaded: Loaded) -> None:
    before = controlled(loaded, Controls(), SHARD)
    after = controlled(loaded, Controls(blank=("image", "audio")), SHARD)
    for record, blank in zip(before, after, strict=True):
        for item, made in zip(record.media, blank.media, strict=True):
            assert made.header == item.header
            if item.modality == "image":
                image = Image.open(io.BytesIO(made.read()))
                assert image.size == (48, 32) and image.getcolors() == [(48 * 32, GREY)]
            elif item.modality == "audio":
                samples, rate = soundfile.read(io.BytesIO(made.read()))
                assert not np.any(samples) and len(samples) / rate == pytest.approx(item.header.duration_s, abs=1e-3)
            else:
                assert made == item


def test_missing_takes_a_share_that_grows(loaded: Loaded) -> None:
    def gone(share: float) -> set[str]:
        records = controlled(loaded, Controls(missing={"image": share}))
        return {record.key for record in records if any(item.data is None for item in record.media)}

    half, most, everything = gone(0.5), gone(0.8), gone(1.0)
    assert half < most < everything and len(everything) == 24 and 6 <= len(half) <= 18
    assert gone(0.0) == set()
    keys = [str(i) for i in range(2000)]
    drawn = [{key for key in keys if Controls(missing={"image": 0.5}, seed=s).is_missing("image", key)} for s in (0, 1)]
    assert 400 < len(drawn[0] & drawn[1]) < 600  # another seed draws anew


def test_shuffle_gives_the_same_frames_in_any_order(loaded: Loaded) -> None:
    records = controlled(loaded, Controls(), SHARD)
    record = next(one for one in records if one.media and one.media[0].modality == "video")
    (question,) = TASKS["instruct"].questions(record, Protocol())
    sample = loaded.template.render(question.conversation, "k", answer=True)
    (frames,) = tensors = load_media(sample, loaded.template)
    assert len(frames) == 4 and len({frame.numpy().tobytes() for frame in frames}) == 4
    on = Controls(shuffle=("video",))
    orders = Counter[tuple[int, ...]]()
    for i in range(2400):
        (found,) = on.shuffled(sample, tensors, f"{i}")
        orders[tuple(int((frames == frame).flatten(1).all(1).int().argmax()) for frame in found)] += 1
    assert len(orders) == 24 and all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert min(orders.values()) > 60 and max(orders.values()) < 145  # each as likely as any other
    (one,), (again,) = on.shuffled(sample, tensors, "a"), on.shuffled(sample, tensors, "a")
    assert one.equal(again)
    assert Controls().shuffled(sample, tensors, "a")[0].equal(frames)
    # Stored features: frames of two features each.
    features = frames[:, :2, 0, :3].flatten(0, 1)
    (found,) = on.shuffled(sample, [features], "a")
    assert found.equal(one[:, :2, 0, :3].flatten(0, 1))


def test_controls_change_the_answers_about_their_media_alone(whole: Path, loaded: Loaded, tmp_path: Path) -> None:
    right = lines(whole)
    for name, controls in {
        "swap": Controls(swap=("image",)),
        "blank": Controls(blank=("image",)),
        "missing": Controls(missing={"image": 1.0}),
    }.items():
        metrics = evaluate(loaded, "instruct", SHARD, tmp_path / name, SHORT, controls, batch_size=4)
        assert metrics["changed_records"] == {f"{name} image": 8} and metrics["num_questions"] == 20
        pairs = zip(lines(tmp_path / name), right, strict=True)
        changed = {line["key"] for line, was in pairs if line["answer"] != was["answer"]}
        with_picture = {line["key"] for line in right if "<image>" in line["prompt"]}
        assert changed and changed <= with_picture
        assert "banner" in (tmp_path / name / "index.html").read_text()
    parts = metrics["scores_by_presence"]
    out = tmp_path / "shuffle"
    shuffled = evaluate(loaded, "instruct", SHARD, out, SHORT, Controls(shuffle=("video",)), batch_size=4)
    assert shuffled["changed_records"] == {"shuffle video": 4}
    changed = {now["key"] for now, was in zip(lines(out), right, strict=True) if now["answer"] != was["answer"]}
    assert changed <= {line["key"] for line in right if "<video>" in line["prompt"]}
    assert "frames of clips in any order" in (out / "index.html").read_text()
    assert parts["missing"]["num_questions"] == 8 and parts["present"]["num_questions"] == 12


def test_controls_that_make_no_sense_are_refused(loaded: Loaded, tmp_path: Path) -> None:
    for values, message in [
        ({"blank": ["video"]}, "there is no blank clip"),
        ({"blank": ["image"], "swap": ["image"]}, "swap and blank of image"),
        ({"missing": {"image": 1.5}}, "wanted a share"),
        ({"swap": ["image", "image"]}, "swap image, image: a modality is given twice"),
        ({"blank": ["audio", "audio"]}, "a modality is given twice"),
        ({"shuffle": ["audio"]}, "shuffle"),
    ]:
        with pytest.raises(ConfigError, match=message):
            parse(Controls, values, "controls")
    for text, message in [("image", "wanted MODALITY=SHARE"), ("smell=0.5", "the modalities are")]:
        with pytest.raises(ValueError, match=message):
            parse_missing([text])
    with pytest.raises(ValueError, match="a share of image already"):
        parse_missing(["image=0.5", "audio=1", "image=0.6"])
    assert parse_missing(["image=0.5", "audio=1"]) == {"image": 0.5, "audio": 1.0}
    with pytest.raises(ValueError, match="no two have as many items"):
        evaluate(loaded, "instruct", SHARD, tmp_path, SHORT, Controls(swap=("image",)), limit=3)
