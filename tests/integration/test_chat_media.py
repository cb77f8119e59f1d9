"""`infer.py chat` with sounds and clips: what the model is given is said and, on request, saved."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

import infer
from mmchat.config import load_config
from mmchat.data.build import build_template
from mmchat.inference.seen import spectrogram_of
from tests import by_heart, odd_media, tiny

CONFIG = "configs/tiny.yaml"


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    (folder / "disc.png").write_bytes(by_heart.picture())
    (folder / "tone.wav").write_bytes(odd_media.wav(odd_media.steps(2, 44_100, [440, 880]), 44_100))
    (folder / "clip.mp4").write_bytes(tiny.clip("right"))
    (folder / "film.mkv").write_bytes(odd_media.film(3, odd_media.steps(3, 16_000, [300, 600])))
    (folder / "silent.mkv").write_bytes(odd_media.film(1))
    (folder / "broken.mp4").write_bytes(b"no film")
    (folder / "long.flac").write_bytes(odd_media.silent_flac(400))
    text = (tiny.ROOT / CONFIG).read_text()
    text = text.replace("      connector: {kind: pool", "      too_long: spread\n      connector: {kind: pool")
    (folder / "spread.yaml").write_text(text.replace("      too_long", "      max_duration_s: 60\n      too_long"))
    return folder


def chat(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["infer.py", "chat", *map(str, arguments), "--max-new-tokens", "4"])
    return infer.main()


def test_a_sound_a_clip_and_a_picture_together(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "seen"
    media = ["--video", folder / "clip.mp4", "--audio", folder / "tone.wav", "--image", folder / "disc.png"]
    media += ["--audio", folder / "film.mkv"]
    assert chat(monkeypatch, CONFIG, *media, "--ask", "What is <this>?", "--save-seen", out) == 0
    error = capsys.readouterr().err
    # Pictures come first, then sounds, then clips.
    assert "audio-2: 2 s heard" in error and re.search(r"audio-3: 3\.\d+ s heard", error)
    assert "video-4: 4 frames, one every 0.25 s of 1 s" in error
    frames = [f"video-4-frame-{i + 1:03d}-at-{at}s.png" for i, at in enumerate(("0.125", "0.375", "0.625", "0.875"))]
    sounds = [f"audio-{n}{end}" for n in (2, 3) for end in ("-spectrogram.png", ".wav")]
    assert sorted(p.name for p in out.iterdir()) == sorted(["image-1.png", *sounds, *frames, "index.html"])

    preprocesses = build_template(load_config(CONFIG)).preprocesses
    for modality, names, path in (("image", ["image-1.png"], "disc.png"), ("video", frames, "clip.mp4")):
        process, data = preprocesses[modality], (folder / path).read_bytes()  # type: ignore[index]
        given = process(data, process.plan(process.header(data)))
        saved = process.spec.normalise(np.stack([np.asarray(Image.open(out / name)) for name in names]))
        np.testing.assert_allclose(saved, given, rtol=0, atol=1e-5)
    samples, rate = soundfile.read(out / "audio-2.wav", dtype="float32")
    process, data = preprocesses["audio"], (folder / "tone.wav").read_bytes()
    assert rate == 16_000
    np.testing.assert_array_equal(samples, process.samples(data, process.plan(process.header(data)))[0, : 2 * rate])

    page = (out / "index.html").read_text()
    assert page.count("<audio controls") == 2 and page.count("data:image/png") == 1 + 2 + 4
    assert "0.375 s</figcaption>" in page and "What is &lt;this&gt;?" in page and "default-src 'none'" in page


def test_the_spectrogram_shows_the_pitch(folder: Path) -> None:
    """The second second is an octave above the first: its light stands higher."""
    process = build_template(load_config(CONFIG)).preprocesses["audio"]
    data = (folder / "tone.wav").read_bytes()
    plan = process.plan(process.header(data))
    picture = spectrogram_of(process(data, plan).numpy(), plan.shape[0])
    assert picture.size == (200, 160)
    light = np.asarray(picture).sum(axis=2)
    rows = light[:, 20:80].sum(1).argmax(), light[:, 120:180].sum(1).argmax()
    assert rows[0] > rows[1] + 10


def test_what_is_longer_than_the_budget_is_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--audio", folder / "long.flac", "--ask", "What?")
    assert chat(monkeypatch, folder / "spread.yaml", *asked, "--save-seen", tmp_path / "seen") == 0
    said = "audio-1: 60 s heard: 85.00 to 115.00 s, 285.00 to 315.00 s; sound longer than max_duration_s, windows all"
    assert f"{said} over it heard: 60 of 400 s (15.00%)" in capsys.readouterr().err
    assert said.partition(": ")[2] in (tmp_path / "seen" / "index.html").read_text()
    assert soundfile.info(tmp_path / "seen" / "audio-1.wav").duration == 60
    assert chat(monkeypatch, CONFIG, *asked) == 1
    error = capsys.readouterr().err
    assert "error: audio too long: 400.000 s, wanted up to 300 s" in error and "too_long: first or spread" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--video", "{f}/broken.mp4"], "undecodable video"),
        (["--video", "{f}/tone.wav"], "no video track"),
        (["--audio", "{f}/silent.mkv"], "no audio track: the file holds video"),
        (["--audio", "{f}/absent.wav"], "audio {f}/absent.wav: cannot be read"),
        (["--video", "{f}/clip.mp4", "--save-seen", "{f}"], "found files in it; name a new or empty folder"),
        (["--video", "{f}/clip.mp4", "--save-seen", "{f}/disc.png"], "cannot save to {f}/disc.png"),
    ],
)
def test_refusals(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    before = sorted(folder.iterdir())
    assert chat(monkeypatch, CONFIG, *(one.format(f=folder) for one in arguments), "--ask", "What?") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message.format(f=folder) in error and "Traceback" not in error
    assert sorted(folder.iterdir()) == before


def test_files_that_come_later_are_added_to_the_page(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = [
        f"/video {folder / 'clip.mp4'}",
        "What moves?",
        "And now?",
        f"/audio {folder / 'broken.mp4'}",
        "What is that?",
        f"/audio {folder / 'film.mkv'}",
        "And that?",
        "/quit",
    ]
    monkeypatch.setattr("builtins.input", lambda prompt: typed.pop(0))
    assert chat(monkeypatch, CONFIG, "--save-seen", tmp_path / "s") == 0 and not typed
    error = capsys.readouterr().err
    said = [line for line in error.splitlines() if line.startswith(("video", "audio", "error", "saved"))]
    assert [line.split(":")[0] for line in said] == ["video-1", "saved", "saved", "error", "audio-2", "saved"]
    assert "undecodable audio" in said[3]
    names = [path.name for path in (tmp_path / "s").iterdir()]
    assert sum(name.startswith("video-1-frame") for name in names) == 4 and "audio-2.wav" in names
    page = (tmp_path / "s" / "index.html").read_text()
    assert page.count("<section>") == 3 and page.index("video-1") < page.index("audio-2")
    assert "What moves?" in page and "And that?" in page and "What is that?" not in page
