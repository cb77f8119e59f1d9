"""Small stamps, dialogues, clips and recordings in the layouts of the packages that data_prep/open_data.py fetches."""

from __future__ import annotations

import io
import json
import random
import wave
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image, ImageDraw

from data_prep.scene_language import Thing, language
from tests import tiny
from tests.sources.fixture import Fixture, Fixtures


def ogg(hz: float, duration_s: float = 0.4) -> bytes:
    """44.1 kHz Vorbis, as stamps have it."""
    out = io.BytesIO()
    samples = 0.3 * np.sin(2 * np.pi * hz * np.arange(int(44100 * duration_s)) / 44100)
    soundfile.write(out, samples.astype(np.float32), 44100, format="OGG", subtype="VORBIS")
    return out.getvalue()


def _stamp_package(folder: Path) -> None:
    """Stamps in groups, two with one name, one drawn as SVG only, a text without a picture, a mirrored copy without a
    text; recordings with a doubled suffix, as WAV, of a language without text, and of a stamp that was renamed.
    """
    texts = {
        "animals/birds/green_dot": "A green dot.\nfr.utf8=Un point vert.\nel.utf8=Κουκκίδα.\npt_BR.utf8=Um ponto.\n",
        "animals/birds/cartoon/green-dot": "A green dot.\nfr.utf8=Un point vert dessiné.\n",
        "food/fruit/blue_dot": "A blue dot.\nfr.utf8=Un point bleu.\nlt.utf8=\nzh_CN.utf8=蓝点\n",
        "symbols/money/yen.v2": "1 yen.\nca@valencia.utf8=1 ien.\n",
        "animals/drawn": "A drawing.\nfr.utf8=Un dessin.\n",
        "seasonal/gift": "A present.\n",
        "plants/square": "A square.\nfr.utf8=Un carré.\n",  # for test
    }
    for i, (name, text) in enumerate(texts.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        if name not in ("animals/drawn", "seasonal/gift"):
            picture = Image.new("RGBA", (40, 30))
            ImageDraw.Draw(picture).ellipse((5, 5, 34, 24), fill=(50 * i, 60, 200, 255))
            picture.save(folder / f"{name}.png")
    (folder / "animals/drawn.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (folder / "animals/birds/green_dot_mirror.png").write_bytes((folder / "animals/birds/green_dot.png").read_bytes())
    (folder / "animals/birds/green_dot.dat").write_text("noflip\n")
    spoken = (
        "animals/birds/green_dot_desc.ogg",
        "animals/birds/green_dot_desc_fr.ogg",
        "animals/birds/green_dot_desc_el.ogg.ogg",
        "animals/birds/green_dot.ogg",  # how it sounds, not what it is
        "animals/birds/dot_desc_fr.ogg",  # green_dot's old name
        "food/fruit/blue_dot_desc_fr.ogg",
        "food/fruit/blue_dot_desc_lt.ogg",
    )
    for i, name in enumerate(spoken):
        (folder / name).write_bytes(ogg(200 + 50 * i))
    (folder / "animals/birds/green_dot_desc_pt_BR.wav").write_bytes(tiny.tone(300, 0.4))


def stamps(folder: Path) -> Fixture:
    _stamp_package(folder)
    return Fixture("caption", folder, 4, {"picture is SVG": 1, "missing media": 1})


def stamp_speech(folder: Path) -> Fixture:
    _stamp_package(folder)
    return Fixture("transcribe", folder, 5, {"no transcript": 2})


def scenes(folder: Path) -> Fixture:
    """What stamp_scenes.py writes; a label inside another one, two things with one label, one box that is no box."""
    (folder / "train/images").mkdir(parents=True)
    things = [
        ("A red dot.", [("red dot", [2, 3, 20, 21])]),
        ("A red dot, a dot, a ring.", [("dot", [1, 1, 9, 9]), ("red dot", [12, 3, 20, 21]), ("ring", [30, 2, 40, 9])]),
        ("Two rings.", [("rings", [1, 1, 9, 9]), ("rings", [20, 1, 29, 9])]),
        ("A ring and a dot.", [("ring", [1, 1, 9, 9]), ("dot", [20, 1, 29, 9])]),
        ("A broken ring.", [("ring", [1, 1, 9])]),
    ]  # fmt: skip
    rows = []
    for i, (caption, objects) in enumerate(things):
        (folder / f"train/images/{i:06d}.jpg").write_bytes(tiny.picture("red", random.Random(i)))
        listed = [{"label": label, "box": box} for label, box in objects]
        rows.append({"image": f"images/{i:06d}.jpg", "caption": caption, "objects": listed})
    (folder / "train/captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Fixture("rec", folder, 4, {"unreadable objects": 1}, other_tasks=("reg", "spot"))


def referential_scenes(folder: Path, about: str, task: str, *other_tasks: str) -> Fixture:
    """What referential_scenes.py writes, by its own code; one row without boxes, one scene that has no such facts."""
    (folder / "train/images").mkdir(parents=True)
    rows = []
    for i in range(4):
        (folder / f"train/images/{i:06d}.jpg").write_bytes(tiny.picture("red", random.Random(i)))
        things = [Thing("ring", "a", "", (2, 1, 12, 9), 60), Thing("dot", "a", "red", (24, 12, 44, 28), 250)]
        facts = language(things, (48, 48), [f"sign {n}" for n in range(60)], np.random.default_rng(i))
        rows.append({"id": f"train-{i}", "image": f"images/{i:06d}.jpg", **facts})
    rows[2] |= {"targets": 7, "questions": 7, "turns": 7, "rounds": 7}
    rows[3] |= {"targets": [], "questions": [], "turns": [], "rounds": []}
    (folder / "train/scenes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--set", f"about={about}")
    return Fixture(task, folder, 2, {"unreadable row": 1}, options=options, other_tasks=other_tasks)


def fillets(folder: Path) -> Fixture:
    """Scripts and sounds in packages of their own; shared lines, a line on two lines, quotes, a comment, a line without
    words, one that the game completes, and one that nobody spoke.
    """
    scripts = {
        "reef/dialogs_cs.lua": """
-- how it begins
dialogId("reef-m-1", "font_small", "It\u2019s dark here.")
dialogStr("Je tu tma.")


dialogId("reef-v-2", "font_big",
    "Look at C:\\\\TEMP.")
dialogStr("Podívej se do \\"TEMP\\".")

dialogId("reef-x-3", "", "")
dialogStr("")

dialogId("reef-v-4", "font_big", "It took you %1 hours.")
dialogStr("Trvalo to %1 hodin.")

dialogId("reef-m-5", "font_small", "Nobody recorded this.")
dialogStr("Tohle nikdo nenahrál.")
""",
        "reef/demo_dialogs_cs.lua": 'dialogId("demo-1", "font_poster", "The end")\ndialogStr("Konec")\n',
        "share/bore_dialogs_cs.lua": 'dialogId("nuda-1", "font_big", "Nothing.")\ndialogStr("Nic.")\n',
        "reef/dialogs_de_CH.lua": 'dialogId("reef-m-1", "font_small", "It\u2019s dark here.")\ndialogStr("Dunkel.")\n',
    }
    for name, text in scripts.items():
        path = folder / "fillets-ng-data/script" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for i, name in enumerate(("reef/cs/reef-m-1", "reef/cs/reef-v-2", "reef/cs/demo-1", "share/borejokes/cs/nuda-1")):
        path = folder / "fillets-ng-data-cs/sound" / f"{name}.ogg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(ogg(300 + 40 * i))
    options = ("--media", str(folder / "fillets-ng-data-cs"))
    skipped = {"no transcript": 1, "text with a blank": 1, "missing media": 1}
    return Fixture("transcribe", folder / "fillets-ng-data", 4, skipped, options=options)


def clips(folder: Path) -> Fixture:
    """Two packages; one clip is not there."""
    (folder / "data").mkdir()
    (folder / "examples").mkdir()
    for i, name in enumerate(
        ("data/bikes.mp4", "data/bigbuckbunny.mp4", "data/carphone_pristine.mp4", "examples/vtest.avi")
    ):
        (folder / name).write_bytes(tiny.clip(("left", "right")[i % 2]))
    options = ("--media", str(folder / "examples"))
    return Fixture("caption", folder / "data", 4, {"missing media": 1}, options=options)


def pocketsphinx(folder: Path) -> Fixture:
    """Transcripts of two folders, recordings with and without a header, a line whose recording is gone."""
    lines = {
        "librivox/transcription": [("a ring and a dot", "dots_01-0010"), ("a second line", "dots_01-0020")],
        "cards/cards.transcription": [("dot of rings ", "001"), ("gone", "002")],
    }
    for name, said in lines.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text("".join(f"<s> {text} </s> ({id_})\n" for text, id_ in said))
        for i, (text, id_) in enumerate(said):
            if text != "gone":
                (folder / name).with_name(f"{id_}.wav").write_bytes(tiny.tone(300 + 30 * i, 0.4))
    (folder / "tidigits").mkdir()
    for name in ("goforward.raw", "tidigits/dhd.2934z.raw", "numbers.raw"):
        with wave.open(io.BytesIO(tiny.tone(500, 0.5))) as opened:
            (folder / name).write_bytes(opened.readframes(opened.getnframes()))
    return Fixture("transcribe", folder, 5, {"missing media": 1})


def chatterbot(folder: Path) -> Fixture:
    """Two languages; texts of several lines, colons in quotes, three texts in a row, a text where a list should be."""
    files = {
        "english/conversations.yml": """
categories:
- conversations
conversations:
- - Hello
  - "Hi: nice to see you"
- - What is round?
  - A small
    dot.
  - Thank you.
- - What is round?
  - A ring.
- - What is a dot?
  - It is in the test split.
- "What is a ring? - A circle."
""",
        "english/ai.yml": "categories: [AI]\nconversations:\n- - Are you a dot?\n  - 'No, I''m not.'\n",
        "french/conversations.yml": "categories:\n- conversation\nconversations:\n- - Bonjour\n  - Salut, ça va ?\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return Fixture("instruct", folder, 4, {"unreadable row": 1})


FIXTURES: Fixtures = {
    "stamps": stamps,
    "stamp_speech": stamp_speech,
    "scenes": scenes,
    "referential_scenes": lambda folder: referential_scenes(folder, "objects", "refer", "rec", "reg", "spot"),
    "referential_scenes:things": lambda folder: referential_scenes(folder, "things", "reg"),
    "referential_scenes:questions": lambda folder: referential_scenes(folder, "questions", "vqa"),
    "referential_scenes:talk": lambda folder: referential_scenes(folder, "talk", "instruct"),
    "referential_scenes:rounds": lambda folder: referential_scenes(folder, "rounds", "visdial"),
    "fillets": fillets,
    "clips": clips,
    "pocketsphinx": pocketsphinx,
    "chatterbot": chatterbot,
}
