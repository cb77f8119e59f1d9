"""inspect_shards.py shows what training sees, as a page in a real browser and in the terminal."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

from data_prep import inspect_shards
from data_prep.inspect_page import box_at
from data_prep.inspect_samples import Mark, Planned, Token, plan, unnormalised, view
from data_prep.make_shards import media_header
from mmchat.batch import IGNORE
from mmchat.config import load_config
from mmchat.conversation import MediaRef, Record, Region
from mmchat.data.build import build_template
from mmchat.data.lanes import SampleId
from mmchat.data.mixture import Mixture
from mmchat.data.pack import LanePacker, load_media
from mmchat.data.shard_writer import write_shards
from mmchat.modalities.decode import fit_square
from tests import inspect_example, tiny
from tests.browser import launch, watched_page

ATTACK = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
SIZE, BOX, POINT = (120, 80), (30.0, 20.0, 90.0, 60.0), (10.0, 70.0)
RED, GREY = (220, 30, 30), (128, 128, 128)


def turns(question: list[dict], answer: list[dict], **more) -> dict:
    return {"turns": [{"role": "user", "parts": question}, {"role": "assistant", "parts": answer, **more}]}


def region(**facts) -> dict:
    return {"region": {"media": 0, **facts}}


def boxed_picture() -> bytes:
    """Grey with a red box at BOX, stored on its side with the EXIF mark that says so."""
    image = Image.new("RGB", SIZE, GREY)
    ImageDraw.Draw(image).rectangle((BOX[0], BOX[1], BOX[2] - 1, BOX[3] - 1), fill=RED)
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    image.transpose(Image.Transpose.ROTATE_90).save(out, "JPEG", quality=95, subsampling=0, exif=exif)
    return out.getvalue()


def records() -> list[Record]:
    rng = random.Random(0)
    picture = boxed_picture()
    torn = tiny.picture("red", rng)
    return [
        Record(
            "boxed",
            turns(
                [{"media": 0}, {"text": "Where is red, and what is at "}, region(point=list(POINT)), {"text": "?"}],
                [region(box=list(BOX), label=f"red {ATTACK}"), {"text": " and grey."}],
            ),
            (MediaRef("image", picture),),
        ),
        Record(
            "moving",
            turns([{"media": 0}, {"text": "Where?"}], [region(box=[0, 8, 16, 24], time_s=0.1)]),
            (MediaRef("video", tiny.clip("right")),),
        ),
        Record("tone", turns([{"media": 0}], [{"text": "high"}]), (MediaRef("audio", tiny.tone(1500.0, 1.1)),)),
        Record("attack", turns([{"text": f"Say {ATTACK}"}], [{"text": ATTACK}]) | {"note": ATTACK}),
        Record("characters", turns([{"text": "Grüße?\n"}], [{"text": "😀 你好"}])),
        Record("absent", turns([{"media": 0}, {"text": "Blind?"}], [{"text": "yes"}]), (MediaRef("image", None),)),
        Record("mute", turns([{"text": "Say nothing."}], [{"text": "..."}], learn=False)),
        Record("long", turns([{"text": "x" * 2000}], [{"text": "y"}])),
        Record(
            "tube",
            turns([{"media": 0}, {"text": "Where?"}], [region(tube=[[1.0, 48, 8, 64, 24], [0.0, 0, 8, 16, 24]])]),
            (MediaRef("video", tiny.clip("right")),),
        ),
        Record("torn", turns([{"media": 0}], [{"text": "red"}]), (MediaRef("image", torn[: len(torn) * 3 // 4]),)),
    ]


@pytest.fixture(scope="module")
def config_file(tiny_folder, tmp_path_factory) -> Path:
    """configs/tiny.yaml with the records above, one stage, and nothing dropped."""
    folder = tmp_path_factory.mktemp("inspect")
    report = write_shards(records(), folder / "shards", header_of=media_header)
    assert report.num_samples == len(records()), report.examples
    values = yaml.safe_load((tiny.ROOT / "configs/tiny.yaml").read_text())
    values["stages"] = values["stages"][:1]
    values["stages"][0]["data"] = [{"name": "made", "task": "instruct", "shards": str(folder / "shards")}]
    values["model"]["fusion"] |= {"adapter_dropout": {}, "modality_dropout": {}}
    (folder / "made.yaml").write_text(yaml.safe_dump(values))
    return folder / "made.yaml"


@pytest.fixture(scope="module")
def page_file(config_file) -> Path:
    out = config_file.parent / "pages" / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tiny.ROOT)
        assert inspect_shards.main(["--config", str(config_file), "--out", str(out), "--packs", "3"]) == 0
    return out


@pytest.fixture(scope="module")
def browser():
    with launch() as launched:
        yield launched


@pytest.fixture
def opened(browser, page_file):
    with watched_page(browser) as watched:
        watched.page.goto(page_file.as_uri())
        yield watched


def card(page, key: str):
    return page.locator("article.card").filter(has=page.get_by_role("heading", name=key, exact=True))


# ---- what is shown is what is trained -------------------------------------------------------------------------------


@pytest.mark.parametrize("stage_number", [0, 1])
def test_samples_are_those_that_training_packs(stage_number, tiny_folder):
    """With dropouts and all: the seeds are the packer's."""
    config = load_config("configs/tiny.yaml")
    stage, template = config.stages[stage_number], build_template(config)
    mixture = Mixture(stage.data)
    lane = mixture.lane(config.seed, stage.name, 0, stage.batch.lanes)
    packer = LanePacker(lane, mixture, template, stage.batch, config.seed, stage.name)
    packed = [pair for _ in range(6) for pair in packer.next()]
    assert any(number.epoch for number, _ in packed) and len(packed) > 20
    for number, sample in packed:
        planned = plan(number, mixture, template, stage, config.seed)
        assert isinstance(planned, Planned)
        assert (planned.sample.token_ids, planned.sample.labels) == (sample.token_ids, sample.labels)
        assert np.array_equal(planned.sample.gates, sample.gates)
        shown = view(planned, template, with_media=False)
        positions = [
            position
            for piece in shown.pieces
            for position in range(
                piece.position,
                piece.position + (len(piece.ids) if isinstance(piece, Token) else piece.num_tokens),
            )
        ]
        assert positions == list(range(len(sample))), "every token once, in order"
        learned = [position for piece in shown.pieces if isinstance(piece, Token) and piece.is_learned
                   for position in range(piece.position, piece.position + len(piece.ids))]  # fmt: skip
        assert learned == [i + 1 for i, label in enumerate(sample.labels) if label != IGNORE]
        text = "".join(piece.text for piece in shown.pieces if isinstance(piece, Token) and piece.is_learned)
        assert text == "".join(p["text"] for p in planned.record.facts["turns"][-1]["parts"]) + "<|im_end|>"


def test_pictures_are_the_encoder_input(tiny_folder):
    config = load_config("configs/tiny.yaml")
    template = build_template(config).without_dropout()
    mixture = Mixture(config.stages[0].data)
    planned = plan(SampleId("tiny", 0, 0), mixture, template, config.stages[0], config.seed)
    spec = template.preprocesses["image"].spec
    (tensor,) = load_media(planned.sample, template)
    image = Image.open(io.BytesIO(planned.record.media[0].read()))
    wanted = fit_square(image, spec.size, "pad", spec.fill, spec.resample)
    assert np.array_equal(np.asarray(unnormalised(tensor, spec)[0]), np.asarray(wanted))
    shown = view(planned, template, with_media=True).items[0].pictures[0]
    assert np.array_equal(np.asarray(shown.encoder), np.asarray(wanted))
    assert shown.original.size == image.size


def test_frames_are_the_encoder_input_beside_their_originals(tiny_folder):
    config = load_config("configs/tiny.yaml")
    template = build_template(config).without_dropout()
    planned = plan(SampleId("tiny", 0, 2), Mixture(config.stages[0].data), template, config.stages[0], config.seed)
    (tensor,) = load_media(planned.sample, template)
    frames = view(planned, template, with_media=True).items[0].pictures
    assert len(frames) == 4
    for frame, wanted in zip(frames, unnormalised(tensor, template.preprocesses["video"].spec), strict=True):
        assert np.array_equal(np.asarray(frame.encoder), np.asarray(wanted))
        original, encoder = (np.asarray(image.convert("L"), np.float64) for image in (frame.original, frame.encoder))
        assert original.shape == (32, 64)
        # The white square of 16 pixels: as far from the left in both, where the encoder's is half as large.
        left, small_left = (int(np.argmax(levels[levels.shape[0] // 2] > 128)) for levels in (original, encoder))
        assert abs(left / 2 - small_left) <= 1
        assert original[10:22].max() > 200 and original[:6].max() < 80 and original[27:].max() < 80


def test_tubes_move_evenly_and_timed_boxes_show_at_their_time():
    tube = Mark(Region(0, tube=((1.0, 0, 0, 10, 10), (2.0, 10, 20, 20, 30))))
    assert box_at(tube, 1.5) == (5, 10, 15, 20)
    assert box_at(tube, 0.9) is None and box_at(tube, 2.1) is None
    timed = Mark(Region(0, box=(1, 2, 3, 4), time_s=1.0))
    assert box_at(timed, 1.2) == (1, 2, 3, 4) and box_at(timed, 1.5) is None
    assert box_at(Mark(Region(0, box=(1, 2, 3, 4))), 7.0) == (1, 2, 3, 4)


# ---- the page in a browser ------------------------------------------------------------------------------------------


def test_it_opens_whole_and_alone(opened, page_file):
    page = opened.page
    assert opened.requests == [page_file.as_uri()]
    assert page.locator("article.card").count() == 6  # all but the refused
    images = page.locator("img")
    assert images.count() == 2 + 2 * 4 + 2  # picture, four frames, sound; each as it was and as the encoder gets it
    for i in range(images.count()):
        images.nth(i).scroll_into_view_if_needed()
    page.wait_for_function("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    page.wait_for_function("[...document.querySelectorAll('audio')].every((audio) => audio.readyState >= 1)")
    assert page.locator("audio").evaluate("(audio) => audio.duration") == pytest.approx(1.1, abs=0.15)
    assert card(page, "tone").locator("img.mels").first.evaluate("(i) => i.naturalHeight") == 80
    assert opened.faults == []


def test_text_of_shards_stays_text(opened):
    page = opened.page
    assert page.evaluate("window.hacked") is None
    assert card(page, "attack").locator(".tokens").text_content().count(ATTACK) == 2
    card(page, "attack").locator("summary").click()
    assert ATTACK in json.loads(card(page, "attack").locator("pre").text_content())["note"]
    assert ATTACK in card(page, "boxed").locator("table.regions").text_content()
    assert opened.faults == []
    # Were something not escaped, the policy would still not run it.
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.hacked = 3'}))")
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x: onerror=\"window.hacked = 4\">')")
    page.wait_for_function("performance.now() > 0")
    assert page.evaluate("window.hacked") is None
    assert any("Content Security Policy" in fault for fault in opened.faults)


@pytest.mark.parametrize("width", [1200, 390])
def test_regions_lie_where_they_should(browser, page_file, width):
    with watched_page(browser, width) as watched:
        page = watched.page
        page.goto(page_file.as_uri())
        figures = card(page, "boxed").locator(".pair figure")
        side, left, top = 32 / 120, 0.0, 20 * 32 / 120  # the picture in the encoder's square of 32 pixels
        for number, (scale, offset, full) in enumerate(
            [((1.0, 1.0), (0.0, 0.0), SIZE), ((side, side), (left, top), (32, 32))]
        ):
            figure = figures.nth(number)
            image = figure.locator("img").bounding_box()
            box = figure.locator("rect[data-region]").bounding_box()
            zoom = image["width"] / full[0]
            assert image["height"] == pytest.approx(full[1] * zoom, abs=1)
            # A line of two pixels lies half outside of the box.
            wanted = [
                image["x"] + (BOX[0] * scale[0] + offset[0]) * zoom - 1,
                image["y"] + (BOX[1] * scale[1] + offset[1]) * zoom - 1,
                (BOX[2] - BOX[0]) * scale[0] * zoom + 2,
                (BOX[3] - BOX[1]) * scale[1] * zoom + 2,
            ]
            assert [box["x"], box["y"], box["width"], box["height"]] == pytest.approx(wanted, abs=0.5)
            point = figure.locator("circle[data-region]").bounding_box()
            x, y = point["x"] + point["width"] / 2, point["y"] + point["height"] / 2
            assert x == pytest.approx(image["x"] + (POINT[0] * scale[0] + offset[0]) * zoom, abs=0.5)
            assert y == pytest.approx(image["y"] + (POINT[1] * scale[1] + offset[1]) * zoom, abs=0.5)


def test_regions_lie_on_what_they_name(opened):
    """By the pixels of a screenshot: red inside of the box, grey outside, on the picture that EXIF turns."""
    page = opened.page
    figure = card(page, "boxed").locator(".pair figure").first
    page.get_by_label("regions", exact=True).uncheck()
    assert not figure.locator("rect[data-region]").is_visible()
    shot = np.asarray(Image.open(io.BytesIO(figure.locator("img").screenshot())).convert("RGB"), np.float64)
    zoom = shot.shape[1] / SIZE[0]
    for x, y, colour in [(33, 23, RED), (87, 57, RED), (26, 40, GREY), (94, 40, GREY), (60, 16, GREY), (60, 64, GREY)]:
        assert np.abs(shot[round(y * zoom), round(x * zoom)] - colour).max() < 30, (x, y)


def test_a_timed_box_shows_on_its_frame_only(opened):
    frames = card(opened.page, "moving").locator(".frame")
    assert [frames.nth(i).locator("rect[data-region]").count() for i in range(4)] == [2, 0, 0, 0]
    times = [text.split()[0] for text in frames.locator("figure.original figcaption").all_text_contents()]
    assert [float(time) for time in times] == pytest.approx([0.12, 0.38, 0.62, 0.88], abs=0.1)


def test_learned_tokens_stand_out(opened):
    tokens = card(opened.page, "characters").locator(".tokens")
    learned = "".join(tokens.locator(".l").all_text_contents())
    assert learned == "😀 你好<|im_end|>", "characters of several ids are whole"
    colours = tokens.evaluate(
        """(tokens) => ['.t.l', '.t:not(.l):not(.s)', '.t.s:not(.l)'].map(
             (kind) => getComputedStyle(tokens.querySelector(kind)).backgroundColor)"""
    )
    assert len(set(colours)) == 3
    assert tokens.locator(".l").first.get_attribute("data-i").count(" ") == 3  # an emoji is four bytes
    chip = card(opened.page, "boxed").locator(".tokens .chip")
    assert chip.text_content() == "image 0: 16 tokens"
    assert "absent in the record" in card(opened.page, "absent").locator(".item").text_content()
    assert card(opened.page, "absent").locator(".tokens .chip").count() == 0


def test_refused_samples_are_listed_with_their_reasons(opened):
    rows = {row.split("\n")[0]: row for row in opened.page.locator(".refused tr").evaluate_all(
        "(rows) => rows.map((row) => [...row.children].map((cell) => cell.textContent).join('\\n'))")}  # fmt: skip
    assert "nothing to learn" in rows["mute"] and "does not fit the budget" in rows["long"]
    assert "undecodable image" in rows["torn"]
    assert "impossible time" in rows["tube"]
    assert len(rows) == 1 + 4


def test_controls_choose_samples(opened):
    page = opened.page

    def shown():
        return {heading.text_content() for heading in page.locator("article.card:visible h3").all()}

    page.get_by_label("With").select_option("audio")
    assert shown() == {"tone"}
    assert page.locator("#count").text_content() == "1 of 6 samples"
    page.get_by_label("With").select_option("region")
    assert shown() == {"boxed", "moving"}
    page.get_by_label("With").select_option("text")
    assert shown() == {"attack", "characters"}
    page.get_by_label("With").select_option("")
    page.get_by_label("Text", exact=True).fill("grüSSe".replace("SS", "ß"))
    assert shown() == {"characters"}
    page.get_by_label("Text", exact=True).fill("")
    page.get_by_label("Source").select_option(label="made")
    assert len(shown()) == 6


def test_a_token_tells_its_id_to_pointer_and_keyboard(opened):
    page = opened.page
    tokens = card(page, "tone").locator(".tokens")
    status = page.locator("#token")
    tokens.locator(".l").first.hover()
    ids = tiny.tokenizer()("h", add_special_tokens=False)["input_ids"]
    assert re.search(rf"id {ids[0]} · learned", status.text_content())
    tokens.focus()
    assert "position 0 · id 1 · not learned · special · adapters: audio" in status.text_content()
    page.keyboard.press("ArrowRight")
    assert "position 1 " in status.text_content()
    page.keyboard.press("Escape")
    assert not status.is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_can_be_read_in_both_schemes(browser, page_file, scheme):
    with watched_page(browser, 390, 844, color_scheme=scheme, has_touch=True) as watched:
        page = watched.page
        page.goto(page_file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.locator("article.card").first.bounding_box()["width"] > 300
        assert watched.faults == []
        for kind in ("body", ".tokens .l", ".tokens .s", ".tokens .chip", ".card .muted", "a"):
            assert contrast(page, kind) >= 4.5, kind
        dark = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) < 0.1
        assert dark == (scheme == "dark")


def contrast(page, selector: str) -> float:
    """WCAG's ratio of the text's colour to the nearest background behind it."""
    colours = page.locator(selector).first.evaluate(
        """(element) => { let behind = element;
          while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
          return [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor]; }"""
    )
    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    levels = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in levels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_packs_and_figures_are_drawn(opened, config_file):
    page = opened.page
    assert page.locator(".pack").count() == 3
    stage = load_config(config_file).stages[0]
    widths = (
        page.locator(".pack svg").first.locator(".block").evaluate_all("(b) => b.map((r) => +r.getAttribute('width'))")
    )
    assert 0 < sum(widths) <= stage.batch.tokens
    for plot in page.locator(".plot svg").all():
        assert plot.get_attribute("aria-label")
        assert plot.locator(".bar, .dot").count() > 0


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_same_command_gives_the_same_page(config_file, page_file, tmp_path, capsys):
    again = tmp_path / "again.html"
    assert inspect_shards.main(["--config", str(config_file), "--out", str(again), "--packs", "3"]) == 0
    assert again.read_bytes() == page_file.read_bytes()
    said = capsys.readouterr().err
    assert "10 of 10 samples, 0 s left" in said and "again.html" in said


def test_without_media_nothing_is_decoded(config_file, tmp_path):
    out = tmp_path / "page.html"
    assert inspect_shards.main(["--config", str(config_file), "--out", str(out), "--no-media"]) == 0
    html = out.read_text()
    assert "<img" not in html and "<audio" not in html and "image 0: 16 tokens" in html


def test_text_for_a_terminal(config_file, capsys, monkeypatch):
    command = ["--config", str(config_file), "--text", "--packs", "2"]
    assert inspect_shards.main(command) == 0
    plain = capsys.readouterr().out
    assert "\x1b" not in plain
    assert "»😀 你好<|im_end|>«" in plain
    assert "[image 0: 16 tokens]" in plain and "frames at 0.12, 0.38" in plain
    assert "region 1: box on item 0" in plain and "(30.0, 20.0, 90.0, 60.0) [0.250,0.333,0.750,0.667]" in plain
    assert "mute: nothing to learn" in plain
    assert len(re.findall(r"[#=]+\.* +\d+ samples, \d+ tokens", plain)) == 2
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert inspect_shards.main(command) == 0
    coloured = capsys.readouterr().out
    assert "\x1b[32m" in coloured and "»" not in coloured


def test_shards_of_no_source_need_a_task(config_file, tiny_folder, tmp_path, capsys):
    command = [str(tiny_folder / "shards"), "--config", str(config_file), "--text", "--samples", "1", "--packs", "1"]
    assert inspect_shards.main(command) == 1
    assert "--task" in capsys.readouterr().err
    assert inspect_shards.main([*command, "--task", "instruct"]) == 0
    assert "60 samples in 3 shards" in capsys.readouterr().out
    own = [str(config_file.parent / "shards"), *command[1:]]
    assert inspect_shards.main(own) == 0
    assert "=== made: task instruct" in capsys.readouterr().out


def test_a_sample_that_would_stop_the_run_is_shown_as_one(config_file, tmp_path, capsys):
    folder = tmp_path / "shards"
    shutil.copytree(config_file.parent / "shards", folder)
    index = folder / "000000.tar.index.jsonl"
    index.write_text(re.sub(r'"json": ?\[\d+', '"json":[999999999', index.read_text(), count=1))
    config = tmp_path / "made.yaml"
    config.write_text(config_file.read_text().replace(str(config_file.parent / "shards"), str(folder)))
    assert inspect_shards.main(["--config", str(config), "--text"]) == 0
    said = capsys.readouterr().out
    assert "made#0: stops the run: ValueError" in said and said.count("points outside of its shard") == 2
    assert "»high<|im_end|>«" in said, "the others are shown all the same"


ESCAPE = "\x1b[2J"


@pytest.fixture
def odd_config(config_file, tmp_path) -> Path:
    """Captions whose objects cannot be drawn, and which a terminal would obey."""
    picture = boxed_picture()
    boxes = {"null": [None, 2, 3, 4], "text": ["left", 2, 3, 4], "huge": [10**400, 2, 3, 4], "short": [1, 2]}
    records = [
        Record(name, {"caption": "red", "objects": [{"label": ESCAPE, "box": box}]},
               (MediaRef("image", picture),))
        for name, box in (boxes | {"good": [1, 2, 30, 40]}).items()
    ]  # fmt: skip
    records.append(Record("none", {"caption": 7, "note": ESCAPE}, (MediaRef("image", picture),)))
    assert write_shards(records, tmp_path / "shards", header_of=media_header).num_samples == 6
    values = yaml.safe_load(config_file.read_text())
    values["stages"][0]["data"] = [{"name": f"odd{ESCAPE}", "task": "caption", "shards": str(tmp_path / "shards")}]
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "odd.yaml"


def test_objects_that_cannot_be_drawn_are_noted(odd_config, capsys):
    assert inspect_shards.main(["--config", str(odd_config), "--text", "--out", str(odd_config.parent / "p.html")]) == 0
    said, html = capsys.readouterr().out, (odd_config.parent / "p.html").read_text()
    for text in (said, html):
        assert text.count("unreadable region in the facts: 1 not drawn, the first: ") == 4
        assert text.count("in the facts, not said") == 1
    assert "\x1b" not in said and "=== odd\ufffd[2J: task caption" in said
    assert "on item 0 \ufffd[2J (1.0, 2.0, 30.0, 40.0)" in said


def test_a_terminal_of_ascii_gets_all(odd_config):
    command = [sys.executable, "data_prep/inspect_shards.py", "--config", str(odd_config), "--text", "--no-media"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=tiny.ROOT, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"\\xbbred<|im_end|>\\xab" in done.stdout and b"\x1b" not in done.stdout + done.stderr


def test_damage_that_nobody_foresaw_is_refused_with_its_reason(config_file, monkeypatch, capsys):
    def damaged(*_):
        raise KeyError("width")

    monkeypatch.setattr("data_prep.inspect_samples._marks", damaged)
    monkeypatch.setattr(LanePacker, "next", damaged)
    assert inspect_shards.main(["--config", str(config_file), "--text", "--packs", "1"]) == 0
    said = capsys.readouterr().out
    assert "attack: stops the run: KeyError: 'width'" in said and "\n    KeyError: 'width'" in said


def test_long_samples_are_shown_cut(config_file, monkeypatch, capsys):
    monkeypatch.setattr("data_prep.inspect_samples.MAX_TOKENS", 5)
    assert inspect_shards.main(["--config", str(config_file), "--text", "--packs", "0"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"\nthe first 5 of \d+ tokens are shown\n", said) and "<|im_end|>" not in said


@pytest.mark.parametrize("out", [".", "/proc/none/page.html"])
def test_what_cannot_be_written_is_said_before_the_work(out, tmp_path, capsys):
    assert inspect_shards.main(["--config", str(tmp_path / "not looked at"), "--out", out]) == 1
    assert f"--out {out} cannot be written: " in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error(config_file):
    command = [sys.executable, "data_prep/inspect_shards.py", "--config", str(config_file), "--text", "--no-media"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 0 and "rror" not in said


def test_the_picture_of_the_documents_can_be_made(browser, tmp_path):
    """With a real tokenizer, and pictures at the size of real encoders."""
    picture = tmp_path / "inspect.png"
    inspect_example.main(picture, browser)
    assert picture.stat().st_size < 400_000
    with Image.open(picture) as image:
        assert image.size == (inspect_example.WIDTH, inspect_example.HEIGHT)


@pytest.mark.parametrize(
    "more, said",
    [
        (["--stage", "none"], "no stage 'none'"),
        (["nowhere/*.tar", "--task", "instruct"], "no such shards"),
        (["--task", "instruct"], "--task goes with SHARDS"),
    ],
)
def test_what_cannot_be_shown_is_said(more, said, config_file, tmp_path, capsys):
    assert inspect_shards.main([*more, "--config", str(config_file), "--out", str(tmp_path / "page.html")]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
    with pytest.raises(SystemExit):
        inspect_shards.main(["--config", str(config_file)])
