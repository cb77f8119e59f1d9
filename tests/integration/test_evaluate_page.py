"""The page of an evaluation in a real browser: boxes where they belong, text that stays text, nothing fetched."""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import Browser, Page

from data_prep.make_shards import media_header
from mmchat.conversation import Conversation, MediaHeader, MediaRef, Record, Region, Turn
from mmchat.data.shard_writer import write_shards
from mmchat.inference.controls import Controls
from mmchat.inference.evaluate import evaluate
from mmchat.inference.evaluate_card import Pictures, card, escaped
from mmchat.inference.evaluate_page import page as page_of
from mmchat.inference.load import Loaded, load
from mmchat.inference.predictions import Case
from mmchat.regions import Geometry
from mmchat.tasks.question import Answer, Protocol, Question
from tests import tiny
from tests.browser import launch, watched_page

HOSTILE = '<script>document.title = "taken"</script><img src="https://example.org/x.png" onerror="alert(1)">'
SHORT = Protocol(max_new_tokens=2, num_candidates=3)
Box = tuple[float, float, float, float]


def picture(size: tuple[int, int], box: Box, turned: bool = False) -> bytes:
    """A shaded JPEG with an ellipse in `box`; `turned` is stored on its side, with EXIF that says so."""
    shade = Image.linear_gradient("L").resize(size)
    image = Image.merge("RGB", [shade, shade.rotate(180), Image.new("L", size, 120)])
    ImageDraw.Draw(image).ellipse(box, fill=(240, 200, 60))
    exif, out = Image.Exif(), io.BytesIO()
    if turned:
        image = image.transpose(Image.Transpose.ROTATE_90)
        exif[0x0112] = 6
    image.save(out, "JPEG", quality=90, exif=exif.tobytes())
    return out.getvalue()


def rec(key: str, size: tuple[int, int], box: Box, **options: Any) -> Record:
    facts = {"expressions": [f"the yellow disc of {key}"], "boxes": [list(box)]}
    return Record(key, facts, (MediaRef("image", picture(size, box, **options)),))


RECORDS = [
    rec("near", (300, 200), (60, 40, 120, 100)),
    rec("far", (200, 260), (100, 150, 180, 240)),
    rec("turned", (240, 120), (20, 30, 80, 90), turned=True),
    rec("hostile", (64, 64), (5, 5, 30, 30)),
    rec("half", (300, 200), (60, 40, 120, 100)),
    rec("cut", (300, 200), (60, 40, 120, 100)),
    Record("facts", {"expressions": 3}, ()),
]
RECORDS[5] = Record("cut", RECORDS[5].facts, (MediaRef("image", RECORDS[5].media[0].read()[:900]),))
SAID: dict[str, tuple[tuple[int, int], Box]] = {
    "near": ((300, 200), (66, 44, 120, 102)),
    "far": ((200, 260), (10, 10, 60, 50)),
    "turned": ((240, 120), (20, 30, 80, 90)),
}


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> Loaded:
    return load(tiny.ROOT / "configs/tiny.yaml")


def edited(folder: Path, loaded: Loaded, task: str, shards: Path, said: dict[str, str], **options: Any) -> Path:
    """The page of an evaluation in which the model gave these answers, by key."""
    evaluate(loaded, task, str(shards), folder, SHORT, **options)
    path = folder / "predictions.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["key"] in said:
            line |= {"answer": said[line["key"]], "judge": 0.9 if line["key"] in ("near", "turned") else 0.0}
            line["num_failed"] = int(line["key"] == "half")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluate(loaded, task, str(shards), folder, SHORT, batch_size=len(lines), **options)
    return folder / "index.html"


def answers(loaded: Loaded) -> dict[str, str]:
    """A sentence with a box in the dialect of the model, a hostile one, and half a box."""
    said = {"hostile": HOSTILE, "half": "It is [0.1,0.2,"}
    for key, ((width, height), box) in SAID.items():
        identity = Geometry(width, height, width, height, 1, 1, 0, 0)
        said[key] = f"It is here: {loaded.template.config.regions.render(Region(0, box=box), identity)}."
    return said


@pytest.fixture(scope="module")
def page_file(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_shards(RECORDS, folder / "shards")
    return edited(folder / "out", loaded, "rec", folder / "shards", answers(loaded))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launch() as opened:
        yield opened


def drawn(page: Page, key: str, name: str) -> Box:
    """Where a region is drawn, as shares of its picture's width and height on the screen."""
    card = page.locator(".card", has=page.locator("h3", has_text=key))
    inner, outer = card.locator(f"rect[data-name={name}]").bounding_box(), card.locator("img").bounding_box()
    assert inner is not None and outer is not None
    x, y = (inner["x"] - outer["x"]) / outer["width"], (inner["y"] - outer["y"]) / outer["height"]
    return x, y, x + inner["width"] / outer["width"], y + inner["height"] / outer["height"]


def test_boxes_are_drawn_where_they_belong(browser: Browser, page_file: Path) -> None:
    with watched_page(browser) as watched:
        watched.page.goto(page_file.as_uri())
        for record in RECORDS[:3]:
            size, said = SAID[record.key]
            for name, box in (("R1", record.facts["boxes"][0]), ("A1", said)):
                shares = [value / side for value, side in zip(box, (*size, *size), strict=True)]
                assert drawn(watched.page, record.key, name) == pytest.approx(shares, abs=0.012), (record.key, name)
        card = watched.page.locator(".card", has=watched.page.locator("h3", has_text="near"))
        assert card.locator(".answer").inner_text().split() == ["ANSWER", "It", "is", "here:", "A1."]
        assert card.locator(".reference .chip.true").inner_text() == "R1"
        dashes = card.locator("rect").evaluate_all("all => all.map(one => getComputedStyle(one).strokeDasharray)")
        assert dashes == ["none", "7px, 4px"]
        alt = card.locator("img").get_attribute("alt")
        assert alt and alt.startswith("near, picture 1; marked: R1 box 60 40 120 100, A1 box 6")
        assert watched.faults == [] and watched.requests == [page_file.as_uri()]


def test_what_a_model_says_stays_text(browser: Browser, page_file: Path) -> None:
    with watched_page(browser) as watched:
        watched.page.goto(page_file.as_uri())
        card = watched.page.locator(".card", has=watched.page.locator("h3", has_text="hostile"))
        assert HOSTILE in card.locator(".answer").inner_text()
        assert watched.page.title() == "rec: 7 questions" and watched.page.locator("script").count() == 1
        assert watched.faults == [] and watched.requests == [page_file.as_uri()]


def test_worst_first_filters_and_what_is_not_answered(browser: Browser, page_file: Path) -> None:
    with watched_page(browser) as watched:
        page = watched.page
        page.goto(page_file.as_uri())
        kinds = page.locator(".card").evaluate_all("all => all.map(one => one.dataset.kind)")
        assert kinds == ["wrong"] * 3 + ["right"] * 2 + ["none"] * 2
        assert "2 not answered, counted as wrong" in page.locator("main").inner_text()
        assert "undecodable image" in page.locator("main").inner_text()
        half = page.locator(".card", has=page.locator("h3", has_text="half"))
        assert "1 malformed region" in half.inner_text() and half.locator("rect[data-name=A1]").count() == 0
        for label, count in (("wrong", 3), ("not answered", 2), ("right", 2), ("all", 7)):
            page.get_by_label(label, exact=True).check()
            assert page.locator(".card:visible").count() == count, label
        page.get_by_placeholder("key or words").fill("TURNED")
        assert page.locator(".card:visible").count() == 1 and "1 of 7" in page.locator("#count").inner_text()
        assert page.locator(".banner").count() == 0


@pytest.mark.parametrize("width", [1200, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen(browser: Browser, page_file: Path, width: int, scheme: str) -> None:
    with watched_page(browser, width, color_scheme=scheme) as watched:
        watched.page.goto(page_file.as_uri())
        assert watched.page.evaluate("document.documentElement.scrollWidth") <= width
        back = watched.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, back[4:-1].split(","))) < 60) == (scheme == "dark")


def test_a_control_stands_on_top_and_absent_pictures_are_hatched(
    browser: Browser, loaded: Loaded, tmp_path: Path
) -> None:
    records = [rec(name, (300, 200), (60, 40, 120, 100)) for name in ("a", "b", "c", "d")]
    write_shards(records, tmp_path / "shards", header_of=media_header)
    controls = Controls(missing={"image": 0.5}, swap=("image",))
    said = {record.key: answers(loaded)["near"] for record in records}
    file = edited(tmp_path / "out", loaded, "rec", tmp_path / "shards", said, controls=controls)
    missing = sum(controls.is_missing("image", record.key) for record in records)
    assert 0 < missing < 4
    with watched_page(browser) as watched:
        watched.page.goto(file.as_uri())
        banner = watched.page.locator(".banner").inner_text()
        assert "pictures swapped between records; pictures missing from 50% of records" in banner
        assert watched.page.locator("svg.gone").count() == missing
        assert watched.page.locator(".card img").count() == 4 - missing
        heads = watched.page.locator(".scores th[scope=col]").all_inner_texts()
        assert heads == ["all", f"media missing ({missing})", f"media present ({4 - missing})"]
        assert watched.faults == []


def test_candidates_with_the_rank_of_the_right_one(browser: Browser, loaded: Loaded, tmp_path: Path) -> None:
    options = ["a red one", HOSTILE, "no"]
    rounds = [{"question": "which", "answer": "a red one", "options": options, "gt_index": 0}]
    media = (MediaRef("image", tiny.picture("red", random.Random(0))),)
    write_shards([Record("d", {"caption": "a disc", "rounds": rounds}, media)], tmp_path / "shards")
    evaluate(loaded, "visdial", str(tmp_path / "shards"), tmp_path / "out", SHORT)
    line = json.loads((tmp_path / "out/predictions.jsonl").read_text())
    order = sorted(range(3), key=lambda i: -line["likelihoods"][i])
    with watched_page(browser) as watched:
        watched.page.goto((tmp_path / "out/index.html").as_uri())
        rows = watched.page.locator(".top tr")
        assert [rows.nth(i + 1).locator("td").nth(1).inner_text() for i in range(3)] == [options[i] for i in order]
        assert rows.nth(order.index(0) + 1).get_attribute("class") == "right"
        assert f"rank {order.index(0) + 1} of 3" in watched.page.locator(".talk").inner_text()
        assert watched.faults == []


def test_the_right_candidate_is_the_one_that_is_scored(loaded: Loaded, tmp_path: Path) -> None:
    """Its number says which it is; its text may stand among the candidates twice, or read otherwise."""
    options = ["no", "a red one", "it is a long red one", "a red one"]
    rounds = [{"question": "what is it", "answer": "a  red one", "options": options, "gt_index": 3}]
    write_shards([Record("d", {"caption": "a disc", "rounds": rounds})], tmp_path / "shards")
    out = tmp_path / "out"
    metrics = evaluate(loaded, "visdial", str(tmp_path / "shards"), out, Protocol(num_candidates=4))
    text = (out / "index.html").read_text()
    assert f"at rank <strong>{metrics['scores']['mean_rank']:g}</strong> of 4" in text
    assert text.count("<tr class=right>") == 1


def test_a_key_stays_text(loaded: Loaded) -> None:
    question = Question(Record(HOSTILE, {}), Conversation((Turn("user", (HOSTILE,)),)), (HOSTILE,))
    for case in (Case(0, HOSTILE, question, Answer(HOSTILE)), Case(0, HOSTILE, None, Answer(error=HOSTILE))):
        text = card(case, "wrong", Pictures(), loaded.template)
        assert "<script" not in text and "<img" not in text and text.count("&lt;script") >= 2
    picture = MediaRef("image", tiny.picture("red", random.Random(0)), MediaHeader(48, 32))
    assert 'src="https' not in Pictures().figure(picture, [], escaped(HOSTILE))


def test_the_page_stays_small_with_long_texts_and_many_places(loaded: Loaded) -> None:
    """Everything that a card shows, as long as it can be; quotation marks take six bytes, ideographs three."""
    rng = random.Random(0)
    out = io.BytesIO()
    Image.frombytes("RGB", (448, 448), rng.randbytes(448 * 448 * 3)).save(out, "JPEG", quality=95)
    picture = MediaRef("image", out.getvalue(), MediaHeader(448, 448))
    region = Region(0, box=(1e300, 1.123456789, 1e301, 40.987654321))
    cases = []
    for i in range(90):
        said = ('"' * 9000, *[region, "\u4e00"] * 500)
        turns = [Turn("user", (*[picture] * 20, *said))]
        turns += [Turn("assistant" if j % 2 else "user", said) for j in range(40)]
        candidates = ('"' * 3000, *[f"{j}" + "\u4e00" * 3000 for j in range(99)])
        record = Record(f'"{i}' * 500, {"gt_index": 2})
        question = Question(record, Conversation(tuple(turns)), said, candidates if i % 2 else ())
        likelihoods = tuple(-float(j) for j in range(100)) if i % 2 else ()
        answer = Answer("" if i % 2 else '"' * 9000 + "[0.1,0.2,0.3,0.4]" * 500, likelihoods=likelihoods, num_failed=3)
        cases.append(Case(i, record.key, question, Answer(error='"' * 9000) if i % 6 == 0 else answer))
    failed = {f'"{i}' * 300: {"count": 99, "keys": [case.key for case in cases[:20]]} for i in range(500)}
    metrics = {
        "task": "visdial", "num_questions": 90, "num_records": 90, "scores": {"mrr": 0.5}, "not_answered": failed,
        "warnings": failed, "num_with_malformed_regions": 9, "changed_records": {}, "protocol": {}, "chat": {},
        "controls": Controls().model_dump(), "limit": None, "checkpoint_folder": None, "dtype": "float32",
        "named_shards": ["/a/long/path" * 20] * 999, "decoding": "greedy", "mmchat_version": "1",
        **dict.fromkeys(["protocol_sha256", "questions_sha256", "checkpoint_sha256", "shards_sha256"], "0" * 64),
    }  # fmt: skip
    text = page_of(metrics, cases, loaded.template)
    assert 4_000_000 < len(text.encode()) < 8_000_000
    assert text.count('<article class="card"') == 84 and "earlier turns" in text and "not in this page" in text
    assert "and 450 more reasons" in text and not re.search(r"\d{100}", text)


def test_the_page_stays_small(loaded: Loaded, tmp_path: Path) -> None:
    """Eighty noisy pictures, of which each alone would be large."""
    rng = random.Random(0)
    noisy = []
    for i in range(80):
        out = io.BytesIO()
        Image.frombytes("RGB", (512, 512), rng.randbytes(512 * 512 * 3)).save(out, "JPEG", quality=60)
        facts = {"expressions": ["noise"], "boxes": [[1, 1, 9, 9]]}
        noisy.append(Record(f"{i:03d}", facts, (MediaRef("image", out.getvalue()),)))
    write_shards(noisy, tmp_path / "shards")
    evaluate(loaded, "rec", str(tmp_path / "shards"), tmp_path / "out", SHORT)
    text = (tmp_path / "out/index.html").read_text()
    assert 4_000_000 < len(text) < 8_000_000 and "left out, this page is full" in text
    assert text.count('<article class="card"') == 72 and "60 worst, 12 best of 80" in text
