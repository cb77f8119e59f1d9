"""`infer.py chat` with pictures drawn, by a model whose answers are known."""

from __future__ import annotations

import subprocess
import sys

import pytest
from PIL import Image, ImageColor

import infer
from mmchat.conversation import Region, Turn
from mmchat.inference.chat import ChatSession
from mmchat.inference.draw import COLOURS
from mmchat.inference.generate import Decoding
from mmchat.inference.load import load
from mmchat.inference.safety import REPLACEMENT, Guard
from mmchat.inference.terminal import check_drawing
from tests import by_heart, runs, tiny

RED, GREEN = ImageColor.getrgb(COLOURS[0]), ImageColor.getrgb(COLOURS[1])
BOX = "[0.250,0.375,0.750,0.625]"


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    """A checkpoint, and two pictures beside it; the second one is stored on its side."""
    folder = tmp_path_factory.mktemp("chat")
    by_heart.checkpoint(folder)
    (folder / "one.png").write_bytes(by_heart.picture())
    (folder / "two.png").write_bytes(by_heart.picture(colour="blue"))
    (folder / "turned.png").write_bytes(by_heart.picture(turned=True))
    (folder / "broken.jpg").write_bytes(b"not a picture")
    (folder / "out-2.png").write_bytes(by_heart.picture(colour="blue"))
    (folder / "soft.png").symlink_to("one.png")
    (folder / "hard.png").hardlink_to(folder / "one.png")
    (folder / "sound.png").write_bytes(b"any sound")
    (folder / "folder.png").mkdir()
    return folder


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def command(folder, *arguments: str, typed: str = "", cwd=tiny.ROOT) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    program = [sys.executable, str(tiny.ROOT / "infer.py"), "chat", str(folder / "tiny"), "--max-new-tokens", "70"]
    return subprocess.run(
        [*program, *arguments], cwd=cwd, env=runs.ENVIRONMENT, input=typed, capture_output=True, text=True, timeout=120
    )


def chat(monkeypatch, *arguments: str) -> int:
    """The same in this process."""
    monkeypatch.setattr(sys, "argv", ["infer.py", "chat", *map(str, arguments), "--max-new-tokens", "70"])
    return infer.main()


def test_the_box_of_an_answer_is_drawn_from_any_folder(folder, tmp_path):
    """The base models' paths are relative to the repository, and the picture's to the working directory."""
    done = command(
        folder, "--image", str(folder / "one.png"), "--ask", "Where is the drum?", "--draw", "out.png", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == BOX + "\n" and "drawn: out.png" in done.stderr
    image = Image.open(tmp_path / "out.png")
    assert image.size == (640, 320)  # ten times the picture
    assert image.getpixel((160, 160)) == image.getpixel((479, 160)) == image.getpixel((320, 239)) == RED
    assert image.getpixel((20, 300)) == (128, 128, 128) and image.getpixel((320, 160)) == (255, 0, 0)
    assert RED in {image.getpixel((x, 70)) for x in range(160, 250)}  # the label's ground, above the box


def test_typed_questions_and_draw(folder, tmp_path):
    lines = [
        "/draw x.png",
        f"/image {folder / 'one.png'}",
        f"/image {folder / 'two.png'}",
        "Where is the drum?",
        f"/draw {tmp_path / 'both.png'}",
        f"/draw {tmp_path / 'nowhere' / 'x.png'}",
        f"/draw {folder / 'one.png'}",
        f"/draw {folder / 'link.png'}",  # the second picture would go to link-2.png, which is a link to two.png
        "/new",
        f"/image {folder / 'broken.jpg'}",
        f"/image {folder / 'one.png'}",
        "What is in <box:16,8,480,24>?",
        "What is in <box:16,8,48,24>?",
        f"/draw {tmp_path / 'asked.png'}",
        "/nonsense",
        "/quit",
    ]
    (folder / "link-2.png").symlink_to("two.png")
    before = contents(folder)
    done = command(folder, typed="\n".join(lines))
    (folder / "link-2.png").unlink()
    assert done.returncode == 0, done.stderr
    assert before == contents(folder) | {"link-2.png": before["two.png"]}
    assert f"It is #2{BOX}." in done.stdout and "A drum." in done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    taken = [f"it is {folder / name}, which the conversation uses" for name in ("one.png", "two.png")]
    wanted = [
        "no picture to draw on",
        "no folder",
        *taken,
        "none of the formats",
        "region outside the picture",
        "/nonsense",
    ]
    assert len(errors) == len(wanted) and all(word in line for word, line in zip(wanted, errors, strict=True)), errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asked.png", "both-2.png"]
    assert Image.open(tmp_path / "both-2.png").getpixel((320, 160)) == (0, 0, 255)
    asked = Image.open(tmp_path / "asked.png")  # dashes of both colours on the line
    assert {asked.getpixel((x, 239)) for x in range(170, 470)} == {RED, (0, 0, 0)}


def test_a_turned_picture_is_understood_as_it_is_shown(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "turned.jpg"
    asked = ("--ask", "What is in <box:16,8,48,24>?", "--draw", out)
    assert chat(monkeypatch, folder / "tiny", "--image", folder / "turned.png", *asked) == 0
    assert capsys.readouterr().out == "A drum.\n"
    image = Image.open(out)
    assert (
        image.size == (640, 320)
        and max(abs(a - b) for a, b in zip(image.getpixel((320, 160)), (255, 0, 0), strict=True)) < 20
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "{f}/absent.png", "--ask", "What?"], "image {f}/absent.png: cannot be read (No such file"),
        (["--image", "{f}/broken.jpg", "--ask", "What?"], "image {f}/broken.jpg: undecodable image"),
        (["--image", "{f}/one.png", "--draw", "{f}/out.png"], "--draw needs --image and --ask"),
        (["--ask", "Where?", "--draw", "{f}/out.png"], "--draw needs --image and --ask"),
        (["--image", "{f}/one.png", "--ask", "Where?", "--draw", "{f}/no/out.png"], "there is no folder {f}/no"),
        (["--image", "{f}/one.png", "--ask", "Where?", "--draw", "{f}/out.txt"], "found the ending '.txt'"),
        (["--image", "{f}/one.png", "--ask", "Where?", "--draw", "{f}/one.png"], "it is {f}/one.png, which the conv"),
        (["--image", "{f}/one.png", "--ask", "Where?", "--draw", "{f}/tiny/../one.png"], "it is {f}/one.png, which"),
        (["--image", "{f}/one.png", "--ask", "Where?", "--draw", "{f}/soft.png"], "it is {f}/one.png, which"),
        (["--image", "{f}/soft.png", "--ask", "Where?", "--draw", "{f}/one.png"], "it is {f}/soft.png, which"),
        (["--image", "{f}/one.png", "--ask", "Where?", "--draw", "{f}/hard.png"], "it is {f}/one.png, which"),
        (["--image", "{f}/one.png", "--image", "{f}/out-2.png", "--ask", "Where?", "--draw", "{f}/out.png"],
         "which may also write {f}/out-2.png: it is {f}/out-2.png, which the conversation uses"),
        (["--image", "{f}/one.png", "--audio", "{f}/sound.png", "--ask", "Where?", "--draw", "{f}/sound.png"],
         "it is {f}/sound.png, which the conversation uses"),
        (["--image", "{f}/one.png", "--ask", "Where?", "--draw", "{f}/folder.png"], "it is a folder or a device"),
        (["--image", "{f}/one.png", "--ask", "Where?", "--draw", "/proc/zz.png"], "one cannot write there (No such"),
        (["--image", "{f}/one.png", "--ask", "Where?", "--draw", "{f}/one.png/x.png"], "there is no folder {f}/one"),
        (["--image", "{f}/one.png", "--ask", "What is in <box 0 0 9 9>?"], "found <box 0 0 9 9>; wanted <box:x1,"),
        (["--image", "{f}/one.png", "--ask", "<box:0,0,99,9>?"], "region outside the picture: <box:0,0,99,9>"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_the_model_is_loaded(folder, monkeypatch, capsys, arguments, message):
    before = contents(folder)
    assert chat(monkeypatch, folder / "no_checkpoint", *(one.format(f=folder) for one in arguments)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message.format(f=folder) in error
    assert contents(folder) == before


@pytest.mark.parametrize("option", ["--temperature", "--top-p"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1"])
def test_a_number_that_decoding_cannot_use_is_refused(folder, monkeypatch, capsys, option, value):
    with pytest.raises(SystemExit):
        chat(monkeypatch, folder / "no_checkpoint", "--ask", "What?", f"{option}={value}")
    assert f"argument {option}: wanted" in capsys.readouterr().err


def test_a_file_that_the_conversation_does_not_use_is_replaced(folder, tmp_path):
    (tmp_path / "out.png").write_bytes(b"an older drawing")
    assert check_drawing(str(tmp_path / "out.png"), [str(folder / "one.png"), str(tmp_path / "gone.png")], [1, 2])
    assert (tmp_path / "out.png").read_bytes() == b"an older drawing"  # not yet: the check changes nothing
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


# ---- what is said ---------------------------------------------------------------------------------------------------


class NoBox:
    """Finds boxes unsafe: what the model says here is known, and harmless."""

    def unsafe(self, text: str) -> float:
        return float("[" in text)


def test_a_guarded_answer_is_replaced_and_the_history_keeps_what_was_shown(folder):
    loaded = load(folder / "tiny", "float32")
    (picture, where), _ = (turn.parts for turn in by_heart.conversations()[0].turns)
    session = ChatSession(loaded, Decoding(max_new_tokens=70), guard=Guard(NoBox()))
    assert "".join(session.ask([picture, where])) == REPLACEMENT
    assert session.turns[-1] == Turn("assistant", (REPLACEMENT,))
    # The next question is answered after what was shown, as if nothing else had been said, with the cache or without.
    again = ChatSession(loaded, Decoding(max_new_tokens=70))
    again.turns = session.turns
    assert "".join(session.afresh().ask([picture, "What is in ", Region(0, box=by_heart.DRUM), "?"])) == "A drum."
    assert list(session.ask(["And now?"])) and session.turns[-1].parts != ()
    unguarded = "".join(again.ask(["And now?"]))
    assert session.turns[-1].parts == ((REPLACEMENT,) if "[" in unguarded else (unguarded,))


def test_a_harmless_answer_passes_the_word_list(folder, monkeypatch, capsys):
    asked = ("--image", folder / "one.png", "--ask", "Where is the drum?")
    assert chat(monkeypatch, folder / "tiny", *asked, "--safety", "word-list") == 0
    assert capsys.readouterr().out == BOX + "\n"


def test_a_safety_stage_that_is_none_is_said_before_the_model_is_loaded(folder, monkeypatch, capsys):
    asked = ("--ask", "Hello", "--safety", folder / "no_classifier")
    assert chat(monkeypatch, folder / "no_checkpoint", *asked) == 1
    assert "no text classifier" in capsys.readouterr().err
