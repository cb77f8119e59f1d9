"""Boxes and points drawn on the pictures that they lie in, beside the words that name them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageColor, ImageDraw, ImageFont

from mmchat.conversation import Conversation, Part, Region
from mmchat.data.chat_template import SEEN, ChatTemplate
from mmchat.modalities.image import upright
from mmchat.tasks.prompts import LOCATE, POINT_TO

# The longer side that a picture has at least when it is drawn on: labels could not be read on a smaller one.
MIN_SIDE = 640
COLOURS = ("#ff3b30", "#34c759", "#2f80ff", "#ffcc00", "#ff2dd1", "#00c7ff", "#ff9500", "#9b6bff")
# Below every coloured line and around every label, so that they show on any background.
EDGE = "black"
# Beside a picture that has no room for labels.
MARGIN = "white"

Rectangle = tuple[float, float, float, float]


def draw(
    picture: bytes, regions: Sequence[Region], labels: Sequence[str], is_asked: Sequence[bool] = ()
) -> Image.Image:
    """The picture, turned as its EXIF says, with each box and point in a colour of its own and its label beside it.

    A picture whose longer side is below MIN_SIDE is enlarged by a whole number. Regions are in original pixels, as
    everywhere; what reaches out of the picture is drawn up to its edge. A picture without room for the labels, very low
    or very narrow, gets a margin below or on the right, in which they stand.

    Args:
        labels: one for each region; "" for none.
        is_asked: which regions stand in the question: their boxes are dashed, their points are rings.
    Raises:
        SampleError: the picture cannot be decoded.
        ValueError: a tube, which lies in a video.
    """
    image = upright(picture)
    factor = math.ceil(MIN_SIDE / max(image.size))
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    canvas = _Canvas(image)
    asked = is_asked or [False] * len(regions)
    marked = list(zip(regions, labels, asked, strict=True))
    # All lines lie below all labels.
    places = [canvas.mark(region, factor, COLOURS[i % len(COLOURS)], a) for i, (region, _, a) in enumerate(marked)]
    canvas.make_room(labels)
    for i, (place, (_, label, _)) in enumerate(zip(places, marked, strict=True)):
        canvas.label(label, place, COLOURS[i % len(COLOURS)])
    return canvas.finished()


class _Canvas:
    """A picture that is drawn on, with lines and letters that fit its size. Coordinates are its own pixels.

    Attributes:
        width, height: of the picture, without the margin.
        full_width, full_height: with the margin that labels need: none, below, or on the right.
    """

    def __init__(self, image: Image.Image) -> None:
        self.image = image
        self.pen = ImageDraw.Draw(image)
        self.width, self.height = self.full_width, self.full_height = image.size
        self.line = max(3, round(max(image.size) / 240))
        self.letter = max(15, round(max(image.size) / 45))
        self.font = ImageFont.load_default(self.letter)
        self.pad = self.letter // 4
        self.row = math.ceil(self.letter * 1.2 + 2 * self.pad)  # height of a label
        self.taken: list[Rectangle] = []

    def make_room(self, labels: Sequence[str]) -> None:
        """Adds the margin that these labels need."""
        texts = [" ".join(label.split()) for label in labels if label.strip()]
        widest = min(math.ceil(max(map(self._width, texts), default=0)), 20 * self.letter)
        if texts and self.height < 3 * self.row:
            self.full_height += len(texts) * self.row
        elif self.width < widest:
            self.full_width += widest
        else:
            return
        picture, self.image = self.image, Image.new("RGB", (self.full_width, self.full_height), MARGIN)
        self.image.paste(picture)
        self.pen = ImageDraw.Draw(self.image)

    def finished(self) -> Image.Image:
        """The picture, with as much of the margin below as labels took."""
        lowest = max((bottom for _, _, _, bottom in self.taken), default=0)
        return self.image.crop((0, 0, self.full_width, max(self.height, math.ceil(lowest) + 1)))

    def mark(self, region: Region, factor: int, colour: str, is_asked: bool) -> Rectangle:
        """Draws one region, given in original pixels; returns the rectangle that it covers."""
        if region.box is not None:
            x1, y1, x2, y2 = (round(value * factor) for value in region.box)
            return self._box(x1, y1, x2, y2, colour, is_asked)
        if region.point is None:
            raise ValueError("found a tube; wanted a box or a point: a tube lies in a video, not in a picture")
        x, y = (value * factor for value in region.point)
        return self._point(x, y, colour, is_asked)

    def _box(self, x1: int, y1: int, x2: int, y2: int, colour: str, is_dashed: bool) -> Rectangle:
        # Pixels from the first to the last one inside, three line widths across at least, and in the picture.
        least = 3 * self.line
        x1, y1 = max(0, min(x1, self.width - least)), max(0, min(y1, self.height - least))
        x2, y2 = min(self.width, max(x2, x1 + least)) - 1, min(self.height, max(y2, y1 + least)) - 1
        self.pen.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=EDGE, width=self.line + 2)
        if not is_dashed:
            self.pen.rectangle((x1, y1, x2, y2), outline=colour, width=self.line)
            return x1, y1, x2, y2
        thick, dash = self.line - 1, 4 * self.line
        for start in range(x1, x2 + 1, 2 * dash):
            end = min(start + dash, x2)
            self.pen.rectangle((start, y1, end, y1 + thick), fill=colour)
            self.pen.rectangle((start, y2 - thick, end, y2), fill=colour)
        for start in range(y1, y2 + 1, 2 * dash):
            end = min(start + dash, y2)
            self.pen.rectangle((x1, start, x1 + thick, end), fill=colour)
            self.pen.rectangle((x2 - thick, start, x2, end), fill=colour)
        return x1, y1, x2, y2

    def _point(self, x: float, y: float, colour: str, is_ring: bool) -> Rectangle:
        radius = 3 * self.line
        disc = (x - radius, y - radius, x + radius, y + radius)
        if is_ring:
            self.pen.circle((x, y), radius, outline=EDGE, width=self.line + 2)
            self.pen.circle((x, y), radius - 1, outline=colour, width=self.line)
        else:
            self.pen.circle((x, y), radius, fill=colour, outline=EDGE, width=1)
        return disc

    def label(self, text: str, place: Rectangle, colour: str) -> None:
        """Writes a label near a place, or in the margin, where it covers the least of other labels."""
        text = self._shortened(" ".join(text.split()))
        if not text:
            return
        width, height = self._width(text), self.row
        x1, y1, x2, y2 = place
        rows = range(0, self.height - height + 1, height)
        wanted: list[tuple[float, float]]
        if self.full_height > self.height:
            wanted = [(x, y) for y in range(self.height, self.full_height, height) for x in (x1, x2 - width)]
        elif self.full_width > self.width:
            wanted = [(self.width, y) for y in (y1, *rows)]
        else:
            wanted = [(x, y) for y in (y1 - height, y2 + 1, y1, y2 - height) for x in (x1, x2 - width)]
            wanted += [(x1, y) for y in rows]
        rectangles = []
        for x, y in wanted:
            left, top = max(0.0, min(x, self.full_width - width)), max(0.0, min(y, self.full_height - height))
            rectangles.append((left, top, left + width - 1, top + height - 1))
        # Of equally good ones the first; upon the marked place itself only where nothing else is free.
        chosen = min(rectangles, key=lambda r: sum(_shared(r, other) for other in self.taken) + _shared(r, place) / 100)
        self.taken.append(chosen)
        self.pen.rectangle(chosen, fill=colour, outline=EDGE)
        red, green, blue = ImageColor.getrgb(colour)[:3]
        ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else "white"
        self.pen.text((chosen[0] + self.pad, chosen[1] + height / 2), text, fill=ink, font=self.font, anchor="lm")

    def _width(self, text: str) -> float:
        return self.font.getlength(text) + 2 * self.pad

    def _shortened(self, text: str) -> str:
        if self._width(text) <= (room := max(self.width, self.full_width - self.width)):
            return text
        while text and self._width(text + "...") > room:
            text = text[:-1]
        return text.rstrip() + "..." if text else ""


def _shared(a: Rectangle, b: Rectangle) -> float:
    """Area that two rectangles have in common."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


# ---- which words name which region ----------------------------------------------------------------------------------


def draw_answer(conversation: Conversation, template: ChatTemplate) -> dict[int, Image.Image]:
    """Draws what the last question and its answer name, on the pictures in which it lies.

    Returns:
        Pictures by their number, counted from 1 over all pictures and videos of the conversation, as an answer counts
        them. Where nothing is named, the last picture as it is.
    Raises:
        ValueError: there is no answer, or no picture.
        SampleError: a picture cannot be decoded.
    """
    media = conversation.media
    shown = [i for i, item in enumerate(media) if item.modality in SEEN]
    pictures = [i for i in shown if media[i].modality == "image" and media[i].data is not None]
    if not pictures:
        raise ValueError("there is no picture to draw on; wanted one at least in the conversation")
    named = named_regions(conversation, template)
    by_picture = {i: [one for one in named if one.region.media == i] for i in pictures}
    drawn = {i: found for i, found in by_picture.items() if found} or {pictures[-1]: []}
    return {
        shown.index(i) + 1: draw(
            media[i].read(),
            [one.region for one in found],
            [one.words for one in found],
            [one.is_asked for one in found],
        )
        for i, found in drawn.items()
    }


class Named(NamedTuple):
    """A region, the words that name it, and whether it stands in the question."""

    region: Region
    words: str
    is_asked: bool


def named_regions(conversation: Conversation, template: ChatTemplate) -> list[Named]:
    """The regions of the last question and of its answer, in order.

    Raises ValueError where the conversation does not end with an answer to a question.
    """
    if [turn.role for turn in conversation.turns[-2:]] != ["user", "assistant"]:
        raise ValueError("there is no answer yet; wanted a question that was answered")
    question, answer = (turn.parts for turn in conversation.turns[-2:])
    said = "".join(part for part in answer if isinstance(part, str))
    asked = [
        Named(region, words if _DETERMINER.match(words) else "", True) for region, words in _words_before(question)
    ]
    topic = _topic([turn.parts for turn in conversation.turns if turn.role == "user"])
    parts = template.read_regions(said, conversation).parts
    answered = [Named(region, words or topic, False) for region, words in _words_before(parts)]
    if len(asked) == 1 and not asked[0].words and not answered:
        asked = [asked[0]._replace(words=said.strip(" ."))]  # 'What is this?' is answered by its name
    return asked + answered


def _words_before(parts: Sequence[Part]) -> list[tuple[Region, str]]:
    """The regions with the words before each; those of a list of places have the same words."""
    found: list[tuple[Region, str]] = []
    words = ""
    for part in parts:
        if isinstance(part, Region):
            found.append((part, words))
        elif isinstance(part, str) and re.sub(r"\W|\band\b", "", part):
            words = phrase(part)
    return found


_DETERMINER = re.compile(r"\b(?:an?|the|this|that|these|those|one|two|three|his|her|its|their|my|your)\b.*", re.I)
_LINK = r"(?:and|or|with|is|are|was|were|lies|located|here|there|at|in|by|near|of|for|box|boxes|point)"
_PLACE = re.compile(r"^the (?:(?:bounding )?box(?:es)?|location|place|position|coordinates|region) (?:of|for) ", re.I)
_NO_NAMES = ("it", "they", "them", "he", "him", "she", "her", "this", "that", "these", "those", "one", "yes", "no")
_SCENE = re.compile(r"\s+(?:in|on|of|from) (?:the|this|that) (?:picture|image|photo|photograph|scene)$", re.I)


# Words that name something stand in so many characters before it. The patterns take long where many blanks follow.
_NAMED_WITHIN = 300


def phrase(before: str) -> str:
    """The words that name what comes next: 'It holds a red ball' gives 'a red ball', 'The drum is at' 'The drum'."""
    clause = re.split(r"[.!?;:\n]\s|[\])>]", before.strip(" ,.;:!?([")[-_NAMED_WITHIN:])[-1].strip(" ,")
    clause = re.sub(rf"^(?:{_LINK}\s+)+|(?:(?:^|\s+){_LINK})+$", "", clause, flags=re.I)
    found = _DETERMINER.search(clause)
    words = found[0] if found else clause
    return "" if words.lower() in _NO_NAMES else words


def subject(question: str) -> str:
    """What a question asks for: 'Where is the drum in this picture?' gives 'the drum', 'Find left pig.' 'left pig'."""
    return _expression(question) or " ".join(question.split()).rstrip(" ?.!")


def _topic(questions: Sequence[Sequence[Part]]) -> str:
    """What the last question asks for; of 'Where is it?' what was last named in a question before it."""
    texts = [" ".join(part.strip() for part in parts if isinstance(part, str)) for parts in questions]
    topic = subject(texts[-1])
    if topic.lower() not in _NO_NAMES:
        return topic
    named = (_expression(text) for text in reversed(texts[:-1]))
    return next((words for words in named if words and words.lower() not in _NO_NAMES), topic)


def _expression(question: str) -> str:
    """The words for a thing in a question, or "": those that stand in a prompt of the tasks, else from a determiner."""
    asked = _SCENE.sub("", " ".join(question.split()).rstrip(" ?.!"))
    for sentence in (asked, *re.split(r"[.?!] ", asked)):
        for prompt in _PROMPTS:
            if match := prompt.fullmatch(sentence):
                return _SCENE.sub("", match[1])
    found = _DETERMINER.search(asked)
    return _PLACE.sub("", found[0]) if found else ""


def _pattern(prompt: str) -> re.Pattern[str]:
    """Matches a question without its last mark; the expression in it is of one sentence."""
    before, after = (re.escape(part) for part in prompt.rstrip(" ?.!").split("{}"))
    return re.compile(rf"{before}((?:(?![.?!] ).)+){after}", re.I)


# 'Mark all that fits: {}' comes before 'Mark {}'.
_PROMPTS = [_pattern(prompt) for prompt in sorted({*LOCATE, *POINT_TO}, key=lambda prompt: (-len(prompt), prompt))]
