"""The regions of a conversation in rows: ms-swift's `objects`, and what another model's dialect writes in texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from mmchat.conversation import MediaRef, Modality, Region
from mmchat.errors import SampleError
from mmchat.region_text import DIALECTS, FoundRegion, smart_resize, split_regions, to_region
from mmchat.regions import Frame, check_region
from mmchat.sources.files import Files

REGION_OPTIONS = {
    "regions": f"how regions are written in the texts: {', '.join(DIALECTS)} (default: they stay text)",
    "frame": "with regions=llava: what its numbers are shares of, original or padded_square",
    "max_pixels": "with regions=qwen25_vl: max_pixels that the pictures were resized with (default: 12845056)",
}

# What opens a region in the dialects that have a tag for it: where one is left in a text, that region is broken.
_OPENINGS = {
    "qwen_vl": "<box>",
    "internvl": "<box>",
    "qwen2_vl": "<|box_start|>",
    "kosmos2": "<patch_index_",
    "paligemma": "<loc",
    "molmo": "<point",
    "shikra_tokens": "_st>",
}


@dataclass(frozen=True)
class Item:
    """A place where a media item is shown. `source`: path, bytes or data URL; None: the row's next item."""

    modality: Modality
    source: Any = None


@dataclass(frozen=True)
class Place:
    """A box or point in picture number `picture` of the row, in pixels or shares of its sides."""

    picture: int
    numbers: list[float]
    is_share: bool


Piece = str | Item | Place  # of a turn, before its media are numbered


@dataclass
class Objects:
    """ms-swift's `objects`: what each <ref-object> and each <bbox> stands for, independently, in order."""

    things: dict[str, list[Piece]] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Any) -> Objects:
        """Raises SampleError for objects that cannot be read."""
        if found is None:
            return cls()
        try:
            kind = found.get("bbox_type") or "real"
            boxes = [[float(number) for number in box] for box in found.get("bbox") or []]
            pictures = [int(number) for number in found.get("image_id") or [0] * len(boxes)]
            refs = [str(ref) for ref in found.get("ref") or []]
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise SampleError("unreadable objects", f"{error} in {found!r:.200}") from error
        if kind not in ("real", "norm1") or not all(len(box) in (2, 4) for box in boxes):
            raise SampleError("unreadable objects", f"wanted 2 or 4 numbers, real or norm1, found {found!r:.200}")
        if len(pictures) != len(boxes) or not all(number >= 0 for number in pictures):
            raise SampleError("unreadable objects", f"wanted {len(boxes)} numbers of pictures, found {pictures}")
        places = [Place(picture, box, kind == "norm1") for picture, box in zip(pictures, boxes, strict=True)]
        return cls({"ref-object": list(refs), "bbox": list(places)} if refs or places else {})

    def take(self, thing: str) -> Piece | None:
        """The next one; None in a row without objects, where it is text. Raises SampleError if none is left."""
        if not self.things:
            return None
        if not self.things[thing]:
            raise SampleError("objects mismatch", f"more <{thing}> in the messages than in objects")
        return self.things[thing].pop(0)

    def check_all_taken(self) -> None:
        """Raises SampleError where an object has no placeholder."""
        if left := {thing: len(pieces) for thing, pieces in self.things.items() if pieces}:
            raise SampleError("objects mismatch", f"no placeholder in the messages for {left} of the objects")


@dataclass(frozen=True)
class RegionReader:
    """How regions are read from the texts."""

    files: Files
    dialect: str | None
    frame: Frame | None
    max_pixels: int | None

    @classmethod
    def of(cls, files: Files, options: Mapping[str, str]) -> RegionReader:
        """Raises ValueError for an option's value."""
        dialect, frame, max_pixels = (options.get(name) for name in REGION_OPTIONS)
        if dialect is not None and dialect not in DIALECTS:
            raise ValueError(f"regions={dialect} is none of {', '.join(DIALECTS)}")
        if frame is not None and frame not in get_args(Frame):
            raise ValueError(f"frame={frame} is none of {', '.join(get_args(Frame))}")
        if dialect == "llava" and frame is None:
            raise ValueError("regions=llava needs frame=original or frame=padded_square: the numbers do not tell")
        if max_pixels is not None and not max_pixels.isdecimal():
            raise ValueError(f"max_pixels={max_pixels} is no number of pixels")
        return cls(files, dialect, frame, int(max_pixels) if max_pixels else None)  # type: ignore[arg-type]


class Pictures:
    """The pictures of one row, in which its regions lie."""

    def __init__(self, regions: RegionReader, media: Sequence[MediaRef]) -> None:
        self._regions = regions
        self._media = media
        self._numbers = [number for number, item in enumerate(media) if item.modality == "image"]
        self._sizes: dict[int, tuple[int, int]] = {}

    def parts(self, piece: str | Place | dict[str, Any]) -> Iterator[dict[str, Any]]:
        """A piece as facts; a text is cut where regions stand in it. Raises SampleError."""
        if isinstance(piece, dict):
            yield piece
        elif isinstance(piece, Place):
            yield self._region_of(piece)
        elif self._regions.dialect is None or not self._numbers:
            yield {"text": piece}
        else:
            opening = _OPENINGS.get(self._regions.dialect)
            for part in split_regions(piece, self._regions.dialect):
                if isinstance(part, str) and opening and opening in part:
                    raise SampleError("unreadable region", f"no whole region behind {opening} in {part!r:.200}")
                yield {"text": part} if isinstance(part, str) else self._region_in_text(part)

    def _region_in_text(self, found: FoundRegion) -> dict[str, Any]:
        if len(self._numbers) > 1:
            detail = f"found {found.kind} {found.numbers} among {len(self._numbers)} pictures, wanted one picture"
            raise SampleError("region in one of several pictures", detail)
        media = self._numbers[0]
        width, height = self._size(media)
        try:
            limit = {} if self._regions.max_pixels is None else {"max_pixels": self._regions.max_pixels}
            resized = smart_resize(width, height, **limit) if found.frame == "resized" else None
            region = to_region(found, media, width, height, self._regions.frame, resized)
        except ValueError as error:
            raise SampleError("unreadable region", str(error)) from error
        return self._facts(region)

    def _region_of(self, place: Place) -> dict[str, Any]:
        if place.picture >= len(self._numbers):
            detail = f"a box in picture {place.picture} of {len(self._numbers)}, counted from 0"
            raise SampleError("objects mismatch", detail)
        media = self._numbers[place.picture]
        numbers = place.numbers
        if place.is_share:
            numbers = [number * self._size(media)[i % 2] for i, number in enumerate(numbers)]
        if len(numbers) == 2:
            return self._facts(Region(media, point=(numbers[0], numbers[1])))
        (x1, x2), (y1, y2) = sorted(numbers[::2]), sorted(numbers[1::2])  # as ms-swift orders corners
        return self._facts(Region(media, box=(x1, y1, x2, y2)))

    def _facts(self, region: Region) -> dict[str, Any]:
        region = check_region(region, *self._size(region.media))
        name, numbers = ("box", region.box) if region.box is not None else ("point", region.point)
        assert numbers is not None, "texts hold boxes and points"
        label = {} if region.label is None else {"label": region.label}
        return {"region": {"media": region.media, name: [round(number, 3) for number in numbers], **label}}

    def _size(self, media: int) -> tuple[int, int]:
        if media not in self._sizes:
            if self._media[media].data is None:
                raise SampleError("region in an absent picture", f"media item {media} has no file")
            self._sizes[media] = self._regions.files.picture_size(self._media[media])
        return self._sizes[media]
