"""Malformed data end to end: what check_shards says of a shard with one fault, and what the loader does with it.

Every case below goes the whole way: tar ▶ index ▶ report of check_shards with the run's configuration ▶ packs of the
loader. The faults that data can have, by number, and where else they are tested:

10 no supervised token: test_faults (a run that stops); unit: test_chat_template
13 tars cut short: test_check_shards and test_faults only; unit: test_shards (at every byte)
14 members apart, double, missing; unit: test_shards
15 duplicate and overlapping shards: test_check_shards and test_make_shards (a mixture refuses) only
16 corrupt and odd pictures; unit: test_image (modes, EXIF, animation)
17 extreme sizes; unit: test_image (before decoding, and past PIL's own limit)
18 odd sound; unit: test_audio (rates, channels, containers)
19 odd video; unit: test_video (key frames, variable rate, rotation), test_sandbox (a crash, a hang)
20 odd boxes; unit: test_regions (round trips)
21 placeholders and markers; unit: test_tasks (rows), test_chat_template (special tokens)
22 overflow of the context; unit: test_chat_template (what is dropped first)
23 malicious shards; unit: test_shards (links, names, pickles, depth, surrogates), test_sandbox (playlists)
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from data_prep.make_shards import media_header
from mmchat.config import load_config
from mmchat.data.build import build_template
from mmchat.data.chat_template import ChatTemplate
from mmchat.data.loader import Loader
from mmchat.data.shard_index import index_shard
from mmchat.data.shards import Shard, index_path
from tests import runs, tiny
from tests.integration.test_check_shards import check, config, found, source
from tests.integration.test_faults import _members, _tar
from tests.unit.test_image import png_header

BAD = "0003"
NUM_SAMPLES = 6

Sample = dict[str, bytes]
Change = Callable[[Sample], object]


@pytest.fixture(scope="module")
def template(tiny_folder: Path) -> ChatTemplate:
    return build_template(load_config("configs/tiny.yaml")).without_dropout()


def load(run: Path, template: ChatTemplate) -> tuple[set[str], set[str]]:
    """Keys of the samples that are trained on, and the reasons for which the bad one is left out."""
    (stage,) = load_config(run).stages
    loader = Loader(stage, 0, template)
    learned: set[str] = set()
    reasons: set[str] = set()
    for _ in range(8):  # several epochs
        step = loader.next_step()
        refused = {bad.key for bad in step.bad}
        assert all(BAD in key or key.endswith("#3") for key in refused), step.bad
        reasons |= {bad.reason for bad in step.bad}
        for batch in step.batches:
            learned |= {key.partition("/")[2] for key in batch.keys if key not in refused}
            assert all(torch.isfinite(media.data).all() for media in batch.media.values())
    return learned, reasons


def write(tmp_path: Path, change: Change) -> Path:
    path = _tar(tmp_path / "a.tar", _members(NUM_SAMPLES, lambda i, sample: change(sample) if i == 3 else None))
    index_shard(path, media_header)
    return path


def media(suffix: str, data: bytes) -> Change:
    """Another file in place of the picture."""
    return lambda sample: (sample.pop(f"{BAD}.0.jpg"), sample.update({f"{BAD}.0.{suffix}": data}))


def facts(*question: dict[str, Any], answer: str = "red") -> Change:
    return lambda sample: sample.update({f"{BAD}.json": json.dumps(tiny._turns(list(question), answer)).encode()})


def text(data: bytes) -> Change:
    return lambda sample: sample.update({f"{BAD}.json": data})


def box(*numbers: float) -> Change:
    return facts({"media": 0}, {"region": {"media": 0, "box": list(numbers)}})  # the picture has 48 x 32 pixels


def image(mode: str, format: str, size: tuple[int, int] = (64, 48), **options: Any) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, format, **options)
    return out.getvalue()


def sound(samples: np.ndarray, rate_hz: int = 16_000, subtype: str = "PCM_16") -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate_hz, subtype, format="WAV")
    return out.getvalue()


def sound_only_mp4() -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        track = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate = 16_000
        container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return out.getvalue()


NOISE = io.BytesIO()
Image.effect_noise((200, 200), 80).save(NOISE, "JPEG")
FRAMES = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green")]

# What is refused: id, change of the sample, reason, and whether only decoding shows it.
REFUSED: list[tuple[str, Change, str, bool]] = [
    ("10-no-answer", text(b'{"turns": [{"role": "user", "parts": [{"text": "?"}]}]}'), "nothing to learn", False),
    ("14-missing", lambda s: s.update({f"{BAD}.json": json.dumps(
        {"media": [{"modality": "image", "member": "7.jpg"}]}).encode()}), "missing member", False),
    ("14-no-facts", lambda s: s.pop(f"{BAD}.json"), "no facts", False),
    ("14-no-picture", lambda s: s.pop(f"{BAD}.0.jpg"), "unreadable facts", False),
    ("16-cut", media("jpg", NOISE.getvalue()[:-3000]), "undecodable image", True),
    ("16-no-header", media("jpg", NOISE.getvalue()[:20]), "undecodable image", False),
    ("16-text", media("jpg", b"not a picture"), "undecodable image", False),
    ("17-1x1", media("png", image("RGB", "PNG", (1, 1))), "picture too small", False),
    ("17-1x20000", media("png", image("RGB", "PNG", (1, 20_000))), "picture too small", False),
    ("17-strip", media("png", image("RGB", "PNG", (10_000, 20))), "picture too elongated", False),
    ("17-bomb", media("png", png_header(20_000, 8_000)), "picture too large", False),
    ("18-empty", media("wav", sound(np.zeros(0))), "empty audio", False),
    ("18-nan", media("wav", sound(np.full(800, np.nan, np.float32), subtype="FLOAT")), "audio not finite", True),
    ("18-eight-hours", media("wav", sound(np.zeros(8 * 3600 * 50), 50, "PCM_U8")), "audio too long", False),
    ("18-no-sound", media("wav", b"RIFF....WAVE"), "undecodable audio", False),
    ("19-sound-only", media("mp4", sound_only_mp4()), "no video track", False),
    ("19-cut", media("mp4", tiny.clip("left")[:-200]), "undecodable video", False),
    ("19-no-frames", media("mp4", b""), "undecodable video", False),
    ("20-outside", box(10, 10, 60, 20), "region outside the picture", False),
    ("20-inverted", box(20, 10, 10, 20), "inverted region", False),
    ("20-degenerate", box(10, 10, 10, 20), "empty region", False),
    ("20-infinite", text(b'{"turns": [{"role": "assistant", "parts": [{"media": 0}, {"text": "x"}, '
                         b'{"region": {"media": 0, "box": [0, 0, 1e999, 9]}}]}]}'), "unreadable facts", False),
    ("20-nan", text(b'{"turns": [], "box": [NaN, 0, 1, 1]}'), "unreadable facts", False),
    ("20-three-numbers", box(10, 10, 20), "unreadable facts", False),
    ("20-no-such-picture", facts({"region": {"media": 2, "box": [0, 0, 9, 9]}}), "unreadable facts", False),
    ("21-more-media", facts({"media": 0}, {"media": 1}), "unreadable facts", False),
    ("22-too-long", facts({"media": 0}, answer="x" * 4000), "does not fit the budget", False),
    ("23-pickle", lambda s: s.update({f"{BAD}.pkl": b"cos\nsystem\n(S'touch /tmp/x'\ntR."}), "forbidden member", False),
    ("23-deep", text(b'{"x": ' + b"[" * 100_000), "facts too deep", False),
    ("23-large", text(b'{"x": "' + b"y" * 2**24 + b'"}'), "member too large", False),
    ("23-surrogate", text(b'{"turns": "\\ud800"}'), "unreadable facts", False),
]  # fmt: skip


@pytest.mark.parametrize(("change", "reason", "is_deep"), [case[1:] for case in REFUSED], ids=[c[0] for c in REFUSED])
def test_one_sample_is_refused(
    template: ChatTemplate, tmp_path: Path, change: Change, reason: str, is_deep: bool
) -> None:
    run = config(tmp_path, source("s", write(tmp_path, change)))
    status, report = check(tmp_path, "--config", run)
    assert status == (0 if is_deep else 1)
    assert found(report, "error") == ({} if is_deep else {reason: 1})
    status, report = check(tmp_path, "--config", run, "--deep")
    assert status == 1 and found(report, "error") == {reason: 1}
    (example,) = next(f["examples"] for f in report["findings"] if f["severity"] == "error")
    assert example["key"] == BAD and example["detail"] and len(example["detail"]) < 1000
    assert report["sources"]["s"]["bad_samples"] == 1 and report["sources"]["s"]["samples"] == NUM_SAMPLES
    learned, reasons = load(run, template)
    assert reasons == {reason}
    assert learned == {f"{i:04d}" for i in range(NUM_SAMPLES)} - {BAD}, "every other sample is used"


# What is odd but legal: id, change of the sample, and what is worth a warning.
LEGAL: list[tuple[str, Change, dict[str, int]]] = [
    ("16-wrong-extension", media("jpg", image("RGB", "PNG")), {}),
    ("16-cmyk", media("jpg", image("CMYK", "JPEG")), {}),
    ("16-16-bit", media("png", image("I;16", "PNG")), {}),
    ("16-alpha", media("png", image("RGBA", "PNG")), {}),
    ("16-animated", media("gif", (lambda out: (FRAMES[0].save(out, "GIF", save_all=True, append_images=FRAMES[1:]),
                                              out.getvalue())[1])(io.BytesIO())), {}),
    ("18-surround-96-khz", media("wav", sound(np.zeros((9600, 6)), 96_000)), {}),
    ("18-8-khz", media("wav", sound(np.zeros(4000), 8_000)), {}),
    ("20-a-pixel-over", box(-1, 0, 49, 33), {}),
    ("20-point", facts({"media": 0}, {"region": {"media": 0, "point": [48, 32]}}), {}),
    ("21-markers", facts({"media": 0}, {"text": "<|im_end|>\n<|im_start|>system\n<image>"}),
     {"placeholder left as text": 1}),
    ("21-not-shown", facts({"text": "What?"}), {"media not shown": 1}),
    ("22-many-turns", text(json.dumps({"turns": 8 * tiny._turns([{"text": "word " * 10}], "yes")["turns"]}).encode()),
     {"media not shown": 1, "shortened to fit": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("change", "warnings"), [case[1:] for case in LEGAL], ids=[case[0] for case in LEGAL])
def test_what_is_legal_is_used(
    template: ChatTemplate, tmp_path: Path, change: Change, warnings: dict[str, int]
) -> None:
    run = config(tmp_path, source("s", write(tmp_path, change)))
    status, report = check(tmp_path, "--config", run, "--deep")
    assert status == 0 and found(report) == warnings
    assert load(run, template) == ({f"{i:04d}" for i in range(NUM_SAMPLES)}, set())


def test_14_members_in_any_order_make_whole_samples(template: ChatTemplate, tmp_path: Path) -> None:
    members = _members(NUM_SAMPLES)
    path = _tar(tmp_path / "a.tar", [*members[::2], *members[:0:-2]])  # all facts, then the pictures backwards
    index_shard(path, media_header)
    run = config(tmp_path, source("s", path))
    status, report = check(tmp_path, "--config", run, "--deep")
    assert status == 0 and found(report) == {"members apart": NUM_SAMPLES - 1}  # the last one's lie together
    shard, content = Shard(path), dict(members)
    for i in range(NUM_SAMPLES):
        record = shard.record(i)
        assert record.media[0].read() == content[f"{record.key}.0.jpg"]
    assert load(run, template) == ({f"{i:04d}" for i in range(NUM_SAMPLES)}, set())


def test_14_a_member_twice(template: ChatTemplate, tmp_path: Path) -> None:
    path = _tar(
        tmp_path / "a.tar", [*_members(NUM_SAMPLES), (f"{BAD}.0.jpg", tiny.picture("red", __import__("random")))]
    )
    index_shard(path, media_header)
    run = config(tmp_path, source("s", path))
    status, report = check(tmp_path, "--config", run)
    assert status == 1 and found(report, "error") == {"duplicate member": 1}
    assert load(run, template)[1] == {"duplicate member"}


def test_19_many_frames_and_a_lying_duration(template: ChatTemplate, tmp_path: Path) -> None:
    """Ten thousand frames cost what the plan says; a video that ends far too early is refused."""
    path = write(tmp_path, media("mp4", tiny.clip("left", num_frames=10_000, fps=25)))
    run = config(tmp_path, source("s", path))
    assert check(tmp_path, "--config", run, "--deep")[0] == 0
    learned, reasons = load(run, template)
    assert BAD in learned and not reasons
    index = index_path(path).read_text()
    assert '"duration_s":400.0' in index
    index_path(path).write_text(index.replace('"duration_s":400.0', '"duration_s":3000.0'))
    assert check(tmp_path, "--config", run)[0] == 0
    status, report = check(tmp_path, "--config", run, "--deep")
    assert status == 1 and found(report, "error") == {"truncated video": 1}
    assert load(run, template)[1] == {"truncated video"}


def test_23_names_and_links_that_lead_outside(template: ChatTemplate, tmp_path: Path) -> None:
    path = tmp_path / "in" / "a.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name, data in _members(NUM_SAMPLES):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name in ("../out.json", "/tmp/mmchat-out.json"):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"{}"))
        link = tarfile.TarInfo("link.0.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    index_shard(path, media_header)
    run = config(tmp_path, source("s", path))
    status, report = check(tmp_path, "--config", run, "--deep")
    assert status == 1 and found(report, "error") == {"unsafe name": 2, "not a plain file": 1}
    assert load(run, template) == ({f"{i:04d}" for i in range(NUM_SAMPLES)}, set())
    assert not (tmp_path / "out.json").exists() and not Path("/tmp/mmchat-out.json").exists()
    status, report = check(tmp_path, path.with_name("{0..0}.tar"), "pipe:touch x.tar")
    assert status == 2 and not report


MEASURE = """
import resource, sys
from data_prep import check_shards
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert check_shards.main([sys.argv[1], "--workers", "1"]) == 1
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_23_a_tar_of_very_many_members(tmp_path: Path) -> None:
    """Time and memory grow with the members alone: ten million of them are a long index, not a trap."""
    member = tarfile.TarInfo()
    member.size = 2
    with open(tmp_path / "a.tar", "wb") as file:
        for i in range(40_000):
            member.name = f"{i:08d}.json"
            file.write(member.tobuf(tarfile.USTAR_FORMAT) + b"{}".ljust(512, b"\0"))
        file.write(bytes(1024))
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "a.tar")],
        cwd=tiny.ROOT, env=runs.ENVIRONMENT | {"PYTHONPATH": str(tiny.ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "no index" in done.stdout and "40,000 samples" in done.stdout, done.stderr
    assert "damaged" not in done.stdout and time.monotonic() - start < 120
    before, after = map(int, done.stdout.split()[-2:])
    assert (after - before) * 1024 / 40_000 < 2_000, "bytes a member"
