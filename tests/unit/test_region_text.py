"""Regions in the texts of other families: each dialect's documented examples, and what only looks like a region."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.kosmos2.processing_kosmos2 import clean_text_and_extract_entities_with_bboxes
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as qwen_resize

from mmchat.region_text import DIALECTS, FoundRegion, smart_resize, split_regions, to_region

SNOWMAN = (
    "An image of<phrase> a snowman</phrase><object><patch_index_0044><patch_index_0863></object> warming himself "
    "by<phrase> a fire</phrase><object><patch_index_0005><patch_index_0911></object>."
)


def read(text: str, dialect: str, width: int = 1000, height: int = 500, **settings: object) -> list[object]:
    """Texts as they are, regions as (label, box or point) in pixels of a picture of that size."""
    shown: list[object] = []
    for part in split_regions(text, dialect):
        if isinstance(part, FoundRegion):
            region = to_region(part, 0, width, height, **settings)
            shown.append((region.label, tuple(round(value, 3) for value in region.box or region.point)))
        else:
            shown.append(part)
    return shown


@pytest.mark.parametrize(
    ("dialect", "text", "expected"),
    [
        (
            "kosmos2",
            SNOWMAN,
            [
                "An image of a snowman ",
                ("a snowman", (390.625, 23.438, 984.375, 414.062)),
                " warming himself by a fire ",
                ("a fire", (171.875, 7.812, 484.375, 445.312)),
                ".",
            ],
        ),
        (
            "kosmos2",
            "<object><patch_index_0000><patch_index_0031></delimiter_of_multi_objects/>"
            "<patch_index_1023><patch_index_1023></object>",
            [(None, (0, 0, 1000, 15.625)), (None, (968.75, 484.375, 1000, 500))],
        ),
        (
            "qwen_vl",
            "<ref> Two apples</ref><box>(302,257),(582,671)</box><box>(603,252),(878,642)</box> and<ref> a bowl</ref>"
            "<box>(2,269),(304,674)</box>",
            [
                " Two apples ",
                ("Two apples", (302, 128.5, 582, 335.5)),
                ("Two apples", (603, 126, 878, 321)),
                " and a bowl ",
                ("a bowl", (2, 134.5, 304, 337)),
            ],
        ),
        (
            "qwen2_vl",
            "<|object_ref_start|>a dog<|object_ref_end|><|box_start|>(221,423),(569,886)<|box_end|> at "
            "<|box_start|>(10, 20)<|box_end|>",
            ["a dog ", ("a dog", (221, 211.5, 569, 443)), " at ", (None, (10, 10))],
        ),
        (
            "qwen3_vl",
            '[{"bbox_2d": [135,114,1000,672], "label": "house"}, {"label": "cup", "point_2d": [346, 328], "n": 1}]',
            [
                '[{"bbox_2d": ',
                ("house", (135, 57, 1000, 336)),
                ', "label": "house"}, {"label": "cup", "point_2d": ',
                ("cup", (346, 164)),
                ', "n": 1}]',
            ],
        ),
        (
            "internvl",
            "<ref>the cat</ref><box>[[100, 200, 300, 400], [0, 0, 1000, 1000]]</box>.",
            ["the cat ", ("the cat", (100, 100, 300, 200)), ("the cat", (0, 0, 1000, 500)), "."],
        ),
        ("internvl", "at <box>[100,200,300,400]</box>", ["at ", (None, (100, 100, 300, 200))]),
        (
            "ferret",
            "a dog [100, 200, 300, 400] and a cup [500, 500].",
            ["a dog ", (None, (100, 100, 300, 200)), " and a cup ", (None, (500, 250)), "."],
        ),
        (
            "cogvlm",
            "in *[[086,540,400,760;000,000,999,999]]* or [[010,020]] [1,2]",
            [
                "in *",
                (None, (86, 270, 400, 380)),
                (None, (0, 0, 999, 499.5)),
                "* or ",
                (None, (10, 10)),
                " [1,2]",
            ],
        ),
        (
            "minigpt_v2",
            "<p>two dogs</p> {<12><30><55><80>}<delim>{<0><0><100><100>} [identify] what is this {<4><50><30><65>}",
            [
                "two dogs ",
                ("two dogs", (120, 150, 550, 400)),
                ("two dogs", (0, 0, 1000, 500)),
                " [identify] what is this ",
                (None, (40, 250, 300, 325)),
            ],
        ),
        (
            "paligemma",
            "<loc0000><loc1023><loc1023><loc1023> stop sign ; <loc0000><loc0000><loc1023><loc0000> car",
            [("stop sign", (1000, 0, 1000, 500)), " stop sign ; ", ("car", (0, 0, 0, 500)), " car"],
        ),
        (
            "molmo",
            '<point x="61.5" y="40.4" alt="cup">the cup</point> <points x1="10.0" y1="20.0" x2="30" y2=" 40.0" '
            'alt="dogs">dogs</points>',
            [
                "the cup ",
                ("cup", (615, 202)),
                " dogs ",
                ("dogs", (100, 100)),
                ("dogs", (300, 200)),
            ],
        ),
        (
            "glm_v",
            "It is <|begin_of_box|>[[100, 200, 300, 400], [0,0,10,10]]<|end_of_box|>, <|begin_of_box|>(100,200,300,400)"
            "<|end_of_box|>; the answer is <|begin_of_box|>cat<|end_of_box|>",
            [
                "It is ",
                (None, (100, 100, 300, 200)),
                (None, (0, 0, 10, 5)),
                ", ",
                (None, (100, 100, 300, 200)),
                "; the answer is <|begin_of_box|>cat<|end_of_box|>",
            ],
        ),
        (
            "glm_v",
            '{"0":[{"label":"dog","bbox_2d":[100,200,300,400]}]}',
            ['{"0":[{"label":"dog","bbox_2d": ', ("dog", (100, 100, 300, 200)), "}]}"],
        ),
        (
            "shikra",
            "The man [0.100,0.300,0.500,0.500;0.200, 0.250, 0.300, 0.750] at [0.250,0.400] of [1, 0] and [12].",
            [
                "The man ",
                (None, (100, 50, 500, 250)),
                (None, (200, 0, 300, 500)),
                " at ",
                (None, (250, 150)),
                " of [1, 0] and [12].",
            ],
        ),
        (
            "shikra_tokens",
            "A <b_st><bin_125> <bin_300> <bin_500> <bin_750><b_sep><bin_0><bin_250><bin_1000><bin_750><b_ed>"
            "<p_st><bin_250> <bin_400><p_ed>",
            ["A ", (None, (125, 50, 500, 500)), (None, (0, 0, 1000, 500)), (None, (250, 150))],
        ),
    ],
)
def test_documented_forms(dialect, text, expected):
    assert read(text, dialect) == expected


def test_llava_needs_a_frame():
    text = "It is [0.12, 0.30, 0.50, 0.88]."
    assert read(text, "llava", frame="original")[1] == (None, (120, 150, 500, 440))
    assert read(text, "llava", 900, 1000, frame="padded_square")[1] == (None, (70, 300, 450, 880))
    with pytest.raises(ValueError, match="wanted frame"):
        read(text, "llava")


def test_qwen25_counts_pixels_of_the_resized_picture():
    text = '```json\n[{"bbox_2d": [28, 56, 504, 252], "label": "house"}]\n```'
    assert read(text, "qwen25_vl", input_size=smart_resize(1000, 500))[1] == ("house", (27.778, 55.556, 500, 250))
    assert smart_resize(1000, 500) == (1008, 504)
    with pytest.raises(ValueError, match="wanted input_size"):
        read(text, "qwen25_vl")


def test_an_unknown_dialect_names_the_known():
    with pytest.raises(ValueError, match=r"'shikr'.*shikra_tokens"):
        split_regions("", "shikr")


@pytest.mark.parametrize(
    ("dialect", "text"),
    [
        ("kosmos2", "<object><patch_index_0044></object> <object><patch_index_0044><patch_index_1024></object>"),
        ("qwen_vl", "<ref>a dog</ref><box>(1,2),(3)</box> <box>(1,2),(3,4) <box>(1,2),(3,1001)</box>"),
        ("qwen2_vl", "<|object_ref_start|>a dog<|object_ref_end|> <|box_start|>(1,2),(3,4),(5,6)<|box_end|>"),
        ("qwen25_vl", '{"bbox_2d": [1, 2, 3]} {"bbox_2d": [1, 2]} {"point_2d": [1, 2, 3, 4]} bbox_2d [1,2,3,4]'),
        ("qwen3_vl", '{"bbox_2d": [1, 2, 3, 1001]} {"bbox_2d": [1, 2, 3, 4 {"bbox_2d": "[1, 2, 3, 4]"}'),
        ("internvl", "<box>[[1,2,3]]</box> <box>[[1,2,3,4],[5]]</box> [[1,2,3,4]]"),
        ("ferret", "[1, 2, 3] [1, 2, 3, 4, 5] [1, 2 [a, b] [1, 2, 3, 1001] [-1, 2]"),
        ("cogvlm", "[001,002,003,004] [[1,2,3]] [[1,2,3,4;5]]"),
        ("minigpt_v2", "{<12><30><55>} {<12><30><55><101>} <p>dog</p> {<1><2><3><4><5>}"),
        ("paligemma", "<loc0001><loc0002><loc0003> <loc0001><loc0002><loc0003><loc0004><loc0005> <loc1024>"),
        ("paligemma", "<loc0001><loc0002><loc0003><loc1024>"),
        ("molmo", '<point x="101" y="40.4" alt="cup">cup</point> <point x="1.0">cup</point> <points x1="1" y1="2">'),
        ("glm_v", "<|begin_of_box|>[1,2,3]<|end_of_box|> [1,2,3,4] <|begin_of_box|>12<|end_of_box|>"),
        ("llava", "[0, 1, 0, 1] [0.1, 0.2, 0.3] [0.1, 0.2, 0.3, 1.1]"),
        ("shikra", "[0.1,0.2,0.3,0.4,0.5] [0.1,0.2,0.3,0.4;0.5] [0.1,0.2 (0.1,0.2)"),
        ("shikra_tokens", "<b_st><bin_1><bin_2><b_ed> <b_st><bin_1><bin_2><bin_3><bin_1001><b_ed> <p_st><bin_1>"),
    ],
)
def test_what_only_looks_like_a_region_stays_text(dialect, text):
    assert split_regions(text, dialect) == [text]


def test_the_picture_s_edge_survives_rounding_in_the_square():
    # A picture of 2000 x 1001 begins at y = 499 of 2000: 0.2495, written 0.249 or 0.250.
    for text, y in (("[0.000,0.249,1.000,0.750]", 0), ("[0.000,0.250,1.000,0.750]", 1)):
        (found,) = split_regions(text, "shikra")
        assert to_region(found, 0, 2000, 1001).box == (0, y, 2000, 1001)
    (found,) = split_regions("[0.000,0.200,1.000,0.750]", "shikra")  # the picture's own frame, not the square
    assert to_region(found, 0, 2000, 1001).box[1] == pytest.approx(-99)


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([1003520, 12845056]))
def test_smart_resize_is_the_reference_s(width, height, max_pixels):
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(ValueError, match="aspect"):
            smart_resize(width, height)
    else:
        expected = qwen_resize(height, width, 28, 3136, max_pixels)
        assert smart_resize(width, height, max_pixels=max_pixels) == expected[::-1]


@given(st.integers(0, 1023), st.integers(0, 1023))
def test_kosmos2_is_the_reference_s(first, last):
    text = f"<phrase>it</phrase><object><patch_index_{first:04d}><patch_index_{last:04d}></object>"
    ((_, _, (expected,)),) = clean_text_and_extract_entities_with_bboxes(text)[1]
    _, found = split_regions(text, "kosmos2")
    assert found.numbers == pytest.approx(expected)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_hostile_texts_take_no_time(dialect):
    openings = ["[", "[[", "<ref>", "<box>(1,", "{", '{"bbox_2d": [', "<phrase>", "<loc0001>", "<p>", "[1,", "1", " "]
    openings += ["<points ", '<points x="1" y="1" ', "<|begin_of_box|>", "<|begin_of_box|>[ ", "<b_st><bin_1> "]
    openings += ['"label":', '{"label":"', "<object><patch_index_0001><patch_index_0001>", "{<1><1><1><1>}<delim>"]
    start = time.process_time()
    for opening in openings:
        text = opening * (20_000 // len(opening))
        for hostile in (text, "[" + text, "{<box>(<|begin_of_box|>[" + text):
            split_regions(hostile, dialect)
    assert time.process_time() - start < 5
