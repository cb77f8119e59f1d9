"""From a public format on disk to samples of a mixture, by the scripts that people run."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset
from PIL import Image

from data_prep import index_shards, make_shards
from mmchat.config import SourceConfig
from mmchat.conversation import MediaHeader, MediaRef, Record
from mmchat.data.mixture import Mixture
from mmchat.data.shard_index import ShardReport
from mmchat.data.shard_writer import Chunk
from mmchat.data.shards import Shard, expand_shards, index_path
from mmchat.errors import SampleError
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent.parent
NUM_PICTURES = 23


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """A caption folder with 23 good rows and four bad ones."""
    source = tmp_path / "source"
    (source / "train" / "pictures").mkdir(parents=True)
    rows = []
    for i in range(NUM_PICTURES):
        colour = tuple(random.Random(i).randrange(256) for _ in range(3))
        Image.new("RGB", (40 + i, 30), colour).save(source / "train" / "pictures" / f"{i}.jpg")
        rows.append({"image": f"pictures/{i}.jpg", "caption": f"Picture number {i}."})
    (source / "train" / "pictures" / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(10))
    (source / "train" / "pictures" / "note.jpg").write_text("not a picture")
    rows.insert(3, {"image": "pictures/cut.jpg", "caption": "x"})
    rows.insert(7, {"image": "pictures/note.jpg", "caption": "x"})
    rows.insert(9, {"image": "pictures/none.jpg", "caption": "x"})
    rows.append({"image": "pictures/0.jpg"})
    (source / "train" / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return source


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_script_as_people_run_it(captions: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    done = run("data_prep/make_shards.py", "caption", captions, out, "--samples-per-shard", 10)
    assert done.returncode == 0, done.stderr
    assert "format captions; task caption also has" in done.stdout
    assert "holds 23 samples in 3 shards" in done.stdout
    assert "skipped 4:" in done.stdout and "1 x missing media" in done.stdout
    assert "2 x undecodable image" in done.stdout and "captions.jsonl row 9" in done.stdout
    # Ten records each; what turns out not to be usable leaves its place empty, the same way for any number of workers.
    assert [Shard(path).num_samples for path in expand_shards(f"{out}/{{000000..000002}}.tar")] == [8, 10, 5]
    report = json.loads((out / "report.json").read_text())
    assert (report["num_samples"], report["num_shards"], report["num_skipped"]) == (23, 3, 4)
    assert report["asked"]["format"] == "captions" and report["skipped"][0]["reason"] == "undecodable image"
    assert report["skipped"][0]["count"] == 2 and "cut.jpg" in report["skipped"][0]["examples"][0]

    before = contents(out)
    again = run("data_prep/make_shards.py", "caption", captions, out, "--samples-per-shard", 10)
    assert again.returncode == 0 and "has 3 finished shards" in again.stdout and "made" not in again.stdout
    assert "holds 23 samples in 3 shards" in again.stdout and "skipped 4:" in again.stdout
    assert contents(out) == before
    other = run("data_prep/make_shards.py", "caption", captions, out)
    assert other.returncode == 1 and "samples_per_shard: 10 then, 1000 now" in other.stderr
    assert "Traceback" not in other.stderr and contents(out) == before


def test_webdataset_sees_the_same_bytes(captions: Path, tmp_path: Path) -> None:
    assert make_shards.main(["caption", str(captions), str(tmp_path / "out"), "--samples-per-shard", "10"]) == 0
    paths = expand_shards(str(tmp_path / "out"))
    ours = [shard.record(i) for shard in map(Shard, paths) for i in range(shard.num_samples)]
    theirs = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))
    assert len(ours) == len(theirs) == NUM_PICTURES
    for record, sample in zip(ours, theirs, strict=True):
        assert sample["__key__"] == record.key
        facts = json.loads(sample["json"])
        assert facts.pop("media") == [{"modality": "image", "member": "0.jpg"}]
        assert facts == record.facts
        assert sample["0.jpg"] == record.media[0].read()
        assert record.media[0].header is not None
        picture = Image.open(io.BytesIO(sample["0.jpg"]))
        assert (record.media[0].header.width, record.media[0].header.height) == picture.size


def test_the_same_source_gives_the_same_bytes(captions: Path, tmp_path: Path) -> None:
    found = []
    for name, workers in (("a", "1"), ("b", "3")):
        made = make_shards.main(
            ["caption", str(captions), str(tmp_path / name), "--max-shard-mb", "0.02", "--workers", workers]
        )
        assert made == 0
        found.append(contents(tmp_path / name))
    assert found[0] == found[1] and len(found[0]) > 2
    assert all(len(data) <= 20_000 + 10_240 for name, data in found[0].items() if name.endswith(".tar"))


def test_shards_of_webdatasets_own_writer_are_indexed(captions: Path, tmp_path: Path) -> None:
    pictures = sorted((captions / "train" / "pictures").glob("?.jpg"))
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"f-{shard:02d}.tar")) as writer:
            for path in pictures[shard * 5 : shard * 5 + 5]:
                writer.write({"__key__": path.stem, "jpg": path.read_bytes(), "txt": f"number {path.stem}"})
    done = run("data_prep/index_shards.py", tmp_path / "f-{00..01}.tar")
    assert done.returncode == 0, done.stderr
    assert "indexed 10 samples in 2 of 2 shards" in done.stdout
    record = Shard(tmp_path / "f-01.tar").record(2)
    assert record.facts == {"caption": "number 7"} and record.media[0].header == MediaHeader(width=47, height=30)


def test_bad_shards_are_named_and_the_others_indexed(
    captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert make_shards.main(["caption", str(captions), str(out), "--samples-per-shard", "6"]) == 0
    paths = expand_shards(str(out))
    with tarfile.open(paths[0]) as tar:
        members = tar.getmembers()
    for path, size in ((paths[0], members[4].offset), (paths[1], members[4].offset_data + 100)):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match="cut short"):
            Shard(path)
        index_path(path).unlink()
    with tarfile.open(paths[2], "a") as tar:
        for name in ("evil.json", "evil.0.pkl", "../out.json"):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"{}"))
    capsys.readouterr()
    assert index_shards.main([str(out)]) == 1
    printed = capsys.readouterr()
    assert all(str(path) in printed.err for path in paths[:2]) and str(paths[2]) not in printed.err
    assert "1 x forbidden member" in printed.out and "1 x unsafe name" in printed.out
    shard = Shard(paths[2])
    with pytest.raises(SampleError, match="forbidden member"):
        shard.record(shard.num_samples - 1)
    assert not (tmp_path / "out.json").exists()


def test_sound_and_video_have_headers(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "tone.wav", np.sin(np.arange(24_000) / 10), 16_000)
    soundfile.write(tmp_path / "nothing.wav", np.zeros(0), 16_000)
    (tmp_path / "clip.mp4").write_bytes(tiny.clip("left"))
    said = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "A tone."}]
    rows = [{"audio": "tone.wav", "video": "clip.mp4"}, {"audio": "nothing.wav"}, {"video": "tone.wav"}]
    (tmp_path / "train.json").write_text(json.dumps([row | {"conversations": said} for row in rows]))
    assert make_shards.main(["instruct", str(tmp_path), str(tmp_path / "out")]) == 0
    shard = Shard(tmp_path / "out" / "000000.tar")
    video, audio = (item.header for item in shard.record(0).media)
    assert shard.num_samples == 1
    assert audio is not None and (audio.duration_s, audio.sample_rate_hz) == (pytest.approx(1.5), 16_000)
    assert video is not None and (video.width, video.height, video.num_frames) == (64, 32, 8)


def test_friendly_ends(captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for main in (make_shards.main, index_shards.main):
        with pytest.raises(SystemExit) as ended:
            main(["--help"])
        assert ended.value.code == 0
    with pytest.raises(SystemExit) as ended:
        make_shards.main(["captoin", str(captions), str(tmp_path / "a")])
    assert ended.value.code == 2
    assert make_shards.main(["caption", str(captions), str(tmp_path / "a"), "--split", "val"]) == 1
    assert "val/captions.jsonl" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").write_text('{"image": "x.jpg", "caption": "x"}\n')
    assert make_shards.main(["caption", str(tmp_path / "empty.jsonl"), str(tmp_path / "b")]) == 1
    assert index_shards.main([str(tmp_path / "none-{0..2}.tar")]) == 1
    assert "none-1.tar" in capsys.readouterr().err


def test_a_mixture_reads_what_the_lanes_draw(captions: Path, tmp_path: Path) -> None:
    for name, size in (("a", "5"), ("b", "100")):
        assert make_shards.main(["caption", str(captions), str(tmp_path / name), "--samples-per-shard", size]) == 0
    (tmp_path / "b" / "000000.tar").rename(tmp_path / "b" / "x.tar")
    index_path(tmp_path / "b" / "000000.tar").rename(index_path(tmp_path / "b" / "x.tar"))
    configs = [
        SourceConfig(name="a", task="caption", shards=f"{tmp_path}/a/{{000000..000004}}.tar", weight=3),
        SourceConfig(name="b", task="caption", shards=[f"{tmp_path}/b/*.tar"]),
    ]
    mixture = Mixture(configs)
    assert mixture.weights == (0.75, 0.25)
    assert [source.shard_sizes for source in mixture.sources] == [(4, 4, 5, 5, 5), (23,)]
    seen: Counter[str] = Counter()
    for number in range(4):
        lane = mixture.lane(0, "align", number, 4)
        while (sample := lane.next()).source != "a" or sample.epoch == 0:
            if sample.source == "a":
                record = mixture.record(sample)
                seen[record.facts["caption"]] += 1
                assert mixture.tasks["a"].conversation(record, random.Random(0)).media == record.media
    assert seen == Counter(f"Picture number {i}." for i in range(NUM_PICTURES))


def test_mixtures_that_cannot_be_used(captions: Path, tmp_path: Path) -> None:
    assert make_shards.main(["caption", str(captions), str(tmp_path / "a"), "--samples-per-shard", "10"]) == 0
    copy = tmp_path / "copy.tar"
    copy.write_bytes((tmp_path / "a" / "000000.tar").read_bytes())
    index_path(copy).write_bytes(index_path(tmp_path / "a" / "000000.tar").read_bytes())
    empty = tmp_path / "empty.tar"
    with tarfile.open(empty, "w"):
        pass
    assert index_shards.main([str(empty)]) == 0

    def refusal(*shards: str | list[str], task: str = "caption", names: str = "abc") -> str:
        configs = [SourceConfig(name=name, task=task, shards=one) for name, one in zip(names, shards, strict=False)]
        with pytest.raises(ValueError) as caught:
            Mixture(configs)
        return str(caught.value)

    a = str(tmp_path / "a")
    assert "at least one source" in refusal()
    assert "more than once: ['a']" in refusal(a, a, names="aa")
    assert "did you mean 'caption'" in refusal(a, task="captions")
    assert "000003.tar" in refusal(a + "/{000000..000003}.tar")
    assert "hold no samples" in refusal(str(empty))
    assert "the same content" in refusal([a, str(copy)])
    for path in expand_shards(a)[:2]:
        index_path(path).unlink()
    message = refusal(a)
    assert "2 shards cannot be used" in message and "000001.tar" in message and "index_shards.py" in message
    with pytest.raises(ValueError, match="weight"):
        SourceConfig(name="a", task="caption", shards=a, weight=0)


def test_places_outside_of_the_picture_are_left_out(tmp_path: Path) -> None:
    """What training would refuse is not stored: more than a pixel outside, after the rotation that the header names."""
    data, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # shown as 30 x 40
    Image.new("RGB", (40, 30)).save(data, "JPEG", exif=exif)
    media = (MediaRef("image", data.getvalue()),)
    answer = {"role": "assistant", "parts": [{"text": "A car."}]}
    records = [
        Record(str(i), {"turns": [{"role": "user", "parts": [{"media": 0}, {"region": region}]}, answer]}, media)
        for i, region in enumerate(
            {"media": 0, "box": box} for box in ([0, 0, 30, 40], [0, 0, 30.5, 41], [0, 0, 40, 30], [5, 5, 2, 9])
        )
    ]
    line = make_shards.ShardMaker("instruct", tmp_path)(Chunk(0, records, ShardReport(), ""))
    assert line.problems == {"region outside the picture": 1, "inverted region": 1}
    assert line.examples["region outside the picture"][0].startswith("2: ")
    shard = Shard(tmp_path / "000000.tar")
    assert [shard.record(i).key for i in range(shard.num_samples)] == ["0", "1"]
