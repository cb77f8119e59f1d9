"""One answer of an evaluation's page: what was asked, said and right, its pictures with regions drawn, its sounds."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmchat.conversation import MediaRef, Part, Region
from mmchat.data.chat_template import ChatTemplate
from mmchat.errors import SampleError
from mmchat.inference.predictions import Case, text_of
from mmchat.metrics.ranking import place_of
from mmchat.modalities.image import upright
from mmchat.tasks.question import Question

TOP_CANDIDATES = 5
PICTURE_SIDE = 448
# A page of 84 cards stays below 8 MB. Bytes of HTML, but for the pictures and sounds of all cards together, before
# base64.
MAX_PICTURE_BYTES = 4_200_000
MAX_TEXT = 1500  # of one turn
MAX_TALK = 6000  # of all turns of a question; the oldest are left out
MAX_SHORT = 300  # of a key or a candidate
MAX_ITEMS = 6  # media of one card
MAX_MARKS = 16  # regions of a question, of its answer and of the right one each
MAX_SOUND_BYTES = 400_000  # of one recording, so that a long one leaves room for others
# What a browser plays, by the first bytes of a file.
SOUND_TYPES = {b"RIFF": "wav", b"fLaC": "flac", b"OggS": "ogg", b"ID3": "mpeg", b"\xff\xfb": "mpeg"}
_NUM_COLOURS = 4  # of regions in questions: the style's --c0, --c1, ...


def escaped(text: Any, limit: int | None = None) -> str:
    """For text and for quoted attributes; at most `limit` bytes of it."""
    text = str(text)
    if limit is None:
        return html.escape(text)
    room = limit
    for i, letter in enumerate(text):
        room -= len(html.escape(letter).encode())
        if room < 0:
            return html.escape(text[:i]) + "…"
    return html.escape(text)


@dataclass(frozen=True)
class _Mark:
    """A region that is drawn: Q1, R1 or A1, with the class of its colour."""

    region: Region
    name: str
    style: str


def card(case: Case, kind: str, pictures: Pictures, template: ChatTemplate) -> str:
    """The answer as HTML; `kind` is what the page's filter chooses by, `template` reads the answer's regions."""
    question, answer = case.question, case.answer
    judged = "not answered" if answer.error else f"judged {case.judge:.3f}"
    key = escaped(case.key, MAX_SHORT)
    head = f'<header><h3>{key}</h3><span class="judge">{judged}</span>'
    error = f'<p class="problem">{escaped(answer.error, MAX_TEXT)}</p>' if answer.error else ""
    if question is None:
        return f'<article class="card" data-kind="{kind}">{head}</header>{error}</article>'
    marks: list[_Mark] = []
    items = question.conversation.media
    talk = _talk(question, marks)
    said: Sequence[Part] = ()
    if answer.text:
        try:
            said = template.read_regions(answer.text, question.conversation).parts
        except SampleError:
            said = (answer.text,)
    reference = _said(question.reference, "R", marks)
    if question.candidates:
        talk.append(_candidates(case, question))
    elif not answer.error:
        talk.append(f'<p class="answer"><b>answer</b> {_said(said, "A", marks) or "<i>nothing</i>"}</p>')
    if question.reference:
        talk.append(f'<p class="reference"><b>right</b> {reference}</p>')
    if answer.num_failed:
        talk.append(f'<p class="problem">{answer.num_failed} malformed region(s) in the answer</p>')
    if marks:
        places = "; ".join(f"{mark.name} {text_of([mark.region], len(items)).strip('<>')}" for mark in marks)
        talk.append(f'<p class="muted">{escaped(places)}</p>')
    media = "".join(
        pictures.figure(item, [mark for mark in marks if mark.region.media == i], f"{key}, picture {i + 1}")
        for i, item in enumerate(items[:MAX_ITEMS])
    )
    if len(items) > MAX_ITEMS:
        media += f'<p class="muted">and {len(items) - MAX_ITEMS} more, not in this page</p>'
    shown = f'<div class="media">{media}</div>' if media else ""
    return (
        f'<article class="card" data-kind="{kind}">{head}</header>{error}<div class="sample{"" if media else " bare"}">'
        f'{shown}<div class="talk">{"".join(talk)}</div></div></article>'
    )


def _talk(question: Question, marks: list[_Mark]) -> list[str]:
    """The turns as HTML: the last ones that there is room for."""
    turns, room = question.conversation.turns, MAX_TALK
    first = len(turns)
    while first and room > 0:
        first -= 1
        texts = "".join(part for part in turns[first].parts if isinstance(part, str))
        num_items = sum(isinstance(part, MediaRef) for part in turns[first].parts)
        room -= min(len(escaped(texts[:MAX_TEXT]).encode()), MAX_TEXT) + 40 * (min(num_items, MAX_ITEMS) + 1)
    earlier = [f'<p class="muted">… {first} earlier turns</p>'] if first else []
    return earlier + [
        f'<p class="{turn.role}"><b>{turn.role}</b> {_said(turn.parts, "Q", marks)}</p>' for turn in turns[first:]
    ]


def _said(parts: Sequence[Part], letter: str, marks: list[_Mark]) -> str:
    """Parts as HTML, regions as chips; each is added to `marks`, as long as there are not too many."""
    shown, room, num_items = list[str](), MAX_TEXT, 0
    for part in parts:
        if isinstance(part, str):
            if room > 0:
                shown.append(escaped(part, room))
                room -= len(shown[-1].encode())
        elif isinstance(part, MediaRef):
            num_items += 1
            if num_items <= MAX_ITEMS:
                shown.append(f'<span class="chip item">{part.modality}</span>')
        elif (number := sum(mark.name[0] == letter for mark in marks)) == MAX_MARKS:
            if shown[-1:] != ["…"]:
                shown.append("…")
                room -= len("…".encode())
        else:
            style = {"R": "true", "A": "said"}.get(letter, f"c{number % _NUM_COLOURS}")
            mark = _Mark(part, f"{letter}{number + 1}", style)
            marks.append(mark)
            shown.append(f'<span class="chip {style}" title="{escaped(text_of([part]))}">{mark.name}</span>')
    return "".join(shown)


def _candidates(case: Case, question: Question) -> str:
    """The likeliest candidates, and at which rank the right one stands."""
    likelihoods, texts = case.answer.likelihoods, [candidate.strip() for candidate in question.candidates]
    if not likelihoods:
        return ""
    # A task that knows the right one by its number says it in the facts; else there is one with the right text.
    wanted = text_of(question.reference).strip()
    right = question.record.facts.get("gt_index", texts.index(wanted) if wanted in texts else None)
    order = sorted(range(len(likelihoods)), key=lambda i: -likelihoods[i])
    rows = "".join(
        f'<tr{" class=right" if i == right else ""}><td class="number">{likelihoods[i]:.2f}</td>'
        f"<td>{escaped(texts[i], MAX_SHORT)}</td></tr>"
        for i in order[:TOP_CANDIDATES]
    )
    rank = ""
    if right is not None:
        place = place_of(likelihoods, right)
        rank = f"<p>The right one is at rank <strong>{place.mean_rank:g}</strong> of {len(likelihoods)}.</p>"
    return f'<table class="top"><tr><th>nats</th><th>likeliest candidates</th></tr>{rows}</table>{rank}'


@dataclass
class Pictures:
    """Makes figures, and keeps the page within its size."""

    num_bytes: int = 0

    def figure(self, item: MediaRef, marks: Sequence[_Mark], name: str) -> str:
        """A picture with its regions, a recording to listen to; else what can be said of an item.

        `name` is escaped.
        """
        header = item.header
        size = (header.width, header.height) if header is not None and header.width and header.height else None
        if item.data is None:
            note = f"no {item.modality}: the model answered without it"
            return self._drawn(None, size, marks, name, note) if size else f'<p class="muted">{note}</p>'
        if item.modality != "image":
            seconds = f", {header.duration_s:.1f} s" if header is not None and header.duration_s else ""
            if item.modality == "audio" and (source := self._sound(item)):
                return (
                    f'<figure><audio controls preload="metadata" src="{source}" aria-label="{name}"></audio>'
                    f"<figcaption>audio{seconds}</figcaption></figure>"
                )
            return f'<p class="muted">{item.modality}{seconds} (not in this page)</p>'
        try:
            image = upright(item.read())
        except (SampleError, OSError):
            return f'<p class="muted">{name}: it cannot be decoded</p>'
        size = image.size
        image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))  # small ones stay, and are enlarged on the page
        out = io.BytesIO()
        image.save(out, "JPEG", quality=80)
        if self.num_bytes + out.tell() > MAX_PICTURE_BYTES:
            return f'<p class="muted">{name}: left out, this page is full</p>'
        self.num_bytes += out.tell()
        source = f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
        return self._drawn(source, size, marks, name, f"{size[0]} x {size[1]}")

    def _sound(self, item: MediaRef) -> str:
        """The stored file as a data URI; "" where there is no room, or no browser would play it."""
        try:
            data = item.read()
        except OSError:
            return ""
        kind = next((kind for start, kind in SOUND_TYPES.items() if data.startswith(start)), None)
        if kind is None or len(data) > MAX_SOUND_BYTES or self.num_bytes + len(data) > MAX_PICTURE_BYTES:
            return ""
        self.num_bytes += len(data)
        return f"data:audio/{kind};base64,{base64.b64encode(data).decode()}"

    def _drawn(self, source: str | None, size: tuple[int, int], marks: Sequence[_Mark], name: str, note: str) -> str:
        scale = max(size) / 100
        # All lines lie below all names.
        shapes = "".join([_shape(mark, scale) for mark in marks] + [_name(mark, scale) for mark in marks])
        named = ", ".join(f"{mark.name} {text_of([mark.region]).strip('<>')}" for mark in marks)
        alt = name + escaped(f"; marked: {named}" if named else "")
        width, height = (round(side / max(size) * PICTURE_SIDE) for side in size)
        shown = f'width="{width}" height="{height}"'
        if source is None:
            inner = f'<svg class="gone" {shown} viewBox="0 0 {width} {height}" role="img" aria-label="{alt}"></svg>'
        else:
            inner = f'<img alt="{alt}" {shown} src="{source}">'
        return (
            f'<figure><div class="drawn">{inner}<svg class="marks" viewBox="0 0 {size[0]} {size[1]}" '
            f'aria-hidden="true">{shapes}</svg></div><figcaption>{escaped(note)}</figcaption></figure>'
        )


def _shape(mark: _Mark, scale: float) -> str:
    """A region as SVG in original pixels; `scale` is a hundredth of the picture's longer side."""
    region, kind = mark.region, f'class="{mark.style}" data-name="{mark.name}"'
    if region.point is not None:
        x, y = region.point
        return f'<circle {kind} cx="{x:.7g}" cy="{y:.7g}" r="{1.8 * scale:.7g}"/>'
    if region.box is None:  # a tube lies in a video
        return ""
    x1, x2 = sorted(region.box[0::2])
    y1, y2 = sorted(region.box[1::2])
    return f'<rect {kind} x="{x1:.7g}" y="{y1:.7g}" width="{x2 - x1:.7g}" height="{y2 - y1:.7g}"/>'


def _name(mark: _Mark, scale: float) -> str:
    """The region's name in it; the answer's stands at the bottom, so that it does not cover the right one's."""
    region = mark.region
    if region.point is not None:
        x, y = region.point[0] + 2.5 * scale, region.point[1] + 1.6 * scale
    elif region.box is not None:
        x, y = min(region.box[0::2]) + scale, min(region.box[1::2]) + 5 * scale
        if mark.style == "said":
            y = max(region.box[1::2]) - scale
    else:
        return ""
    return f'<text class="{mark.style}" x="{x:.7g}" y="{y:.7g}" font-size="{5 * scale:.7g}">{mark.name}</text>'
