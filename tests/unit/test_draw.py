"""Boxes and points stand at their pixels, in colours that show, with labels that stay inside the picture."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageColor

from mmchat.conversation import Conversation, MediaRef, Region, Turn
from mmchat.errors import SampleError
from mmchat.inference.chat import read_question
from mmchat.inference.draw import COLOURS, draw, draw_answer, named_regions, phrase, subject
from mmchat.tasks.prompts import LOCATE, POINT_TO
from mmchat.tasks.rec import named
from tests import by_heart, models

RED = ImageColor.getrgb(COLOURS[0])
GREEN = ImageColor.getrgb(COLOURS[1])
BLACK = (0, 0, 0)


def flat(size: tuple[int, int], level: int = 200, kind: str = "PNG", orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    Image.new("RGB", size, (level,) * 3).save(out, kind, exif=exif.tobytes())
    return out.getvalue()


def where(image: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """The rectangle of the pixels that have exactly this colour: left, top, right and bottom, all inside."""
    rows, columns = np.nonzero((np.asarray(image) == colour).all(-1))
    return int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())


def test_the_lines_of_a_box_are_its_outermost_pixels():
    image = draw(flat((800, 600)), [Region(0, box=(100, 50, 300, 250))], [""])
    assert image.size == (800, 600) and where(image, RED) == (100, 50, 299, 249)
    for x, y in ((100, 150), (299, 150), (200, 50), (200, 249)):
        assert image.getpixel((x, y)) == RED
    for x, y in ((99, 150), (300, 150), (200, 49), (200, 250)):  # dark lines beside the bright ones
        assert image.getpixel((x, y)) == BLACK
    assert image.getpixel((200, 150)) == image.getpixel((98, 150)) == (200, 200, 200)


def test_a_small_picture_is_enlarged_and_its_boxes_with_it():
    image = draw(flat((40, 24)), [Region(0, box=(10, 6, 30, 18)), Region(0, point=(5, 5))], ["", ""])
    assert image.size == (640, 384) and where(image, RED) == (160, 96, 479, 287)
    left, top, right, bottom = where(image, GREEN)
    assert ((left + right) / 2, (top + bottom) / 2) == (80, 80)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_regions_count_pixels_of_the_turned_picture(kind):
    image = draw(flat((900, 700), kind=kind, orientation=6), [Region(0, box=(600, 100, 690, 890))], [""])
    assert image.size == (700, 900) and where(image, RED) == (600, 100, 689, 889)


def test_a_turned_picture_is_drawn_as_it_is_shown():
    image = draw(by_heart.picture(turned=True), [Region(0, box=by_heart.DRUM)], [""])
    assert image.size == (640, 320)
    assert image.getpixel((320, 160)) == (255, 0, 0) and image.getpixel((20, 20)) == (128, 128, 128)


@pytest.mark.parametrize("level", [0, 255])
def test_every_colour_shows_on_dark_and_on_light(level):
    regions = [Region(0, box=(20, 20 + 70 * i, 700, 70 + 70 * i)) for i in range(len(COLOURS))]
    image = draw(flat((720, 640), level), regions, [""] * len(regions))
    for i, colour in enumerate(map(ImageColor.getrgb, COLOURS)):
        assert image.getpixel((20, 40 + 70 * i)) == colour and image.getpixel((19, 40 + 70 * i)) == BLACK
        difference = max(abs(channel - level) for channel in colour)
        assert difference > 100


def test_what_was_asked_is_dashed_and_what_was_answered_is_not():
    boxes = [Region(0, box=(100, 100, 300, 300)), Region(0, box=(400, 100, 600, 300))]
    image = draw(flat((800, 600)), boxes, ["", ""], [True, False])
    dashed = {image.getpixel((x, 100)) for x in range(100, 300)}
    assert dashed == {RED, BLACK} and where(image, RED)[:2] == (100, 100)
    assert {image.getpixel((x, 100)) for x in range(400, 600)} == {GREEN}
    points = draw(flat((800, 600)), [Region(0, point=(100, 100)), Region(0, point=(300, 300))], ["", ""], [True, False])
    assert points.getpixel((100, 100)) == (200, 200, 200) and points.getpixel((300, 300)) == GREEN


@pytest.mark.parametrize("size", [(800, 600), (60, 40), (12, 500), (500, 12), (2, 2)])
@pytest.mark.parametrize("label", ["a drum", "a very long name of a thing " * 9, "two\nlines", "漢字"])
@pytest.mark.parametrize("share", [(0, 0, 0.1, 0.1), (0.9, 0.9, 1, 1), (0, 0, 1, 1), (0.45, 0.45, 0.5, 0.5)])
def test_labels_stay_inside(size, label, share):
    box = tuple(value * size[i % 2] for i, value in enumerate(share))
    bare = draw(flat(size), [Region(0, box=box)], [""])
    image = draw(flat(size), [Region(0, box=box)], [label])
    assert image.width >= bare.width and image.height >= bare.height  # a margin, where there is no room
    left, top, right, bottom = where(image, RED)
    # A label that was cut off would have lost its dark edge on that side.
    pixels = np.asarray(image)
    before = np.full_like(pixels, 255)
    before[: bare.height, : bare.width] = bare
    rows, columns = np.nonzero((pixels != before).any(-1))
    edge = [(rows.min(), columns.min()), (rows.max(), columns.max())]
    assert all(tuple(pixels[place]) == BLACK for place in edge)
    assert 0 <= left <= right < image.width and 0 <= top <= bottom < image.height


def test_labels_of_one_place_do_not_cover_each_other():
    box = Region(0, box=(300, 200, 420, 300))
    image = draw(flat((800, 600)), [box] * 5, ["first", "second", "third", "fourth", "fifth"])
    for colour in map(ImageColor.getrgb, COLOURS[:4]):
        assert (np.asarray(image) == colour).all(-1).sum() > 800  # its label's background


def test_a_low_picture_has_its_labels_below_and_a_narrow_one_on_the_right():
    low = [Region(0, box=(10, 2, 60, 18)), Region(0, box=(400, 2, 690, 18))]
    names = ["the left drum", "a bear"]
    image, bare = draw(flat((700, 20)), low, names), draw(flat((700, 20)), low, ["", ""])
    assert image.width == 700 and 40 < image.height < 60 and bare.size == (700, 20)  # both in one row
    assert np.array_equal(np.asarray(image)[:20], np.asarray(bare))
    assert image.getpixel((14, 24)) == RED and image.getpixel((404, 24)) == GREEN
    narrow = [Region(0, box=(2, 10, 18, 60)), Region(0, box=(2, 400, 18, 690))]
    image, bare = draw(flat((20, 700)), narrow, names), draw(flat((20, 700)), narrow, ["", ""])
    assert 60 < image.width < 200 and image.height == 700 and bare.size == (20, 700)
    assert np.array_equal(np.asarray(image)[:, :20], np.asarray(bare))
    assert image.getpixel((23, 14)) == RED and image.getpixel((23, 404)) == GREEN


def test_many_labels_of_a_low_picture_stand_below_each_other():
    box = Region(0, box=(300, 2, 420, 18))
    image = draw(flat((700, 20)), [box] * 3, ["a very long name of a thing " * 9] * 3)
    for colour in map(ImageColor.getrgb, COLOURS[:3]):
        assert (np.asarray(image) == colour).all(-1).sum() > 8000


@pytest.mark.parametrize("box", [(-50, -50, 900, 700), (790, 590, 800, 600), (100, 100, 100.4, 100.4)])
def test_boxes_at_and_beyond_the_edge(box):
    left, top, right, bottom = where(draw(flat((800, 600)), [Region(0, box=box)], [""]), RED)
    assert 0 <= left < right < 800 and 0 <= top < bottom < 600


def test_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="tube"):
        draw(flat((80, 60)), [Region(0, tube=((0, 1, 1, 2, 2),))], [""])
    with pytest.raises(SampleError, match="undecodable image"):
        draw(b"no picture", [], [])
    with pytest.raises(SampleError, match="undecodable image"):
        draw(by_heart.picture("JPEG", (300, 300))[:900], [], [])
    assert draw(flat((800, 600)), [], []).getcolors() == [(480_000, (200, 200, 200))]


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ("The drum is at ", "The drum"),
        ("It holds a red ball ", "a red ball"),
        ("Yes. The cat is here: ", "The cat"),
        ("two dogs: ", "two dogs"),
        (", and a bus ", "a bus"),
        ("Trees ", "Trees"),
        ("It is ", ""),
        ("She is at ", ""),
        ("", ""),
    ],
)
def test_the_words_before_a_place(before, words):
    assert phrase(before) == words


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("Where is the drum?", "the drum"),
        ("Give the bounding box of the red car in this image.", "the red car"),
        ("Point to the two birds on the left in the picture", "the two birds on the left"),
        ("Drums?", "Drums"),
        ("Where is the fox?", "the fox"),
        ("Find thing left of the drum.", "thing left of the drum"),
        ("Find the thing left of the drum.", "the thing left of the drum"),
        ("Where is this: left pig", "left pig"),
        ("Mark all that fits: two birds", "two birds"),
        ("locate  fox", "fox"),
        ("Show a man with a hat with a point.", "a man with a hat"),
        ("Can you see the left pig? Say where.", "the left pig"),
        ("Where is fox? Answer with a box.", "fox"),
        ("How many?", "How many"),
        ("Where is it?", "it"),
    ],
)
def test_what_a_question_asks_for(question, words):
    assert subject(question) == words


@pytest.mark.parametrize("expression", ["pig", "thing left of the drum", "Mark", "a 3.5 m pole (at the back)"])
def test_each_prompt_of_the_tasks_is_understood(expression):
    for prompt in (*LOCATE, *POINT_TO):
        assert subject(named(prompt, expression)) == expression, prompt


# ---- whole conversations --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template(tiny_folder):
    from mmchat.data.build import build_template

    return build_template(models.config())


def talk(question, answer, *media):
    return Conversation((Turn("user", (*media, *question)), Turn("assistant", (answer,))))


def test_each_region_has_its_words(template):
    image = MediaRef("image", by_heart.picture())
    box = Region(0, box=(0, 0, 32, 16))
    one = talk(["Is the ball ", box, " near?"], "Yes. A drum [0.250,0.375,0.750,0.625] and [0.1,0.3].", image)
    assert [(n.words, n.is_asked) for n in named_regions(one, template)] == [
        ("the ball", True), ("A drum", False), ("A drum", False),
    ]  # fmt: skip
    assert [n.words for n in named_regions(talk(["What is in ", box, "?"], "A drum.", image), template)] == ["A drum"]
    assert [n.words for n in named_regions(talk(["Is the cat ", box, "?"], "Yes.", image), template)] == ["the cat"]
    assert [n.words for n in named_regions(talk(["Where is the drum?"], "[0.3,0.5]", image), template)] == ["the drum"]
    assert named_regions(talk(["Where?"], "Half a box [0.250,0.375", image), template) == []


def test_it_is_what_was_last_named_in_a_question(template):
    image = MediaRef("image", by_heart.picture())
    before = talk(["Do you see a whale?"], "Yes.", image).turns
    between = talk(["Is it red?"], "No.").turns
    last = talk(["Where is it?"], "[0.3,0.5]").turns
    assert [n.words for n in named_regions(Conversation(before + between + last), template)] == ["a whale"]
    assert [n.words for n in named_regions(talk(["Where is it?"], "[0.3,0.5]", image), template)] == ["it"]


def test_only_pictures_with_a_place_are_drawn_by_their_number(template):
    one, two = (MediaRef("image", by_heart.picture(colour=colour)) for colour in ("red", "blue"))
    drawn = draw_answer(talk(["Where?"], "#2[0.250,0.375,0.750,0.625]", one, two), template)
    assert list(drawn) == [2]
    assert drawn[2].getpixel((160, 160)) == drawn[2].getpixel((479, 160)) == RED
    assert drawn[2].getpixel((320, 160)) == (0, 0, 255)  # the second picture's disc
    drawn = draw_answer(talk([Region(0, point=(3, 3)), "?"], "#2[0.250,0.375,0.750,0.625]", one, two), template)
    assert list(drawn) == [1, 2]
    assert list(draw_answer(talk(["What?"], "A drum.", one, two), template)) == [2]
    with pytest.raises(ValueError, match="no picture to draw on"):
        draw_answer(talk(["Where?"], "[0.1,0.1]"), template)
    with pytest.raises(ValueError, match="no answer yet"):
        draw_answer(Conversation((Turn("user", (one, "Where?")),)), template)


def test_a_typed_place_is_a_region_of_its_picture():
    media = [MediaRef("image", by_heart.picture()), MediaRef("audio", b""), MediaRef("image", by_heart.picture())]
    assert read_question("Is <box:1,2,30,20> near <point: 5.5, 6>?", media[:1]) == [
        "Is ", Region(0, box=(1, 2, 30, 20)), " near ", Region(0, point=(5.5, 6)), "?",
    ]  # fmt: skip
    assert read_question("<point:2:5,6>", media) == [Region(2, point=(5, 6))]
    assert read_question("<BOX:1,2,30,20><Point :1:5,6>", media[:1]) == [
        Region(0, box=(1, 2, 30, 20)), Region(0, point=(5, 6)),
    ]  # fmt: skip
    for text in ("a <b> [0.1,0.2]", "< box> and < box:1,2,3,4>", "<boxes>, <pointer>, x<3 and 4>y", "a box: 1,2,3,4"):
        assert read_question(text, media) == [text]
    turned = [MediaRef("image", by_heart.picture("JPEG", turned=True))]
    assert read_question("<point:60,30>", turned) == [Region(0, point=(60, 30))]


@pytest.mark.parametrize(
    ("mark", "count", "reason"),
    [
        ("<box:1,2,3>", 1, "region not readable: found <box:1,2,3> with 3 numbers"),
        ("<point:a,b>", 1, "region not readable"),
        ("<box:x:1,2,3,4>", 1, "region not readable"),
        ("<box>", 1, "region not readable: found <box>; wanted <box:x1,y1,x2,y2> or"),
        ("<Box 1 2 3 4>", 1, "region not readable: found <Box 1 2 3 4>; wanted"),
        ("<box>1,2,3,4</box>", 1, "region not readable: found <box>; wanted"),
        ("</point>", 1, "region not readable: found </point>; wanted"),
        ("<box:1,2,30,20 and", 1, "region not readable: found <box:1,2,30,20 and"),
        ("<point=1,2>", 1, "region not readable"),
        ("<POINT:1>", 1, "region not readable: found <POINT:1> with 1 numbers"),
        ("<box:1,2,300,4>", 1, "region outside the picture: <box:1,2,300,4>: found"),
        ("<box:30,2,3,20>", 1, "inverted region"),
        ("<point:nan,2>", 1, "region not finite"),
        ("<box:1,2,3,4>", 2, "region names no picture"),
        ("<box:3:1,2,3,4>", 2, "region without its picture"),
        ("<box:0:1,2,3,4>", 1, "region without its picture"),
        ("<box:1,2,3,4>", 0, "region without its picture"),
    ],
)
def test_a_place_that_cannot_be_meant_is_refused(mark, count, reason):
    with pytest.raises(SampleError) as caught:
        read_question(f"What is {mark}?", [MediaRef("image", by_heart.picture())] * count)
    assert str(caught.value).startswith(reason)
