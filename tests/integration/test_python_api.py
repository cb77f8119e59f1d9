"""`mmchat.load` and what it returns, with a model whose answers are known."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from PIL import Image, ImageColor

import mmchat
from mmchat.config import dump_config
from mmchat.conversation import Conversation, Region, Turn
from mmchat.data.pack import load_media
from mmchat.inference.draw import COLOURS
from mmchat.inference.media_input import to_media
from mmchat.inference.python_api import Chat
from tests import by_heart, models, runs, tiny

BOX = "[0.250,0.375,0.750,0.625]"
WHERE = "Where is the drum?"
RED = ImageColor.getrgb(COLOURS[0])


@pytest.fixture(scope="module")
def loaded(heart):
    return mmchat.load(heart, "float32").loaded


@pytest.fixture
def chat(loaded):
    return Chat(loaded)


# ---- three lines ----------------------------------------------------------------------------------------------------


def test_three_lines(chat, tmp_path):
    (tmp_path / "photo.png").write_bytes(by_heart.picture())
    answer = chat.ask(WHERE, image=tmp_path / "photo.png")
    assert answer.text == BOX
    assert answer.regions == (Region(0, box=by_heart.DRUM, label="the drum"),)
    assert str(answer) == f"{BOX}\n  the drum: box (16, 8, 48, 24)"
    assert "pictures" not in vars(answer)  # not drawn before somebody looks
    assert answer.picture.size == (640, 320) and answer.picture.getpixel((160, 160)) == RED
    assert repr(chat).endswith("takes text, image, video, audio; 1 answer so far>")


def test_a_notebook_shows_the_picture_and_escapes_what_was_said(chat):
    answer = replace(chat.ask(WHERE, image=by_heart.picture()), text="<script>alert(1)</script> & more")
    shown = answer._repr_html_()
    assert '<img src="data:image/jpeg;base64,' in shown and "<li>the drum: box (16, 8, 48, 24)</li>" in shown
    assert "<script" not in shown and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in shown


def test_importing_mmchat_is_light():
    code = "import mmchat, sys; print(mmchat.load.__name__, [m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=runs.ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "load []\n", done.stderr


# ---- a conversation -------------------------------------------------------------------------------------------------


def test_a_conversation_goes_on_and_starts_afresh(chat):
    first = chat.ask(WHERE, image=by_heart.picture())
    pieces = list(chat.stream("Describe it."))
    assert chat.answer.text == "".join(pieces) and chat.answer.conversation == chat.conversation
    assert [turn.role for turn in chat.conversation.turns] == ["user", "assistant"] * 2
    assert len(chat.conversation.media) == 1 and len(first.conversation.turns) == 2
    assert chat.new() is chat and chat.answer is None and chat.conversation == Conversation(())
    assert chat.ask(WHERE, image=by_heart.picture()).text == BOX


def test_an_answer_that_is_broken_off_leaves_no_trace(chat):
    chat.ask(WHERE, image=by_heart.picture())
    before, answer = chat.conversation, chat.answer
    stream = chat.stream("Describe it.")
    next(stream)
    stream.close()
    assert chat.conversation is not before and chat.conversation == before and chat.answer is answer
    # The cache is as that of a chat in which nothing was broken off.
    other = Chat(chat.loaded)
    other.ask(WHERE, image=by_heart.picture())
    assert chat.ask("Describe it.").text == other.ask("Describe it.").text


def test_places_in_questions_as_marks_and_as_regions_of_an_answer(chat):
    region = chat.ask(WHERE, image=by_heart.picture()).regions[0]
    asked = chat.new().ask("What is in <box:16,8,48,24>?", image=by_heart.picture())
    assert asked.text == "A drum." and asked.regions == () and asked.picture.getpixel((400, 160)) == (255, 0, 0)
    again = chat.new().ask(["What is in ", region, "?"], image=by_heart.picture())
    assert again.text == "A drum." and again.conversation.turns[0].parts[1:] == ("What is in ", region, "?")


def test_of_several_pictures_the_one_that_is_named_is_drawn(chat):
    pictures = [by_heart.picture(), Image.open(io.BytesIO(by_heart.picture(colour="blue")))]
    answer = chat.ask(WHERE, image=pictures)
    assert answer.text == f"It is #2{BOX}." and answer.regions[0].media == 1
    assert list(answer.pictures) == [2] and answer.picture.getpixel((320, 160)) == (0, 0, 255)
    assert str(answer).endswith("box (16, 8, 48, 24) in picture 2")


def test_without_a_picture_there_is_none(chat):
    answer = chat.ask("Hello", max_new_tokens=3)
    assert answer.picture is None and answer.pictures == {} and "<img" not in answer._repr_html_()


def test_sampling_follows_its_seed(chat):
    said = [chat.new().ask("Hello", temperature=2.0, seed=seed, max_new_tokens=12).text for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


# ---- what may be given ----------------------------------------------------------------------------------------------


def seen(loaded, modality, given) -> np.ndarray:
    """What the encoder gets."""
    sample = loaded.template.render(Conversation((Turn("user", tuple(to_media(modality, given))),)), answer=True)
    return load_media(sample, loaded.template)[0].numpy()


@pytest.mark.parametrize("turned", [False, True])
def test_a_picture_is_the_same_from_wherever_it_comes(loaded, tmp_path, turned):
    stored = by_heart.picture("JPEG", turned=turned)
    (tmp_path / "p.jpg").write_bytes(stored)
    opened = Image.open(tmp_path / "p.jpg")
    wanted = seen(loaded, "image", stored)
    for given in (str(tmp_path / "p.jpg"), tmp_path / "p.jpg", opened, [opened]):
        assert (seen(loaded, "image", given) == wanted).all()
    if not turned:
        assert (seen(loaded, "image", np.asarray(opened)) == wanted).all()


def test_pictures_of_every_mode(loaded):
    picture = Image.open(io.BytesIO(by_heart.picture()))
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16"):
        given = picture.convert("L").convert(mode) if mode == "I;16" else picture.convert(mode)
        assert seen(loaded, "image", given).shape == (1, 3, 32, 32), mode
    assert seen(loaded, "image", np.asarray(picture.convert("L"))).shape == (1, 3, 32, 32)
    assert seen(loaded, "image", np.asarray(picture.convert("RGBA"))).shape == (1, 3, 32, 32)


def test_a_sound_is_the_same_from_wherever_it_comes(loaded, tmp_path):
    stored = tiny.tone(440.0, 0.5)
    (tmp_path / "s.wav").write_bytes(stored)
    wanted = seen(loaded, "audio", stored)
    floats, whole = (soundfile.read(tmp_path / "s.wav", dtype=kind)[0] for kind in ("float32", "int16"))
    stereo = np.stack([floats, floats], axis=1).astype(np.float64)
    for given in (tmp_path / "s.wav", (floats, 16000), (whole, np.int64(16000)), (stereo, 16000)):
        np.testing.assert_allclose(seen(loaded, "audio", given), wanted, atol=1e-5)


def test_a_clip_and_a_sound_are_taken(chat, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(tiny.clip("left"))
    samples = np.zeros(8000, np.float32)
    answer = chat.ask("Which way?", video=tmp_path / "clip.mp4", audio=(samples, 16000), max_new_tokens=2)
    assert [item.modality for item in answer.conversation.media] == ["audio", "video"]


# ---- what cannot be done --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image": "no/photo.jpg"}, r"image no/photo.jpg: cannot be read \(No such file"),
        ({"image": [by_heart.picture(), b"no picture"]}, "image 2: undecodable image"),
        ({"image": Image.open(io.BytesIO(by_heart.picture("JPEG", (640, 320))[:-200]))}, "image 1: undecodable image"),
        ({"image": np.zeros((4, 4), np.float32)}, r"image 1: found an array \[4, 4\] of float32; wanted .* uint8"),
        ({"image": ("a.jpg", "b.jpg")}, "image 1: found a tuple of str, str; wanted a path, .* or a list"),
        ({"audio": (np.array([np.nan]), 16000)}, "audio 1: found samples that are no finite numbers"),
        ({"audio": (np.zeros((2, 16000)), 16000)}, r"audio 1: found an array \[2, 16000\] .* \[n, channels\]"),
        ({"audio": np.zeros(16000)}, "audio 1: found a ndarray; wanted a path.*samples, sample_rate_hz"),
        ({"audio": b"no sound"}, "The question was not asked"),
        ({"video": b"no clip"}, "The question was not asked"),
        ({"temperature": -1.0}, "temperature: found -1.0; wanted 0 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens: found 0"),
        ({"question": None}, "question: found None; wanted a text"),
        ({"question": ["In ", 3]}, r"question: found \['In ', 3\]; wanted"),
        ({"audio": (np.zeros(9), 1 << 40)}, "at 1099511627776 Hz; wanted"),
        ({"question": "What is in <box:0,0,900,9>?"}, "region outside the picture.*The question was not asked"),
        ({"question": ["In ", Region(7, point=(1, 1)), "?"]}, "region without its picture.*The question was not asked"),
    ],
)  # fmt: skip
def test_a_question_that_cannot_be_asked_changes_nothing(chat, given, message):
    chat.ask(WHERE, image=by_heart.picture())
    before, answer = chat.conversation, chat.answer
    with pytest.raises(ValueError, match=message):
        chat.ask(**({"question": "And now?"} | given))
    assert chat.conversation == before and chat.answer is answer


@pytest.fixture(scope="module")
def deaf(tiny_folder, tmp_path_factory):
    """An untrained model that sees pictures and nothing else, from its configuration."""
    path = tmp_path_factory.mktemp("deaf") / "deaf.yaml"
    path.write_text(dump_config(models.config(audio=None, video=None)))
    return mmchat.load(str(path), "float32")


def test_a_model_that_cannot_hear_says_so(deaf):
    assert "tiny, not trained: takes text, image;" in repr(deaf)
    with pytest.raises(ValueError, match=r"modality not in the model: found audio, but model\.modalities has image"):
        deaf.ask("What is said?", audio=tiny.tone(440.0, 0.5))
    assert deaf.conversation == Conversation(()) and deaf.answer is None
    assert deaf.ask("What?", image=by_heart.picture(), max_new_tokens=2).picture is not None


def test_names_that_are_no_model():
    with pytest.raises(ValueError, match=r"there is no not/here/at/all \(from .*Wanted a checkpoint's folder"):
        mmchat.load("not/here/at/all")
    with pytest.raises(ValueError, match=r"there is no absent\.yaml"):
        mmchat.load("absent.yaml")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        mmchat.load("docs")
    with pytest.raises(ValueError, match=r"revision 'main' and the local configs/tiny\.yaml"):
        mmchat.load("configs/tiny.yaml", revision="main")
    with pytest.raises(ValueError, match="dtype: found 'float8'; wanted float32 or bfloat16"):
        mmchat.load("configs/tiny.yaml", dtype="float8")
