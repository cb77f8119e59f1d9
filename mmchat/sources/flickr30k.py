"""Flickr30k Entities: captions whose phrases have boxes (arXiv 1505.04870).

Format: github.com/BryanPlummer/flickr30k_entities, its README and its readers in Python and Matlab. SPLIT.txt lists
the pictures; Sentences/ID.txt has a caption a line with phrases as [/EN#CHAIN/TYPE words]; Annotations/ID.xml has the
boxes of the chains; UNRELATED_CAPTIONS lists captions of something else. Both folders may stay in annotations.zip.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from mmchat.conversation import MediaRef, Record, Region
from mmchat.errors import SampleError
from mmchat.regions import check_region
from mmchat.sources.files import Files
from mmchat.sources.rows import annotated
from mmchat.sources.source import Source

_PHRASE = re.compile(r"\[/EN#(\d+)((?:/[^\s/\]]+)+) ([^\[\]]+)\]")
_FOLDERS = ("", "annotations/", "Flickr30kEntities/", "flickr30k_entities/")

# A chain's boxes, or why they cannot be used.
_Chains = dict[str, list[list[float]] | SampleError]


def read_entities(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """A record a caption: its words, and each phrase's place in them and boxes.

    Phrases of a scene or of what is not visible (chain 0, nobndbox) have no boxes. Boxes count pixels from 1 in the
    files; as in the publisher's reader, 1 is taken off each of the four numbers.
    """
    for picture in _pictures(files, split):
        if isinstance(picture, SampleError):
            yield picture
            continue
        for number, line in picture.captions:
            try:
                caption, phrases = _sentence(line, picture.chains)
                facts = {"caption": caption, "phrases": phrases, "image_id": picture.id}
                yield Record(f"{picture.id}/{number}", facts, (annotated(picture.item, *picture.size),))
            except SampleError as error:
                yield SampleError(error.reason, f"{picture.id} caption {number}: {error.detail}")
        yield from picture.unrelated


def read_captions(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """A record a picture with all its captions, without the marks."""
    for picture in _pictures(files, split):
        if isinstance(picture, SampleError):
            yield picture
            continue
        captions = []
        for number, line in picture.captions:
            try:
                captions.append(_sentence(line, {})[0])
            except SampleError as error:
                yield SampleError(error.reason, f"{picture.id} caption {number}: {error.detail}")
        yield from picture.unrelated
        if captions:
            yield Record(picture.id, {"captions": captions, "image_id": picture.id}, (picture.item,))


_MARKS = ("Sentences/*.txt", "*/Sentences/*.txt")

SOURCES = {
    "flickr30k_entities": Source(("spot", "ground"), _MARKS, read_entities),
    "flickr30k_captions": Source(("caption",), _MARKS, read_captions),
}


@dataclass(frozen=True)
class _Picture:
    """Captions with their numbers from 1, as written; `unrelated` are those of something else. size: width, height."""

    id: str
    item: MediaRef
    size: tuple[int, int]
    captions: list[tuple[int, str]]
    unrelated: list[SampleError]
    chains: _Chains


def _pictures(files: Files, split: str) -> Iterator[_Picture | SampleError]:
    """The pictures of a split in its own order."""
    ids = files.text(files.one(f"{split}.txt", *(f"{folder}{split}.txt" for folder in _FOLDERS[1:]))).split()
    unrelated: set[tuple[str, str]] = set()
    if lists := files.beside("UNRELATED_CAPTIONS", "*/UNRELATED_CAPTIONS"):
        lines = (line for line in files.text(lists[0]).splitlines() if not line.startswith("#"))
        unrelated = {(words[0], words[1]) for words in map(str.split, lines) if len(words) == 2}
    for one in ids:
        try:
            names = (f"flickr30k-images/{one}.jpg", f"flickr30k_images/{one}.jpg", f"{one}.jpg")
            item = files.media("image", *names)
            captions = list(enumerate(filter(None, _text(files, f"Sentences/{one}.txt").split("\n")), 1))
            wrong = [
                SampleError("unrelated caption", f"{one} caption {number}: it is in UNRELATED_CAPTIONS")
                for number, _ in captions
                if (one, str(number)) in unrelated
            ]
            kept = [(number, line) for number, line in captions if (one, str(number)) not in unrelated]
            size, chains = _chains(_text(files, f"Annotations/{one}.xml"))
            yield _Picture(one, item, size, kept, wrong, chains)
        except SampleError as error:
            yield SampleError(error.reason, f"{one}: {error.detail}")


def _text(files: Files, name: str) -> str:
    """Read at its place: a zip with 63,000 members is too slow to be opened for each."""
    for folder in _FOLDERS:
        if (stored := files.stored(folder + name)) is not None:
            return stored.read().decode("utf-8", "replace")
    raise SampleError("missing annotation", f"{name} is not in {files}")


def _sentence(line: str, chains: Mapping[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """The words of a caption, one blank apart, and its phrases. Raises SampleError."""
    caption, rest, phrases = "", 0, []
    line = " ".join(line.split())
    for match in _PHRASE.finditer(line):
        caption += line[rest : match.start()]
        boxes = chains.get(match[1], [])
        if isinstance(boxes, SampleError):
            raise boxes
        phrase = {"start": len(caption), "end": len(caption) + len(match[3]), "boxes": boxes}
        phrases.append(phrase | {"chain": match[1], "types": match[2].strip("/").split("/")})
        caption += match[3]
        rest = match.end()
    caption += line[rest:]
    if "[/EN#" in caption or not caption.strip():
        raise SampleError("unreadable sentence", f"wanted phrases as [/EN#1/people A man], found {line!r:.300}")
    return caption, phrases


def _chains(text: str) -> tuple[tuple[int, int], _Chains]:
    """The picture's size, and boxes [x1, y1, x2, y2] by chain; an object may be several chains'. Raises SampleError."""
    chains: _Chains = {}
    try:
        root = ElementTree.fromstring(text)
        width, height = (int(root.findtext(f"size/{side}", "")) for side in ("width", "height"))
        for thing in root.iter("object"):
            if (found := thing.find("bndbox")) is None:
                continue
            x1, y1, x2, y2 = (int(found.findtext(side, "")) - 1 for side in ("xmin", "ymin", "xmax", "ymax"))
            for name in (element.text or "" for element in thing.iter("name")):
                boxes = chains.setdefault(name, [])
                try:
                    check_region(Region(0, box=(x1, y1, x2, y2)), width, height)
                    if isinstance(boxes, list):
                        boxes.append([x1, y1, x2, y2])
                except SampleError as error:
                    chains[name] = error
    except (ElementTree.ParseError, ValueError) as error:
        raise SampleError("unreadable annotation", f"{error}") from error
    return (width, height), chains
